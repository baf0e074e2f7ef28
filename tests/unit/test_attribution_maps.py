"""Class activation maps: the identities of the paper, by hand and against captum."""

from __future__ import annotations

import warnings

import pytest
import torch
from captum.attr import GuidedGradCam, LayerGradCam
from torch import nn

from nbkit import attribution
from nbkit.errors import LayerDidNotRun, LayerNotFound


def pooled_net(seed: int = 0, inplace: bool = False) -> nn.Sequential:
    """Convolutions, global average pooling, one linear layer: the network of CAM."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(inplace), nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU6(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def pictures(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 13, 11, generator=torch.Generator().manual_seed(2))


def agree(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - theirs.detach().cpu()).abs().max() <= tolerance * theirs.abs().max())


@pytest.mark.filterwarnings("ignore:examples")  # a map without evidence is as good a case as any
@pytest.mark.parametrize("seed", range(3))
def test_times_z_it_is_cam_where_the_head_is_linear(device, seed):
    net, x = pooled_net(seed).to(device), pictures().to(device)
    c = torch.tensor([0, 3, 1])
    with torch.no_grad():
        a = net[:5](x).cpu()
    cam = torch.einsum("nk,nkhw->nhw", net[8].weight.detach().cpu()[c], a)
    z = a.shape[2] * a.shape[3]
    ours = attribution.grad_cam(net, x, c, layer="4")
    assert ours.shape == (3, *a.shape[2:]) and ours.device.type == "cpu"
    assert agree(ours * z, cam.clamp(min=0), 1e-6)
    assert agree(attribution.grad_cam(net, x, c, layer="4", relu=False) * z, cam, 1e-6)


def test_by_hand():
    """A = [[1,2],[3,4]] and [[4,3],[2,1]], y = 2 sum A1 - sum A2: alpha = (2, -1), L = relu([[-2,1],[4,7]])."""
    net = nn.Sequential(nn.Identity())
    x = torch.tensor([[[[1.0, 2], [3, 4]], [[4, 3], [2, 1]]]])

    def y(out):
        return 2 * out[:, 0].sum((1, 2)) - out[:, 1].sum((1, 2))

    maps, alpha = attribution.grad_cam(net, x, y, layer="0", with_weights=True)
    assert alpha.tolist() == [[2, -1]]
    assert maps.tolist() == [[[0, 1], [4, 7]]]
    assert attribution.grad_cam(net, x, y, layer="0", relu=False).tolist() == [[[-2, 1], [4, 7]]]


def test_the_counterfactual_map_is_the_map_of_the_negative_score():
    net, x = pooled_net(), pictures()
    for method in (attribution.grad_cam, attribution.grad_cam_plus_plus):
        negative = method(net, x, lambda out: -out[:, 2], layer="3")
        torch.testing.assert_close(method(net, x, 2, layer="3", negate=True), negative)
        assert not torch.equal(negative, method(net, x, 2, layer="3"))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("inplace", [False, True])
def test_agrees_with_captum_at_every_layer(device, seed, inplace):
    net, x = pooled_net(seed, inplace).to(device), pictures().to(device)
    plain = pooled_net(seed).to(device)  # captum reads an activation after it has been overwritten
    for name in ("0", "1", "2", "3", "4"):
        theirs = LayerGradCam(plain, plain[int(name)]).attribute(x, 1, relu_attributions=True)[:, 0]
        assert agree(attribution.grad_cam(net, x, 1, layer=name), theirs), name


def test_guided_grad_cam_agrees_with_captum():
    net, x = pooled_net(), pictures()
    net[2], net[4] = nn.ReLU(), nn.ReLU()  # captum's guided backpropagation leaves a ReLU6 as it is
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="captum")
        theirs = GuidedGradCam(net, net[3]).attribute(x, 2, interpolate_mode="bilinear")
    assert agree(attribution.guided_grad_cam(net, x, 2, layer="3"), theirs)


def test_plus_plus_weights_are_the_derivatives_of_the_exponential():
    """alpha_ij = Y'' / (2 Y'' + sum(A) Y''') with Y = exp(S), each derivative taken by autograd."""
    torch.manual_seed(0)
    a = torch.rand(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    y = (a * w).sum().exp()
    weights = torch.zeros(2, dtype=torch.float64)
    first = torch.autograd.grad(y, a, create_graph=True)[0]
    for k, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).tolist():
        second = torch.autograd.grad(first[0, k, i, j], a, create_graph=True)[0][0, k, i, j]
        third = torch.autograd.grad(second, a, retain_graph=True)[0][0, k, i, j]
        alpha = second / (2 * second + a[0, k].sum() * third)
        weights[k] += (alpha * first[0, k, i, j].clamp(min=0)).detach()
    expected = (weights[:, None, None] * a[0]).sum(0).detach() / y.detach()
    ours = attribution.grad_cam_plus_plus(
        nn.Sequential(nn.Identity()), a.detach(), lambda out: (out * w).sum((1, 2, 3)), layer="0"
    )
    torch.testing.assert_close(ours[0], expected)


def test_nothing_is_recorded_before_the_layer():
    net, x = pooled_net(), pictures()
    modes = []
    for module in (net[0], net[3], net[4], net[8]):
        module.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    attribution.grad_cam(net, x, 0, layer="3")
    assert modes == [False, False, True, True]


def test_a_layer_that_runs_twice_is_taken_at_its_last_run():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(torch.relu(self.conv(x)))).mean((2, 3)))

    net, x = Twice(), pictures()
    hidden = net.conv(torch.relu(net.conv(x))).detach().requires_grad_()
    gradient = torch.autograd.grad(net.fc(torch.relu(hidden).mean((2, 3)))[:, 1].sum(), hidden)[0]
    expected = (gradient.mean((2, 3), keepdim=True) * hidden).sum(1).detach()
    torch.testing.assert_close(attribution.grad_cam(net, x, 1, layer="conv", relu=False), expected)


def test_an_empty_map_stays_zero_and_is_reported():
    net = nn.Sequential(nn.Identity())
    x = torch.stack([torch.ones(1, 2, 2), -torch.ones(1, 2, 2)])
    with pytest.warns(UserWarning, match=r"examples \[1\].*zero everywhere"):
        maps = attribution.grad_cam(net, x, lambda out: out.sum((1, 2, 3)), layer="0")
    assert (maps[1] == 0).all()
    assert (attribution.normalize(maps)[1] == 0).all() and attribution.normalize(maps)[0].max() == 1


def test_normalize_is_by_map():
    maps = torch.tensor([[[1.0, 2.0]], [[-8.0, 4.0]]])
    assert attribution.normalize(maps).tolist() == [[[0.5, 1.0]], [[-1.0, 0.5]]]


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (3, 3)])
def test_upsampling_keeps_every_maximum_in_its_cell(place):
    maps = torch.zeros(1, 4, 4)
    maps[0, place[0], place[1]] = 1
    large = attribution.upsample(maps, (32, 32))[0]
    rows, columns = torch.nonzero(large == large.max(), as_tuple=True)
    # the middle of the ties lies in the middle of the cell, not shifted towards a corner
    assert rows.float().mean().item() // 8 == place[0] and columns.float().mean().item() // 8 == place[1]
    net, x = pooled_net(), pictures()
    small = attribution.grad_cam(net, x, 1, layer="3")
    torch.testing.assert_close(
        attribution.grad_cam(net, x, 1, layer="3", size=(13, 11)), attribution.upsample(small, (13, 11))
    )
    assert attribution.grad_cam(net, x, 1, layer="3", size=20).shape == (3, 20, 20)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_every_mode_of_upsampling_keeps_a_flat_map_flat(mode):
    large = attribution.upsample(torch.full((2, 3, 4), 0.7), (9, 8), mode=mode)
    torch.testing.assert_close(large, torch.full((2, 9, 8), 0.7))
    with pytest.raises(ValueError, match="mode must be"):
        attribution.upsample(torch.zeros(1, 3, 4), 6, mode="area")


def test_upsampling_to_the_nearest_repeats_values():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    large = attribution.upsample(maps, (4, 6), mode="nearest")
    assert torch.equal(large, maps.repeat_interleave(2, 1).repeat_interleave(3, 2))


def test_layers_without_a_map_are_refused():
    net, x = pooled_net(), pictures()
    net.add_module("spare", nn.Identity())
    with pytest.raises(ValueError, match="1 x 1"):
        attribution.grad_cam(net, x, 0, layer="5")
    with pytest.raises(ValueError, match=r"puts out \(3, 8\)"):
        attribution.grad_cam(net, x, 0, layer="6")
    with pytest.raises(LayerNotFound):
        attribution.grad_cam(net, x, 0, layer="conv9")
    with pytest.raises(ValueError, match="does not depend"):
        attribution.grad_cam(net, x, lambda out: out.detach()[:, 0], layer="3")

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.net = nn.Conv2d(3, 3, 3), pooled_net()

        def forward(self, x):
            return self.net(x)

    with pytest.raises(LayerDidNotRun):
        attribution.grad_cam(Skips(), x, 0, layer="conv")
    with pytest.raises(ValueError, match="maps must be"):
        attribution.upsample(torch.zeros(2, 3), 4)
