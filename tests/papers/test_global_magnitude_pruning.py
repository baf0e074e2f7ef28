"""The method cells of the global magnitude pruning notebook, used without the notebook."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from nbkit import models, papers, recipes, sparsity
from nbkit.errors import NotFinite

gmp = papers.method("global-magnitude-pruning")


def linear(*weights: list) -> nn.Sequential:
    """Layers ``0``, ``1``, ... with the given weights; never run, so the shapes need not follow each other."""
    layers = []
    for weight in map(torch.tensor, weights):
        layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        layers[-1].weight = nn.Parameter(weight.float())
    return nn.Sequential(*layers)


def two_layers() -> nn.Sequential:
    return linear([[1, -2], [3, -4]], [[0.5, -6]])


def by_min_keep(model: nn.Module, kappa: float, mt: float = 0.05) -> sparsity.Masks:
    """The kit's own repair, which the notebook compares: protect each layer's largest, one threshold for the rest."""
    T = max(gmp.minimum(sparsity.magnitude_mask(model, 0), mt).values())
    return sparsity.magnitude_mask(model, kappa, min_keep=T)


def below_minimum(masks, mt: float = 0.05) -> list[str]:
    kept = masks.kept()
    return [name for name, least in gmp.minimum(masks, mt).items() if kept[name] < least]


def net(seed: int = 0, norm: bool = True) -> nn.Sequential:
    return models.build("small-cnn", seed=seed, widths=(4, 6, 8), pool=(1, 2), batch_norm=norm)


def kept_values(model: nn.Module, masks) -> set[float]:
    return {v for name, w in sparsity.prunable(model).items() for v in w[masks[name]].tolist()}


draw = torch.Generator().manual_seed(0)
x, y = torch.rand(60, 1, 12, 12, generator=draw), torch.randint(0, 10, (60,), generator=draw)


def test_six_weights_by_hand():
    model = two_layers()
    exact = gmp.prune(model, "global", 0.5)
    assert kept_values(model, exact) == {3, -4, -6}
    assert exact.densities() == {"0.weight": 0.5, "1.weight": 0.5}
    official, t = gmp.global_mp(model, 0.5)  # k = 3: the third smallest is the threshold, and is kept
    assert t == 2 and kept_values(model, official) == {-2, 3, -4, -6}


def test_one_fewer_falls_than_k_and_ties_stay():
    model = net()
    N = sum(w.numel() for w in sparsity.prunable(model).values())
    for kappa in (0.3, 0.5, 0.9, 0.99):
        official, _ = gmp.global_mp(model, kappa)
        assert N - sum(official.kept().values()) == int(kappa * N) - 1
    tied = linear([[1, 1, 1, 1, 2, 2]])
    assert gmp.global_mp(tied, 0.5)[0].sparsity == 0  # the third smallest is 1, and so are all four
    assert gmp.prune(tied, "global", 0.5).sparsity == 0.5
    assert gmp.global_mp(model, 0)[0].sparsity == 0


@pytest.mark.parametrize("kappa", [0.3, 0.9])
def test_torch_ranks_the_same_where_no_two_weights_are_equal(kappa):
    model = net(seed=1)
    ours = gmp.prune(model, "global", kappa)
    peer = copy.deepcopy(model)
    layers = {name: peer.get_submodule(name.removesuffix(".weight")) for name in ours}
    pairs = [(layer, "weight") for layer in layers.values()]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=kappa)
    assert all(torch.equal(layers[name].weight_mask.bool(), mask) for name, mask in ours.items())


def test_one_layer_makes_global_and_uniform_the_same():
    model = linear(torch.randn(8, 9, generator=draw).tolist())
    assert gmp.prune(model, "global", 0.7) == gmp.prune(model, "uniform", 0.7)


def test_a_common_factor_changes_nothing_and_a_factor_on_one_layer_everything():
    model, scaled = net(), net()
    before = gmp.prune(model, "global", 0.8)
    with torch.no_grad():
        for w in sparsity.prunable(scaled).values():
            w.mul_(8)
    assert gmp.prune(scaled, "global", 0.8) == before
    with torch.no_grad():
        model.conv2.weight.mul_(100)
    after = gmp.prune(model, "global", 0.8)
    assert {name for name, kept in after.kept().items() if kept} == {"conv2.weight"}
    assert all(before.kept().values())


def test_scaling_a_layer_by_100_moves_all_pruning_to_the_other_until_the_minimum_protects_it():
    model = linear([[100, -200], [300, -400]], [[0.5, -6]])
    plain = gmp.prune(model, "global", 1 / 3)
    assert plain.kept() == {"0.weight": 4, "1.weight": 0}
    assert below_minimum(plain, 20) == ["1.weight"] and not below_minimum(plain, 0)
    for repair in (gmp.mt_rescaled, by_min_keep):  # 20 % of 6 weights: T = 1
        masks = repair(model, 0.5, 20)
        assert masks.kept() == {"0.weight": 2, "1.weight": 1}
        assert kept_values(model, masks) == {300, -400, -6}


def script(n: dict, s: dict, kappa: float, T: int) -> dict[str, float]:
    """Step 2 of the authors' prune_withMT.py, its formulas written out again: sparsities s of layers of n weights."""
    N = sum(n.values())
    s = {name: 0.0 if n[name] < T else s[name] for name in n}

    def total() -> float:
        return sum(n[name] * s[name] for name in n) / N

    s = {name: value / total() * kappa for name, value in s.items()}
    while True:
        s = {k: 1 - T / n[k] if (1 - s[k]) * n[k] < T < n[k] else s[k] for k in n}
        if total() >= kappa - 1e-12:
            return s
        s = {name: value / now * kappa for now in [total()] for name, value in s.items()}


