"""concept-metrics: the three metrics by hand and by plain loops, the scenes' rules, and what bad input does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nbkit import papers, recipes
from nbkit.errors import NotFinite

method = papers.method("concept-metrics")
rules = recipes.load("papers/concept-metrics/recipe.py")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures():
    """Flat tiles: concept j has brightness (j + 1) / 12."""
    return ((torch.arange(12) + 1) / 12)[:, None, None, None, None].expand(12, 3, 1, 28, 28)


def test_a_scene_has_four_concepts_in_two_dominoes_and_each_is_where_it_is_said_to_be():
    s = rules.compose(pictures(), 60, 0.5, seed=1)
    assert (s.u.sum(1) == 4).all() and s.images.shape == (60, 1, 84, 84)
    for i, j in s.u.nonzero().tolist():
        row, column = s.place[i, j].tolist()
        assert s.images[i, 0, row - 10 : row + 10, column - 10 : column + 10].mean() == pytest.approx(
            (j + 1) / 12, abs=0.04
        )
        mate = s.mate[i, j].item()
        assert s.u[i, mate] and s.mate[i, mate] == j
        assert (s.place[i, j] - s.place[i, mate]).abs().sum() == 28
    assert (s.place[~s.u] == -1).all() and (s.mate[~s.u] == -1).all()


def test_rho_ties_partners_and_leaves_all_else_as_it_was():
    loose, tied = (rules.compose(pictures(), 900, rho, seed=0) for rho in (0.0, 1.0))
    assert torch.equal(loose.y, tied.y) and torch.equal(loose.u[:, ::2], tied.u[:, ::2])
    assert torch.equal(tied.u[:, ::2], tied.u[:, 1::2]) and not torch.equal(loose.u[:, ::2], loose.u[:, 1::2])
    for s in (loose, tied):
        V = torch.stack([s.u[s.y == k].float().mean(0) for k in range(6)], 1)
        w = rules.PROFILE / rules.PROFILE.sum()
        twice = [w[a] + sum(w[b] * w[a] / (1 - w[b]) for b in range(6) if b != a) for a in range(6)]
        for k in range(6):
            expected = torch.stack(twice).roll(k).repeat_interleave(2)
            assert torch.allclose(V[:, k], expected, atol=0.14)


def test_cavs_are_unit_normals_on_the_side_of_the_concept_and_need_no_more_than_they_are_given():
    feats = torch.randn(300, 5, generator=generator())
    u = torch.stack([feats @ torch.tensor([3.0, 4, 0, 0, 0]) > 0, feats[:, 4] > 0.3], 1)
    bank = method.fit_cavs(feats, u, 90)
    assert torch.allclose(bank.vectors.norm(dim=1), torch.ones(2), atol=1e-6)
    assert bank.vectors[0] @ torch.tensor([0.6, 0.8, 0, 0, 0]) > 0.98
    right = (method.project(feats, bank, margin=True) > 0) == u
    assert right.float().mean() > 0.95
    assert torch.allclose(
        method.project(feats, bank, margin=True) - method.project(feats, bank),
        bank.intercepts.expand(300, 2),
        atol=1e-6,
    )


def test_theta_is_the_same_classifier_whatever_the_scale_of_the_projections():
    uhat = torch.randn(200, 4, generator=generator(1))
    y = uhat[:, :3].argmax(1)
    theta, bias = method.fit_theta(uhat, y)
    again, same = method.fit_theta(uhat * torch.tensor([1, 10, 0.1, 5]), y)
    assert torch.allclose(again * torch.tensor([1, 10, 0.1, 5])[:, None], theta, atol=1e-3)
    assert torch.allclose(bias, same, atol=1e-3) and ((uhat @ theta + bias).argmax(1) == y).float().mean() > 0.9


def test_cgim_by_numpy_by_version_and_axis_and_nan_for_an_empty_row():
    theta, U, V = (torch.randn(5, 3, generator=generator(s)) for s in range(3))
    for version, ours in {1: theta, 2: U, 3: theta * U}.items():
        for axis, a, b in (("concept", ours, V), ("class", ours.T, V.T)):
            expected = [
                np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
                for x, y in zip(a.numpy(), b.numpy(), strict=True)
            ]
            assert method.cgim(theta, U, V, version, axis=axis).numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(method.cgim(V, V, 3 * V, 1), torch.ones(5)) and torch.allclose(
        method.cgim(V, V, -V, 2), -torch.ones(5)
    )
    empty = V.clone()
    empty[2] = 0
    assert method.cgim(theta, U, empty).isnan().tolist() == [False, False, True, False, False]


def test_mean_projection_takes_rightly_classified_images_alone():
    uhat = torch.tensor([[1.0, 2], [3, 4], [100, 100], [5, 6]])
    made = method.mean_projection(uhat, torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 3)
    assert made[:, :2].tolist() == [[2, 5], [3, 6]] and made[:, 2].isnan().all()


def test_ranking_and_cem_by_hand():
    theta = torch.tensor([[2.0, 0], [-1, 1], [0.5, 0]])
    q = method.ranking(theta, torch.tensor([[1.0, 3, 4], [1, 3, 4]]), torch.tensor([0, 1]))
    assert q.tolist() == [[0, 2, 1], [1, 0, 2]]
    u = torch.tensor([[False, False, True], [True, True, False]])
    assert [method.cem(q, u, depth).tolist() for depth in (1, 2, 3)] == [
        [0, 1],
        [0.5, 1],
        [pytest.approx(1 / 3), pytest.approx(2 / 3)],
    ]


def test_the_mean_of_coam_times_d_is_the_projection():
    E = torch.rand(4, 6, 5, 5, generator=generator())
    bank = method.Bank(torch.randn(3, 6, generator=generator(1)), torch.zeros(3))
    assert torch.allclose(
        method.coam(E, bank.vectors).mean((2, 3)) * 6, method.project(E.mean((2, 3)), bank), atol=1e-5
    )


def test_omega_holds_the_highest_pixels_and_breaks_ties_by_lot():
    maps = torch.rand(2, 3, 4, 4, generator=generator())
    large = F.interpolate(maps, size=(12, 18), mode="bilinear").flatten(2)
    for alpha in (1, 3, 9):
        high = method.omega(maps, alpha, size=(12, 18))
        assert (high.flatten(2).sum(2) == alpha * 24).all()
        lowest_in = large.masked_fill(~high.flatten(2), 9).amin(2)
        highest_out = large.masked_fill(high.flatten(2), -9).amax(2)
        assert (lowest_in >= highest_out).all()
    flat = [method.omega(torch.ones(1, 1, 2, 2), 1, size=(30, 30), seed=s)[0, 0] for s in (0, 1)]
    assert flat[0].sum() == 100 and not torch.equal(*flat) and flat[0][:10].sum() < 60
    assert torch.equal(flat[0], method.omega(torch.ones(1, 1, 2, 2), 1, size=(30, 30))[0, 0])


def clm_by_loops(maps, q, place, depth, alpha, absent):
    values = []
    for i in range(len(q)):
        order = [j for j in q[i].tolist() if absent == "miss" or place[i, j, 0] >= 0][:depth]
        hits = 0
        for j in order:
            high = method.omega(maps[i : i + 1, j : j + 1], alpha)[0, 0]
            row, column = place[i, j].tolist()
            hits += row >= 0 and bool(high[row, column])
        values.append(hits / (len(order) if absent == "skip" else depth))
    return values


def test_clm_by_loops_with_absent_concepts_skipped_or_missed():
    s = rules.compose(pictures(), 12, 0.5, seed=3)
    maps = torch.rand(12, 12, 5, 5, generator=generator())
    q = torch.rand(12, 12, generator=generator(1)).argsort(dim=1)
    for depth, alpha, absent in ((1, 1, "skip"), (3, 3, "skip"), (5, 1, "skip"), (1, 6, "miss"), (5, 3, "miss")):
        found = method.clm(maps, q, s.place, depth, alpha, absent=absent)
        assert found.tolist() == pytest.approx(clm_by_loops(maps, q, s.place, depth, alpha, absent))
    assert (method.clm(maps, q, s.place, 12, 9) == 1).all()


def test_a_map_with_one_bright_place_finds_it_and_row_and_column_are_not_swapped():
    spot = torch.zeros(1, 1, 21, 21)
    spot[..., 10, 17] = 1
    q = torch.tensor([[0]])
    assert method.clm(spot, q, torch.tensor([[[42, 70]]]), 1, 1) == 1
    assert method.clm(spot, q, torch.tensor([[[70, 42]]]), 1, 1) == 0
    assert method.omega(spot, 1 / 49)[0, 0].nonzero().float().mean(0).tolist() == pytest.approx([41.5, 69.5], abs=0.6)


def test_the_stored_tables_are_of_nine_networks_and_add_up():
    metrics = papers.results("concept-metrics", "metrics")
    assert (metrics.groupby("bank")["seed"].size() == 9).all()
    assert set(metrics["seed"]) == {0, 1, 2} and set(metrics["rho"]) == set(rules.RHOS)
    named = papers.results("concept-metrics", "named")
    total = named.groupby(["rho", "seed"])[["own", "neighbour", "other", "empty"]].sum().sum(axis=1)
    assert (total == 4 * rules.TEST).all()
    assert (metrics.query("bank == 'oracle'")["cgim2_concept"] > 0.9).all()
    beside = named[named["neighbour is"] == "partner"].set_index(["rho", "seed"])
    share = beside["neighbour"] / beside[["own", "neighbour", "other", "empty"]].sum(axis=1)
    pairs = papers.results("concept-metrics", "pairs").set_index("seed")
    for rho in (0.0, 0.9):
        assert pairs[f"rho {rho:g}"].to_numpy() == pytest.approx(share[rho].to_numpy(), abs=1e-3)


def test_bad_input_raises_and_changes_nothing():
    feats, u = torch.randn(50, 4, generator=generator()), torch.rand(50, 2, generator=generator(1)) > 0.5
    maps, q, place = (
        torch.rand(2, 3, 4, 4),
        torch.zeros(2, 3, dtype=torch.long),
        torch.zeros(2, 3, 2, dtype=torch.long),
    )
    none = u.clone()
    none[:, 1] = False
    net = rules.models.build("small-cnn", seed=0, **rules.SHAPE).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    method.last_maps(net, torch.rand(3, 1, 28, 28))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for call, error, words in (
        (lambda: rules.compose(pictures(), 5, 1.5), ValueError, "rho in"),
        (lambda: rules.compose(pictures(), 0, 0.5), ValueError, "n >= 1"),
        (lambda: rules.shipped(0.7), KeyError, "0.7"),
        (lambda: method.last_maps(net, torch.full((1, 1, 28, 28), float("nan"))), NotFinite, "NaN"),
        (lambda: method.fit_cavs(feats, u.float(), 5), ValueError, "u must be bool"),
        (lambda: method.fit_cavs(feats, u[:9], 5), ValueError, "u must be bool"),
        (lambda: method.fit_cavs(feats, u, 40), ValueError, "needs n >= 1 images"),
        (lambda: method.fit_cavs(feats, none, 5), ValueError, "has 0"),
        (lambda: method.fit_cavs(feats, u, 0), ValueError, "n = 0"),
        (lambda: method.fit_cavs(feats * float("inf"), u, 5), NotFinite, "feats holds"),
        (lambda: method.fit_theta(feats, torch.zeros(50)), ValueError, "class"),
        (lambda: method.fit_theta(feats * float("nan"), u[:, 0].long()), NotFinite, "uhat holds"),
        (lambda: method.cgim(feats, feats, u.float()), ValueError, "three"),
        (lambda: method.cgim(feats, feats, feats, 4), ValueError, "version 1, 2, 3"),
        (lambda: method.cgim(feats, feats, feats, axis="image"), ValueError, "axis concept or class"),
        (lambda: method.cem(q, q > 0, 4), ValueError, "1 <= depth <= L"),
        (lambda: method.omega(maps, 0.0001), ValueError, "are 0 pixels"),
        (lambda: method.omega(maps, 10), ValueError, "7840 pixels"),
        (lambda: method.omega(maps * float("nan"), 1), NotFinite, "maps holds"),
        (lambda: method.clm(maps, q, place, 4, 1), ValueError, "depth 4"),
        (lambda: method.clm(maps, q[:, :2], place, 1, 1), ValueError, "not matched"),
        (lambda: method.clm(maps, q, place + 84, 1, 1), ValueError, "places lie in"),
        (lambda: method.clm(maps, q, place, 1, 1, absent="drop"), ValueError, "skip or miss"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
