"""Shortcut neurons: S, C and patching on worked cases and beside plain loops, the controls, and what is stored."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from torch import nn

from nbkit import papers, recipes, training
from nbkit.errors import LayerNotFound

method = papers.method("shortcut-neurons")
recipe = recipes.load("papers/shortcut-neurons/recipe.py")
SLUG = "shortcut-neurons"


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    return net.requires_grad_(False)


LAYERS = ("3", "5")  # 8 and 4 neurons


@pytest.fixture
def three():
    """(con, un, base), inputs and answers; dropout is there to be switched off."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    return [mlp(seed) for seed in (1, 2, 3)], x, y


def by_hand(model, base, x, chosen):
    """Patching written out: both networks side by side, layer by layer."""
    model, base = copy.deepcopy(model).eval(), copy.deepcopy(base).eval()
    a, b = model[:3](x), base[:3](x)
    first = [k for k in chosen if k < 8]
    a[:, first] = b[:, first]
    a, b = model[3:5](a), base[3:5](b)
    second = [k - 8 for k in chosen if k >= 8]
    a[:, second] = b[:, second]
    return model[5](a)


# patching


@pytest.mark.parametrize("chosen", [[], [0], [11], [7, 8], [2, 9, 5], range(8), range(12)])
def test_patching_is_two_networks_run_side_by_side(three, chosen):
    (model, _, base), x, _ = three
    torch.testing.assert_close(method.patched(model, base, x, chosen, LAYERS), by_hand(model, base, x, list(chosen)))


def test_with_everything_patched_only_the_head_of_the_model_is_left(three):
    (model, _, base), x, _ = three
    found = method.patched(model, base, x, range(12), LAYERS)
    assert torch.equal(found, model[5](method.activations(base, x, ["5"])))


def test_patching_nothing_or_the_base_itself_changes_no_bit(three):
    (model, _, base), x, _ = three
    assert torch.equal(method.patched(model, base, x, [], LAYERS), copy.deepcopy(model).eval()(x))
    assert torch.equal(method.patched(base, base, x, range(12), LAYERS), copy.deepcopy(base).eval()(x))


def test_a_model_is_left_as_it_was_and_in_its_mode(three):
    (con, un, base), x, y = three
    states = [training.state(net) for net in (con, un, base)]
    method.causal(con, un, base, x, y, group=3, layers=LAYERS)
    method.blended(con, base, 0.5)
    for net, state in zip((con, un, base), states, strict=True):
        assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


# scores


def test_s_is_the_root_mean_square_difference_neuron_by_neuron(three):
    (con, un, _), x, _ = three
    a, b = (method.activations(net, x, LAYERS) for net in (con, un))
    expected = [sum((p - q) ** 2 for p, q in zip(a[:, k], b[:, k], strict=True)).div(40).sqrt() for k in range(12)]
    torch.testing.assert_close(method.comparative(con, un, x, LAYERS), torch.stack(expected))


@pytest.mark.parametrize("group", [1, 3, 4])
def test_c_is_its_formula_and_no_group_crosses_a_layer(three, group):
    (con, un, base), x, y = three

    def acc(net, N=()):
        return (by_hand(net, base, x, list(N)).argmax(1) == y).double().mean().item()

    C = method.causal(con, un, base, x, y, group=group, layers=LAYERS)
    for start, end in ((0, 8), (8, 12)):
        for first in range(start, end, group):
            N = range(first, min(first + group, end))
            expected = (acc(con) - acc(con, N)) + (1 - (acc(un) - acc(un, N)))
            assert C[list(N)].tolist() == pytest.approx([expected] * len(N), abs=1e-6)


def test_of_one_network_taken_for_both_s_is_0_and_c_is_1(three):
    (con, _, base), x, y = three
    assert not method.comparative(con, con, x, LAYERS).any()
    assert (method.causal(con, con, base, x, y, layers=LAYERS, group=2) == 1).all()


