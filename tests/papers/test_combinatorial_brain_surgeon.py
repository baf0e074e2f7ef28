"""Pruning block by block: the quadratic problem, its solvers, the search, and the tables its recipe stored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import papers, recipes, sparsity, training
from nbkit.errors import LayerNotFound

cbs = papers.method("combinatorial-brain-surgeon")
recipe = recipes.load("papers/combinatorial-brain-surgeon/recipe.py")


def random_problem(b: int, seed: int):
    """g, H, w0 and the x of now, in float64."""
    chance = torch.Generator().manual_seed(seed)
    g, w0 = torch.randn(2, b, generator=chance, dtype=torch.float64)
    H = torch.randn(b, b, generator=chance, dtype=torch.float64)
    now = torch.zeros(b, dtype=torch.float64)
    now[torch.randperm(b, generator=chance)[: b // 2]] = 1
    return g, H + H.T, w0, now


def feasible(b: int, k: int):
    """Every x of b zeros and ones with k ones."""
    for ones in itertools.combinations(range(b), k):
        x = torch.zeros(b, dtype=torch.float64)
        x[list(ones)] = 1
        yield x


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 4)).to(device)


@pytest.fixture
def data(device):
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.randn(12, 4, generator=torch.Generator().manual_seed(2))).argmax(1)
    return x.to(device), y.to(device)


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# the quadratic problem


@pytest.mark.parametrize("b", [8, 9, 10])
def test_q_and_its_constant_are_the_second_order_model_for_every_feasible_x(b):
    g, H, w0, now = random_problem(b, seed=b)
    w = w0 * (1 - now)
    Q, c = cbs.problem(g, H, w0, w, alpha_g=0.75, rho=0.001)
    assert torch.equal(Q, Q.T)
    for x in feasible(b, int(now.sum())):
        delta = w0 * (1 - x) - w
        direct = 0.75 * g @ delta + delta @ H @ delta / 2 + 0.001 * delta @ delta
        torch.testing.assert_close(x @ Q @ x + c, direct)
    torch.testing.assert_close(now @ Q @ now + c, torch.zeros((), dtype=torch.float64))


def test_of_a_quadratic_loss_the_prediction_is_the_true_change():
    chance = torch.Generator().manual_seed(0)
    X, y = torch.randn(50, 9, generator=chance).double(), torch.randn(50, generator=chance).double()
    w0 = torch.randn(9, generator=chance).double()
    now = torch.tensor([1, 0, 1, 0, 1, 0, 0, 1, 0]).double()
    w = w0 * (1 - now)
    g, H = 2 * X.T @ (X @ w - y) / 50, 2 * X.T @ X / 50
    Q, c = cbs.problem(g, H, w0, w, alpha_g=1, rho=0)
    for x in feasible(9, 4):
        true = F.mse_loss(X @ (w0 * (1 - x)), y) - F.mse_loss(X @ w, y)
        torch.testing.assert_close(x @ Q @ x + c, true)


def test_without_curvature_the_largest_w0_g_are_pruned():
    g, _, w0, now = random_problem(12, seed=0)
    Q, _ = cbs.problem(g, torch.zeros(12, 12).double(), w0, w0 * (1 - now), rho=0)
    expected = torch.zeros(12).double().index_fill(0, (w0 * g).topk(6).indices, 1)
    for solver in (cbs.full, cbs.diagonal):
        assert torch.equal(solver(Q, now)[1], expected)


def test_a_diagonal_hessian_is_solved_exactly_by_the_k_lowest_entries():
    g, H, w0, now = random_problem(10, seed=3)
    Q, _ = cbs.problem(g, H.diagonal().diag(), w0, w0 * (1 - now))
    assert torch.equal(Q, Q.diagonal().diag())
    best = min(feasible(10, 5), key=lambda x: (x @ Q @ x).item())
    assert torch.equal(cbs.diagonal(Q, now)[1], best)


# annealing


@pytest.mark.parametrize("b", [8, 10, 12])
def test_annealing_finds_what_enumeration_finds(b):
    g, H, w0, now = random_problem(b, seed=b)
    Q, _ = cbs.problem(g, H, w0, w0 * (1 - now))
    best = min((x @ Q @ x).item() for x in feasible(b, b // 2))
    found = torch.as_tensor(cbs.anneal(Q, now))
    assert (found @ Q @ found).item() == pytest.approx(best) and found.sum() == b // 2


def test_a_sweep_keeps_its_books():
    chance = np.random.default_rng(0)
    Q = chance.normal(size=(20, 20))
    Q = Q + Q.T
    places = np.tile(np.arange(20), (5, 1))
    x = (np.arange(20) < 8).astype(float)
    h, energy = np.tile(Q @ x, (5, 1)), np.full(5, x @ Q @ x)
    cbs.sweep(Q, 8, places, h, energy, 0.1, 50, chance)
    for row in range(5):
        assert sorted(places[row]) == list(range(20))
        x = np.isin(np.arange(20), places[row, :8]).astype(float)
        assert energy[row] == pytest.approx(x @ Q @ x)
        np.testing.assert_allclose(h[row], Q @ x)
    assert len({tuple(sorted(row[:8])) for row in places}) == 5  # restarts go their own ways


def test_annealing_never_ends_above_its_start_and_leaves_alone_what_it_cannot_better():
    Q = np.diag(np.arange(20.0))
    lowest = (np.arange(20) < 7).astype(float)
    assert np.array_equal(cbs.anneal(Q, lowest), lowest)
    assert np.array_equal(cbs.anneal(np.zeros((20, 20)), lowest), lowest)
    assert np.array_equal(cbs.anneal(Q, np.ones(20)), np.ones(20))


def test_the_truncated_solver_sees_no_negative_entry():
    Q = torch.tensor([[-5.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    used, x = cbs.truncated(Q, torch.tensor([0.0, 0, 1]))
    assert torch.equal(used, Q.clamp(min=0)) and x.tolist() != [0, 0, 1]


# the Fisher matrix of a block


def test_gradients_and_fisher_agree_with_one_backward_pass_an_example(net, data):
    x, y = data[0][:15], data[1][:15]
    weight = net[0].weight
    one_by_one = torch.stack(
        [torch.autograd.grad(F.cross_entropy(net(x[n : n + 1]), y[n : n + 1]), weight)[0].flatten() for n in range(15)]
    )
    d, a, loss = cbs.factors(net, "0.weight", x, y)
    torch.testing.assert_close((d.T @ a / 15).flatten(), one_by_one.mean(0))
    block = torch.tensor([0, 7, 100, 359], device=weight.device)
    columns = one_by_one[:, block]
    torch.testing.assert_close(cbs.fisher(d, a, block), columns.T @ columns / 15)
    assert loss == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-5)


# the search


def test_the_first_mask_is_the_kits_and_the_extremes_are_fixed(net):
    scores = sparsity.magnitude(net)
    layers = cbs.begin(net, scores, 0.25, b=16)
    masks = sparsity.mask_from_scores(scores, 0.75, "layer")
    for name, layer in layers.items():
        assert torch.equal(layer.keep.cpu(), masks[name].flatten())
        assert torch.equal(net.get_parameter(name).flatten(), layer.w0 * layer.keep)
        score, fixed, n, kept = scores[name].flatten(), ~layer.free.cpu(), len(layer.w0), int(layer.keep.sum())
        assert int(fixed.sum()) == round(0.42 * (n - kept)) + round(0.35 * kept)
        assert score[~fixed].max() <= score[fixed & layer.keep.cpu()].min()


def test_a_search_keeps_density_original_values_and_what_is_fixed(net, data):
    before = training.state(net)
    layers = cbs.begin(net, sparsity.magnitude(net), 0.3, b=16)
    fixed = {name: (~layer.free, layer.keep.clone()) for name, layer in layers.items()}
    net.train()
    table = cbs.icbs(net, layers, *data, steps=12, batch=30, b=16, watch=lambda _: {"seen": 1}, every=4)
    assert net.training and all(p.grad is None for p in net.parameters())
    assert table["seen"].notna().sum() == 4 and table["swaps"].sum() > 0
    for name, layer in layers.items():
        held, kept = fixed[name]
        assert int(layer.keep.sum()) == int(kept.sum()) and torch.equal(layer.keep[held], kept[held])
        assert torch.equal(net.get_parameter(name).flatten(), before[name].flatten() * layer.keep)
    assert torch.equal(net[0].bias, before["0.bias"])


def test_larger_layers_get_more_steps_by_the_logarithm_of_their_size():
    lenet = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    layers = cbs.begin(lenet, sparsity.magnitude(lenet), 0.05)
    x, y = torch.rand(4, 784), torch.arange(4)
    turns = cbs.icbs(lenet, layers, x, y, b=4, batch=4, solver=cbs.diagonal)["layer"]
    assert turns.value_counts().to_dict() == {"0.weight": 25, "2.weight": 21, "4.weight": 14}


def test_a_block_holds_the_doubtful_of_both_sides_and_none_that_rests(net, data):
    layer = cbs.begin(net, sparsity.magnitude(net), 0.3, b=16)["0.weight"]
    score = torch.rand(360, generator=torch.Generator().manual_seed(0)).to(layer.w0.device)
    block = cbs.choose(layer, score, 16)
    pruned, kept = layer.free & ~layer.keep, layer.free & layer.keep
    assert len(block) == 16 and set(block[:8].tolist()) == set(score.masked_fill(~pruned, -1).topk(8).indices.tolist())
    assert set(block[8:].tolist()) == set(score.masked_fill(~kept, 2).topk(8, largest=False).indices.tolist())
    layer.tabu.extend(block.tolist())
    assert not set(block.tolist()) & set(cbs.choose(layer, score, 16).tolist())


def test_a_step_predicts_the_change_and_says_nothing_where_a_side_is_empty(net, data):
    layer = cbs.begin(net, sparsity.magnitude(net), 0.3, b=16)["0.weight"]
    before = training.evaluate(net, *data)[0]
    done = cbs.step(net, layer, *data, b=16, rho=0)
    assert done["true"] == pytest.approx(training.evaluate(net, *data)[0] - before, abs=1e-6)
    assert done["predicted"] < 0 and 0 < done["swaps"] <= 8
    layer.free[layer.keep] = False
    nothing = {"predicted": pytest.approx(0, abs=1e-6), "true": pytest.approx(0, abs=1e-6), "swaps": 0}
    assert cbs.step(net, layer, *data, b=16) == nothing
    layer.free[:] = False
    assert cbs.step(net, layer, *data, b=16) == nothing


# bad input: a clear error, and the model as it was


@pytest.mark.parametrize(("density", "word"), [(0, "density 0"), (1, "density 1"), (1e-6, "keeps 0 of"), (-1, "some")])
def test_a_density_that_leaves_nothing_to_choose(net, density, word):
    before = training.state(net)
    with pytest.raises(ValueError, match=word):
        cbs.begin(net, sparsity.magnitude(net), density)
    assert same(net, before)


def test_scores_that_do_not_fit(net):
    before, good = training.state(net), sparsity.magnitude(net)
    for bad in (torch.ones(3, 3), torch.full((4, 30), torch.nan)):
        with pytest.raises(ValueError, match=r"finite and \(4, 30\)"):
            cbs.begin(net, {**good, "2.weight": bad}, 0.3)
    with pytest.raises(LayerNotFound, match="5"):
        cbs.begin(net, {**good, "5.weight": torch.ones(3, 3)}, 0.3)
    assert same(net, before)


def test_no_images_or_another_kind_of_layer(net, data):
    layers = cbs.begin(net, sparsity.magnitude(net), 0.3, b=16)
    before, masks = training.state(net), {name: layer.keep.clone() for name, layer in layers.items()}
    for x, y in ((data[0][:0], data[1][:0]), (data[0], data[1][:3])):
        with pytest.raises(ValueError, match="inputs"):
            cbs.icbs(net, layers, x, y, b=16)
    for some, wrong in (({}, {}), (layers, {"steps": 0}), (layers, {"b": -3}), (layers, {"batch": 0})):
        with pytest.raises(ValueError, match="at least one"):
            cbs.icbs(net, some, *data, **wrong)
    assert same(net, before) and all(torch.equal(layers[n].keep, mask) for n, mask in masks.items())
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="Linear"):
        cbs.factors(conv, "0.weight", torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))


def test_problems_that_are_none():
    Q, x = np.eye(4), np.array([1, 1, 0, 0])
    for bad in (np.eye(3), np.triu(np.ones((4, 4))), np.eye(4) * np.nan):
        with pytest.raises(ValueError, match="symmetric"):
            cbs.anneal(bad, x)
    with pytest.raises(ValueError, match="0 and 1"):
        cbs.anneal(Q, np.array([1, 2, 0, 0]))


# what the recipe adds, and what it stored


def test_swapping_all_trades_as_many_as_both_sides_have():
    x = torch.tensor([1.0, 1, 1, 0, 0])
    assert recipe.swap_all(torch.eye(5), x)[1].tolist() == [0, 0, 1, 1, 1]


def test_wanda_ranks_within_rows_and_its_total_is_exact(net, data):
    plain = recipe.wanda(net, data[0].to(net[0].weight.device), "0.weight")
    torch.testing.assert_close(plain, (net[0].weight.detach().abs() * data[0].norm(dim=0)).cpu())
    score = recipe.by_row(plain)
    assert torch.equal(score.argsort(1), plain.argsort(1))
    rows = cbs.begin(net, {"0.weight": score}, 0.3)["0.weight"].keep.view(30, 12).sum(1)
    assert int(rows.sum()) == 108 and set(rows.tolist()) == {3, 4}


def test_every_arm_is_stored_for_every_seed():
    table = papers.results("combinatorial-brain-surgeon")
    for density in recipe.DENSITIES:
        for seed in range(10, 15):
            for arm, options in recipe.arms(cbs, density, seed).items():
                steps = table.query("density == @density and arm == @arm and seed == @seed")["step"]
                assert steps.tolist() == list(range(0, options.get("steps", 60) + 1, 5)), (density, seed, arm)
    assert len(table.query("arm == 'dense'")) == 5


def test_in_the_stored_steps_the_whole_problem_is_never_predicted_to_get_worse():
    steps = papers.results("combinatorial-brain-surgeon", "steps")
    assert steps.query("arm == 'full Q'")["predicted"].max() <= 1e-6
    assert steps.loc[steps["swaps"].eq(0), "true"].abs().max() < 1e-4
