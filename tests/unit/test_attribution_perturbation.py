"""Occlusion and RISE: by hand, against captum, and followed window by window against whole forwards."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from captum.attr import Occlusion
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nbkit.attribution import _perturbation, _windows, occlusion, rise


class Branches(nn.Module):
    """Strides, dilation, padding of several kinds, branches, a residual sum in place, concatenation, a gate."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.pad, self.stem, self.norm = nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.act, self.pool = nn.ReLU6(inplace=True), nn.MaxPool2d(3, 1, 1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, (1, 5), padding=(0, 2))
        self.mean, self.gate, self.fc = nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.pool(self.act(self.norm(self.stem(self.pad(x)))))
        left = F.silu(self.left(x), inplace=True)
        left += x
        right = self.right(x) * 0.5 - 0.1
        x = self.mean(torch.cat([left, torch.maximum(right, x)], 1))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.fc(F.max_pool2d(F.gelu(x), 2).flatten(2).mean(2))


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def pictures(n: int = 2, height: int = 17, width: int = 20) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(4))


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


@pytest.fixture
def follow(monkeypatch):
    """Follow windows in pictures of any size, and fail where that was given up."""
    monkeypatch.setattr(_perturbation, "_SMALL", 1)
    monkeypatch.setattr(_perturbation, "_covered", lambda *a: pytest.fail("windows were not followed"))


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (5, 3), ((3, 6), (2, 5)), (7, 1), (17, 17), ((17, 20), 5)])
def test_occlusion_agrees_with_captum(device, window, stride):
    net, x = conv_net().to(device), pictures().to(device)
    if window == 7:
        x = x[:, :, :9, :10]
    theirs = Occlusion(net).attribute(
        x, target=1, sliding_window_shapes=(3, *pair(window)), strides=(3, *pair(stride)), baselines=0.25,
        perturbations_per_eval=4,
    )  # fmt: skip
    ours = occlusion(net, x, 1, window=window, stride=stride, fill=0.25)
    assert ours.shape == x.shape and ours.device.type == "cpu"
    torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [conv_net, Branches])
