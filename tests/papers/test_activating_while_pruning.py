"""AP: dead neurons counted, the cut, the cycles around it, and the files its recipe stored."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from nbkit import papers, recipes, sparsity, training
from nbkit.errors import NotFinite
from nbkit.sparsity import Masks

ap = papers.method("activating-while-pruning")
recipe = recipes.load("papers/activating-while-pruning/recipe.py")


def network(seed=0, sizes=(6, 12, 8, 3)):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(a, b)
        nn.init.normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def ones(model):
    return Masks({n: torch.ones(w.shape) for n, w in sparsity.prunable(model).items()})


def brief(model, masks):
    x = torch.rand(60, 6, generator=torch.Generator().manual_seed(0))
    return ap.train(model, masks, (x, x.argmax(1) % 3), steps=8, lr=0.1, seed=0, batch=20)


@pytest.fixture
def trained():
    """Masks, state after, state before, of a network that was trained a little."""
    model = network()
    start = training.state(model)
    brief(model, ones(model))
    return ones(model), training.state(model), start


# dead neurons


def test_a_neuron_at_minus_1_5_comes_back_with_0_5():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    model.load_state_dict({"0.weight": torch.tensor([[0.5, -1.0]]), "2.weight": torch.ones(1, 1)})
    x, state = torch.tensor([[1.0, 2.0]]), training.state(model)
    assert model[0](x).item() == -1.5 and ap.dnr(model, x).loc["all", "dynamic"] == 1
    ap.prune(ones(model), state, state, p=1 / 3, q=1 / 3).apply(model)
    assert model[0](x).item() == 0.5 and ap.dnr(model, x).loc["all", "dynamic"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_those_counted_one_by_one(seed):
    model, x = network(seed), torch.randn(9, 6, generator=torch.Generator().manual_seed(seed))
    zero = {1: [], 3: []}
    for row in x:
        z = model[0](row)
        zero[1].append([v.item() <= 0 for v in z])
        zero[3].append([v.item() <= 0 for v in model[2](z.relu())])
    table = ap.dnr(model, x)
    for name, cells in zero.items():
        cells = np.array(cells)
        assert table.loc[str(name)].tolist() == pytest.approx([cells.mean(), cells.all(0).mean()])
    both = np.concatenate([zero[1], zero[3]], axis=1)
    assert table.loc["all"].tolist() == pytest.approx([both.mean(), both.all(0).mean()])


def test_in_a_convolution_every_channel_and_place_is_a_neuron():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(4, 1, 6, 6)
    assert ap.dead(model, x)["1"].shape == (4, 3, 4, 4)
    assert ap.dnr(model, x).loc["all", "dynamic"] == pytest.approx((model[0](x) <= 0).float().mean().item())


def test_an_exact_0_is_dead_and_the_mode_comes_back():
    model = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.9), nn.ReLU(), nn.Linear(1, 1)).train()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    assert ap.dnr(model, torch.ones(1, 2)).loc["all", "dynamic"] == 1 and model.training
    nn.init.ones_(model[0].bias)
    assert ap.dnr(model, torch.ones(50, 2)).loc["all", "dynamic"] == 0  # dropout is off


@pytest.mark.parametrize("seed", range(5))
def test_without_negative_weights_no_neuron_that_nonnegative_inputs_reach_dies(seed):
    chance = torch.Generator().manual_seed(seed)
    model, x = network(seed), torch.rand(50, 6, generator=chance)
    before, z = ap.dead(model, x)["1"], model[0](x)
    gone = (torch.rand(12, 6, generator=chance) < 0.5) & (model[0].weight < 0)
    Masks({"0.weight": ~gone}).apply(model)
    assert (model[0](x) >= z - 1e-6).all() and not (ap.dead(model, x)["1"] & ~before).any()


# the cut


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_one_found_by_sorting_pairs(trained, seed):
    masks, now, start = trained
    chance = torch.Generator().manual_seed(seed)
    masks = Masks({n: torch.rand(m.shape, generator=chance) < 0.7 for n, m in masks.items()})
    after_x = ap.prune(masks, now, start, p=0.15, q=0)
    alive = sum(masks.kept().values())
    found = []
    for name in after_x:
        for index in after_x[name].nonzero().tolist():
            w, s = now[name][tuple(index)].item(), start[name][tuple(index)].item()
            if w < 0:
                found.append((abs(np.float32(w) - np.float32(s)), name, tuple(index)))
    count = round(0.2 * alive) - (alive - sum(after_x.kept().values()))
    fallen = {(name, index) for _, name, index in sorted(found)[: round(0.05 * alive)]}
    cut = ap.prune(masks, now, start, p=0.2, q=0.05)
    gone = {(n, tuple(i)) for n in cut for i in (after_x[n] & ~cut[n]).nonzero().tolist()}
    assert gone == fallen and abs(len(fallen) - count) <= 1
    assert alive - sum(cut.kept().values()) == round(0.2 * alive)


@pytest.mark.parametrize("step", ap.STEPS)
def test_every_arm_loses_as_much_and_nothing_returns(trained, step):
    masks, now, start = trained
    for _ in range(4):
        cut = ap.prune(masks, now, start, step=step, q=0.05)
        assert cut & masks == cut
        assert sum(cut.kept().values()) == sum(masks.kept().values()) - round(0.2 * sum(masks.kept().values()))
        masks = cut


def test_q_0_is_magnitude_alone_and_the_arm_x_is_so_at_any_q(trained):
    masks, now, start = trained
    alone = sparsity.prune_surviving(masks, {n: now[n].abs() for n in masks}, 0.2, scope="global")
    assert ap.prune(masks, now, start, q=0) == alone == ap.prune(masks, now, start, step="X", q=0.1)


def test_weights_that_never_moved_tie_and_are_counted_by_index():
    masks = Masks({"a": torch.ones(1, 6), "b": torch.ones(1, 3)})
    now = {"a": -torch.ones(1, 6), "b": torch.ones(1, 3)}
    cut = ap.prune(masks, now, now, p=2 / 9, q=2 / 9)
    assert cut["a"].tolist() == [[False, False, True, True, True, True]] and cut["b"].all()


def test_fewer_negative_weights_than_asked_for_is_said(trained):
    masks = Masks({"a": torch.ones(1, 10)})
    now = {"a": torch.ones(1, 10)}
    now["a"][0, 3] = -1
    with pytest.warns(UserWarning, match="only 1 of 2"):
        cut = ap.prune(masks, now, now, p=0.2, q=0.2)
    assert cut["a"].sum() == 9 and not cut["a"][0, 3]


def test_random_cuts_are_the_seeds(trained):
    one, again, other = (ap.prune(*trained, step="random", q=0.1, seed=s) for s in (1, 1, 2))
    assert one == again != other


# the cycles


def test_plain_cycles_are_the_kits_own_search():
    kit = [r.masks for r in sparsity.iterative_magnitude(network(), brief, rounds=4, scope="global")]
    assert kit == [m for m, *_ in ap.cycles(network(), brief, number=4, q=0)]
    assert kit == [m for m, *_ in ap.cycles(network(), brief, number=4, step="X")]
    assert kit != [m for m, *_ in ap.cycles(network(), brief, number=4, q=0.1)]


def test_every_cycle_starts_at_w_0_and_pruned_weights_stay_0():
    model = network()
    w_0, rounds = training.state(model), 0
    for masks, start, _ in ap.cycles(model, brief, number=3, q=0.1):
        now, rounds = training.state(model), rounds + 1
        for name, mask in masks.items():
            assert torch.equal(start[name], torch.where(mask, w_0[name], 0))
            assert not now[name][~mask].any()
    assert rounds == 4


def test_pro_goes_on_training_and_counts_movement_from_there():
    model, trainings = network(), []

    def train(model, masks):
        before = training.state(model)
        brief(model, masks)
        trainings.append((before, training.state(model)))

    first, second = (masks for masks, *_ in ap.cycles(model, train, number=1, q=0.1, pro=True))
    (_, once), (start, twice), *_ = trainings
    assert all(torch.equal(once[n], start[n]) for n in once)
    assert second == ap.prune(first, twice, start, q=0.1)


# bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [({"q": 0.3}, "q = 0.3"), ({"q": -0.1}, "q"), ({"p": 1.0}, "p = 1.0"), ({"step": "ap"}, "'ap'")],
)
def test_bad_rates_and_steps_are_refused(trained, options, words):
    before = [{n: v.clone() for n, v in state.items()} for state in trained]
    with pytest.raises(ValueError, match=words):
        ap.prune(*trained, **options)
    for state, old in zip(trained, before, strict=True):
        assert all(torch.equal(state[n], old[n]) for n in old)


def test_missing_or_misshaped_weights_are_refused(trained):
    masks, now, start = trained
    with pytest.raises(ValueError, match=r"2\.weight"):
        ap.prune(masks, now, {n: v for n, v in start.items() if n != "2.weight"})
    with pytest.raises(ValueError, match=r"0\.weight"):
        ap.prune(Masks({"0.weight": torch.ones(3, 3)}), now, start)


@pytest.mark.parametrize("which", ["now", "start"])
def test_weights_that_are_not_finite_are_refused(trained, which):
    masks, now, start = trained
    states = {"now": now, "start": start}
    states[which]["2.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite.*2\.weight"):
        ap.prune(masks, **states)


def test_a_cut_that_would_empty_a_layer_is_refused(trained):
    masks, now, start = trained
    now = now | {"4.weight": torch.full((3, 8), -1e-3)}
    with pytest.raises(ValueError, match=r"4\.weight"):
        ap.prune(masks, now, start, p=0.5)


def test_no_relu_no_pictures_and_nan_are_refused():
    with pytest.raises(ValueError, match=r"no nn\.ReLU"):
        ap.dnr(nn.Sequential(nn.Linear(2, 2), nn.GELU()), torch.ones(1, 2))
    with pytest.raises(ValueError):
        ap.dnr(network(), torch.ones(0, 6))
    with pytest.raises(NotFinite):
        ap.dnr(network(), torch.full((1, 6), torch.nan))


def test_a_mask_of_another_shape_and_an_empty_set_leave_the_model_as_it_was():
    model = network().eval()
    before, x = training.state(model), torch.rand(4, 6)
    for masks, data in [(Masks({"0.weight": torch.ones(3, 3)}), (x, torch.zeros(4).long())),
                        (ones(model), (x[:0], torch.zeros(0).long()))]:  # fmt: skip
        with pytest.raises(ValueError, match="shape|no examples"):
            ap.train(model, masks, data, steps=2, lr=0.1, seed=0)
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()) and not model.training


# what is stored


@pytest.fixture(scope="module")
def table():
    return papers.results("activating-while-pruning")


def test_arms_of_a_cycle_have_equally_many_weights(table):
    assert (table.groupby("cycle")["left"].nunique() == 1).all()
    left = 91_776
    for cycle, group in table.groupby("cycle"):
        assert group["left"].iloc[0] == pytest.approx(100 * left / 91_776, abs=1e-3), cycle
        left -= round(0.2 * left)


def test_every_arm_is_stored_for_three_seeds_at_its_own_rate(table):
    best = recipe.best_rate(table)
    own = table[table["lr"] == table["arm"].map(best)]
    for arm, rows in own.groupby("arm"):
        assert len(rows) == 3 * 14 and rows["seed"].nunique() == 3, arm
    assert set(best) == set(ap.STEPS) and set(best.values()) <= set(recipe.RATES)


def test_stored_masks_are_as_large_as_the_table_says(table):
    stored = Masks.load(papers.folder("activating-while-pruning") / "masks.safetensors")
    left = table.groupby("cycle")["left"].first()
    kept = pd.Series(stored.kept())
    for (arm, cycle), part in kept.groupby(lambda name: tuple(name.split("/")[:2])):
        assert 100 * part.sum() / 91_776 == pytest.approx(left[int(cycle)], abs=1e-3), arm


def test_chances_are_what_the_recipe_counts(table):
    stored = papers.results("activating-while-pruning", "chance")
    assert stored.equals(recipe.chances(table)) and stored["by_chance"].max() < 0.05
