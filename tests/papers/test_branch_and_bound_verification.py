"""GenBaB: sound bounds above all; then lines, branching points, splits and their order, and the stored tables."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbkit import papers, recipes

bab = papers.method("branch-and-bound-verification")
recipe = recipes.load("papers/branch-and-bound-verification/recipe.py")
SLUG = "branch-and-bound-verification"
NAMES = ("relu", "sigmoid", "tanh", "sin", "gelu")
SEEDS = st.integers(0, 10**6)


class Apply(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.f = recipe.activation(name)["f"]

    def forward(self, x):
        return self.f(x)


def network(name, sizes=(3, 5, 4, 2), seed=0, scale=1.5):
    """A random model in float64 and its net."""
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    layers = [m for layer in layers for m in (layer, Apply(name))][:-1]
    model = nn.Sequential(*layers).double().requires_grad_(False)
    for layer in model[::2]:
        layer.weight.mul_(scale)
    return model, bab.read(model, recipe.activation(name))


def asked(net, eps=0.5, n=2, seed=0):
    """n boxes of different places and widths, and the difference of both outputs."""
    inputs = net["W"][0].shape[1]
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, inputs, generator=g, dtype=torch.float64)
    r = eps * torch.rand(n, inputs, generator=g, dtype=torch.float64)
    return bab.task(net, torch.tensor([[1.0, -1.0]] * n).double(), x - r, x + r)


# soundness


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), SEEDS, st.floats(0, 1), st.integers(0, 6), st.booleans())
def test_no_bound_of_a_domain_lies_above_a_value_met_in_it(name, seed, eps, splits, points):
    model, net = network(name, seed=seed)
    t = asked(net, eps, seed=seed)
    choose = table(name) if points else None
    _, d = bab.branch(net, t, bab.start(net, t, choose, steps=3), splits, choose=choose, steps=3, lr=0.2)
    assert recipe.room(model, net, t, d, points=2000, climbs=200) > -1e-12  # with eps 0 they are equal


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_random_and_a_thousand_attacked_points(name):
    model, net = network(name, (6, 12, 10, 2), seed=1)
    t = asked(net)
    _, d = bab.branch(net, t, bab.start(net, t), 8)
    assert recipe.room(model, net, t, d) > 0


def table(name):
    return recipe.points(name, step=0.25)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.floats(-12, 12), st.floats(0, 8), st.floats(-2, 2), st.sampled_from([1, -1]))
def test_a_line_of_any_slope_stays_on_its_side_and_touches(name, low, length, k, side):
    act = recipe.activation(name)
    l, u = torch.tensor([low]).double(), torch.tensor([min(low + length, 16)]).double()
    k = torch.tensor([k]).double()
    z = torch.cat([l + (u - l) * torch.linspace(0, 1, 5001).double(), torch.zeros_like(l).clamp(l, u)])  # ReLU's kink
    gap = side * (act["f"](z) - k * z - bab.offset(act, k, l, u, side))
    assert gap.min() > 0
    assert gap.min() < bab.SLACK + 4 * ((u - l).item() / 5000) ** 2 + 1e-12


def test_rounding_of_a_pass_is_far_below_the_slack():
    """The pass in 80 bits, numpy's longdouble."""
    _, net = network("tanh", (64, 32, 32, 2), seed=3)
    t = asked(net, 0.05)
    rows = bab.lines(net["act"], t["l"], t["u"])

    def again(kind):
        W, b = ([p.numpy().astype(kind) for p in net[key]] for key in "Wb")
        signed = lambda A, x, y: np.maximum(A, 0) * x + np.minimum(A, 0) * y  # noqa: E731
        A = t["c"].numpy().astype(kind) @ W[-1]
        r = t["c"].numpy().astype(kind) @ b[-1]
        for i, part in reversed(list(enumerate(net["parts"]))):
            kl, ku, bl, bu = rows.numpy().astype(kind)[..., part].transpose(1, 0, 2)
            r = r + signed(A, bl, bu).sum(-1)
            A = signed(A, kl, ku)
            r, A = r + A @ b[i], A @ W[i]
        return signed(A, t["low"].numpy().astype(kind), t["high"].numpy().astype(kind)).sum(-1) + r

    A, r, _ = bab.backward(net, t["c"], rows)
    found = bab.least(A, r, t["low"], t["high"]).numpy()
    assert abs(found - again(np.longdouble)).max() < 1e-3 * bab.SLACK


# known answers


