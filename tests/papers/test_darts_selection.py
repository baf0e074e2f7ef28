"""Selecting an architecture from a supernet: mixed edges, both rules, training, two estimates, and what is stored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nbkit import models, papers, recipes, training
from nbkit.models.zoo.cells import EDGES, OPERATIONS, operation

SLUG = "darts-selection"
darts = papers.method(SLUG)
recipe = recipes.load(f"papers/{SLUG}/recipe.py")


def supernet(seed=0, operations=OPERATIONS, channels=4):
    torch.manual_seed(seed)
    net = darts.Supernet(operations, channels)
    net.alpha.data.normal_()
    return net


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    return torch.rand(40, 1, 8, 8), torch.arange(40) % 10


# the supernet


@pytest.mark.parametrize("seed", range(3))
def test_an_edge_is_the_weighted_sum_of_its_operations(seed):
    net, x = supernet(seed), torch.randn(5, 4, 6, 6)
    edge, w = net.cells[0]["0-1"], torch.rand(5)
    by_hand = sum(w[o] * edge.ops[o](x) for o in range(5))
    torch.testing.assert_close(edge(x, w), by_hand)


@pytest.mark.parametrize("chosen", [(3, 2, 1), (1, 0, 3), (4, 4, 2)])
def test_with_every_edge_decided_it_is_that_cell_net(digits, chosen):
    net = supernet()
    net.decided = dict(enumerate(chosen))
    plain = models.build("cell-net", ops=tuple(OPERATIONS[o] for o in chosen), cells=2, channels=4, seed=0)
    plain.stem.load_state_dict(net.stem.state_dict())
    plain.bn0.load_state_dict(net.bn0.state_dict())
    plain.head.load_state_dict(net.head.state_dict())
    for number, cell in enumerate((plain.cell1, plain.cell2)):
        for edge, op in zip(EDGES, chosen, strict=True):
            cell.edges[edge].load_state_dict(net.cells[number][edge].ops[op].state_dict())
    torch.testing.assert_close(net.train()(digits[0]), plain.train()(digits[0]))


def test_weights_are_a_softmax_and_one_hot_where_decided():
    net = supernet()
    torch.testing.assert_close(darts.weights(net), net.alpha.softmax(-1))
    net.decided = {2: 3}
    assert darts.weights(net)[2].tolist() == [0, 0, 0, 1, 0]
    torch.testing.assert_close(darts.weights(net)[:2], net.alpha.softmax(-1)[:2])


def test_no_gradient_reaches_the_alpha_of_a_decided_edge(digits):
    net = supernet()
    net.decided = {1: 3}
    F.cross_entropy(net(digits[0]), digits[1]).backward()
    assert net.alpha.grad[1].count_nonzero() == 0 and net.alpha.grad[0].count_nonzero() == 5


# both rules


def test_magnitude_takes_the_largest_but_none():
    net = supernet()
    net.alpha.data = torch.tensor([[9.0, 1, 2, 3, 0], [0, 5, 1, 1, 1], [0, 0, 0, 0, 2]])
    assert [darts.largest(net, edge) for edge in range(3)] == [3, 1, 4]


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_the_change_worked_out_by_hand(digits, seed):
    net = supernet(seed)
    w = net.alpha.softmax(-1).detach()
    net.train()
    with torch.no_grad():
        whole = F.cross_entropy(net(*digits[:1]), digits[1])
        for edge, op in itertools.product(range(3), range(5)):
            less = w.clone()
            less[edge, op] = 0
            logits = net(digits[0], less)
            harm = darts.damage(net, digits, edge)
            assert harm["loss"][op].item() == pytest.approx(
                (F.cross_entropy(logits, digits[1]) - whole).item(), abs=1e-5
            )
            lost = (net(digits[0]).argmax(1) == digits[1]).sum() - (logits.argmax(1) == digits[1]).sum()
            assert harm["acc"][op].item() == pytest.approx(lost.item() / 40, abs=1e-6)


def test_the_strongest_has_the_lowest_accuracy_or_the_highest_loss_left(digits):
    net = supernet()
    for edge, criterion in itertools.product(range(3), ("acc", "loss")):
        left = []
        for op in range(5):
            w = darts.weights(net).detach().clone()
            w[edge, op] = 0
            left.append(darts.probe(net, digits, w)[criterion])
        by_hand = int(np.argmin(left) if criterion == "acc" else np.argmax(left))
        assert darts.strongest(net, digits, edge, criterion) == by_hand


@pytest.mark.parametrize("planted", [1, 2, 3, 4])
def test_the_only_operation_that_does_something_is_found_whatever_alpha_says(planted):
    data = recipes.load("papers/darts-selection/recipe.py").parts()[2]
    net = supernet(channels=8)
    by, g = darts.optimizers(net, 0.3, 0), torch.Generator().manual_seed(0)
    net.decided = {0: planted, 1: 0, 2: 3}
    for _ in range(4):
        darts.epoch(net, data, data, *by, g)
    net.decided = {1: 0, 2: 3}
    for cell in net.cells:
        for op in set(range(5)) - {planted}:
            cell["0-1"].ops[op] = operation("none", 8)
    for draw in range(6):
        net.alpha.data = torch.randn(3, 5, generator=torch.Generator().manual_seed(draw))
        assert darts.strongest(net, data, 0, "loss") == planted


def test_removing_what_has_no_weight_does_nothing(digits):
    net = supernet()
    net.alpha.data = 300 * torch.eye(5)[[3, 1, 2]]
    for edge, sure in enumerate((3, 1, 2)):
        harm = darts.damage(net, digits, edge)["loss"]
        assert harm[[o for o in range(5) if o != sure]].count_nonzero() == 0


def test_a_probe_leaves_every_number_and_the_mode(digits):
    for mode in (True, False):
        net = supernet().train(mode)
        before = training.state(net)
        darts.damage(net, digits, 1)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training == mode


# training


def test_a_step_of_alpha_comes_before_one_of_the_network_each_on_its_own_half(digits):
    net, twin = supernet(), supernet()
    half = (digits[0][:20], digits[1][:20]), (digits[0][20:], digits[1][20:])
    darts.epoch(net, *half, *darts.optimizers(net, 0.1, 0.01), torch.Generator().manual_seed(3), batch=20)
    g = torch.Generator().manual_seed(3)
    rows, drawn = torch.randperm(20, generator=g), torch.randperm(20, generator=g)
    sgd, adam = darts.optimizers(twin, 0.1, 0.01)
    twin.train()
    F.cross_entropy(twin(half[1][0][drawn]), half[1][1][drawn]).backward()
    adam.step()
    twin.zero_grad()
    F.cross_entropy(twin(half[0][0][rows]), half[0][1][rows]).backward()
    torch.nn.utils.clip_grad_norm_(
        [p for p in twin.parameters() if p.requires_grad and p is not twin.alpha], 5
    )
    sgd.step()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_alpha_stays_where_it_has_no_optimizer_and_the_scales_of_batchnorm_always(digits):
    net = supernet()
    before = training.state(net)
    darts.epoch(net, digits, digits, *darts.optimizers(net, 0.1, 0), torch.Generator().manual_seed(0))
    assert torch.equal(net.alpha, before["alpha"]) and not torch.equal(net.stem.weight, before["stem.weight"])
    assert all(
        torch.equal(v, before[k])
        for k, v in net.state_dict().items()
        if "ops" in k and k.endswith("bn.weight")
    )


def test_edges_are_decided_one_by_one_and_tuned_between(digits):
    net, seen = supernet(), []

    def rule(given, edge):
        seen.append((edge, dict(given.decided), given.stem.weight.detach().clone()))
        return 2

    assert darts.decide(net, digits, digits, rule, interval=1, seed=5) == ("conv1x1",) * 3
    assert sorted(edge for edge, _, _ in seen) == [0, 1, 2] and [len(d) for _, d, _ in seen] == [0, 1, 2]
    assert not torch.equal(seen[0][2], seen[1][2]) and torch.equal(seen[2][2], net.stem.weight)
    orders = {tuple(darts_order(seed)) for seed in range(30)}
    assert len(orders) == 6


def darts_order(seed):
    net, order = supernet(), []
    darts.decide(net, None, None, lambda n, edge: order.append(edge) or 1, interval=0, seed=seed)
    return order


# two estimates


def test_the_shares_are_those_of_a_search_and_of_the_hand():
    torch.testing.assert_close(darts.shares(torch.tensor([1.0, 4.0])), torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(darts.shares(torch.tensor([1.0, 4.0]), 0.5), torch.tensor([0.875, 0.125]))
    w = torch.linspace(-1, 2, 300_001, dtype=torch.float64)
    for vs, vc, c in ((1, 2, 0.3), (3, 1, -0.5), (2, 2, 1.9)):
        best = w[(w**2 * vs + (1 - w) ** 2 * vc + 2 * w * (1 - w) * c).argmin()].item()
        assert darts.shares(torch.tensor([float(vs), float(vc)]), c)[0].item() == pytest.approx(
            best, abs=2e-5
        )


# bad input


def test_bad_input_is_named_and_changes_nothing(digits):
    net = supernet()
    before = training.state(net)
    with pytest.raises(ValueError, match="criterion"):
        darts.strongest(net, digits, 0, "accuracy")
    for edge in (3, -1):
        with pytest.raises(ValueError, match="edge"):
            darts.damage(net, digits, edge)
        with pytest.raises(ValueError, match="edge"):
            darts.largest(net, edge)
    for interval in (-1, 0.5):
        with pytest.raises(ValueError, match="interval"):
            darts.decide(net, digits, digits, darts.largest, interval=interval)
    for V, C in (([0.0, 1.0], 0), ([1.0, 1.0], 1.5), ([-1.0, 1.0], 0), ([1.0, float("nan")], 0)):
        with pytest.raises(ValueError, match="variances"):
            darts.shares(torch.tensor(V), C)
    net.decided[1] = 2
    with pytest.raises(ValueError, match="decided"):
        darts.strongest(net, digits, 1)
    with pytest.raises(ValueError, match="decided"):
        darts.decide(net, digits, digits, darts.largest)
    net.decided.clear()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.alpha.data[0, 0] = torch.nan
    for ask in (darts.largest, lambda n, e: darts.strongest(n, digits, e)):
        with pytest.raises(ValueError, match="NaN"):
            ask(net, 0)


# the tables


def test_every_selection_is_there_for_six_seeds():
    choices = papers.results(SLUG, "choices")
    assert not choices.duplicated(["space", "seed", "epoch", "rule"]).any()
    assert (choices.groupby(["space", "epoch", "rule"])["seed"].nunique() == 6).all()
    for column in ("e01", "e02", "e12"):
        assert set(choices[column]) <= set(OPERATIONS)
    assert not (
        choices.query("rule in ['magnitude', 'magnitude, tuned']")[["e01", "e02", "e12"]] == "none"
    ).any(axis=None)


def test_magnitude_is_the_largest_weight_of_the_table():
    strengths = papers.results(SLUG, "strengths").query("space == 'five' and op != 'none'")
    choices = papers.results(SLUG, "choices").query("space == 'five' and rule == 'magnitude'")
    cells = choices.set_index(["seed", "epoch"])[["e01", "e02", "e12"]].set_axis(EDGES, axis=1)
    for (seed, epoch, edge), part in strengths.groupby(["seed", "epoch", "edge"]):
        top = part.loc[part["w"] == part["w"].max(), "op"]
        assert cells.loc[(seed, epoch), edge] in set(top)


def test_weights_sum_to_one_and_fixed_ones_are_equal():
    alphas, strengths = papers.results(SLUG, "alphas"), papers.results(SLUG, "strengths")
    for table in (alphas, strengths):
        assert (table.groupby(["space", "seed", "epoch", "edge"])["w"].sum() - 1).abs().max() < 3e-4
    assert (strengths.query("space == 'fixed'")["w"] == 0.2).all()


def test_the_stored_supernets_have_the_weights_of_the_table():
    vectors = papers.tensors(SLUG, "supernets")
    strengths = papers.results(SLUG, "strengths")
    for name, vector in vectors.items():
        space, moment, seed = name.split()
        net = darts.Supernet()
        torch.nn.utils.vector_to_parameters(vector.float(), net.parameters())
        part = strengths.query(f"space == '{space}' and seed == {seed} and epoch == {moment}")
        assert np.abs(darts.weights(net).detach().numpy().ravel() - part["w"].to_numpy()).max() < 1e-3