@pytest.mark.parametrize(("kappa", "mt"), [(0.7, 0.05), (0.8, 0.05), (0.8, 0.2), (0.95, 0.2)])
def test_the_sparsities_are_those_of_the_authors_script(kappa, mt):
    model = models.load("mobilenet-small", seed=0)
    plain = gmp.prune(model, "global", kappa)
    n = {name: mask.numel() for name, mask in plain.items()}
    T = max(gmp.minimum(plain, mt).values())
    theirs = script(n, {name: 1 - d for name, d in plain.densities().items()}, plain.sparsity, T)
    ours = gmp.mt_rescaled(model, kappa, mt).kept()
    assert all(abs(ours[name] - (1 - theirs[name]) * n[name]) <= 1 for name in n)


def test_two_layers_of_the_table():
    model = linear([list(range(1, 1001))], [[4.45 * k for k in range(1, 201)]])
    assert list(gmp.prune(model, "global", 0.9).kept().values()) == [118, 2]
    for repair in (gmp.mt_rescaled, by_min_keep):
        assert list(repair(model, 0.9, 0.84).kept().values()) == [110, 10]


def test_rescaling_stops_where_only_untouched_layers_could_give():
    model = linear([[100, -200], [300, -400]], [[0.5, -6]])
    with pytest.raises(ValueError, match="rescaling ends at 1 of 2"):
        gmp.mt_rescaled(model, 1 / 3, 20)
    assert by_min_keep(model, 1 / 3, 20).kept() == {"0.weight": 3, "1.weight": 1}


@pytest.mark.parametrize("repair", [gmp.mt_rescaled, by_min_keep])
def test_a_minimum_that_cannot_be_met_names_both_numbers(repair):
    model = two_layers()
    with pytest.raises(ValueError, match=r"protects 2 weights.*leaves 1\b"):
        repair(model, 5 / 6, 20)
    with pytest.raises(ValueError, match="percentage"):
        repair(model, 0.5, 101)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 0.97), st.floats(0, 0.6))