def test_areas_and_points_of_tanh_as_worked_out_by_hand():
    act = recipe.activation("tanh")
    l, u = torch.tensor([[-1.0, 0, -2], [1, 3, 2]]).double()
    torch.testing.assert_close(bab.area(act, l, u), torch.tensor([0.2185, 1.2229, 1.5929]).double(), atol=1e-4, rtol=0)
    for p in (bab.best_point(act, l, u, tries=400), recipe.points("tanh")(l, u)):
        assert p.abs().sub(torch.tensor([0.605, 1.125, 0]).double()).abs().max() < 0.03
        left = bab.area(act, l, p) + bab.area(act, p, u)
        torch.testing.assert_close(left, torch.tensor([0.1510, 0.2421, 1.1183]).double(), atol=4e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_leave_the_least_area_and_area_is_the_integral(name):
    act = recipe.activation(name)
    l, u = torch.tensor([[-2.0, -1, 0.3, -4], [1.5, 3, 2, 4]]).double()
    kl, ku, bl, bu = bab.lines(act, l, u)
    z = l + (u - l) * torch.linspace(0, 1, 2001).double()[:, None]
    between = (ku * z + bu - kl * z - bl).mean(0) * (u - l)
    torch.testing.assert_close(bab.area(act, l, u), between)
    for k in torch.linspace(-1.5, 1.5, 61).double():  # any other slope is worse: area is (height at the middle) (u - l)
        k = k.expand(4)
        mid = (l + u) / 2
        assert (k * mid + bab.offset(act, k, l, u, 1) <= kl * mid + bl + 1e-6).all()
        assert (k * mid + bab.offset(act, k, l, u, -1) >= ku * mid + bu - 1e-6).all()


@pytest.mark.parametrize("name", ["tanh", "sin"])
def test_best_points_of_an_odd_function_mirror_and_beat_the_middle(name):
    act = recipe.activation(name)
    l, u = torch.tensor([[-1.0, 0, -2.5, -3], [2, 3, 1, -1]]).double()
    p = table(name)(l, u)
    assert ((l < p) & (p < u)).all()
    left = bab.area(act, l, p) + bab.area(act, p, u)
    q = table(name)(-u, -l)
    torch.testing.assert_close(bab.area(act, -u, q) + bab.area(act, q, -l), left, atol=1e-6, rtol=0)
    middle = (l + u) / 2
    assert (left <= bab.area(act, l, middle) + bab.area(act, middle, u) + 0.02).all()


def test_outside_the_table_the_point_is_the_middle():
    l, u = torch.tensor([[-7.0, 0.01, 0.0], [1, 0.1, 0.25]]).double()
    torch.testing.assert_close(table("tanh")(l, u), (l + u) / 2)


def test_without_curvature_the_bound_is_exact():
    model, net = network("relu")
    net["act"] = bab.tabled(lambda z: 1 * z)
    t = asked(net)
    W = net["W"][2] @ net["W"][1] @ net["W"][0]
    b = net["W"][2] @ (net["W"][1] @ net["b"][0] + net["b"][1]) + net["b"][2]
    exact = bab.least(t["c"] @ W, t["c"] @ b, t["low"], t["high"])
    torch.testing.assert_close(bab.start(net, t, steps=0)["bound"], exact, atol=1e-5, rtol=0)


def test_one_input_and_four_sines_reach_the_smallest_value_by_splits():
    found = recipe.smallest([1, 4, 1], recipe.activation("sin"), 4, 40)
    assert -1e-9 < found["smallest on a grid"] - found["all splits"] < 2e-3


def relu_minimum(net, t):
    """Exact smallest value of a small ReLU network on its box: a linear program for every pattern of signs."""
    from scipy.optimize import linprog

    W, b = ([p.numpy() for p in net[key]] for key in "Wb")
    box = list(zip(t["low"][0].numpy(), t["high"][0].numpy(), strict=True))
    met = []
    for signs in itertools.product([1, -1], repeat=net["parts"][-1].stop):
        A, r = np.eye(len(box)), np.zeros(len(box))
        limits = []
        for i, part in enumerate(net["parts"]):
            sign = np.array(signs[part])
            A, r = W[i] @ A, W[i] @ r + b[i]
            limits.append((-sign[:, None] * A, sign * r))
            A, r = A * (sign[:, None] > 0), r * (sign > 0)
        c = t["c"][0].numpy() @ W[-1]
        left, right = (np.concatenate(part) for part in zip(*limits, strict=True))
        answer = linprog(c @ A, A_ub=left, b_ub=right, bounds=box)
        if answer.status == 0:
            met.append(answer.fun + c @ r + t["c"][0].numpy() @ b[-1])
    return min(met)


def test_with_all_relus_split_a_long_climb_reaches_the_smallest_value():
    """The domains of every pattern of signs, empty ones among them; the rest of the gap is the climb's."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 3), Apply("relu"), nn.Linear(3, 3), Apply("relu"), nn.Linear(3, 1)]
    net = bab.read(nn.Sequential(*layers), recipe.activation("relu"))
    box = 2 * torch.ones(1, 2).double()
    t = bab.task(net, torch.ones(1, 1).double(), -box, box)
    d = bab.start(net, t, recipe.at_zero, lr=0.1)
    exact = relu_minimum(net, t)
    assert d["bound"].item() < exact - 0.03
    for j in range(6):
        d = bab.split(net["act"], d, torch.full((len(d["bound"]),), j), recipe.at_zero)
    found = bab.improve(net, t, d, 400, 0.03)["bound"].min().item()
    assert -2e-4 < found - exact < 1e-9


def test_a_neuron_that_is_straight_on_its_interval_is_not_split_again():
    """A ReLU once split at 0 has nothing to gain; the search on this network once stayed with it."""
    found = recipe.smallest([2, 3, 3, 1], recipe.activation("relu"), 2, 16, recipe.at_zero)
    assert found["no split"] < -0.03
    assert -1e-9 < found["smallest on a grid"] - found["all splits"] < 5e-3


# the search


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(NAMES), SEEDS)
def test_a_child_is_never_below_its_parent_and_a_batch_is_its_questions_one_by_one(name, seed):
    _, net = network(name, seed=seed)
    t = asked(net, n=3, seed=seed)
    score = recipe.heuristic("weighted")
    history, d = bab.branch(net, t, bab.start(net, t, steps=2), 4, score, steps=2)
    assert (history.diff(dim=0) >= 0).all()
    assert torch.equal(d["who"].view(-1, 3), torch.arange(3).expand(5, 3))
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in t.items()}
        alone, _ = bab.branch(net, one, bab.start(net, one, steps=2), 4, score, steps=2)
        torch.testing.assert_close(alone[:, 0], history[:, i], atol=1e-3, rtol=0)


def test_a_split_cuts_one_neuron_and_leaves_the_parent_as_it_was():
    _, net = network("tanh")
    t = asked(net)
    d = bab.start(net, t, steps=1)
    before = copy.deepcopy(d)
    two = bab.split(net["act"], d, torch.tensor([1, 7]))
    assert all(torch.equal(d[k], before[k]) for k in d)
    p = d["point"][[0, 1], [1, 7]]
    assert torch.equal(two["ends"][[0, 1], 1, [1, 7]], p) and torch.equal(two["ends"][[2, 3], 0, [1, 7]], p)
    assert two["cut"].sum() == 4
    changed = (two["ends"] != d["ends"].repeat(2, 1, 1)).sum()
    assert changed == 4


def test_bbps_is_the_bound_with_one_neurons_lines_exchanged():
    """In the first layer, whose planes are exact: the same by a backward pass from that layer down."""
    _, net = network("tanh")
    t = asked(net)
    d = bab.start(net, t, steps=0)
    found = bab.bbps(net, t, d)
    part = net["parts"][0]
    rows = d["rows"][..., part]
    A1 = d["arrived"][:, part]

    def through(rows):
        a = bab.signed(A1, rows[:, 0], rows[:, 1])
        r = bab.signed(A1, rows[:, 2], rows[:, 3]).sum(-1) + a @ net["b"][0]
        return bab.least(a @ net["W"][0], r, t["low"], t["high"])

    for j in range(part.stop):
        children = []
        for half in (1, 2):
            other = rows[:, 0].clone()
            other[..., j] = rows[:, half, :, j]
            children.append(through(other) - through(rows[:, 0]))
        torch.testing.assert_close(found[:, j], torch.minimum(*children))


def test_bad_input_is_named_and_changes_nothing():
    act = recipe.activation("tanh")
    one = torch.ones(1).double()
    with pytest.raises(ValueError, match="no activation 'tanhh'"):
        recipe.activation("tanhh")
    for l, u in ((one, 0 * one), (-17 * one, one), (one * torch.nan, one)):
        with pytest.raises(ValueError, match="l <= u"):
            bab.lines(act, l, u)
    model, net = network("tanh")
    with pytest.raises(ValueError, match="low <= high"):
        bab.task(net, torch.ones(1, 2).double(), torch.ones(1, 3).double(), torch.zeros(1, 3).double())
    model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="l <= u"):
        asked(bab.read(model, act))
    linear, relu = nn.Linear(3, 3), nn.ReLU()
    for wrong in ((linear, nn.Tanh(), linear), (linear, linear), (linear, relu, linear, linear), (linear, relu)):
        with pytest.raises(ValueError, match="must alternate"):
            bab.read(nn.Sequential(*wrong), recipe.activation("relu"))
    with pytest.raises(ValueError, match="no heuristic"):
        recipe.heuristic("best")


# what is stored


def test_no_stored_bound_lies_above_the_smallest_value_met():
    bounds = papers.results(SLUG, "bounds")
    assert len(bounds) == 4 * recipe.SEEDS * recipe.IMAGES
    arms = bounds.drop(columns=["activation", "seed", "image", "least"])
    assert (arms.max(axis=1) <= bounds["least"]).all()
    assert (arms.min(axis=1) >= bounds["none"] - 0.03).all()  # points begin with the same lines, other steps


def test_stored_networks_are_as_accurate_as_said():
    settings_ = papers.results(SLUG, "settings").query("seed == 0").set_index("activation")
    _, _, x, y = recipe.data()
    for name in recipe.ACTIVATIONS:
        model, *_ = recipe.stored(name, n=1)
        accuracy = (model(x.double()).argmax(1) == y).double().mean().item()
        assert abs(accuracy - settings_.loc[name, "accuracy"]) < 0.006


def test_radii_prove_between_a_fifth_and_four_fifths_on_training_images():
    assert papers.results(SLUG, "settings")["proved"].between(0.2, 0.8).all()
