"""DIMAP: its score, both ends of its groupings, what scaling does, and the files its recipe stored."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from nbkit import models, papers, recipes, sparsity, training
from nbkit.errors import NotFinite

dimap = papers.method("dimap")
recipe = recipes.load("papers/dimap/recipe.py")
GROUPINGS = list(dimap.GRANULARITIES)


@pytest.fixture(scope="module")
def swin():
    return models.load("tiny-swin", seed=0)


@pytest.fixture
def small(device):
    """Two blocks with the names of a transformer and weights with many ties."""
    block = lambda: nn.ModuleDict(  # noqa: E731
        {"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)}), "mlp": nn.Linear(4, 4)}
    )
    net = nn.ModuleDict({"patch_embed": nn.Linear(3, 4), "stage1": block(), "stage2": block(), "head": nn.Linear(4, 2)})
    generator = torch.Generator().manual_seed(0)
    for weight in sparsity.prunable(net).values():
        weight.data = torch.randint(-5, 6, weight.shape, generator=generator).float()
    return net.to(device)


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def aux_of(model):
    return [name for name, module in dimap.modules(model).items() if module == dimap.AUX]


# the score


def test_4_2_1_and_a_tenth_of_it_score_the_same_and_lose_one_each():
    weights = {"large": torch.tensor([4.0, 2, 1]), "small": torch.tensor([0.4, 0.2, 0.1])}
    scores = dimap.importance(weights, {"large": "A", "small": "B"})
    for score in scores.values():
        torch.testing.assert_close(score, torch.tensor([1, 4 / 20, 1 / 21], dtype=torch.float64))
    by_module = sparsity.mask_from_scores(scores, 2 / 6)
    at_once = sparsity.mask_from_scores(dimap.importance(weights, dict.fromkeys(weights, "A")), 2 / 6)
    assert [m.tolist() for m in by_module.values()] == [[True, True, False]] * 2
    assert [m.tolist() for m in at_once.values()] == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_the_definition_weight_by_weight(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(3, 4, generator=generator) for name in "abcd"}
    group = {"a": "x", "b": "y", "c": "x", "d": "y"}
    scores = dimap.importance(weights, group)
    for name, weight in weights.items():
        mates = torch.cat([w.flatten() for other, w in weights.items() if group[other] == group[name]]).double()
        for w, score in zip(weight.flatten().double(), scores[name].flatten(), strict=True):
            expected = w**2 / sum(m**2 for m in mates if abs(m) >= abs(w))
            assert score.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("granularity", GROUPINGS)
def test_inside_a_group_the_order_is_that_of_the_sizes(swin, granularity):
    group = dimap.groups(swin, granularity)
    weights = {n: w.detach() for n, w in sparsity.prunable(swin).items() if n in group}
    scores = dimap.importance(weights, group)
    for label in set(group.values()):
        size, score = (torch.cat([t[n].flatten() for n in group if group[n] == label]) for t in (weights, scores))
        order = score.argsort()
        assert (size.abs()[order].diff() >= 0).all() and score.max() == 1


def test_a_group_of_zeros_scores_0_and_goes_first():
    weights = {"a": torch.zeros(2), "b": torch.tensor([1.0, 2.0])}
    scores = dimap.importance(weights, {"a": "A", "b": "B"})
    assert scores["a"].tolist() == [0, 0]
    assert sparsity.mask_from_scores(scores, 0.5)["b"].all()


def test_small_squares_are_not_lost_beside_a_large_sum():
    weights = {"w": torch.cat([torch.full((1,), 1e4), torch.linspace(1e-3, 2e-3, 1000)])}
    score = dimap.importance(weights, {"w": "A"})["w"][1:]
    assert (score.diff() > 0).all()


# the groupings


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 0.97])
def test_one_group_is_global_magnitude_and_a_group_a_layer_is_lamp(swin, share):
    aux = aux_of(swin)
    assert dimap.dimap(swin, share, "net") == sparsity.magnitude_mask(swin, share, exclude=aux)
    by_lamp = sparsity.mask_from_scores(sparsity.lamp(swin, exclude=aux), share)
    assert dimap.dimap(swin, share, "layer") == by_lamp


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_both_ends_agree_with_the_kit_where_many_weights_tie(small, share):
    aux = aux_of(small)
    assert dimap.dimap(small, share, "net") == sparsity.magnitude_mask(small, share, exclude=aux)
    by_lamp = sparsity.mask_from_scores(sparsity.lamp(small, exclude=aux), share)
    assert dimap.dimap(small, share, "layer") == by_lamp


def test_every_weight_of_both_networks_has_one_module_and_aux_is_never_pruned(swin):
    for net, counts in ((swin, [4, 4, 8, 3]), (models.build("tiny-vit", seed=0), [6, 6, 12, 2])):
        found = list(dimap.modules(net).values())
        assert [found.count(module) for module in dimap.PARTS] == counts
        assert not set(aux_of(net)) & set(dimap.dimap(net, 0.5))
    stages = set(dimap.groups(swin, "module x stage").values())
    assert stages == {f"{m}, stage{k}" for m in ("QKV-M", "PRJ-M", "MLP-M") for k in (1, 2)}


@pytest.mark.parametrize("granularity", GROUPINGS)
def test_the_number_of_removed_weights_is_exact(swin, granularity):
    for share in (0.4, 0.7, 0.9):
        masks = dimap.dimap(swin, share, granularity)
        total = sum(m.numel() for m in masks.values())
        assert total - sum(masks.kept().values()) == round(share * total)


@pytest.mark.parametrize("kind", ["uniform", "erk", "rms"])
def test_rivals_are_as_sparse_and_keep_the_largest_of_each_layer(swin, kind):
    masks = recipe.rival(dimap, swin, 0.8, kind)
    assert masks.keys() == dimap.dimap(swin, 0.8).keys()
    assert sum(masks.kept().values()) == sum(dimap.dimap(swin, 0.8).kept().values())
    for name, mask in masks.items():
        size = swin.get_parameter(name).detach().abs()
        assert mask.all() or size[mask].min() >= size[~mask].max()
    if kind == "uniform":
        assert all(abs(density - 0.2) < 0.002 for density in masks.densities().values())


def test_rms_takes_a_scaled_module_for_the_same(swin):
    assert recipe.rival(dimap, dimap.rescale(swin, 8.0), 0.8, "rms") == recipe.rival(dimap, swin, 0.8, "rms")


# scale


@pytest.mark.parametrize("c", [0.1, 3.0, 256.0])
def test_a_module_scaled_as_a_whole_keeps_its_mask(swin, c):
    scaled = copy.deepcopy(swin)
    with torch.no_grad():
        for name, module in dimap.modules(scaled).items():
            if module == "QKV-M":
                scaled.get_parameter(name).mul_(c)
    for granularity in GROUPINGS[1:]:
        first, second = (dimap.dimap(net, 0.8, granularity) for net in (scaled, swin))
        apart = sum((first[name] != second[name]).sum().item() for name in first)
        assert apart <= (0 if c == 256 else 4)  # float32 rounds 0.1 and 3 times a weight
    assert dimap.dimap(scaled, 0.8, "net") != dimap.dimap(swin, 0.8, "net")


@pytest.mark.parametrize("name", ["tiny-swin", "tiny-vit"])
def test_rescaling_leaves_the_function_alone(name):
    net = models.load(name, seed=1)
    x = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before, state = net(x), training.state(net)
    assert torch.equal(dimap.rescale(net, 4.0)(x), before)
    torch.testing.assert_close(dimap.rescale(net, 0.3)(x), before, rtol=1e-4, atol=1e-4)
    assert same(net, state)


def test_rescaled_down_qkv_loses_more_to_one_global_cut_and_nothing_to_modules(swin):
    scaled = dimap.rescale(swin, 0.25)
    qkv = [name for name, module in dimap.modules(swin).items() if module == "QKV-M"]
    kept = [sum(dimap.dimap(net, 0.8, "net").kept()[n] for n in qkv) for net in (swin, scaled)]
    assert kept[1] < kept[0] / 2
    assert dimap.dimap(scaled, 0.8) == dimap.dimap(swin, 0.8)


# fine-tuning


def test_fine_tuning_keeps_pruned_weights_at_zero_and_trains_the_rest(small):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(next(small.parameters()).device)
    masks = sparsity.magnitude_mask(net, 0.5)
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    before = training.state(net)
    tuned = dimap.finetune(net, masks, (x, x[:, :3].argmax(1)), lr=0.01, seed=0)
    assert same(net, before)
    for name, mask in masks.items():
        weight = tuned.get_parameter(name).detach().cpu()
        assert not weight[~mask].any() and (weight != before[name].cpu())[mask].all()


# bad input


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_0_to_1_is_refused(small, share):
    before = training.state(small)
    with pytest.raises(ValueError, match="sparsity"):
        dimap.dimap(small, share)
    assert same(small, before)


def test_a_group_that_would_vanish_is_refused_by_name(swin):
    with pytest.raises(ValueError, match="no weight of QKV-M"):
        dimap.dimap(swin, 0.99999)


def test_a_weight_of_no_module_or_of_two_is_refused_by_name(small):
    small["extra"] = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight.*no module"):
        dimap.dimap(small, 0.5)
    with pytest.raises(ValueError, match="mlp.*A and B"):
        dimap.modules(nn.ModuleDict({"mlp": nn.Linear(2, 2)}), {"A": ["mlp"], "B": ["mlp"]})


def test_bad_names_and_values_are_refused_and_change_nothing(small):
    before = training.state(small)
    with pytest.raises(ValueError, match="granularity"):
        dimap.dimap(small, 0.5, "block")
    with pytest.raises(ValueError, match="'b'"):
        dimap.importance({"a": torch.ones(2)}, {"a": "A", "b": "A"})
    with pytest.raises(ValueError, match="nothing|no prunable"):
        dimap.dimap(nn.ReLU(), 0.5)
    for c in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive"):
            dimap.rescale(small, c)
    with pytest.raises(ValueError, match=r"attn\.qkv"):
        dimap.rescale(nn.Linear(2, 2), 2.0)
    assert same(small, before)


def test_weights_that_are_not_finite_are_refused():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NotFinite, match="of A"):
            dimap.importance({"a": torch.tensor([1.0, bad])}, {"a": "A"})


def test_masks_of_another_shape_and_no_data_are_refused_before_anything_changes(small):
    net = nn.Sequential(nn.Linear(6, 3)).to(next(small.parameters()).device)
    before, x, y = training.state(net), torch.randn(4, 6), torch.zeros(4).long()
    masks, wrong = sparsity.magnitude_mask(net, 0.5), sparsity.Masks({"0.weight": torch.ones(2, 2)})
    for case in ((wrong, (x, y), 0.1), (masks, (x[:0], y[:0]), 0.1), (masks, (x, y[:2]), 0.1), (masks, (x, y), 0.0)):
        with pytest.raises(ValueError):
            dimap.finetune(net, case[0], case[1], lr=case[2], seed=0)
    assert same(net, before)


# what is stored


def test_every_arm_is_stored_for_three_seeds_and_both_sparsities():
    table = papers.results("dimap", "oneshot")
    arms = [*GROUPINGS, "uniform", "erk", "rms", "snip", "taylor", "random 0", "random 1"]
    assert len(table[table["arm"].isin(arms)]) == len(arms) * 3 * len(recipe.SPARSITIES)
    assert not table.duplicated(["seed", "sparsity", "arm"]).any()


def test_other_sparsities_three_groupings_of_tiny_vit_and_ten_dealings_of_every_tiny_swin_are_stored():
    table = papers.results("dimap", "plain")
    assert not table.duplicated(["seed", "sparsity", "arm"]).any()
    assert (table.groupby("arm").size() == 3 * len(recipe.SPARSITIES)).all() and table["arm"].nunique() == 3
    around = papers.results("dimap", "window")
    assert (around.groupby("sparsity")["seed"].nunique() == 3).all() and set(around["sparsity"]) == set(recipe.AROUND)
    deals = papers.results("dimap", "dealt")
    assert (deals.groupby(["seed", "sparsity"])["dealing"].nunique() == recipe.DEALT).all()
    assert deals.groupby("dealing")["seed"].nunique().max() == 1


def test_a_dealing_keeps_the_number_of_matrices_of_every_group(swin):
    group = dimap.groups(swin)
    for seed in range(30):
        dealt = recipe.dealt(group, seed)
        assert dealt.keys() == group.keys() and sorted(dealt.values()) == sorted(group.values())
        assert dealt != group and dealt == recipe.dealt(group, seed)


def test_the_budget_of_a_network_is_what_its_masks_say(swin):
    table = papers.results("dimap", "budget").query("seed == 0").set_index(["granularity", "module"])
    masks, module = dimap.dimap(swin, 0.8), dimap.groups(swin)
    for m in set(module.values()):
        mask = torch.cat([masks[n].flatten() for n in masks if module[n] == m])
        assert table.loc[("module", m), "density"] == pytest.approx(mask.float().mean().item(), abs=1e-4)


def test_the_spread_of_two_scales_is_their_ratio():
    rows = pd.DataFrame({"weights": [10, 30, 20], "rms": [1.0, 2.0, 4.0]})
    found = recipe.spread(rows, np.array([[0, 1, 2], [2, 0, 1]]))
    assert found == pytest.approx([4, 4])
    chance = papers.results("dimap", "premise")["chance"]
    assert chance.max() <= 0.05 + 1e-9


def test_the_groupings_keep_half_of_dinov2():
    table = papers.results("dimap", "dinov2")
    total = table["weights"].sum()
    assert total == 12 * 12 * 384**2
    for granularity in ("net", "module", "layer"):
        assert abs(table[f"kept {granularity}"].sum() - total / 2) <= 1
    smallest = table.groupby("module")["smallest module"]
    assert ((smallest.max() - smallest.min()) / smallest.min()).max() < 0.01  # one threshold a module
