"""Maestro: factors, draws, nested lasso and shrinking by hand, training against a loop, cuts, and what is stored."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nbkit import papers, recipes, sparsity
from nbkit.errors import NotFinite

maestro = papers.method("maestro")
recipe = recipes.load("papers/maestro/recipe.py")


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.ReLU(), torch.nn.Linear(9, 7), torch.nn.Linear(7, 3))


@pytest.fixture
def net():
    return maestro.decompose(network())


@pytest.fixture(scope="module")
def pairs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(90, 12, generator=g), torch.randint(0, 3, (90,), generator=g)


def unchanged(model, call, error, match=None):
    before = copy.deepcopy(model.state_dict())
    ranks = maestro.ranks_of(model)
    with pytest.raises(error, match=match):
        call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert maestro.ranks_of(model) == ranks and all(layer.b is None for layer in maestro.layers(model).values())


# factors


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_every_truncation_is_the_best_of_its_rank(shape):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = torch.linalg.svdvals(W).square()
    for b in range(min(shape) + 1):
        off = (maestro.LowRank(W, rank=b).weight - W).square().sum()
        torch.testing.assert_close(off, left[b:].sum())


def test_decomposed_it_answers_as_before_and_the_model_is_left_alone(pairs):
    model = network()
    state = copy.deepcopy(model.state_dict())
    made = maestro.decompose(model)
    torch.testing.assert_close(made(pairs[0]), model(pairs[0]), rtol=1e-5, atol=1e-5)
    assert maestro.ranks_of(made) == {"0": 9, "2": 7, "3": 3}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert isinstance(model[0], torch.nn.Linear)


def test_the_first_b_components_run_inside_and_all_afterwards(net, pairs):
    x = pairs[0]
    whole = net(x)
    with maestro.using(net, {"0": 4, "2": 0}):
        h = F.relu(F.linear(x, net[0].U[:, :4] @ net[0].V[:, :4].T, net[0].bias))
        torch.testing.assert_close(net(x), net[3](net[2].bias.expand(len(h), -1)))
        assert net[0](x).shape == (90, 9)
    torch.testing.assert_close(net(x), whole, rtol=0, atol=0)
    with maestro.using(net, maestro.ranks_of(net)):
        torch.testing.assert_close(net(x), whole, rtol=0, atol=0)


def test_decomposing_again_orders_by_svd_and_keeps_the_function(net, pairs):
    net[0].U.data, net[0].V.data = net[0].U.data.flip(1), net[0].V.data.flip(1)
    again = maestro.decompose(net)
    torch.testing.assert_close(again(pairs[0]), net(pairs[0]), rtol=1e-4, atol=1e-5)
    sizes = again[0].U.norm(dim=0) * again[0].V.norm(dim=0)
    torch.testing.assert_close(sizes, torch.linalg.svdvals(net[0].weight))


# draws


def test_every_pair_comes_once_a_round_in_another_order():
    ranks = {"a": 4, "b": 0, "c": 2}
    stream = maestro.draws(ranks, np.random.default_rng(0))
    rounds = [list(itertools.islice(stream, 6)) for _ in range(3)]
    every = {("a", b) for b in range(1, 5)} | {("c", 1), ("c", 2)}
    assert all(set(found) == every for found in rounds)
    assert len({tuple(found) for found in rounds}) == 3


# lasso and shrinking


def test_the_penalty_by_hand_and_group_by_group():
    layer = maestro.LowRank(torch.eye(3))
    layer.U.data = torch.diag(torch.tensor([2.0, 2, 1]))
    layer.V.data = torch.diag(torch.tensor([4.0, 2, 5**0.5]))
    by_hand = (3 + 5**0.5 + 1) + (5 + 3 + 5**0.5)
    assert maestro.penalty(layer).item() == pytest.approx(by_hand)


def test_the_penalty_is_its_definition_and_its_gradient_is_finite_at_zero(net):
    layer = net[0]
    groups = [layer.U[:, b:].norm() + layer.V[:, b:].norm() for b in range(9)]
    torch.testing.assert_close(maestro.penalty(layer), sum(groups))
    layer.U.data[:, 4:] = 0
    layer.V.data[:, 4:] = 0
    maestro.penalty(layer).backward()
    assert layer.U.grad.isfinite().all() and layer.V.grad.isfinite().all()


def test_later_components_are_pressed_harder():
    layer = maestro.LowRank(torch.linalg.qr(torch.randn(6, 6)).Q)
    maestro.penalty(layer).backward()
    pull = (layer.U.grad * layer.U).sum(0)
    assert (pull.diff() > 0).all()


def test_shrinking_drops_exactly_the_zeros_at_the_end(net, pairs):
    net[0].U.data[:, [1, 5, 6, 7, 8]] = 0  # the second is zero, too, and stays: those behind it are not
    net[0].V.data[:, [1, 5, 6, 7, 8]] = 0
    before = net(pairs[0])
    assert maestro.shrink(net, 1e-6) == {"0": 5, "2": 7, "3": 3}
    torch.testing.assert_close(net(pairs[0]), before)
    assert maestro.shrink(net, 1e9) == {"0": 0, "2": 0, "3": 0}
    torch.testing.assert_close(net(pairs[0]), net[3].bias.expand(90, -1))


# training


@pytest.mark.parametrize(("sample", "lam"), [(True, 1e-3), (False, 1e-3), (True, 0.0)])
def test_training_is_the_loop_written_out(monkeypatch, pairs, sample, lam):
    x, y = pairs
    ours = maestro.decompose(network()).double()
    theirs = maestro.decompose(network()).double()
    monkeypatch.setattr(maestro, "BATCH", 30)
    ranks = list(maestro.train(ours, x.double(), y, lam=lam, lr=0.05, epochs=3, sample=sample, seed=4))
    rng = np.random.default_rng(4)
    velocity = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for epoch in range(3):
        stream = maestro.draws(ranks[epoch], rng)
        for step, index in enumerate(torch.from_numpy(rng.permutation(90)).split(30)):
            b = dict([next(stream)]) if sample else {}
            h = x[index].double()
            for name, layer in maestro.layers(theirs).items():
                k = b.get(name, layer.rank)
                h = h @ (layer.U[:, :k] @ layer.V[:, :k].T).T + layer.bias
                h = F.relu(h) if name == "0" else h
            loss = F.cross_entropy(h, y[index])
            for layer in maestro.layers(theirs).values():
                groups = [A[:, k:].square().sum() for A in (layer.U, layer.V) for k in range(A.shape[1])]
                loss = loss + lam * (torch.stack(groups) + 1e-12).sqrt().sum()
            theirs.zero_grad()
            loss.backward()
            rate = 0.05 * 0.5 * (1 + np.cos(np.pi * (epoch + step / 3) / 3))
            with torch.no_grad():
                for name, p in theirs.named_parameters():
                    velocity[name] = 0.9 * velocity[name] + p.grad
                    p -= rate * velocity[name]
        maestro.shrink(theirs, 1e-3)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


def test_a_linear_map_is_learned_as_its_svd_and_not_without_sampling():
    g = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(n, 3, generator=g)).Q for n in (9, 6))
    C = P @ torch.diag(torch.tensor([9.0, 6, 3])) @ Q.T
    off = {}
    for sample in (True, False):
        layer = maestro.LowRank(torch.randn(9, 6, generator=g) / 6**0.5)
        stream = maestro.draws({"map": 6}, np.random.default_rng(0))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        for _ in range(4000):
            layer.b = next(stream)[1] if sample else None
            loss = (layer(torch.eye(6)) - C.T).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cuts = [layer.U[:, :b] @ layer.V[:, :b].T for b in (1, 2, 3)]
        best = [maestro.LowRank(C, rank=b).weight for b in (1, 2, 3)]
        off[sample] = max(((a - c).norm() / c.norm()).item() for a, c in zip(cuts, best, strict=True))
    assert off[True] < 0.01 and off[False] > 0.1


# cost and cuts


def test_multiply_adds_are_those_counted_on_a_pass():
    x = torch.zeros(1, 40)
    for b in (1, 7, 20, 30):
        thin = torch.nn.Sequential(torch.nn.Linear(40, b, bias=False), torch.nn.Linear(b, 30))
        counted = sparsity.flops(thin, x)["macs"].sum()
        assert maestro.macs(30, 40, b) == min(counted, 30 * 40)


def test_a_common_factor_is_the_largest_that_fits_and_spares_the_last(net):
    full = maestro.ranks_of(net)
    for share in (0.9, 0.6, 0.4):
        ranks = maestro.proportional(net, share)
        assert maestro.cost(net, ranks) <= share and ranks["3"] == 3
        larger = [k for k in range(1, 1001) if {n: -(-k * r // 1000) for n, r in full.items()}["0"] > ranks["0"]]
        more = {n: -(-larger[0] * full[n] // 1000) for n in ("0", "2")} | {"3": 3}
        assert maestro.cost(net, more) > share
    assert maestro.proportional(net, 1.0) == full


def test_greedy_takes_the_cheapest_block_each_time(net, pairs):
    from nbkit import training

    ranks, path = maestro.ranks_of(net), []
    shapes = {"0": (9, 12), "2": (7, 9), "3": (3, 7)}
    while maestro.cost(net, ranks) > 0.4:
        options = []
        for name, (m, n) in shapes.items():
            r = min(ranks[name], m * n // (m + n))
            if r > 1:
                fewer = ranks | {name: min(int(0.8 * r), r - 1)}
                losses = []
                for some in (ranks, fewer):
                    with maestro.using(net, some):
                        losses.append(training.evaluate(net, *pairs)[0])
                saved = maestro.cost(net, ranks) - maestro.cost(net, fewer)
                options.append(((losses[1] - losses[0]) / saved, fewer))
        ranks = min(options, key=lambda option: option[0])[1]
        path.append(ranks)
    assert recipe.greedy(net, *pairs, 0.4) == ranks and len(path) > 2
    assert recipe.greedy(net, *pairs, 0.4, start=path[0]) == ranks
    assert recipe.greedy(net, *pairs, 1.0) == maestro.ranks_of(net)


# bad input


def test_ranks_that_are_not_there_are_refused(net):
    W = torch.randn(4, 6)
    for rank in (-1, 5):
        with pytest.raises(ValueError, match="ranks 0 to 4"):
            maestro.LowRank(W, rank=rank)
    for wrong in ({"0": 10}, {"0": -1}, {"nowhere": 1}):
        unchanged(net, lambda wrong=wrong: maestro.using(net, wrong).__enter__(), ValueError, "ranks")
    with pytest.raises(ValueError, match="LowRank"):
        maestro.layers(network())
    with pytest.raises(ValueError, match="LowRank"):
        maestro.ranks_of(maestro.decompose(torch.nn.ReLU()))
    with pytest.raises(ValueError, match="nowhere"):
        maestro.decompose(network(), {"0": 2, "nowhere": 1})
    with pytest.raises(ValueError, match="lambda"):
        next(maestro.draws({"a": 0}, np.random.default_rng(0)))


def test_settings_that_make_no_sense_are_refused_and_change_nothing(net, pairs):
    x, y = pairs
    for settings in ({"lam": -1}, {"lam": float("nan")}, {"lr": 0}, {"epochs": 0}, {"first": 10}, {"first": -1}):
        unchanged(net, lambda s=settings: list(maestro.train(net, x, y, **({"lam": 0.0} | s))), ValueError)
    for few in (x[:3], x[:0]):
        unchanged(net, lambda few=few: list(maestro.train(net, few, y[: len(few) // 2], lam=0.0)), ValueError)
    for eps in (-1.0, float("nan")):
        unchanged(net, lambda eps=eps: maestro.shrink(net, eps), ValueError, "eps")
    unchanged(net, lambda: maestro.proportional(net, 0.01), ValueError, "share")
    for share, block in ((0.0, 0.2), (0.5, 0.0), (0.5, 2.0), (0.01, 0.2)):
        unchanged(net, lambda s=share, b=block: recipe.greedy(net, x, y, s, block=b), ValueError, "share")


def test_from_a_later_epoch_the_schedule_goes_on(net, pairs):
    other = copy.deepcopy(net)
    fast = list(maestro.train(net, *pairs, lam=0.0, epochs=10, first=9, sample=False))
    lr = 0.02 * 0.5 * (1 + np.cos(0.9 * np.pi))
    slow = list(maestro.train(other, *pairs, lam=0.0, lr=lr, epochs=1, sample=False))
    assert len(fast) == len(slow) == 2
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_loss_that_is_not_finite_stops_training_before_the_step(net, pairs):
    broken = pairs[0].clone()
    broken[:] = float("nan")
    unchanged(net, lambda: list(maestro.train(net, broken, pairs[1], lam=0.0)), NotFinite)


# what is stored


def test_every_arm_is_stored_for_five_seeds_of_both_sets():
    table = papers.results("maestro")
    seeds = table.groupby(["set", "who", "share"])["seed"].nunique()
    assert (seeds == 5).all()
    cut = table[~table["who"].str.endswith("uncut")]
    assert (cut["macs"] <= cut["share"] + 1e-4).all()
    both = table[table["who"].isin(["Maestro", "dense SVD, Maestro's ranks"]) & table["set"].isin(recipe.SETS)]
    assert (both.groupby(["set", "seed", "share"])["macs"].nunique() == 1).all()


def test_labels_tell_the_arms_apart():
    assert recipe.label({"arm": "dense", "order": "SVD", "rule": "greedy"}) == "dense SVD, greedy"
    assert recipe.label({"arm": "Maestro", "order": "lot 2", "rule": "proportional"}) == "Maestro, by lot"
    assert recipe.label({"arm": "dense", "order": "own", "rule": "none"}) == "dense, uncut"
    assert recipe.label({"arm": "dense", "order": "SVD", "rule": "greedy, tuned"}) == "dense SVD, tuned"


def test_the_order_by_lot_is_the_same_function_with_the_components_left(net, pairs):
    maestro.shrink(net, 1e-6)
    net[0].rank = 5
    dealt = recipe.dealt(net, 0)
    torch.testing.assert_close(dealt(pairs[0]), net(pairs[0]), rtol=1e-4, atol=1e-5)
    assert not torch.equal(dealt[0].U, net[0].U) and torch.equal(dealt[0].U[:, 5:], net[0].U[:, 5:])
