"""The method cells of the there-and-back-again notebook, and what its recipe stored, used without the notebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import attribution, papers, recipes
from nbkit.errors import LayerNotFound, NotFinite

SLUG = "there-and-back-again"
method = papers.method(SLUG)
recipe = recipes.load(f"papers/{SLUG}/recipe.py")
LAYERS = ["1", "3"]


def net(classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.ReLU(), nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes),
    )  # fmt: skip


x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_maps_and_gradients_are_those_of_the_grad_cam_notebook_and_of_the_kit(seed):
    model, grad_cam = net(seed=seed), papers.method("grad-cam")
    found = method.grads_at(model, x, torch.tensor([0, 2]), ["", *LAYERS])
    for layer in LAYERS:
        for mine, theirs in zip(
            found[layer], grad_cam.maps_and_gradients(model, x, torch.tensor([0, 2]), layer=layer), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        cam = method.saliency(model, x, 1, [layer], "Grad-CAM")[layer]
        torch.testing.assert_close(cam, grad_cam.grad_cam(model, x, 1, layer=layer)[0])
    torch.testing.assert_close(
        found[""][1], attribution.saliency(model, x, torch.tensor([0, 2]), absolute=False)
    )
    with recipe.guided(model):
        guided = method.grads_at(model, x, 1, ["", *LAYERS])
    torch.testing.assert_close(guided[""][1], attribution.guided_backprop(model, x, 1))
    plain = method.grads_at(model, x, 1, ["3"])["3"][1]
    torch.testing.assert_close(guided["3"][1], plain)  # no ReLU comes after it, and no hook is left


@pytest.mark.parametrize("shape", [(1, 1, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (3, 1, 2, 2, 2), (5, 2, 2, 1, 3)])
def test_the_weights_gradient_is_the_sum_of_the_places_outer_products(shape):
    kernel, stride, padding, dilation, groups = shape
    torch.manual_seed(sum(shape))
    conv = nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups)
    image = random(1, 6, 9, 8)
    out = conv(image)
    g = random(*out.shape, seed=1)
    out.backward(g)
    found = method.norm_grad_conv(conv, image, g)[0]
    total = torch.zeros_like(conv.weight)
    for i in range(g.shape[2]):
        for j in range(g.shape[3]):  # the gradient that this place alone gives the weights
            alone = torch.zeros_like(g)
            alone[..., i, j] = g[..., i, j]
            (outer,) = torch.autograd.grad(conv(image), conv.weight, alone)
            total += outer
            torch.testing.assert_close(found[i, j], outer.norm(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, conv.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [1, 3])
def test_a_real_identity_convolution_gives_the_map_of_the_virtual_one(place):
    model = net().eval()
    layers = list(model)
    channels = 4 if place == 1 else 5
    identity = nn.Conv2d(channels, channels, 1, bias=False)
    identity.weight = nn.Parameter(torch.eye(channels)[..., None, None])
    longer = nn.Sequential(*layers[: place + 1], identity, *layers[place + 1 :]).eval()
    torch.testing.assert_close(longer(x), model(x))
    virtual = method.saliency(model, x, 1, [str(place)])[str(place)]
    inside, g = (method.grads_at(longer, x, 1, [str(k)])[str(k)] for k in (place, place + 1))
    torch.testing.assert_close(method.norm_grad_conv(identity, inside[0], g[1]), virtual)


def test_rules_by_hand():
    a = torch.tensor([[[[3.0, 1]], [[4, -2]]]])  # two channels, two places
    g = torch.tensor([[[[1.0, 3]], [[-1, 2]]]])
    expected = {
        "gradient": [1, 3], "linear approximation": [-1, -1], "Grad-CAM": [8, 1],
        "selective NormGrad": [3, 3], "NormGrad": [50**0.5, 65**0.5],
    }  # fmt: skip
    for rule, values in expected.items():
        torch.testing.assert_close(method.RULES[rule](a, g)[0, 0], torch.tensor(values, dtype=torch.float))
    cosines = torch.tensor([(1 * 2 - 0.5) / (2 * 4.25) ** 0.5, (6 + 1) / (13 * 4.25) ** 0.5])
    torch.testing.assert_close(recipe.coherence(g), cosines.mean()[None])


def test_at_a_pooled_head_normgrad_does_not_see_the_class_and_the_linear_map_is_grad_cam():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    maps = {rule: [method.saliency(model, x, c, ["1"], rule)["1"] for c in (0, 3)] for rule in method.RULES}
    assert torch.allclose(method.class_sensitivity(*maps["NormGrad"]), torch.ones(2))
    assert torch.equal(method.class_sensitivity(*maps["gradient"]), torch.ones(2))  # two constant maps
    for linear, cam in zip(maps["linear approximation"], maps["Grad-CAM"], strict=True):
        torch.testing.assert_close(linear.relu(), cam)
    total = maps["linear approximation"][0].sum((1, 2))
    torch.testing.assert_close(total, (model(x)[:, 0] - model[4].bias[0]).detach())


def test_class_sensitivity_is_pearsons_correlation():
    a, b = random(3, 5, 4), random(3, 5, 4, seed=1)
    expected = [np.corrcoef(p.flatten(), q.flatten())[0, 1] for p, q in zip(a.numpy(), b.numpy(), strict=True)]
    assert np.allclose(method.class_sensitivity(a, b), expected, atol=1e-6)
    assert torch.allclose(method.class_sensitivity(a, 5 - 2 * a), -torch.ones(3))
    ones = torch.ones(3, 5, 4)
    assert torch.equal(method.class_sensitivity(ones, 3 * ones), torch.ones(3))
    assert method.class_sensitivity(a, ones).isnan().all()


def test_layers_together_are_a_weighted_mean_of_maps_from_0_to_1():
    coarse, fine = torch.tensor([[[2.0, 6], [4, 2]]]), torch.tensor([[[0.0, 1], [0.5, 0]]])
    unit = torch.tensor([[[0.0, 1], [0.5, 0]]])
    torch.testing.assert_close(method.combine([coarse, fine], (2, 2)), unit + 1e-6)
    torch.testing.assert_close(method.combine([coarse, 1 - fine], (2, 2), [0.25, 0.75], "sum"), 0.75 - 0.5 * unit)
    low = method.combine([coarse, 1 - fine], (2, 2))
    assert low[0, 0, 1] < 0.002  # a place that one layer leaves at 0 is 0 for all


@pytest.mark.parametrize("training", [False, True])
def test_the_step_is_plain_sgd_and_every_bit_comes_back(training):
    model = net().train(training)
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    twin = net().eval()
    twin.load_state_dict(before)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(twin(x[:1]), torch.tensor([2])).backward()
    optimizer.step()
    for rule in method.RULES:
        found = method.meta_saliency(model, x[:1], 2, LAYERS, rule=rule, lr=0.1)
        for layer, m in method.saliency(twin, x[:1], 2, LAYERS, rule).items():
            torch.testing.assert_close(found[layer], m)
    away = method.meta_saliency(model, x[:1], 2, ["1"], lr=0.1, negate=True)["1"]
    towards = method.meta_saliency(model, x[:1], 2, ["1"], lr=0.1)["1"]
    assert not torch.allclose(away, towards)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # buffers as well
    assert model.training is training and not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_rival_steps_are_as_long_in_every_tensor():
    model = net()
    own = method.class_step(model, x[:1], 0)
    for rival in (
        recipe.random_step(own, seed=3),
        recipe.as_long_as(own, method.class_step(model, x[:1], 1)),
    ):
        for name, direction in own.items():
            torch.testing.assert_close(rival[name].norm(), direction.norm(), rtol=1e-4, atol=1e-6)
    assert not torch.equal(recipe.random_step(own, 3)["0.weight"], recipe.random_step(own, 4)["0.weight"])


def test_scenes_hold_the_photograph_where_they_say_and_shuffled_pieces_are_the_same_pixels():
    tiles = random(5, 3, recipe.SIDE, recipe.SIDE)
    kit = {"tiles": tiles, "right": [0, 1, 2, 3, 4]}
    picture, place = recipe.scene(kit, "jigsaw", 2, seed=1)
    top, left, bottom, right = recipe.tile_boxes([place], 2 * recipe.SIDE)[0].tolist()
    assert torch.equal(picture[0, :, top:bottom, left:right], tiles[2])
    mixed = recipe.jigsaw(tiles[:1], np.random.default_rng(0))
    assert not torch.equal(mixed, tiles[:1])
    assert torch.equal(mixed.flatten(2).sort().values, tiles[:1].flatten(2).sort().values)
    assert sorted({recipe.scene(kit, "jigsaw", p, s)[1] for p in range(5) for s in range(6)}) == [0, 1, 2, 3]


def test_edges_and_the_centre_know_no_class_and_hit_a_quarter_of_the_mosaics():
    hits = papers.results(SLUG, "hits")
    blind = hits[hits["method"].isin(["edges", "centre", "activations"])]
    rates = blind[blind["scene"] == "mosaic"].groupby(["method", "level"])["hit"].mean()
    assert np.allclose(rates, 0.25, atol=1e-3)


def test_the_stored_correlations_at_the_head_are_what_theory_says():
    stored = papers.results(SLUG, "sensitivity").query("level == 'head'").pivot(
        index="photo", columns="method", values="pearson"
    )
    assert (stored["NormGrad"] == 1).all() and (stored["gradient"] == 1).all() and len(stored) == 20
    coherence = papers.results(SLUG, "coherence")
    assert (coherence.query("level == 'head'")["cosine"] == 1).all()


def test_bad_input_raises_and_changes_nothing():
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = torch.rand(2, 4, 4)
    conv, string = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3, padding="same")
    for call, error, words in (
        (lambda: method.grads_at(model, x, 0, []), ValueError, "no layer was named"),
        (lambda: method.grads_at(model, x, 0, ["33"]), LayerNotFound, "33"),
        (lambda: method.grads_at(model, x, 0, ["7"]), ValueError, "no maps"),
        (lambda: method.grads_at(model, x, 3, ["1"]), IndexError, "0 to 2"),
        (lambda: method.grads_at(model, x / 0, 0, ["1"]), NotFinite, "NaN"),
        (lambda: method.saliency(model, x, 0, ["1"], "norm"), KeyError, "norm"),
        (lambda: method.norm_grad_conv(nn.ReLU(), x, x), ValueError, "does not fit"),
        (lambda: method.norm_grad_conv(conv, x, x), ValueError, "does not fit"),
        (lambda: method.norm_grad_conv(string, x, string(x)), ValueError, "does not fit"),
        (lambda: recipe.guided(nn.Linear(2, 2)).__enter__(), TypeError, "no ReLU"),
        (lambda: method.combine([], (4, 4)), ValueError, "needs maps"),
        (lambda: method.combine([maps], (4, 4), [0.5]), ValueError, "add up to 1"),
        (lambda: method.combine([maps], (4, 4), [float("nan")]), ValueError, "add up to 1"),
        (lambda: method.combine([maps / 0], (4, 4)), NotFinite, "inputs holds"),
        (lambda: method.combine([maps], (4, 4), how="mean"), KeyError, "mean"),
        (lambda: method.class_sensitivity(maps, maps[:1]), RuntimeError, "equal size"),
        (lambda: method.class_sensitivity(maps / 0, maps), NotFinite, "inputs holds"),
        (lambda: method.class_step(model, x, 0), ValueError, "one image"),
        (lambda: method.class_step(model, x[:1], 3), IndexError, "0 to 2"),
        (lambda: method.meta_saliency(model, x[:1], 0, ["33"]), LayerNotFound, "33"),
        (lambda: method.meta_saliency(model, x[:1], 0, ["1"], lr=float("nan")), NotFinite, "lr holds"),
    ):
        with pytest.raises(error, match=words):
            call()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_the_stored_verdicts_follow_from_the_stored_tables():
    hits, cases = papers.results(SLUG, "hits"), papers.results(SLUG, "cases").set_index(["claim", "case"])
    for measure, by in (("hit", ""), ("energy", ", share of mass")):
        blocks = hits[hits["level"].isin(list(method.BLOCKS)) & (hits["scene"] == "jigsaw")]
        mean = blocks.groupby("method")[measure].mean()
        found = cases.loc[("depth" + by, "jigsaw, above Grad-CAM"), "difference"]
        assert found == pytest.approx(mean["NormGrad"] - mean["Grad-CAM"], abs=1e-4)


@pytest.mark.models
def test_on_efficientnet_the_correlation_is_1_after_the_heads_activation_and_not_before_it():
    kit = recipe.load()
    image, y = kit["x"][[13]], kit["logits"][13]
    layers = ["_act_head", "_conv_head"]
    top, least = (method.saliency(kit["model"], image, c.item(), layers) for c in (y.argmax(), y.argmin()))
    after, before = (method.class_sensitivity(top[layer], least[layer]).item() for layer in layers)
    assert after == pytest.approx(1, abs=1e-6) and before < 0.999


@pytest.mark.models
def test_a_stored_row_comes_out_again():
    kit = recipe.load()
    rows = recipe.scene_rows(method, kit, "jigsaw", 13, 0)
    stored = papers.results(SLUG, "hits").query("scene == 'jigsaw' and photo == 13 and seed == 0")
    now = {(rule, level): hit for *_, rule, level, hit, _ in rows}
    kept = stored.set_index(["method", "level"])["hit"]
    assert sum(now[key] != hit for key, hit in kept.items()) <= 2