def test_repaired_masks_keep_the_minimum_and_the_total(seed, kappa, mt):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(4, generator=generator).exp() ** 3
    shapes = [(3, 3), (20, 20), (10, 30), (4, 25)]
    weights = [torch.randn(s, generator=generator) * c for s, c in zip(shapes, scales, strict=True)]
    model = linear(*(w.tolist() for w in weights))
    plain = gmp.prune(model, "global", kappa)
    least = gmp.minimum(plain, mt)
    for repair in (gmp.mt_rescaled, by_min_keep):
        try:
            masks = repair(model, kappa, mt)
        except ValueError as error:
            assert sum(least.values()) > sum(plain.kept().values()) or "rescaling ends" in str(error)
            continue
        assert sum(masks.kept().values()) == sum(plain.kept().values())
        assert not below_minimum(masks, mt)
        for name, w in sparsity.prunable(model).items():  # within a layer the largest stay
            inside, outside = w[masks[name]].abs(), w[~masks[name]].abs()
            assert not len(inside) or not len(outside) or inside.min() >= outside.max()
        if not below_minimum(plain, mt):
            assert masks == plain


def test_every_criterion_removes_the_same_number():
    model = net()
    fallen = {c: gmp.prune(model, c, 0.87, (x, y)) for c in gmp.CRITERIA}
    assert len({sum(m.kept().values()) for m in fallen.values()}) == 1
    assert fallen["MT"] == gmp.mt_rescaled(model, 0.87)
    shares = fallen["uniform"].densities().values()
    assert max(abs(share - 0.13) for share in shares) < 0.03  # 36 weights in the first layer


def test_pruned_weights_stay_zero_and_the_model_is_left_alone():
    model = net()
    model.train()
    before = copy.deepcopy(model.state_dict())
    masks = gmp.prune(model, "global", 0.8)
    for settings_ in ({}, {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.1}):
        tuned = gmp.fine_tune(model, masks, (x, y), **settings_)
        for name, w in sparsity.prunable(tuned).items():
            assert not w[~masks[name]].any() and not torch.equal(w[masks[name]], before[name][masks[name]])
    slow, last = gmp.gradual(model, 0.8, (x, y), rounds=3, every=2, batch=10)
    assert last.sparsity == masks.sparsity
    assert sparsity.sparsity_report(slow).loc["total", "nonzero"] == sum(last.kept().values())
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("lr", [5e-3, 0.2])  # at the large one, pruned weights move further than many that stay
def test_in_gradual_pruning_nothing_returns(monkeypatch, lr):
    seen, flush = [], sparsity.Masks.post_step

    def watched(masks, net):
        moved = {name: w.detach().abs() for name, w in sparsity.prunable(net).items()}
        flush(masks, net)
        seen.append(({name: w != 0 for name, w in sparsity.prunable(net).items()}, moved, masks))
        return net

    monkeypatch.setattr(sparsity.Masks, "post_step", watched)
    gmp.gradual(net(), 0.5, (x, y), rounds=4, every=2, batch=6, lr=lr)
    assert len(seen) == 1 + 10 + 3  # once before the first update, after each, and with each of three new masks
    for (a, _, _), (b, _, _) in zip(seen, seen[1:], strict=False):
        assert all(not (b[name] & ~a[name]).any() for name in a)
    if lr == 0.2:  # the case that the flush is for: ranked before it, weights would return
        _, moved, masks = seen[2]  # after the second update, before the second mask
        level = sparsity.schedule("cubic", 0.5, 4)[1]
        unflushed = sparsity.mask_from_scores(moved, level)
        assert any((unflushed[name] & ~masks[name]).any() for name in masks)


