"""Winding back to step k: the training from k to T, the search, both distances, and what the recipe stored."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from nbkit import papers, recipes, sparsity, training
from nbkit.errors import LayerNotFound
from nbkit.sparsity import Masks

method = papers.method("stabilizing-lottery-ticket")
lottery = papers.method("lottery-ticket")
recipe = recipes.load("papers/stabilizing-lottery-ticket/recipe.py")


@pytest.fixture
def small(device):
    return lottery.draw(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), 0).to(device)


@pytest.fixture(scope="module")
def data():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    return x, (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)


SHORT = {"batch": 20, "lr": 0.01}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_k_0_is_the_lottery_tickets_own_search(small, data):
    plain = sparsity.iterative_magnitude(
        small, lambda model, m: method.train(model, m, data, k=0, T=12, u=3, **SHORT), rounds=3
    )
    start = training.state(small)
    w_k, masks = method.find(small, data, k=0, T=12, u=3, rounds=3, rate=0.2, **SHORT)
    assert same(w_k, start) and masks == [r.masks for r in plain]


def test_the_search_from_k_is_the_kits_wound_back_to_w_k(small, data):
    start = training.state(small)
    w_k, masks = method.find(small, data, k=5, T=12, u=3, rounds=3, rate=0.2, **SHORT)
    assert not same(w_k, start)
    kit = sparsity.iterative_magnitude(
        small, lambda model, m: method.train(model, m, data, k=5, T=12, u=3, **SHORT), rounds=3, rewind_to=w_k
    )
    assert masks == [r.masks for r in kit]


def test_from_k_the_same_batches_and_rates_follow_as_in_the_whole_training(small, data):
    seen, rates = [], []
    small.register_forward_pre_hook(lambda model, x: seen.append(x[0].clone()) if model.training else None)
    m = method.ones(small)

    def schedule(part):
        rates.append(round(part * 10))
        return 1.0

    method.train(small, m, data, k=0, T=10, u=4, schedule=schedule, **SHORT)
    whole, seen[:] = list(seen), []
    method.train(small, m, data, k=7, T=10, u=4, schedule=schedule, **SHORT)
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(seen, whole[7:], strict=True))
    assert rates == [*range(10), 7, 8, 9]


def test_w_k_lies_on_the_whole_trainings_way_also_under_a_schedule(small, data):
    start, passed = training.state(small), {}
    settings = {"T": 10, "u": 4, "schedule": lambda part: 1.0 if part < 0.6 else 0.1, **SHORT}
    watch = {"watch": lambda step, model: passed.update({step: training.state(model)})}
    method.train(small, method.ones(small), data, k=0, **settings, **watch)
    for k in (4, 8):
        small.load_state_dict(start)
        assert same(method.find(small, data, k=k, rounds=0, **settings)[0], passed[k])


def test_training_is_the_first_notebooks_from_step_0(small, data):
    start, m = training.state(small), sparsity.magnitude_mask(small, 0.5)
    ours = method.train(small, m, data, k=0, T=9, u=2, **SHORT)
    parts = {"train": data, "val": data, "test": data}
    lottery.train(m.rewind(small, start), m, parts, j=9, seed=2, **SHORT)
    assert same(training.state(small), ours)


def test_nothing_pruned_or_one_order_twice_or_k_at_the_end_is_distance_0(small, data):
    w_k, masks = method.find(small, data, k=4, T=12, u=0, rounds=2, rate=0.3, **SHORT)
    dense = method.train(masks[0].rewind(small, w_k), masks[0], data, k=4, T=12, u=1, **SHORT)
    where = {"k": 4, "T": 12, **SHORT}
    d, angles, _ = method.stability(small, w_k, masks[0], dense, data, orders=(1, 2), **where)
    assert set(d["prune"].values()) == {0.0} and angles["prune"] == 0 and d["order"]["all"] > 0
    d, angles, subs = method.stability(small, w_k, masks[2], dense, data, orders=(1, 1), **where)
    assert set(d["order"].values()) == {0.0} and angles["order"] == 0 and d["prune"]["all"] > 0
    assert all(not value[~masks[2][name].to(value.device)].any() for name, value in subs[0].items() if name in masks[2])
    still = method.train(masks[2].rewind(small, w_k), masks[2], data, k=12, T=12, u=1, **SHORT)
    assert method.distance(still, w_k, masks[2])["all"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_distance_and_angle_are_those_of_the_masked_vectors(seed):
    chance = torch.Generator().manual_seed(seed)
    w, v = ({"a": torch.randn(4, 5, generator=chance), "b": torch.randn(3, generator=chance)} for _ in range(2))
    m = Masks({name: torch.rand(value.shape, generator=chance) < 0.6 for name, value in w.items()})
    one, other = (np.concatenate([(m[name] * s[name]).flatten().numpy() for name in m]) for s in (w, v))
    d = method.distance(w, v, m)
    assert d["all"] == pytest.approx(np.linalg.norm(one - other), rel=1e-5)
    assert d["all"] ** 2 == pytest.approx(d["a"] ** 2 + d["b"] ** 2)
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert method.angle(w, v, m) == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-3)


def test_opposite_weights_are_180_degrees_apart():
    w, m = {"a": torch.tensor([1.0, -2.0])}, Masks({"a": torch.tensor([True, True])})
    assert method.angle(w, {"a": -w["a"]}, m) == pytest.approx(180)


@pytest.mark.parametrize(("setting", "words"), [({"k": -1}, "k must"), ({"k": 13}, "k must"), ({"lr": 0}, "above 0"),
                                                ({"batch": 0}, "above 0")])  # fmt: skip
def test_bad_settings_are_refused_and_change_nothing(small, data, setting, words):
    before, m = training.state(small), sparsity.magnitude_mask(small, 0.5)
    with pytest.raises(ValueError, match=words):
        method.train(small, m, data, **{"k": 2, "T": 12, "u": 0, **SHORT, **setting})
    assert same(training.state(small), before)


def test_bad_masks_and_data_are_refused_and_change_nothing(small, data):
    before, where = training.state(small), {"k": 2, "T": 12, "u": 0, **SHORT}
    empty = Masks({"0.weight": torch.zeros(12, 6), "2.weight": torch.ones(3, 12)})
    m = sparsity.magnitude_mask(small, 0.5)
    for bad, error, words in [
        (empty, ValueError, "nothing of 0.weight"),
        (Masks({"0.weight": torch.ones(3, 3)}), ValueError, "shape"),
        (Masks({"1st.weight": torch.ones(12, 6)}), LayerNotFound, "1st"),
    ]:
        with pytest.raises(error, match=words):
            method.train(small, bad, data, **where)
    with pytest.raises(ValueError, match="60"):
        method.train(small, m, (data[0], data[1][:-1]), **where)
    with pytest.raises(ValueError, match="k must"):
        method.find(small, data, k=13, T=12, u=0, rounds=1)
    assert same(training.state(small), before)


# what is stored


def test_every_setting_is_stored_for_three_seeds_and_as_sparse_in_both_masks():
    table = papers.results("stabilizing-lottery-ticket")
    for (mask, r), draws in {("IMP", 2): 1, ("IMP", 5): 1, ("random", 2): 1, ("random", 5): 2}.items():
        rows = table[(table["mask"] == mask) & (table["round"] == r)]
        assert sorted(zip(rows["k"], rows["seed"], strict=True)) == sorted(
            (k, seed) for k in recipe.KS for seed in range(3) for _ in range(draws)
        )
    assert (table[table["round"] > 0].groupby("round")["kept"].agg(np.ptp) < 1e-3).all()
    layers = table[[f"order fc{i}" for i in (1, 2, 3)]].pow(2).sum(axis=1, min_count=3).pow(0.5)
    assert (layers - table["order all"]).abs().max() < 1e-3


def test_the_chance_of_the_rank_correlation_is_that_of_all_orders():
    simulated = recipe.by_chance(9, 0.6)
    assert simulated == pytest.approx(0.048, abs=0.003)
    order = np.random.default_rng(1).permutation(9)
    rho = scipy.stats.spearmanr(np.arange(9), order).statistic
    assert rho == pytest.approx(1 - 6 * ((order - np.arange(9)) ** 2).sum() / (9 * 80))
