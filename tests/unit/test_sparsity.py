"""Masks from scores: exact counts, ties, allocation between layers, and agreement with torch's own pruning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from nbkit import sparsity as S
from nbkit.errors import LayerNotFound, NotFinite
from nbkit.sparsity import _select


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 4))


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 5),
    )  # fmt: skip


def stable_reference(scores: dict[str, torch.Tensor], remove: int) -> dict[str, torch.Tensor]:
    """The definition: a stable ascending sort of all scores, cut at ``remove``."""
    flat = torch.cat([s.reshape(-1).double() for s in scores.values()])
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[flat.sort(stable=True).indices[:remove]] = False
    parts = mask.split([s.numel() for s in scores.values()])
    return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


tied_scores = st.lists(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.5, -3.0, 1e-30]), min_size=1, max_size=30), min_size=1, max_size=4
)


@settings(deadline=None)
@given(tied_scores, st.floats(0, 1, exclude_max=True), st.sampled_from([_select._SAMPLE, 4]))
def test_counts_are_exact_and_ties_fall_lowest_index_first(lists, sparsity, sample):
    scores = {f"layer{i}": torch.tensor(values) for i, values in enumerate(lists)}
    with pytest.MonkeyPatch.context() as patch:
        # a tiny sample misses its bracket: the search must widen it
        patch.setattr(_select, "_SAMPLE", sample)
        patch.setitem(_select._CHUNK, "cpu", 7)
        masks = S.mask_from_scores(scores, sparsity)
    total = sum(map(len, lists))
    assert total - sum(masks.kept().values()) == round(sparsity * total)
    assert masks == S.Masks(stable_reference(scores, round(sparsity * total)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.9, 0.9999])
def test_the_selection_is_the_stable_sort_for_every_float_type(dtype, sparsity, device):
    values = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    scores = {"a": values[:2].T, "b": values[2]}  # not contiguous, and full of ties in the half types
    expected = stable_reference({n: s.cpu() for n, s in scores.items()}, round(sparsity * values.numel()))
    assert S.mask_from_scores(scores, sparsity) == S.Masks(expected)


def test_infinite_keys_rank_but_nan_is_refused_where_it_would_loop():
    values = torch.tensor([math.inf, -math.inf, 0.0, math.inf])
    assert _select.keep_largest([values], 3)[0].tolist() == [False, False, False, True]
    with pytest.raises(NotFinite):
        _select.keep_largest([torch.full((4,), math.nan)], 2)


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.77, 0.95])
def test_global_masks_agree_with_torch_prune(amount, device):
    model, other = cnn().to(device), cnn().to(device)
    pairs = [(other[i], "weight") for i in (0, 4, 7)]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=amount)
    masks = S.magnitude_mask(model, amount)
    for name, (module, _) in zip(masks, pairs, strict=True):
        assert torch.equal(masks[name], module.weight_mask.bool().cpu())


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.77, 0.95])
def test_layer_masks_agree_with_torch_prune(amount, device):
    model, other = cnn().to(device), cnn().to(device)
    masks = S.magnitude_mask(model, amount, scope="layer")
    for name in masks:
        module = prune.l1_unstructured(other[int(name.split(".")[0])], "weight", amount=amount)
        assert torch.equal(masks[name], module.weight_mask.bool().cpu())


def test_magnitude_mask_is_the_mask_of_the_magnitude_scores(device):
    model = cnn().to(device)
    for kwargs in ({}, {"scope": "layer"}, {"min_keep": 20}):
        assert S.magnitude_mask(model, 0.8, **kwargs) == S.mask_from_scores(S.magnitude(model), 0.8, **kwargs)


def test_the_two_layer_toy_of_global_magnitude_pruning():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
        model[1].weight.copy_(torch.tensor([[0.5, -6.0]]))
    masks = S.magnitude_mask(model, 0.5)
    assert masks["0.weight"].tolist() == [[False, False], [True, True]]
    assert masks["1.weight"].tolist() == [[False, True]]
    assert masks.densities() == {"0.weight": 0.5, "1.weight": 0.5}
    with torch.no_grad():
        for weight in S.prunable(model).values():
            weight.mul_(7.5)
    assert S.magnitude_mask(model, 0.5) == masks, "one constant for all layers changes nothing"
    with torch.no_grad():
        model[0].weight.mul_(100)
    assert S.magnitude_mask(model, 1 / 3).kept() == {"0.weight": 4, "1.weight": 0}, "layer 1 collapses"
    assert S.magnitude_mask(model, 1 / 3, min_keep=1).kept() == {"0.weight": 3, "1.weight": 1}


def test_one_layer_global_equals_layer():
    model = nn.Linear(9, 7)
    assert S.magnitude_mask(model, 0.6) == S.magnitude_mask(model, 0.6, scope="layer")


@settings(deadline=None)
@given(tied_scores, st.floats(0, 0.99), st.integers(0, 12))
def test_min_keep_protects_the_best_and_keeps_the_total(lists, sparsity, min_keep):
    scores = {f"layer{i}": torch.tensor(values) for i, values in enumerate(lists)}
    total = sum(map(len, lists))
    left = total - round(sparsity * total)
    asked = sum(min(min_keep, len(values)) for values in lists)
    if asked > left:
        with pytest.raises(ValueError, match=rf"protects {asked} .* leaves {left} "):
            S.mask_from_scores(scores, sparsity, min_keep=min_keep)
        return
    masks = S.mask_from_scores(scores, sparsity, min_keep=min_keep)
    # protect-then-global by its definition: the protected rank above everything
    protected = {n: stable_reference({n: s}, max(0, len(s) - min_keep))[n] for n, s in scores.items()}
    lifted = {n: s.masked_fill(protected[n], math.inf) for n, s in scores.items()}
    assert masks == S.Masks(stable_reference(lifted, total - left))
    assert all(kept >= min(min_keep, len(v)) for kept, v in zip(masks.kept().values(), lists, strict=True))


def test_min_keep_as_a_fraction_counts_all_prunable_weights():
    model = mlp()
    n = sum(w.numel() for w in S.prunable(model).values())
    with torch.no_grad():
        model[4].weight.mul_(1e-3)
    assert S.magnitude_mask(model, 0.9).kept()["4.weight"] == 0
    assert S.magnitude_mask(model, 0.9, min_keep=0.02).kept()["4.weight"] == int(0.02 * n)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, math.nan, math.inf])
def test_sparsity_must_lie_in_0_to_1(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        S.magnitude_mask(mlp(), sparsity)


def test_bad_arguments_say_what_is_allowed():
    model = mlp()
    for wrong, error, match in [
        ({"sparsity": "0.5"}, TypeError, "number"), ({"sparsity": True}, TypeError, "number"),
        ({"scope": "block"}, ValueError, "'global' or 'layer'"), ({"min_keep": -1}, ValueError, "min_keep"),
        ({"min_keep": 2.0}, ValueError, "fraction"), ({"min_keep": "3"}, TypeError, "min_keep"),
        ({"min_keep": 9, "scope": "layer", "sparsity": 0.9}, ValueError, "protects 9 .* layer '4.weight'.* 5 of 48"),
        ({"layers": "fc"}, LayerNotFound, "'fc'"), ({"exclude": "nope"}, LayerNotFound, "'nope'"),
        ({"exclude": ["0", "2", "4"]}, ValueError, "no prunable"),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            S.magnitude_mask(model, **({"sparsity": 0.5} | wrong))
    with pytest.raises(ValueError, match="no prunable layers"):
        S.magnitude_mask(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), 0.5)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    for criterion in (lambda: S.magnitude_mask(model, 0.5), lambda: S.magnitude(model), lambda: S.lamp(model)):
        with pytest.raises(NotFinite, match=r"'2.weight' holds 1 NaN"):
            criterion()
    with pytest.raises(ValueError, match="no scores"):
        S.mask_from_scores({}, 0.5)


def test_prunable_are_weights_of_linear_and_conv_counted_once():
    model = cnn()
    assert list(S.prunable(model)) == ["0.weight", "4.weight", "7.weight"]
    assert list(S.prunable(model, exclude=["7", "1"])) == ["0.weight", "4.weight"]
    block = nn.ModuleDict({"encoder": cnn(), "head": nn.Linear(5, 5)})
    block["again"] = block["head"]
    assert list(S.prunable(block, layers="encoder")) == [f"encoder.{i}.weight" for i in (0, 4, 7)]
    assert list(S.prunable(block, exclude="encoder")) == ["head.weight"]
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    assert list(S.prunable(tied)) == ["0.weight"]
    prune.l1_unstructured(model[7], "weight", amount=0.5)
    with pytest.raises(ValueError, match="'7' computes its weight"):
        S.prunable(model)


def test_lottery_survivors_of_ten_weights_are_8_6_5():
    layer = nn.Linear(10, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 11.0)[None])
    masks, survivors = S.magnitude_mask(layer, 0), []
    for _ in range(3):
        rounds_before = masks
        masks = S.prune_surviving(masks, S.magnitude(layer), 0.2)
        survivors.append(layer.weight[masks["weight"]].tolist())
        assert (masks & rounds_before) == masks, "nested"
    assert survivors == [[*range(3, 11)], [*range(5, 11)], [*range(6, 11)]]


def test_lenet_300_100_comes_to_the_sizes_of_the_paper():
    torch.manual_seed(0)
    lenet = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    scores = S.magnitude(lenet)
    masks, percent = S.magnitude_mask(lenet, 0), []
    for _ in range(6):
        masks = S.prune_surviving(masks, scores, 0.2, per_layer={"4": 0.1})
        percent.append(100 * (1 - masks.sparsity))
    assert percent == pytest.approx([80.0, 64.0, 51.3, 41.1, 33.0, 26.5], abs=0.2)
    assert masks.kept()["4.weight"] == 531  # 1000 - 100 - 90 - 81 - 73 - 66 - 59


def test_prune_surviving_globally_ranks_survivors_together_and_leaves_rate_0_alone():
    model = mlp()
    scores = S.magnitude(model)
    start = S.magnitude_mask(model, 0.3, scope="layer")
    masks = S.prune_surviving(start, scores, 0.25, scope="global", per_layer={"4": 0})
    assert torch.equal(masks["4.weight"], start["4.weight"])
    before = [start.kept()[n] for n in ("0.weight", "2.weight")]
    assert sum(masks.kept()[n] for n in ("0.weight", "2.weight")) == sum(before) - round(0.25 * sum(before))
    kept = torch.cat([scores[n][masks[n]] for n in ("0.weight", "2.weight")])
    gone = torch.cat([scores[n][start[n] & ~masks[n]] for n in ("0.weight", "2.weight")])
    assert kept.min() > gone.max()
    assert S.prune_surviving(start, scores, 0.0) == start


def test_prune_surviving_refuses_to_empty_a_layer_and_bad_input():
    masks = S.Masks({"w": torch.tensor([True, False])})
    with pytest.raises(ValueError, match="no weight of 'w'"):
        S.prune_surviving(masks, {"w": torch.ones(2)}, 0.6)
    with pytest.raises(ValueError, match="shapes"):
        S.prune_surviving(masks, {"w": torch.ones(3)}, 0.2)
    with pytest.raises(ValueError, match="missing"):
        S.prune_surviving(masks, {"v": torch.ones(2)}, 0.2)
    with pytest.raises(ValueError, match="rate"):
        S.prune_surviving(masks, {"w": torch.ones(2)}, 1.0)
    with pytest.raises(LayerNotFound):
        S.prune_surviving(masks, {"w": torch.ones(2)}, 0.2, per_layer={"out": 0.1})


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 0.99), st.integers(0, 99))
def test_densities_of_any_mask_give_back_its_counts(sizes, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"w{i}": torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    other = {name: torch.rand(s.shape, generator=generator) for name, s in scores.items()}
    masks = S.mask_from_scores(scores, sparsity)
    assert S.mask_from_densities(scores, masks.densities()) == masks
    assert S.mask_from_densities(other, masks.densities()).kept() == masks.kept()


def test_uniform_and_erk_have_the_total_asked_for():
    model = cnn()
    n = sum(w.numel() for w in S.prunable(model).values())
    for sparsity in (0.0, 0.3, 0.8, 0.95):
        for densities in (S.uniform(model, sparsity), S.erk(model, sparsity)):
            masks = S.mask_from_densities(S.magnitude(model), densities)
            assert sum(masks.kept().values()) == pytest.approx((1 - sparsity) * n, abs=0.51)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        S.mask_from_densities({"w": torch.ones(3)}, {"w": 1.2})
    with pytest.raises(ValueError, match="missing"):
        S.mask_from_densities({"w": torch.ones(3)}, {"v": 0.2})


def test_erk_by_hand():
    # raw: (4+2)/8 = 0.75 and (20+40)/800 = 0.075; at 0.9 the total of 80.8 is shared as eps * 66 = 80.8, which makes
    # the small layer 0.918 dense; at 0.8, eps * 66 = 161.6 would pass 1, so it is dense and the rest takes 153.6
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(40, 20))
    assert S.erk(model, 0.9) == pytest.approx({"0.weight": 0.75 * 80.8 / 66, "1.weight": 0.075 * 80.8 / 66})
    assert S.erk(model, 0.8) == pytest.approx({"0.weight": 1.0, "1.weight": 153.6 / 800})


def test_schedules():
    assert S.schedule("one-shot", 0.9) == [0.9]
    assert S.schedule("iterative", rounds=3, rate=0.2) == pytest.approx([0.2, 0.36, 0.488])
    assert S.schedule("iterative", 0.488, 3) == pytest.approx([0.2, 0.36, 0.488])
    assert S.schedule("iterative", 0.488, rate=0.2) == pytest.approx([0.2, 0.36, 0.488])
    assert S.schedule("iterative", 0.5, rate=0.2) == pytest.approx([0.2, 0.36, 0.488, 0.5])
    assert S.schedule("cubic", 0.8, 4) == pytest.approx([0.4625, 0.7, 0.7875, 0.8])
    assert S.schedule("cubic", 0.9, 2, initial=0.5) == pytest.approx([0.85, 0.9])
    for kind in ("gradual cubic", "gradual", "gradual_cubic"):
        assert S.schedule(kind, 0.8, 4) == S.schedule("cubic", 0.8, 4)
    assert S.schedule("one_shot", 0.9) == S.schedule("oneshot", 0.9) == [0.9]
    for kind, sparsity, rounds, more in [
        ("linear", 0.5, 1, {}), ("one-shot", None, None, {}), ("one-shot", 0.5, 3, {}), ("iterative", 0.5, None, {}),
        ("cubic", 0.5, None, {}), ("cubic", 0.5, 0, {}), ("cubic", 1.0, 3, {}), ("cubic", 0.5, 3, {"initial": 0.6}),
        ("iterative", 0.5, 3, {"rate": 0.2}), ("iterative", None, 3, {"rate": 0.0}),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            S.schedule(kind, sparsity, rounds, **more)
