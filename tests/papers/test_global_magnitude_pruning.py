"""The method cells of the global magnitude pruning notebook, used without the notebook."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbkit import models, papers, sparsity
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
    assert gmp.below_minimum(plain, 20) == ["1.weight"] and not gmp.below_minimum(plain, 0)
    for repair in (gmp.mt_rescaled, gmp.mt_protected):  # 20 % of 6 weights: T = 1
        masks = repair(model, 0.5, 20)
        assert masks.kept() == {"0.weight": 2, "1.weight": 1}
        assert kept_values(model, masks) == {300, -400, -6}


def test_rescaling_stops_where_only_untouched_layers_could_give():
    model = linear([[100, -200], [300, -400]], [[0.5, -6]])
    with pytest.raises(ValueError, match="rescaling stops at 1 of 2"):
        gmp.mt_rescaled(model, 1 / 3, 20)
    assert gmp.mt_protected(model, 1 / 3, 20).kept() == {"0.weight": 3, "1.weight": 1}


@pytest.mark.parametrize("repair", [gmp.mt_rescaled, gmp.mt_protected])
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
    for repair in (gmp.mt_rescaled, gmp.mt_protected):
        try:
            masks = repair(model, kappa, mt)
        except ValueError as error:
            assert sum(least.values()) > sum(plain.kept().values()) or "rescaling stops" in str(error)
            continue
        assert sum(masks.kept().values()) == sum(plain.kept().values())
        assert not gmp.below_minimum(masks, mt)
        for name, w in sparsity.prunable(model).items():  # within a layer the largest stay
            inside, outside = w[masks[name]].abs(), w[~masks[name]].abs()
            assert not len(inside) or not len(outside) or inside.min() >= outside.max()
        if not gmp.below_minimum(plain, mt):
            assert masks == plain


def test_every_criterion_removes_the_same_number():
    model = net()
    fallen = {c: gmp.prune(model, c, 0.87, (x, y)) for c in gmp.CRITERIA}
    assert len({sum(m.kept().values()) for m in fallen.values()}) == 1
    assert fallen["random in global's layers"].kept() == fallen["global"].kept()
    assert fallen["random in global's layers"] != fallen["global"]
    shares = fallen["uniform"].densities().values()
    assert max(abs(share - 0.13) for share in shares) < 0.03  # 36 weights in the first layer
    assert gmp.prune(model, "random", 0.87, seed=1) != fallen["random"]


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
    gmp.recalibrate(model, x)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_in_gradual_pruning_nothing_returns(monkeypatch):
    seen, flush = [], sparsity.Masks.post_step

    def watched(masks, net):
        flush(masks, net)
        seen.append({name: w != 0 for name, w in sparsity.prunable(net).items()})
        return net

    monkeypatch.setattr(sparsity.Masks, "post_step", watched)
    gmp.gradual(net(), 0.9, (x, y), rounds=4, every=2, batch=6)
    assert len(seen) == 1 + 10  # once before the first update
    for a, b in zip(seen, seen[1:], strict=False):
        assert all(not (b[name] & ~a[name]).any() for name in a)


def test_gradual_needs_enough_updates():
    with pytest.raises(ValueError, match="1 updates are too few for 4 rounds"):
        gmp.gradual(net(), 0.8, (x, y), rounds=4, every=2, batch=60)


def test_recalibrated_statistics_are_those_of_the_images():
    model = net()
    fresh = gmp.recalibrate(model, x, batch=30)
    maps = model.conv1(x)
    torch.testing.assert_close(fresh.bn1.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        fresh.bn1.running_var, maps.var((0, 2, 3)), rtol=2e-2, atol=1e-5
    )  # of two halves
    assert fresh.bn1.momentum == model.bn1.momentum and not fresh.training
    with pytest.raises(ValueError, match="no BatchNorm"):
        gmp.recalibrate(net(norm=False), x)


def test_work_is_weighted_by_positions():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(18, 1, bias=False))
    cost = sparsity.flops(model, torch.zeros(1, 1, 3, 3))  # 2 weights at 9 places, 18 at one
    masks = sparsity.Masks(
        {"0.weight": torch.tensor([True, False]).view(2, 1, 1, 1), "2.weight": torch.ones(1, 18)}
    )
    assert gmp.work_kept(masks, cost) == (9 + 18) / 36


@pytest.mark.parametrize("call", [
    lambda m: gmp.global_mp(m, 1.0), lambda m: gmp.global_mp(m, -0.1), lambda m: gmp.prune(m, "global", 1.0),
    lambda m: gmp.prune(m, "size", 0.5), lambda m: gmp.prune(m, "SNIP", 0.5), lambda m: gmp.mt_rescaled(m, 1.0),
    lambda m: gmp.global_mp(nn.ReLU(), 0.5), lambda m: gmp.mt_protected(nn.ReLU(), 0.5),
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
    for call in (gmp.global_mp, gmp.mt_rescaled, gmp.mt_protected):
        with pytest.raises(NotFinite):
            call(model, 0.5)
