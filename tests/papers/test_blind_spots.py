"""Blind spots: the walk and its known answers, what it refuses, the robust twins, and the files its recipe stored."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import datasets, models, papers, recipes, training

method = papers.method("blind-spots")
recipe = recipes.load("papers/blind-spots/recipe.py")
robust_twins = recipes.load("models/robust_twins.py")


def rand(*shape, seed=0, **options):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.fixture
def small(device):
    """A network with smooth level sets and some noise of training in it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    return net.to(device)


@pytest.fixture
def case(small, device):
    """Sources with the class that the network calls, and targets."""
    x, y = rand(6, 1, 4, 4).to(device), rand(6, 1, 4, 4, seed=1).to(device)
    small.eval()
    return small, x, y, small(x).argmax(1)


# the step


def test_what_is_left_of_v_is_orthogonal_to_g(device):
    v, g = (rand(5, 3, 4, 4, seed=k, dtype=torch.float64).to(device) - 0.5 for k in (0, 1))
    left = method.project(v, g)
    assert (left * g).sum((1, 2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(method.project(left, g), left)
    torch.testing.assert_close(method.project(3 * g, g), torch.zeros_like(g))
    assert torch.equal(method.project(v, torch.zeros_like(v)), v)
    assert torch.isfinite(method.project(v.float(), 1e-30 * g.float())).all()  # its square underflows


def test_the_gradient_is_each_images_own_and_leaves_no_trace(case):
    model, x, _, c = case
    g = method.gradient(model, x, c)
    alone = torch.cat([method.gradient(model, x[[k]], c[[k]]) for k in range(len(x))])
    torch.testing.assert_close(g, alone)
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad
    p = method.confidence(model, x.clone().requires_grad_(), c)
    assert torch.equal(p, model(x).softmax(1)[torch.arange(6), c])


# the walk


def test_on_a_logistic_model_the_walk_is_the_closed_form():
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    x, y = (0.3 + 0.4 * rand(4, 1, 4, 4, seed=k, dtype=torch.float64) for k in (2, 3))
    walk = method.lst(model, x, y, model(x).argmax(1), eps=0, noise=0, eta=0.1, T=30, delta=1e-9)
    w = (model[1].weight[0] - model[1].weight[1]).detach().view(1, 1, 4, 4).expand_as(x)
    torch.testing.assert_close(walk.end, x + (1 - 0.9**30) * method.project(y - x, w), rtol=0, atol=1e-14)
    assert (walk.p - walk.p_0).abs().max() < 1e-14


def by_hand(model, x, y, c, eta, T, delta, eps, start):
    """The walk of one image, a loop over plain vectors."""
    p_0, a, now = model(x).softmax(1)[0, c].item(), torch.zeros(x.numel()), start
    for _ in range(T):
        leaf = now.clone().requires_grad_()
        (-model(leaf).log_softmax(1)[0, c]).backward()
        g, v = leaf.grad.flatten(), (y - now).flatten()
        a = torch.clip(a + eps / 2 * g, -eps, eps)
        new = (now.flatten() + eta * (v - (g @ v) / (g @ g) * g) - a).clip(0, 1).view_as(x)
        if p_0 - model(new).softmax(1)[0, c].item() < delta:
            now = new
    return now.detach()


def test_a_batch_walks_as_each_image_would_alone():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    for layer in (model[1], model[3]):
        layer.weight.data *= 6  # curved level sets
    x, y = rand(6, 1, 4, 4), rand(6, 1, 4, 4, seed=1)
    c = model(x).argmax(1)
    setting = {"eta": 0.2, "T": 40, "delta": 0.02, "eps": 1e-3}
    walk = method.lst(model, x, y, c, seed=5, **setting)
    start = (x + 4 / 255 * (rand(6, 1, 4, 4, seed=5) - 0.5)).clamp(0, 1)
    assert torch.equal(walk.frames[0], start)
    free = method.lst(model, x, y, c, seed=5, **setting | {"delta": 2})
    assert not torch.equal(walk.end, free.end)  # the budget stopped some
    for k in range(len(x)):
        alone = by_hand(model, x[[k]], y[[k]], c[k].item(), start=start[[k]], **setting)
        torch.testing.assert_close(walk.end[[k]], alone, rtol=0, atol=1e-5)


def test_every_frame_is_within_the_budget_and_the_rivals_too(case):
    model, x, y, c = case
    for direction in ("gradient", "random", "none"):
        walk = method.lst(model, x, y, c, direction=direction, delta=0.1, noise=0, T=25, every=10)
        assert walk.frames.shape == (4, *x.shape) and walk.p.shape == (4, 6)
        assert (walk.p > walk.p_0 - 0.1 - 1e-6).all()
        assert walk.frames.min() >= 0 and walk.frames.max() <= 1


def test_without_projection_and_correction_the_walk_is_the_straight_line(case):
    model, x, y, c = case
    walk = method.lst(model, x, y, c, direction="none", eps=0, noise=0, delta=2, T=20)
    torch.testing.assert_close(walk.end, x + (1 - 0.95**20) * (y - x), rtol=0, atol=1e-5)


def test_a_walk_to_where_it_is_and_one_that_may_not_fall_stay(case):
    model, x, _, c = case
    assert torch.equal(method.lst(model, x, x, c, eps=0, noise=0).end, x)
    assert (method.lst(model, x, x, c, eps=0).end - x).abs().max() <= 2 / 255 + 1e-7

    class Peak(nn.Module):
        def forward(self, z):
            fall = (z - x[:1]).square().sum((1, 2, 3))
            return torch.stack([2 - fall, torch.zeros_like(fall)], 1)

    walk = method.lst(Peak(), x[:1], x[1:2], c[:1] * 0, delta=0, noise=0)
    assert torch.equal(walk.end, x[:1])


def test_the_model_comes_back_as_it_was_and_the_seed_decides_the_noise(case):
    model, x, y, c = case
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ends = [method.lst(model, x, y, c, T=5, seed=s).end for s in (0, 0, 1)]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": lambda x: x + 1}, "between 0 and 1"),
        ({"source": lambda x: x * torch.nan}, "between 0 and 1"),
        ({"target": lambda y: -y}, "between 0 and 1"),
        ({"target": lambda y: y[:3]}, r"\[B, C, H, W\] twice"),
        ({"source": lambda x: x[:, 0], "target": lambda y: y[:, 0]}, r"\[B, C, H, W\] twice"),
        ({"c": lambda c: c[:2]}, r"and c \[B\]"),
        ({"c": lambda c: (c + 1) % 3}, "does not call every source"),
    ],
)  # fmt: skip
def test_what_no_walk_can_start_from_is_refused(case, change, message):
    model, x, y, c = case
    given = {"source": x, "target": y, "c": c}
    given |= {name: edit(given[name]) for name, edit in change.items()}
    model.train()
    with pytest.raises(ValueError, match=message):
        method.lst(model, **given)
    assert model.training


