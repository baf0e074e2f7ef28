"""Sparse training: first masks, moves, the loop they share, their rivals, and what the recipe stored."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from nbkit import papers, recipes, sparsity, training
from nbkit.errors import NotFinite

method = papers.method("sparseland")
recipe = recipes.load("papers/sparseland/recipe.py")
WIDTHS = (12, 16, 8, 4)


@pytest.fixture(scope="module")
def data():
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.randn(12, 4, generator=torch.Generator().manual_seed(1))).argmax(1)
    return {"train": (x[:200], y[:200]), "val": (x[200:250], y[200:250]), "test": (x[250:], y[250:])}


def run(name, density, data, **settings):
    options = {"lr": 0.05, "widths": WIDTHS, "steps": 60, "dt": 5, **settings}
    return method.experiment(name, density, data, **options)


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# first masks


@pytest.mark.parametrize("density", [1, 0.5, 0.2, 0.1, 0.05, 0.02])
def test_erk_adds_up_to_the_density_and_is_proportional_below_one(density):
    net = method.mlp(0)
    shares, weights = sparsity.erk(net, 1 - density), sparsity.prunable(net)
    total = sum(shares[name] * w.numel() for name, w in weights.items())
    assert total / method.weights_of(method.WIDTHS) == pytest.approx(density, abs=1e-9)
    factors = {round(d * weights[n].numel() / sum(weights[n].shape), 6) for n, d in shares.items() if d < 1}
    assert len(factors) <= 1 and all(0 < d <= 1 for d in shares.values())


def test_layers_of_equal_shape_get_equal_densities():
    shares = sparsity.erk(method.mlp(0, (8, 8, 8)), 0.7)
    assert list(shares.values()) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("kind", ["ERK", "uniform"])
def test_random_masks_are_exact_in_number_and_drawn_from_the_seed(kind):
    net = method.mlp(0, WIDTHS)
    first, again, other = (method.random_masks(net, 0.3, kind, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sum(first.kept().values()) == round(0.3 * method.weights_of(WIDTHS))


def test_rescaling_keeps_the_size_of_the_signal():
    net = method.mlp(0, (2000, 1000, 4))
    masks = method.random_masks(net, 0.05, "uniform")
    x = torch.randn(50, 2000, generator=torch.Generator().manual_seed(7))  # 0 drew the weights
    before = net[1](x).std()
    method.rescale(net, masks)
    masks.apply(net)
    assert net[1](x).std().item() == pytest.approx(before.item(), rel=0.03)


def test_snip_on_a_linear_model_is_weight_times_gradient_by_hand(data):
    x, y = data["train"][0][:256], data["train"][1][:256]
    net, masks, move = method.begin("SNIP", 0.25, data, widths=(12, 5, 4))
    nn.functional.cross_entropy(net(x), y).backward()
    score = torch.cat([(w * w.grad).abs().flatten() for w in sparsity.prunable(net).values()])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert score[kept].min() > score[~kept].max() and move is method.stay


# moves


def places(mask):
    return set(mask.flatten().nonzero().flatten().tolist())


def brute_force(w, mask, grow, n):
    active = sorted((abs(w[i].item()), i) for i in range(len(w)) if mask[i])
    left = {i for _, i in active[n:]}
    free = sorted((-grow[i].item(), i) for i in range(len(w)) if i not in left)
    return left | {i for _, i in free[:n]}


@pytest.mark.parametrize("seed", range(8))
def test_an_exchange_is_what_sorting_by_hand_gives(seed):
    chance = torch.Generator().manual_seed(seed)
    w, grow = torch.randn(5, 6, generator=chance), torch.rand(5, 6, generator=chance)
    mask = torch.rand(5, 6, generator=chance) < 0.4
    n = int(mask.sum()) // 3
    new = method.exchange(w * mask, mask, grow, n)
    assert places(new) == brute_force((w * mask).flatten(), mask.flatten(), grow.flatten(), n)
    assert new.sum() == mask.sum()


@pytest.mark.parametrize("rule", ["SET", "RigL"])
def test_a_moving_mask_keeps_its_number_in_every_layer_and_stops_at_three_quarters(data, rule):
    model, history, held = run(rule, 0.2, data)
    assert len(held) == 60 and len({tuple(m.kept().values()) for m in held}) == 1
    moved = [t for t, (a, b) in enumerate(itertools.pairwise(held), start=1) if a is not b]
    assert moved == list(range(5, 45, 5))
    assert method.explored(held) > 1 - held[0].sparsity
    assert all(not model.get_parameter(n)[~m].any() for n, m in held[-1].items())


def test_a_static_mask_explores_exactly_its_density(data):
    held = run("static", 0.2, data)[2]
    assert method.explored(held) == 1 - held[0].sparsity


def test_rigl_grows_by_the_gradient_of_the_whole_matrix(data):
    model, masks, move = method.begin("RigL", 0.2, data, widths=WIDTHS, steps=60, dt=5)
    masks.apply(model)
    nn.functional.cross_entropy(model(data["train"][0]), data["train"][1]).backward()
    new = move(5, model, masks)
    share = 0.15 * (1 + math.cos(math.pi * 5 / 45))
    for name, mask in masks.items():
        w = model.get_parameter(name)
        n = math.ceil(share * int(mask.sum()))
        wanted = brute_force(w.detach().flatten(), mask.flatten(), w.grad.abs().flatten(), n)
        assert places(new[name]) == wanted


def test_the_trap_under_enforced_masks_no_absent_weight_has_a_gradient(data):
    model, masks, _ = method.begin("RigL", 0.2, data, widths=WIDTHS)
    masks.apply(model)
    grown = []
    for guard in (masks.enforced(model), None):
        model.zero_grad()
        if guard:
            with guard:
                nn.functional.cross_entropy(model(data["train"][0]), data["train"][1]).backward()
        else:
            nn.functional.cross_entropy(model(data["train"][0]), data["train"][1]).backward()
        grown.append(model[1].weight.grad[~masks["1.weight"]].abs().max().item())
    assert grown[0] == 0 < grown[1]


def test_what_grows_begins_at_zero_and_at_rest(data):
    model, masks, _ = method.begin("static", 0.2, data, widths=WIDTHS)
    masks.apply(model)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    nn.functional.cross_entropy(model(data["train"][0]), data["train"][1]).backward()
    sgd.step()
    masks.post_step(model)
    new = masks.shuffled(3)
    method.begin_at_rest(sgd, model, masks, new)
    for name, mask in new.items():
        w, came = model.get_parameter(name), mask & ~masks[name]
        speed = sgd.state[w]["momentum_buffer"]
        assert came.any() and not w[came].any() and not speed[came].any()
        assert speed[mask & masks[name]].any() and not w[~mask].any()


def test_gradual_pruning_follows_the_cubic_and_its_masks_are_nested(data):
    held = run("GMP", 0.1, data)[2]
    density = [1 - m.sparsity for m in held]
    assert density[0] == density[5] == 1 and density[-1] == pytest.approx(0.1, abs=2e-3)
    for t in range(10, 45, 5):
        wanted = 0.1 + 0.9 * (1 - min(1, (t - 6) / 36)) ** 3
        assert density[t] == pytest.approx(wanted, abs=2e-3)
    assert all((a & b) == b for a, b in itertools.pairwise(held))


# the loop


@pytest.mark.parametrize("name", ["SET", "RigL"])
def test_alpha_zero_is_static_bit_for_bit(data, name):
    static, _, _ = run("static", 0.2, data)
    moving, _, held = run(name, 0.2, data, alpha=0)
    assert same(moving, static.state_dict()) and all(a == b for a, b in itertools.pairwise(held))


@pytest.mark.parametrize("name", method.METHODS[3:])
def test_density_one_is_dense_bit_for_bit(data, name):
    dense = run("dense", 1, data)[0]
    assert same(run(name, 1, data)[0], dense.state_dict())


def test_a_static_training_is_one_with_masked_gradients(data):
    model, masks, move = method.begin("static", 0.2, data, widths=WIDTHS)
    twin = copy.deepcopy(model)
    method.train(model, masks, move, data, lr=0.05, steps=40)
    with masks.enforced(twin):
        training.fit(twin, data["train"], lr=0.05, steps=40, batch=64, optimizer="sgd", schedule=training.cosine())
    assert same(model, twin.state_dict())


def test_the_same_seed_gives_the_same_network_and_another_another(data):
    first, again, other = (run("RigL", 0.2, data, seed=seed)[0] for seed in (1, 1, 2))
    assert same(first, again.state_dict()) and not same(first, other.state_dict())


# rivals


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("density", [0.5, 0.2, 0.05, 0.02])
def test_a_narrow_network_is_the_widest_within_its_budget(even, density):
    found = method.narrow(method.WIDTHS, density, even)
    budget = density * method.weights_of(method.WIDTHS)
    wider = (784, found[1] + 1, found[1] + 1 if even else max(1, round((found[1] + 1) / 2)), 10)
    assert method.weights_of(found) <= budget < method.weights_of(wider)


# bad input


@pytest.mark.parametrize("density", [0, -0.1, 1.5, math.nan])
def test_a_density_outside_its_range_is_refused(data, density):
    net = method.mlp(0, WIDTHS)
    before = training.state(net)
    with pytest.raises(ValueError, match="density"):
        method.random_masks(net, density)
    for name in method.METHODS:
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            method.begin(name, density, data)
    assert same(net, before)


def test_a_layer_that_would_vanish_is_refused():
    with pytest.raises(ValueError, match="without a weight"):
        method.random_masks(method.mlp(0, WIDTHS), 0.005, "uniform")
    with pytest.raises(ValueError, match="not one unit"):
        method.narrow(WIDTHS, 0.01)


@pytest.mark.parametrize("bad", [{"dt": 0}, {"alpha": -0.1}, {"alpha": 1.1}])
def test_bad_settings_are_refused_before_any_training(data, bad):
    with pytest.raises(ValueError, match="needed"):
        run("RigL", 0.2, data, **bad)


def test_unknown_names_are_refused(data):
    with pytest.raises(ValueError, match="'Rigl'"):
        run("Rigl", 0.2, data)
    with pytest.raises(KeyError, match="erk"):
        run("static", 0.2, data, kind="erk")


def test_bad_data_and_masks_change_nothing(data):
    net = method.mlp(0, WIDTHS)
    before, masks = training.state(net), method.random_masks(net, 0.2)
    x, y = data["train"]
    bad = {
        "empty": ({**data, "train": (x[:0], y[:0])}, masks, ValueError),
        "NaN": ({**data, "train": (x * torch.nan, y)}, masks, NotFinite),
        "no val": ({"train": (x, y), "test": (x, y)}, masks, KeyError),
        "mask": (data, sparsity.Masks({"1.weight": torch.ones(3, 3)}), ValueError),
    }
    for case, (parts, m, error) in bad.items():
        with pytest.raises(error):
            method.train(net, m, method.stay, parts, lr=0.1, steps=3)
        assert same(net, before), case


# what is stored


def test_every_method_is_stored_for_every_density_and_three_seeds():
    table = papers.results("sparseland")
    counts = table[table["density"] < 1].groupby("method").size()
    assert set(counts.index) == {*recipe.ARMS, *recipe.SMALL, "prune only"} and (counts == 12).all()
    total = method.weights_of(method.WIDTHS)
    assert (table["weights"] <= table["density"] * total + 1).all()
    assert (table["weights"] >= 0.9 * table["density"] * total).all()


def test_every_learning_rate_is_the_best_on_held_back_pictures():
    lr = recipe.best(papers.results("sparseland", "rates"))
    table = papers.results("sparseland")
    for row in table[table["method"] != "prune only"].itertuples():
        assert row.lr == lr[row.method, recipe.where(row.method, row.density)]


def test_the_budgets_are_equal_within_the_dense_gradients_of_rigl():
    table = papers.results("sparseland", "budgets")
    assert set(table.groupby("method").size()) == {3}
    assert (table["cost"] / 32).between(0.9, 1.1).all()


def test_the_stored_explored_share_is_the_density_where_masks_rest():
    table = papers.results("sparseland").query("density < 1").set_index("method")
    total = method.weights_of(method.WIDTHS)
    assert (table.loc["static ERK", "explored"] * total).round().tolist() == table.loc["static ERK", "weights"].tolist()
    assert (table.loc[["SET", "RigL"], "explored"] > 1.3 * table.loc[["SET", "RigL"], "density"]).all()


def test_what_was_tried_elsewhere_is_stored_for_three_seeds_of_every_method():
    table = papers.results("sparseland", "elsewhere")
    assert (table.groupby(["case", "method"])["seed"].nunique() == 3).all()
    digits = table[table["case"].str.startswith("digits")]
    assert set(digits["density"]) == {0.02, 0.05} and set(digits["method"]) == {"static ERK", "SET", "RigL"}
    for row in table.query("method == 'static ERK'").itertuples():
        assert row.explored == pytest.approx(row.density, abs=1e-4)