def test_fine_tuning_is_the_authors_loop_with_the_flush():
    model, steps = net(), []
    masks = gmp.prune(model, "global", 0.8)

    def sgd(parameters, lr, weight_decay):
        return torch.optim.SGD(parameters, lr, momentum=0.875, weight_decay=7e-6)

    plain = {"lr": 0.05, "optimizer": sgd, "schedule": None, "batch": 20}
    ours = gmp.fine_tune(model, masks, (x, y), hold=lambda n: steps.append(masks.post_step(n)), **plain)
    theirs = masks.apply(copy.deepcopy(model), keep_original=False).train()
    optimizer = sgd(theirs.parameters(), 0.05, 0)
    for index in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(20):
        loss = nn.functional.cross_entropy(theirs(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, weight in sparsity.prunable(theirs).items():
            weight.data *= masks[name]
    assert len(steps) == 3
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-6)


def test_gradual_needs_enough_updates():
    with pytest.raises(ValueError, match="1 updates are too few for 4 rounds"):
        gmp.gradual(net(), 0.8, (x, y), rounds=4, every=2, batch=60)


def test_work_is_weighted_by_positions():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(18, 1, bias=False))
    masks = sparsity.Masks(
        {"0.weight": torch.tensor([True, False]).view(2, 1, 1, 1), "2.weight": torch.ones(1, 18)}
    )  # 2 weights at 9 places, 18 at one
    assert gmp.work_kept(model, masks, torch.zeros(1, 1, 3, 3)) == (9 + 18) / 36


@pytest.mark.parametrize("call", [
    lambda m: gmp.global_mp(m, 1.0), lambda m: gmp.global_mp(m, -0.1), lambda m: gmp.prune(m, "global", 1.0),
    lambda m: gmp.prune(m, "size", 0.5), lambda m: gmp.prune(m, "SNIP", 0.5), lambda m: gmp.mt_rescaled(m, 1.0),
    lambda m: gmp.global_mp(nn.ReLU(), 0.5), lambda m: by_min_keep(nn.ReLU(), 0.5),
    lambda m: gmp.gradual(m, 1.5, (x, y)),
])  # fmt: skip
def test_bad_input_raises(call):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        call(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_that_are_not_numbers_raise():
    model = two_layers()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    for call in (gmp.global_mp, gmp.mt_rescaled, by_min_keep):
        with pytest.raises(NotFinite):
            call(model, 0.5)


def test_the_search_for_a_rate_goes_on_in_the_direction_that_helps():
    recipe = recipes.load("papers/global-magnitude-pruning/recipe.py")
    best = {lr: recipe.climb(lambda rate, lr=lr: 1 - 0.1 * abs(recipe.RATES.index(rate) - recipe.RATES.index(lr)))
            for lr in recipe.RATES}  # fmt: skip
    for lr, tried in best.items():
        assert max(tried, key=tried.get) == lr
    assert list(recipe.climb(lambda rate: 0.5)) == [0.005, 0.015, 0.0017]  # nothing helps: it stops
    assert set(recipe.climb(lambda rate: 0.1)) == set(recipe.RATES)  # at chance there is no direction


def test_what_is_stored_follows_from_the_masks():
    stored = papers.results("global-magnitude-pruning")
    rates = papers.results("global-magnitude-pruning", "rates")
    assert set(stored["model"]) == {"vgg-small", "mobilenet-small"} and set(stored["seed"]) == {0, 1, 2}
    tuned = stored[(stored["phase"] == "fine-tuned") & (stored["criterion"] != "gradual")]
    without_data = tuned[tuned["criterion"].isin(["global", "uniform", "ERK", "LAMP", "MT"])]
    for row in without_data[without_data["seed"] == 1].itertuples():
        masks = gmp.prune(models.load(row.model, seed=1), row.criterion, row.kappa, mt=row.mt)
        assert sum(masks.kept().values()) == row.kept and min(masks.kept().values()) == row.least
    keys = ["model", "phase", "method", "level"]
    tried = rates.set_index([*keys, "lr"])["accuracy"]
    for row in stored[stored["phase"].isin(["fine-tuned", "same work"])].itertuples():
        if (row.phase, row.method) != ("same work", "uniform"):  # a copy of rows fine-tuned at these sparsities
            at = tried[row.model, row.phase, row.method, row.level]
            assert at[row.lr] == at.max()
    same = stored[stored["phase"] == "same work"]
    assert ((same["work"] - same["level"]).abs() < 0.001).all()