@pytest.mark.parametrize(
    "setting", [{"eta": 0}, {"eta": 1.5}, {"T": 0}, {"delta": -0.1}, {"eps": -1}, {"eps": float("nan")},
     {"every": 0}, {"direction": "up"}]
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(case, setting):
    model, x, y, c = case
    with pytest.raises(ValueError, match=next(iter(setting))):
        method.lst(model, x, y, c, **setting)


# what is looked at


def test_segments_and_triangles_hold_their_corners(case):
    model, x, y, c = case
    line = method.along(model, x, y, c)
    torch.testing.assert_close(line[[0, 10, 20]], torch.stack(
        [method.confidence(model, z, c) for z in (x, (x + y) / 2, y)]).detach(), rtol=0, atol=1e-5)  # fmt: skip
    other = rand(6, 1, 4, 4, seed=2).to(x)
    p, called = method.triangle(model, x, y, other, c)
    assert p.shape == called.shape == (66, 6) and len(set(method.GRID)) == 66
    for corner, z in {(0.0, 0.0): x, (1.0, 0.0): y, (0.0, 1.0): other}.items():
        k = method.GRID.index(corner)
        torch.testing.assert_close(p[k], method.confidence(model, z, c).detach(), rtol=0, atol=1e-5)
        assert torch.equal(called[k], model(z).argmax(1) == c)


def test_a_random_point_is_as_far_as_asked():
    x = datasets.load("fashion-mnist").x_test[:8]
    distance = torch.linspace(0.05, 0.4, 8)
    found = recipe.random_point(method, x, distance, seed=0)
    torch.testing.assert_close(method.rmse(found, x), distance, rtol=0, atol=1e-4)
    assert found.min() >= 0 and found.max() <= 1
    assert not torch.equal(found, recipe.random_point(method, x, distance, seed=1))


def test_the_farthest_point_of_a_fade_is_within_the_budget():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    model[1].weight.data = torch.tensor([[-8.0], [8.0]])
    x, y = torch.full((1, 1, 1, 1), 0.9), torch.zeros(1, 1, 1, 1)
    c = torch.tensor([1])
    p_0 = method.confidence(model, x, c)
    left = recipe.farthest(method, model, x, y, c, p_0).item()
    p = lambda z: method.confidence(model, torch.full_like(x, z), c).item()  # noqa: E731
    assert p_0 - p(left) < recipe.DELTA <= p_0 - p(left - 0.9 / recipe.T)


def test_an_attack_climbs_from_the_target_into_the_budget_and_says_where_it_does_not(case):
    model, x, y, c = case
    p_0 = method.confidence(model, x, c).detach()
    end, reached = recipe.attacked(method, model, y, c, p_0)
    assert torch.equal(reached, p_0 - method.confidence(model, end, c) < recipe.DELTA) and reached.any()
    assert end.min() >= 0 and end.max() <= 1
    one, _ = recipe.attacked(method, model, y, c, p_0, most=1)
    assert method.rmse(one, y).max() <= recipe.ATTACK + 1e-6
    assert (method.confidence(model, one, c) >= method.confidence(model, y, c)).all()
    stay, there = recipe.attacked(method, model, x, c, p_0)
    assert torch.equal(stay, x) and there.all()


def test_the_nearest_images_vote_and_a_bend_is_measured_in_lengths():
    x = torch.tensor([0.0, 0.1, 0.2, 0.8, 0.9, 1.0]).view(6, 1, 1, 1)
    y = torch.tensor([3, 3, 3, 5, 5, 5])
    assert recipe.vote(torch.tensor([0.05, 0.95]).view(2, 1, 1, 1), x, y).tolist() == [3, 5]
    start = torch.zeros(1, 1, 1, 2)
    frames = torch.tensor([[0.0, 0.0], [2.0, 1.0], [4.0, 0.0]]).view(3, 1, 1, 1, 2)
    assert recipe.bent(start, frames).item() == pytest.approx(0.25)
    assert recipe.bent(start, 2 * frames[[0, 2]]).item() == 0


def test_sources_and_targets_are_of_three_classes_and_drawn_from_what_both_twins_are_sure_of():
    y = torch.arange(300) % 10
    fine = torch.arange(300) % 4 > 0
    drawn = recipe.choose(fine, y, seed=3, n=20)
    source, one, two, same = drawn
    assert all(fine[k].all() for k in drawn) and len(source.unique()) == 20
    assert (y[source] != y[one]).all() and (y[source] != y[two]).all() and (y[one] != y[two]).all()
    assert (y[source] == y[same]).all() and not (source == same).any()


# the twins


def test_the_radius_of_the_attack_grows_over_the_first_half():
    model = models.build("small-cnn", seed=0, widths=(2, 2, 2))
    attack = robust_twins.attacks(4)
    x, y = 0.5 * torch.ones(3, 1, 28, 28), torch.tensor([0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    moved = [(attack(model, x, y, generator) - x).abs().max().item() for _ in range(4)]
    assert moved == pytest.approx([0, 0.05, 0.1, 0.1], abs=1e-6)


def test_the_shipped_twins_differ_in_nothing_but_their_training_on_attacks():
    data = datasets.load("fashion-mnist")
    x, y = data.x_test[:200], data.y_test[:200]
    facts, attacked = {}, {}
    for variant in robust_twins.VARIANTS:
        (shipped,) = (c for c in models.checkpoints("small-cnn") if c.variant == variant)
        model = models.load("small-cnn", dataset="fashion-mnist", variant=variant, seed=0)
        facts[variant] = shipped.facts
        assert training.accuracy(model, data.x_test, data.y_test) == pytest.approx(
            shipped.facts["test_accuracy"], abs=2e-3)  # fmt: skip
        bad = training.pgd(model, x, y, eps=0.1, steps=5, generator=torch.Generator().manual_seed(0))
        attacked[variant] = training.accuracy(model, bad, y)
    assert attacked["robust"] > 0.4 > 0.2 > attacked["narrow"]
    for name in ("config", "steps", "train_examples", "seed", "recipe", "dataset"):
        assert facts["narrow"][name] == facts["robust"][name]


# what is stored


def test_every_pair_of_every_twin_is_stored_once():
    pairs = papers.results("blind-spots", "pairs")
    assert len(pairs) == pairs["seed"].nunique() * 2 * recipe.PAIRS
    assert not pairs.duplicated(["seed", "model", "source"]).any()
    assert (pairs["p_0"] > recipe.SURE).all() and (pairs["p end"] > pairs["p_0"] - recipe.DELTA - 1e-3).all()
    wide = pairs.pivot(index=["seed", "source"], columns="model", values=["target", "second target", "start"])
    for name in ("target", "second target", "start"):
        assert np.array_equal(wide[name]["narrow"], wide[name]["robust"])


def test_walks_cut_at_even_distance_are_even():
    pairs = papers.results("blind-spots", "pairs").pivot(index=["seed", "source"], columns="model")
    for which, ends in {"even first": "LST, on", "even second": "second"}.items():
        far = pairs[ends].max(axis=1)
        apart = (pairs[which]["narrow"] - pairs[which]["robust"]).abs()
        assert apart.median() < 0.005 and (pairs[which].max(axis=1) - far).abs().median() < 0.005


def test_the_frames_are_pictures_of_the_steps_that_were_measured():
    import io

    from PIL import Image

    frames = papers.tensors("blind-spots", "frames")
    assert [int(name.split()[1]) for name in sorted(frames, key=lambda n: int(n.split()[1]))] == list(
        recipe.SHOWN
    )
    assert {Image.open(io.BytesIO(f.numpy())).size for f in frames.values()} == {(recipe.SIDE, recipe.SIDE)}
    assert set(recipe.SHOWN) <= set(papers.results("blind-spots", "photo")["step"])
