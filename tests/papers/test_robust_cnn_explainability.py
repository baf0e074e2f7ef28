"""Robust CNNs: canvases, the two branches of AdvProp, maps and scores, and the files the recipe stored."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import faithfulness, models, papers, training
from nbkit.errors import NotFinite

SLUG = "robust-cnn-explainability"
method = papers.method(SLUG)


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def canvases():
    """12 canvases of two digits (classes 3 and 7) and two garments, all of one brightness each."""
    digits = torch.tensor([0.9, 0.8]).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    garments = torch.tensor([0.4, 0.3]).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    return method.compose((digits, torch.tensor([3, 7])), garments, 12, seed=0)


@pytest.fixture
def net():
    return models.build("small-cnn", widths=(6, 6, 6), batch_norm=True, seed=0).eval()


@pytest.fixture
def split(net):
    return method.exchanged(net, nn.BatchNorm2d, method.SplitBN2d)


def same(net, state):
    return all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


# canvases


def test_a_canvas_holds_one_digit_in_its_box_one_garment_and_two_empty_tiles(canvases):
    x, y, boxes = canvases
    assert x.shape == (12, 1, 28, 28) and y.unique().tolist() == [3, 7]
    for picture, label, (top, left, bottom, right) in zip(x[:6, 0], y[:6], boxes[:6], strict=True):
        tile = picture[top:bottom, left:right]
        assert tile.shape == (14, 14)
        torch.testing.assert_close(tile, torch.full_like(tile, 0.9 if label == 3 else 0.8))
        corners = F.avg_pool2d(picture[None], 14).flatten().sort().values
        assert corners[:2].tolist() == [0, 0] and 0.29 < corners[2] < 0.41


def test_the_second_half_has_noise_everywhere_and_stays_in_0_to_1(canvases):
    x, _, _ = canvases
    assert x.min() >= 0 and x.max() <= 1
    assert (x[:6] == 0).float().mean() == 0.5
    assert (x[6:].flatten(1) > 0).float().mean(1).min() > 0.6


def test_the_same_seed_gives_the_same_canvases_and_one_canvas_is_refused(canvases):
    digits, garments = (drawn(3, 1, 28, 28), torch.arange(3)), drawn(3, 1, 28, 28, seed=1)
    one, two, other = (method.compose(digits, garments, 8, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    with pytest.raises(ValueError, match=r"cells \[N"):
        method.compose(digits, garments, 1, seed=0)


# two branches


def test_in_training_each_half_meets_its_own_batchnorm():
    alone = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    both, x = method.SplitBN2d(copy.deepcopy(alone[0])), drawn(8, 3, 5, 5)
    found = both(x)
    for part, bn, twin in zip((slice(4), slice(4, None)), alone, (both.main, both.aux), strict=True):
        torch.testing.assert_close(found[part], bn(x[part]))
        torch.testing.assert_close(twin.running_mean, bn.running_mean)
        torch.testing.assert_close(twin.running_var, bn.running_var)
    with pytest.raises(RuntimeError, match="invalid for input"):
        both(x[:3])


def test_the_main_branch_does_not_see_auxiliary_statistics(split, canvases):
    x = canvases[0]
    before = split.eval()(x)
    for m in split.modules():
        if isinstance(m, method.SplitBN2d):
            m.aux.running_mean += 1
            m.aux.weight.data *= 2
    assert torch.equal(split(x), before)
    aux = method.exchanged(split, method.SplitBN2d, lambda m: m.aux).eval()
    assert not torch.allclose(aux(x), before)


def test_there_and_back_gives_the_network_again_and_leaves_it_alone(net, split, canvases):
    state = training.state(net)
    back = method.exchanged(split, method.SplitBN2d, lambda m: m.main).eval()
    assert back.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(back(canvases[0]), net(canvases[0])) and same(net, state)
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        method.exchanged(nn.Linear(2, 2), nn.BatchNorm2d, method.SplitBN2d)


# trainings


@pytest.mark.parametrize("eps", [0.01, 0.05])
def test_both_attacks_stay_within_eps_and_touch_no_statistics(net, split, canvases, eps):
    x, y, _ = canvases
    states = training.state(net), training.state(split)
    generator = torch.Generator().manual_seed(0)
    for attack, at in ((method.attacked, net), (method.doubled, split)):
        moved = attack(at, x, y, eps, generator)
        assert len(moved) == len(x) * (1 + (at is split)) and moved.min() >= 0 and moved.max() <= 1
        assert at is net or torch.equal(moved[: len(x)], x)
        assert (moved[-len(x) :] - x).abs().max().item() == pytest.approx(eps, rel=1e-3)
    assert same(net, states[0]) and same(split, states[1])
    assert torch.equal(method.attacked(net, x, y, 0.0, generator), x)


def test_the_eps_of_a_training_rises_over_its_first_half(monkeypatch, canvases):
    seen = []

    def spy(net, x, y, eps, generator):
        seen.append(eps)
        return x

    monkeypatch.setitem(method.TRAININGS, "robust", spy)
    method.train("robust", canvases[:2], seed=0, updates=6)
    assert seen == pytest.approx([method.EPS * min(1, k / 3) for k in range(1, 7)])


def test_the_loss_of_a_doubled_batch_is_the_mean_of_both():
    out, y = drawn(8, 10), torch.arange(4)
    parts = F.cross_entropy(out[:4], y) + F.cross_entropy(out[4:], y)
    torch.testing.assert_close(method.loss(out, y), parts / 2)
    torch.testing.assert_close(method.loss(out[:4], y), F.cross_entropy(out[:4], y))


@pytest.mark.parametrize("kind", list(method.TRAININGS))
def test_a_training_gives_a_plain_network_the_same_twice(kind, canvases):
    x, y, _ = canvases
    one, two = (method.train(kind, (x, y), seed=4, updates=2) for _ in range(2))
    assert same(one, two.state_dict()) and not one.training
    assert not any(isinstance(m, method.SplitBN2d) for m in one.modules())


def test_what_cannot_be_trained_is_refused(canvases):
    x, y, _ = canvases
    with pytest.raises(KeyError, match="advprop"):
        method.train("advprop", (x, y), seed=0)
    with pytest.raises(ValueError):
        method.train("vanilla", (x, y[:3]), seed=0, updates=1)


# maps and scores


@pytest.mark.parametrize("name", method.METHODS)
def test_a_map_has_a_value_a_pixel_none_below_0_and_leaves_the_network_alone(name, net, canvases):
    x, y, _ = canvases
    state = training.state(net)
    heat = method.attribute(net, x[:3], y[:3], name)
    assert heat.shape == (3, 28, 28) and heat.min() >= 0 and same(net, state)


def test_gradient_maps_are_what_autograd_says(net, canvases):
    x, y = canvases[0][:4].clone().requires_grad_(), canvases[1][:4]
    (gradient,) = torch.autograd.grad(net(x).gather(1, y[:, None]).sum(), x)
    torch.testing.assert_close(method.attribute(net, x.detach(), y, "gradient"), gradient[:, 0].abs())
    torch.testing.assert_close(method.attribute(net, x.detach(), y, "grad x input"), (gradient * x)[:, 0].abs())


def test_rise_and_occlusion_find_the_one_tile_that_matters(canvases):
    class Corner(nn.Module):
        def forward(self, x):
            there = x[:, 0, :14, 14:].mean((1, 2))
            return torch.stack([4 * there, torch.zeros_like(there)], 1)

    x = torch.full((2, 1, 28, 28), 0.7)
    corner = torch.tensor([[0, 14, 14, 28]] * 2)
    c = torch.zeros(2, dtype=torch.long)
    assert faithfulness.energy_share(method.attribute(Corner(), x, c, "occlusion"), corner).min() > 0.85
    assert method.attribute(Corner(), x, c, "RISE")[:, 4:10, 18:24].mean() > 1.05 * method.attribute(
        Corner(), x, c, "RISE"
    )[:, 18:24, 4:10].mean()


def test_maps_without_a_model():
    x = torch.zeros(1, 1, 28, 28)
    x[..., 8:12, 8:12] = 0.5
    assert torch.equal(method.no_model(x, "ink"), x[:, 0])
    edges = method.no_model(x, "edges")[0]
    assert edges[14:].max() == 0 and edges[9:11, 9:11].max() == 0 and edges[8, 10] > 0
    centre = method.no_model(x, "centre")[0]
    assert centre.argmax() in (13 * 28 + 13, 13 * 28 + 14, 14 * 28 + 13, 14 * 28 + 14)
    assert torch.equal(method.no_model(x, "random", seed=1), method.no_model(x, "random", seed=1))


def test_a_map_that_is_the_tile_has_full_marks_and_a_constant_network_its_constant(canvases):
    x, y, boxes = canvases
    constant = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.init.zeros_(constant[1].weight)
    nn.init.zeros_(constant[1].bias)
    heat = torch.zeros(12, 28, 28)
    for one, (top, left, bottom, right) in zip(heat, boxes, strict=True):
        one[top:bottom, left:right] = 1
    found = method.scores(constant, x, y, heat, boxes)
    for name, value in {"pointing": 1.0, "energy": 1.0, "insertion": 0.1, "deletion": 0.1}.items():
        torch.testing.assert_close(found[name].float(), torch.full((12,), value))
    even = method.scores(constant, x, y, torch.ones_like(heat), boxes)
    assert even["pointing"].tolist() == [0.25] * 12 and even["energy"].tolist() == [0.25] * 12


def test_common_takes_what_all_get_right_from_both_halves(canvases):
    x, y, _ = canvases

    class Says(nn.Module):
        def __init__(self, answers):
            super().__init__()
            self.answers = answers

        def forward(self, x):
            return F.one_hot(self.answers, 10).float()

    wrong = y.clone()
    wrong[[0, 7]] = 0
    assert method.common([Says(y), Says(wrong)], x, y, 3).tolist() == [1, 2, 3, 6, 8, 9]
    with pytest.raises(ValueError, match="only 5"):
        method.common([Says(y), Says(wrong)], x, y, 6)


def test_bad_input_is_refused_and_changes_nothing(net, canvases):
    x, y, boxes = canvases
    state = training.state(net)
    for wrong in (lambda: method.attribute(net, x, y, "LIME"), lambda: method.no_model(x, "face")):
        with pytest.raises(ValueError, match=r"is one of \["):
            wrong()
    with pytest.raises(NotFinite):
        method.scores(net, x, y, torch.full((12, 28, 28), float("nan")), boxes)
    with pytest.raises(ValueError):
        method.scores(net, x, y, torch.ones(12, 14, 14), boxes)
    with pytest.raises(ValueError, match="eps"):
        training.pgd(net, x, y, eps=-0.1, steps=1)
    assert same(net, state)


# what is stored


SEEDS = dict.fromkeys(method.TRAININGS, 3)


def test_every_training_map_background_and_seed_is_stored():
    table = papers.results(SLUG, "scores")
    assert table.groupby("training")["seed"].nunique().to_dict() == SEEDS
    assert len(table) == sum(SEEDS.values()) * 2 * len([*method.METHODS, *method.NO_MODEL])
    assert not table.duplicated(["seed", "training", "background", "method"]).any()
    blind = table[table["method"].isin(method.NO_MODEL)].groupby(["seed", "background", "method"])
    assert (blind[["pointing", "energy"]].nunique() == 1).all(axis=None)  # whatever the network


def test_accuracies_and_correlations_are_stored():
    accuracy = papers.results(SLUG, "accuracy")
    assert not accuracy.duplicated(["seed", "training", "set"]).any()
    assert accuracy.groupby("training")["seed"].nunique().to_dict() == SEEDS
    within = papers.results(SLUG, "correlations")
    assert set(within["training"]) == {*method.TRAININGS, "pooled"}
    assert within[["insertion", "deletion"]].abs().max(axis=None) <= 1


@pytest.mark.parametrize("kind", list(method.TRAININGS))
def test_the_networks_of_seed_0_are_plain_small_cnns(kind):
    net, facts = models.load_checkpoint(papers.folder(SLUG) / f"{kind}-seed0.safetensors")
    assert facts["variant"] == kind and facts["seed"] == 0
    assert net(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