@pytest.mark.parametrize(("window", "stride"), [(4, 4), (5, 3), ((2, 7), (1, 4))])
@pytest.mark.parametrize("batch", [3, 64])
def test_following_windows_gives_what_whole_forwards_give(follow, make, window, stride, batch):
    net, x = make().eval(), pictures(2, 33, 30)
    theirs = Occlusion(net).attribute(
        x, target=torch.tensor([1, 3]), perturbations_per_eval=8, baselines=-0.5,
        sliding_window_shapes=(3, *pair(window)), strides=(3, *pair(stride)),
    )  # fmt: skip
    ours = occlusion(net, x, torch.tensor([1, 3]), window=window, stride=stride, fill=-0.5, batch=batch)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(6, 14), st.integers(6, 14)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    pool=st.booleans(),
    data=st.data(),
)
def test_a_patch_of_a_convolution_is_exact(size, kernel, stride, padding, dilation, pool, data):
    """Any kernel, stride, padding, dilation, any place of the patch: the same map as from the whole input."""
    torch.manual_seed(0)
    clean = torch.randn(1, 2, *size)
    tall, wide = data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1]))
    place = st.tuples(st.integers(0, size[0] - tall), st.integers(0, size[1] - wide))
    places = data.draw(st.lists(place, min_size=1, max_size=4))
    patch = torch.randn(len(places), 2, tall, wide)
    whole = clean.repeat(len(places), 1, 1, 1)
    for row, part, (y, x) in zip(whole, patch, places, strict=True):
        row[:, y : y + tall, x : x + wide] = part
    if pool:
        padding, dilation = min(padding, kernel // 2), 1
        layer = nn.MaxPool2d(kernel, stride, padding)
    else:
        layer = nn.Conv2d(2, 3, kernel, stride, padding, dilation)
    if min(s + 2 * padding - dilation * (kernel - 1) for s in size) < 1:
        return
    with torch.no_grad():
        windowed = _windows.Windowed(clean, patch, *map(list, zip(*places, strict=True)), _windows.Reference())
        followed = layer(windowed)
        followed = followed.whole() if isinstance(followed, _windows.Windowed) else followed
        torch.testing.assert_close(followed, layer(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [(2, 0, 0, 0), (0, 0, 3, 0), (1, 4, 2, 0), (3, 3)])
def test_windows_are_followed_through_padding_on_every_side(follow, padding):
    """Left, right, above, below: a patch moves with the picture."""

    class Pads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x):
            return self.net(F.pad(x, padding, value=0.5))

    net, x = Pads().eval(), pictures(2, 33, 30)
    theirs = Occlusion(net).attribute(
        x, target=1, perturbations_per_eval=8, sliding_window_shapes=(3, 5, 5), strides=(3, 5, 5)
    )
    ours = occlusion(net, x, 1, window=5)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def _shifted(func, x, pad, value=0):
    """The rule of padding with a wrong sign: the patch moves to the left where the picture moves to the right."""
    right = _windows._pad(func, x, pad, value)
    return right.with_patch(right.clean, right.patch, right.top, [max(t - 2 * pad[0], 0) for t in right.left])


def _doubled(func, x, *args, **kwargs):
    right = _windows._elementwise(func, x, *args, **kwargs)
    return right.with_patch(right.clean, 2 * right.patch, right.top, right.left)


@pytest.mark.parametrize(("name", "rule"), [("constant_pad_nd", _shifted), ("sigmoid", _doubled)])
@pytest.mark.parametrize("size", [20, 33])
def test_what_was_followed_wrongly_is_found_out_and_run_whole(monkeypatch, name, rule, size):
    """A rule of one of torch's functions that is wrong: the answer is right all the same."""

    class Fades(nn.Module):
        def forward(self, x):  # weighs the left edge, far from the middle window
            return (torch.sigmoid(x) * torch.linspace(1, 0, x.shape[3]) ** 4).mean((2, 3))

    torch.manual_seed(0)
    net = nn.Sequential(nn.ZeroPad2d((2, 0, 0, 0)), nn.Conv2d(3, 4, 3), Fades(), nn.Linear(4, 3)).eval()
    x = pictures(2, size, size)
    x[:, :, size // 2 - 4 : size // 2 + 4, size // 2 - 4 : size // 2 + 4] = 0  # the middle holds what covers it
    falls, clean = occlusion(net, x, 1, window=4, per_window=True), net(x)[:, 1].detach()
    followed, follow = [], _perturbation._followed
    monkeypatch.setattr(_perturbation, "_SMALL", 1)
    monkeypatch.setattr(_perturbation, "_followed", lambda *a: followed.append(follow(*a)) or followed[-1])
    monkeypatch.setitem(_windows._RULES, getattr(torch.ops.aten, name), rule)
    torch.testing.assert_close(occlusion(net, x, 1, window=4, per_window=True), falls)
    wrong = (clean[:, None] - torch.stack(followed)).view_as(falls)
    assert (wrong - falls).abs().max() > 0.1 * falls.abs().max()


def test_what_cannot_be_followed_is_run_whole(monkeypatch):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x):
            x[:, 0] += 0  # into a view
            return self.net(x)

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x):
            return self.net(x * 2 if x.flatten()[0] > 0 else x.cumsum(2))

    for net in (Writes().eval(), Looks().eval()):
        plain = occlusion(net, pictures(), 1, window=5)
        monkeypatch.setattr(_perturbation, "_SMALL", 1)
        torch.testing.assert_close(occlusion(net, pictures(), 1, window=5), plain, rtol=1e-4, atol=1e-6)
        monkeypatch.undo()


def test_a_hook_of_the_callers_sees_plain_tensors(monkeypatch):
    monkeypatch.setattr(_perturbation, "_SMALL", 1)
    net, kinds = conv_net(), set()
    net[2].register_forward_hook(lambda module, args, output: kinds.add(type(output)))
    occlusion(net, pictures(), 1, window=4)
    assert kinds == {torch.Tensor}


def test_occlusion_of_a_linear_model_is_its_window_of_contributions(device):
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8, 2)).to(device), pictures(2, 6, 8).to(device)
    contributions = (net[1].weight[1].view(3, 6, 8) * (x - 0.5)).sum(1).detach().cpu()
    falls = occlusion(net, x, 1, window=2, fill=0.5, per_window=True)
    expected = F.avg_pool2d(contributions[:, None], 2)[:, 0] * 4
    assert falls.shape == (2, 3, 4)
    torch.testing.assert_close(falls, expected, rtol=1e-4, atol=1e-5)


def test_a_pixel_gets_the_mean_of_the_windows_that_cover_it():
    net, x = conv_net(), pictures(1, 7, 7)
    falls = occlusion(net, x, 0, window=3, stride=2, per_window=True)[0]
    pixels = occlusion(net, x, 0, window=3, stride=2)[0]
    assert falls.shape == (3, 3)
    torch.testing.assert_close(pixels[0, 0, 0], falls[0, 0])
    torch.testing.assert_close(pixels[1, 2, 2], falls[:2, :2].mean())
    torch.testing.assert_close(pixels[2, 3, 4], falls[1, 1:].mean())


