"""The method cells of the Grad-CAM notebook and the functions of its recipe, used without the notebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from nbkit import attribution, datasets, faithfulness, models, papers, recipes
from nbkit.errors import LayerNotFound, NotFinite

grad_cam = papers.method("grad-cam")
recipe = recipes.load("papers/grad-cam/recipe.py")


def net(classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes),
    )  # fmt: skip


x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_loop(model: nn.Sequential, layer: int, x: torch.Tensor, c: int) -> torch.Tensor:
    """The authors' public code, position by position: gradients summed, maps added up, cut at zero; over Z."""
    A = model[: layer + 1](x).detach().requires_grad_()
    model[layer + 1 :](A)[0, c].backward()
    total = torch.zeros(A.shape[2:])
    for k in range(A.shape[1]):
        weight = sum(A.grad[0, k, i, j] for i in range(A.shape[2]) for j in range(A.shape[3]))
        total = total + weight * A[0, k].detach()
    return total * (total > 0) / total.numel()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_it_is_captums_map_and_that_of_a_plain_loop(seed, layer):
    model = net(seed=seed)
    L, _ = grad_cam.grad_cam(model, x, 1, layer=str(layer))
    theirs = LayerGradCam(model, model[layer]).attribute(x, 1, relu_attributions=True)[:, 0]
    torch.testing.assert_close(L, theirs.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(L[0], by_loop(model, layer, x[:1], 1), rtol=1e-5, atol=1e-7)


@pytest.mark.models
@pytest.mark.parametrize("layer", ["_act_head", "_blocks.15", "_blocks.14", "_blocks.10"])
def test_on_efficientnet_it_is_captums_map(layer):
    model, photos = models.load("efficientnet-lite0"), datasets.load("imagenet-sample")
    images = models.transform("efficientnet-lite0")(photos)[:2]
    L, _ = grad_cam.grad_cam(model, images, photos.y[:2], layer=layer)
    theirs = LayerGradCam(model, model.get_submodule(layer)).attribute(images, photos.y[:2], relu_attributions=True)
    assert (L - theirs[:, 0].detach()).abs().max() < 1e-5 * L.max()


def test_it_works_where_the_caller_wants_no_gradients_and_on_frozen_weights():
    model = net()
    expected, _ = grad_cam.grad_cam(model, x, 1, layer="1")
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(grad_cam.grad_cam(model, x, 1, layer="1")[0], expected)


def test_with_pooling_and_a_linear_head_it_is_cam_divided_by_z():
    model = net()
    L, alpha = grad_cam.grad_cam(model, x, 1, layer="3")
    cam = torch.einsum("k,bkhw->bhw", model[6].weight[1], model[:4](x)).relu()
    torch.testing.assert_close(16 * L, cam, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(16 * alpha, model[6].weight[1].expand(2, 5).detach())


def test_it_agrees_with_the_package_and_the_counterfactual_is_the_map_of_minus_y():
    model = net()
    for layer in ("1", "3"):
        quick = attribution.grad_cam(model, x, 2, layer=layer)
        torch.testing.assert_close(grad_cam.grad_cam(model, x, 2, layer=layer)[0], quick)
    against = grad_cam.grad_cam(model, x, 2, layer="3", negate=True)[0]
    torch.testing.assert_close(against, grad_cam.grad_cam(model, x, lambda out: -out[:, 2], layer="3")[0])


def test_guided_grad_cam_is_the_product():
    model = net()
    L = attribution.upsample(grad_cam.grad_cam(model, x, 0, layer="3")[0], (8, 8))
    expected = L[:, None] * attribution.guided_backprop(model, x, 0)
    torch.testing.assert_close(grad_cam.guided_grad_cam(model, x, 0, layer="3"), expected)


def test_the_box_holds_the_largest_region_above_the_threshold():
    L = torch.zeros(6, 6)
    L[0, 0] = 1.0
    L[3:5, 2:5] = 0.2
    assert grad_cam.box_from_map(L) == (3, 2, 5, 5)
    assert grad_cam.box_from_map(L, 0.5) == (0, 0, 1, 1)
    assert grad_cam.box_from_map(torch.zeros(2, 2)) is None
    for bad in ((L, 0), (L, 1.5), (L[None], 0.5)):
        with pytest.raises(ValueError, match="thr in"):
            grad_cam.box_from_map(*bad)


def test_the_overlap_of_boxes_by_hand():
    assert recipe.iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert recipe.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert recipe.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_tiles_by_hand():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    mosaic = grad_cam.grid_mosaic(images)
    assert mosaic.shape == (3, 4, 4)
    assert torch.equal(recipe.tile_masks(4, 4), torch.stack([mosaic[0] == tile for tile in range(4)]))
    hits, shares = zip(*recipe.scored(mosaic[0].expand(4, 4, 4)), strict=True)
    assert hits == (0, 0, 0, 1) and shares == pytest.approx((0, 1 / 6, 2 / 6, 3 / 6))
    assert grad_cam.grid_mosaic(torch.rand(4, 7, 7)).shape == (14, 14)
    with pytest.raises(ValueError, match="takes four"):
        grad_cam.grid_mosaic(images[:3])


def test_mosaics_are_drawn_from_four_different_photos_and_again_the_same():
    drawn = recipe.mosaic_sets([3, 5, 8, 9, 11], seed=4)
    assert drawn == recipe.mosaic_sets([3, 5, 8, 9, 11], seed=4) != recipe.mosaic_sets([3, 5, 8, 9, 11], seed=5)
    assert all(len(set(four)) == 4 for four in drawn)


def test_agreement_is_one_for_the_falls_themselves():
    drops = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    assert recipe.agreement(drops.repeat_interleave(2, 0).repeat_interleave(2, 1), drops) == pytest.approx(1)


def test_the_other_weights_are_what_they_are_called():
    A = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    dA = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    maps = recipe.by_rule(A, dA)
    torch.testing.assert_close(maps["no pooling"], (A * dA).sum(1))
    flat = torch.full_like(dA, 0.5)  # with the same gradient everywhere there is nothing to pool
    same = recipe.by_rule(A, flat)
    torch.testing.assert_close(same["Grad-CAM"], same["max pooling"])
    torch.testing.assert_close(same["Grad-CAM"], same["no pooling"])


def test_the_variants_are_the_packages_and_the_notebooks():
    model = net()
    A, dA = grad_cam.maps_and_gradients(model, x, 2, layer="3")
    maps = recipe.by_rule(A, dA)
    plus = attribution.grad_cam_plus_plus(model, x, 2, layer="3", relu=False)
    torch.testing.assert_close(maps["Grad-CAM++"], plus)
    torch.testing.assert_close(maps["Grad-CAM"], grad_cam.grad_cam(model, x, 2, layer="3", relu=False)[0])


def test_contrastive_winning_probabilities_by_hand():
    """One position, two units below, two above; then a second position, where the first unit below is off."""
    a, top = torch.tensor([2.0, 1.0]).view(2, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1)
    down = torch.tensor([[1.0, 1.0], [-1.0, 3.0]])
    w = torch.tensor([[3.0, -1.0]])
    # of the class all wins at unit 1, of its opposite at unit 2: +1 and -1; unit 1 hands down 2/3 and 1/3, unit 2 all
    # of it to the second: (2/3) and (1/3 - 1), which add up to 0 at the only position
    assert recipe.contrastive(a, down, top, w).item() == pytest.approx(0, abs=1e-6)
    two = torch.cat([a, torch.tensor([0.0, 1.0]).view(2, 1, 1)], dim=2)  # a second position, where unit 1 is off
    tops = torch.cat([top, torch.tensor([0.0, 3.0]).view(2, 1, 1)], dim=2)
    # the opposite wins in proportion 2 : 3 at the two positions, the class only at the first
    torch.testing.assert_close(recipe.contrastive(two, down, tops, w), torch.tensor([[[0.6, 0.0]]]))


def test_falls_are_those_of_the_packages_occlusion():
    model = net()
    found = recipe.falls(model, x[:1], torch.tensor([1, 2]), window=2)
    for k, c in enumerate((1, 2)):
        known = attribution.occlusion(model, x[:1], c, window=2, per_window=True)
        torch.testing.assert_close(found[k], known[0], rtol=1e-4, atol=1e-6)


def test_deconvnet_cuts_signals_and_not_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU6()

        def forward(self, x):
            return (self.relu(x) * torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1)).sum((2, 3))

    images = torch.tensor([-1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    model = nn.Sequential(Two(), nn.Linear(3, 1, bias=False))
    nn.init.ones_(model[1].weight)
    found = recipe.deconvnet(model, images, torch.tensor([0]))
    assert found.flatten().tolist() == [1, 1, 0]  # the negative input lets its signal back, too
    assert isinstance(model[0].relu, nn.ReLU6)


def test_an_attack_stays_in_its_bounds_and_raises_the_class_it_aims_at():
    model = net()
    image = x[:1].clamp(-1, 1)
    fooled = recipe.attack(model, image, 2)
    assert (fooled - image).abs().max() <= 4 / 255 / 0.502 + 1e-6
    assert fooled.min() >= image.min() and fooled.max() <= image.max()
    assert model(fooled).softmax(1)[0, 2] > model(image).softmax(1)[0, 2]


def test_bad_input_raises_and_changes_nothing():
    model = net()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for layer, images, c, error in (
        ("9", x, 0, LayerNotFound), ("3", x, 3, IndexError), ("4", x, 0, ValueError), ("6", x, 0, ValueError),
        ("3", x * float("nan"), 0, NotFinite), ("3", x[:0], 0, ValueError),
    ):  # fmt: skip
        for call in (grad_cam.grad_cam, grad_cam.maps_and_gradients, grad_cam.guided_grad_cam):
            with pytest.raises(error):
                call(model, images, c, layer=layer)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_stored_tables_are_complete():
    mosaics = papers.results("grad-cam", "mosaics")
    assert set(mosaics["seed"]) == set(recipe.SETS)
    counts = mosaics.fillna({"layer": ""}).groupby(["method", "layer"]).size()
    assert counts.nunique() == 1 and counts.iloc[0] == len(recipe.SETS) * 10 * 4
    assert mosaics["hit"].between(0, 1).all() and mosaics["energy"].between(0, 1).all()
    alone = papers.results("grad-cam", "occlusion").query("picture == 'alone'")
    assert alone["photo"].nunique() == 18
    assert np.isfinite(alone["spearman"]).all()


def test_hits_and_shares_are_the_packages():
    maps = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0))
    hits, shares = zip(*recipe.scored(maps), strict=True)
    masks = recipe.tile_masks(6, 6)
    assert list(hits) == faithfulness.pointing_game(maps, masks).tolist()
    assert list(shares) == pytest.approx([(maps[t] * masks[t]).sum().item() / maps[t].sum().item() for t in range(4)])