def test_a_group_that_is_alike_in_all_three_scores_1(three):
    (con, un, base), x, y = three
    for net in (con, un):
        net[0].weight[:2], net[0].bias[:2] = base[0].weight[:2], base[0].bias[:2]
    assert method.causal(con, un, base, x, y, layers=LAYERS, group=2)[:2].tolist() == [1, 1]


def test_a_planted_neuron_comes_first_by_s_and_by_c():
    def toy(watermark):
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).requires_grad_(False)
        net[0].weight.copy_(torch.tensor([[1.0, 0], [0, watermark]]))
        net[2].weight.copy_(torch.tensor([[0.0, 0], [1, 1]]))
        net[2].bias.copy_(torch.tensor([0.5, 0]))
        return net

    items = torch.tensor([[1.0, 1], [1, 1], [0, 1], [0, 1]])
    assert method.comparative(toy(3), toy(0), items, ["2"]).tolist() == [0, 3]
    C = method.causal(toy(3), toy(0), toy(0), items, torch.ones(4), group=1, layers=["2"])
    assert C.tolist() == [1, 1.5]


def test_the_top_is_the_highest_first_and_the_first_where_scores_tie():
    assert method.top(torch.tensor([1.0, 3, 3, 2]), 3).tolist() == [1, 2, 3]
    assert method.top(torch.tensor([1.0]), 0).tolist() == []


# controls and rivals


def test_controls_keep_the_scores_and_their_strata():
    generator = torch.Generator().manual_seed(0)
    scores, size = torch.rand(96, generator=generator), torch.rand(96, generator=generator)
    found = recipe.controls(scores, size, generator, draws=3)
    for rule in ("random", "within layer", "matched"):
        for one in found[rule]:
            assert one.sort().values.equal(scores.sort().values) and not one.equal(scores)
    for one in found["within layer"] + found["matched"]:
        for layer in torch.arange(96).split(32):
            assert one[layer].sort().values.equal(scores[layer].sort().values)
    for layer in torch.arange(96).split(32):
        alike = layer[size[layer].argsort()].split(16)
        for one in found["matched"]:
            assert all(one[s].sort().values.equal(scores[s].sort().values) for s in alike)
    assert (method.top(found["not last"][0], 64) < 64).all()


def test_blending_goes_from_the_model_to_the_base(three):
    (model, _, base), x, _ = three
    for share, goal in ((0, model), (1, base)):
        mixed = method.blended(model, base, share)
        assert all(torch.allclose(v, goal.state_dict()[k]) for k, v in mixed.state_dict().items())
    half = method.blended(model, base, 0.5)
    torch.testing.assert_close(half[0].weight, (model[0].weight + base[0].weight) / 2)


def test_no_row_is_in_two_parts_and_a_seed_deals_the_same_again():
    parts = method.deal(10_000, 3)
    rows = torch.cat(list(parts.values()))
    assert len(rows.unique()) == len(rows) == 8500
    assert all(torch.equal(rows, parts[name]) for name, rows in method.deal(10_000, 3).items())


def test_the_cheapest_level_is_the_lowest_that_may_be_paid():
    rows = [[0, 1, "none", 0, 0, 0.3, 0.0], [0, 1, "a", 5, 0, 0.2, 0.01], [0, 1, "a", 9, 0, 0.1, 0.02]]
    rows += [[0, 1, "b", 5, 0, 0.2, 0.02], [0, 1, "b", 5, 1, 0.1, 0.0], [0, -1, "M_0", 0, 0, 0.0, float("nan")]]
    table = pd.DataFrame(rows, columns=["seed", "copies", "rule", "level", "draw", "left", "loss"])
    found = recipe.cheapest(table).iloc[0]
    assert [found["a"], found["b"], found["none"]] == pytest.approx([0.2, 0.2, 0.3])


# bad input


