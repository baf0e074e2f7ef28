"""The method cells of the Grad-CAM notebook, used without the notebook."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit import attribution, papers
from nbkit.errors import LayerNotFound, NotFinite

grad_cam = papers.method("grad-cam")


def net(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes),
    )  # fmt: skip


x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_with_pooling_and_a_linear_head_it_is_cam_divided_by_z():
    model = net()
    L, alpha = grad_cam.grad_cam(model, "3", x, 1)
    maps = model[:4](x)
    cam = torch.einsum("k,bkhw->bhw", model[6].weight[1], maps).relu()
    torch.testing.assert_close(16 * L, cam, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(16 * alpha, model[6].weight[1].expand(2, 5).detach())


def test_it_agrees_with_the_package_and_the_counterfactual_is_the_map_of_minus_y():
    model = net()
    for layer in ("1", "3"):
        quick = attribution.grad_cam(model, x, 2, layer=layer)
        torch.testing.assert_close(grad_cam.grad_cam(model, layer, x, 2)[0], quick)
    against = grad_cam.grad_cam(model, "3", x, 2, negate=True)[0]
    torch.testing.assert_close(against, grad_cam.grad_cam(model, "3", x, lambda out: -out[:, 2])[0])


def test_guided_grad_cam_is_the_product():
    model = net()
    L = attribution.upsample(grad_cam.grad_cam(model, "3", x, 0)[0], (8, 8))
    expected = L[:, None] * attribution.guided_backprop(model, x, 0)
    torch.testing.assert_close(grad_cam.guided_grad_cam(model, "3", x, 0), expected)


def test_the_box_holds_the_largest_region_above_the_threshold():
    L = torch.zeros(6, 6)
    L[0, 0] = 1.0
    L[3:5, 2:5] = 0.2
    assert grad_cam.box_from_map(L) == (3, 2, 5, 5)
    assert grad_cam.box_from_map(L, 0.5) == (0, 0, 1, 1)
    assert grad_cam.box_from_map(torch.zeros(2, 2)) is None
    with pytest.raises(ValueError, match="thr in"):
        grad_cam.box_from_map(L, 0)


def test_tiles_hits_and_shares_by_hand():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    mosaic = grad_cam.grid_mosaic(images)
    assert mosaic.shape == (1, 3, 4, 4)
    assert [grad_cam.grid_hit(mosaic[0, 0], tile) for tile in range(4)] == [False, False, False, True]
    assert grad_cam.energy_share(mosaic[0, 0], 2) == pytest.approx(2 / 6)
    blank = torch.zeros(4, 4)
    assert not grad_cam.grid_hit(blank, 0) and grad_cam.energy_share(blank, 0) == 0
    with pytest.raises(ValueError, match="four images"):
        grad_cam.grid_mosaic(images[:3])


def test_agreement_is_one_for_the_drops_themselves():
    drops = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    assert grad_cam.agreement(drops.repeat_interleave(2, 0).repeat_interleave(2, 1), drops) == pytest.approx(1)


def test_bad_input_raises_and_changes_nothing():
    model = net()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for layer, images, c, error in (
        ("9", x, 0, LayerNotFound), ("3", x, 3, IndexError), ("4", x, 0, ValueError), ("6", x, 0, ValueError),
        ("3", x * float("nan"), 0, NotFinite),
    ):  # fmt: skip
        with pytest.raises(error):
            grad_cam.grad_cam(model, layer, images, c)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