def test_occlusion_of_features_and_of_series():
    torch.manual_seed(0)
    table, series = nn.Linear(5, 2), nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 6, 2))
    x = torch.randn(4, 5)
    torch.testing.assert_close(
        occlusion(table, x, 0, window=1), (table.weight[0] * x).detach(), rtol=1e-4, atol=1e-5
    )
    assert occlusion(table, x, 0, window=2, per_window=True).shape == (4, 3)
    assert torch.equal(occlusion(table, x, 0), occlusion(table, x, 0, window=1))
    assert occlusion(conv_net(), pictures(1, 28, 21), 0, per_window=True).shape == (1, 7, 7)
    assert occlusion(series, torch.randn(3, 2, 8), 1, window=3, stride=2).shape == (3, 2, 8)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"window": 18}, "larger than the input"), ({"window": 0}, "window must be"), ({"window": (2, 2, 2)}, "window"),
        ({"window": 4, "stride": 5}, "never be covered"), ({"window": 4, "stride": 0}, "stride must be"),
        ({"window": 4, "fill": float("nan")}, "fill"),
    ],
)  # fmt: skip
def test_bad_windows_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        occlusion(conv_net(), pictures(), 0, **kwargs)


def test_rise_is_the_mean_of_masks_weighted_by_scores():
    net, x = conv_net(), pictures(2, 12, 15)
    maps = rise(net, x, torch.tensor([0, 3]), masks=30, grid=3, p=0.4, seed=5, fill=0.1)
    generator = torch.Generator().manual_seed(5)
    cells = (torch.rand(30, 3, 3, generator=generator) < 0.4).float()
    masks = _perturbation._masks(cells, torch.rand(30, 2, generator=generator), (12, 15))
    assert masks.shape == (30, 12, 15) and 0 <= masks.min() and masks.max() <= 1
    for i, c in enumerate((0, 3)):
        scores = torch.cat([net(x[i : i + 1] * m + 0.1 * (1 - m)).detach() for m in masks])[:, c]
        torch.testing.assert_close(maps[i], (scores[:, None, None] * masks).sum(0) / (30 * 0.4), rtol=1e-4, atol=1e-5)


def test_rise_finds_the_one_pixel_that_matters():
    def score(out):
        return out[:, 0, 9, 4]

    x = torch.ones(1, 1, 16, 16)
    found = rise(nn.Identity(), x, score, masks=2000, grid=8)[0]
    assert divmod(int(found.argmax()), 16) in [(r, c) for r in (8, 9, 10) for c in (3, 4, 5)]
    assert found[9, 4] > found.mean() + 3 * found[:6, 8:].std()


def test_rise_of_a_linear_model_orders_pixels_by_their_contribution():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[1, :8] = 1.0  # the top row counts for class 1
        net[1].weight[1, -8:] = -1.0  # the bottom row against it
    rows = rise(net, torch.ones(1, 1, 8, 8), 1, masks=4000, grid=8)[0].mean(1)
    assert rows.argmax() == 0 and rows.argmin() == 7


def test_rise_does_not_depend_on_the_batch_but_on_the_seed():
    net, x = conv_net(), pictures(2, 12, 12)
    one = rise(net, x, 1, masks=25, grid=4, batch=1)
    torch.testing.assert_close(rise(net, x, 1, masks=25, grid=4, batch=7), one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rise(net, x, 1, masks=25, grid=4, seed=1), one)
    with pytest.raises(ValueError, match="pictures"):
        rise(nn.Linear(3, 2), torch.randn(2, 3), 0)
    with pytest.raises(ValueError, match="0 < p < 1"):
        rise(net, x, 0, p=1.0)


class KeepsAScale(nn.Module):
    """A model that makes a tensor in its first forward and keeps it, as lazily built masks and positions are kept."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), None

    def forward(self, x):
        self.scale = torch.full((3,), 2.0, device=x.device) if self.scale is None else self.scale
        return self.body(x) * self.scale


@pytest.mark.parametrize("method", [partial(occlusion, window=4), partial(rise, masks=8)])
def test_a_model_that_first_ran_here_can_still_be_trained(device, method):
    model, x = KeepsAScale().to(device), torch.randn(2, 1, 8, 8, device=device)
    method(model, x, 0)
    model(x).sum().backward()
    assert model.body[1].weight.grad.abs().sum() > 0


def test_the_first_layer_sees_windows_and_not_whole_pictures(follow):
    net, seen = conv_net().eval(), set()

    class Noting(nn.Module):
        def forward(self, x):
            seen.add(type(x))
            return net(x)

    occlusion(Noting(), pictures(), 1, window=4)
    assert _windows.Windowed in seen