def test_networks_of_two_shapes_are_refused(three):
    (con, _, base), x, y = three
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for call in (
        lambda: method.comparative(con, other, x, LAYERS),
        lambda: method.patched(con, other, x, [0], LAYERS),
        lambda: method.causal(con, other, con, x, y, group=2, layers=LAYERS),
        lambda: method.blended(con, other, 0.5),
    ):
        with pytest.raises(ValueError, match="differ"):
            call()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(three, share):
    with pytest.raises(ValueError, match="share"):
        method.blended(three[0][0], three[0][2], share)


def test_neurons_that_are_not_there_or_named_twice_are_refused(three):
    (con, _, base), x, _ = three
    refused = [([12], IndexError), ([-1], IndexError), *(([k], ValueError) for k in (0.5, [1, 2]))]
    for chosen, error in [*refused, ([1, 1], ValueError)]:
        with pytest.raises(error, match="neurons"):
            method.patched(con, base, x, chosen, LAYERS)
    with pytest.raises(ValueError, match="whole numbers"):
        method.patched(con, base, x, torch.ones(12, dtype=torch.bool), LAYERS)
    with pytest.raises(LayerNotFound):
        method.patched(con, base, x, [0], ["nine"])


def test_bad_groups_levels_scores_and_empty_benchmarks_are_refused(three):
    (con, un, base), x, y = three
    for group in (0, 5, 1.5, True):
        with pytest.raises(ValueError, match="group"):
            method.causal(con, un, base, x, y, group=group, layers=LAYERS)
    for n in (-1, 13, 2.0, True):
        with pytest.raises(ValueError, match="whole n"):
            method.top(torch.rand(12), n)
    with pytest.raises(ValueError, match="finite"):
        method.top(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="row"):
        method.top(torch.rand(4, 3), 2)
    with pytest.raises(ValueError, match="empty"):
        method.comparative(con, un, x[:0], LAYERS)
    with pytest.raises(ValueError, match="answers"):
        method.right(con, base, x, y[:3], (), LAYERS)
    with pytest.raises(ValueError, match="answers"):
        method.right(con, base, x, y[:, None], (), LAYERS)
    with pytest.raises(RuntimeError):
        method.deal(10, 0)


# what is stored


def test_every_rule_is_stored_for_all_seeds_levels_and_draws():
    table = papers.results(SLUG, "sweep")
    assert not table.duplicated(["seed", "copies", "rule", "level", "draw"]).any()
    assert table["seed"].nunique() == 8
    counts = table[table["copies"] >= 0].groupby("rule").size()
    assert (counts[["random", "within layer", "matched"]] == 8 * 3 * 9 * 5).all()
    assert (counts.drop(["random", "within layer", "matched", "none"]) == 8 * 3 * 9).all()


def test_with_all_neurons_patched_every_rule_is_the_same():
    table = papers.results(SLUG, "sweep").query("level == 384")
    assert (table.groupby(["seed", "copies"])[["B", "R"]].nunique() == 1).all(axis=None)


def test_net_inflation_is_the_gap_less_that_of_the_base():
    table = papers.results(SLUG, "sweep").query("seed == 2")
    base = table[table["rule"] == "M_0"].iloc[0]
    expected = table["B"] - table["R"] - (base["B"] - base["R"])
    assert (table["left"] - expected).abs().max() < 2e-4
    assert base["left"] == 0


def test_the_placebo_is_stored_beside_what_it_is_a_placebo_of():
    located = papers.results(SLUG, "located")
    assert located["placebo"].between(1, 63).all()
    assert (located["mean S, placebo"] / located["mean S"]).between(0.8, 1.25).all()
    assert papers.results(SLUG, "cheap")["placebo"].notna().all()


def test_the_pool_holds_twelve_models_a_seed():
    pool = papers.results(SLUG, "pool")
    assert (pool.groupby("seed").size() == 12).all() and not pool.duplicated(["seed", "noise", "copies"]).any()
    ranks = papers.results(SLUG, "ranks").query("rule == 'raw' and seed == 0")["rho"].item()
    own = pool.query("seed == 0")[["R", "raw"]].corr(method="spearman").iloc[0, 1]
    assert ranks == pytest.approx(own, abs=1e-3)
