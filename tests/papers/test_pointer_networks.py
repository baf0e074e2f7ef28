"""Pointer networks: targets, pointer and beam against definitions and brute force, the rivals, and what is stored."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from torch.nn import functional as F

from nbkit import papers, recipes

pointer = papers.method("pointer-networks")
recipe = recipes.load("papers/pointer-networks/recipe.py")


def points(sets=5, n=8, seed=0):
    return np.random.default_rng(seed).random((sets, n, 2))


def net(hidden=12, seed=0):
    torch.manual_seed(seed)
    made = pointer.PointerNet(hidden)
    made.v.data *= 5  # so that answers differ
    return made


def rival(attention, n=6):
    torch.manual_seed(1)
    return recipe.Seq2Seq(n, 12, attention)


# targets


@pytest.mark.parametrize("n", [3, 4, 8, 15])
def test_hulls_are_those_of_scipy_from_the_first_corner_and_counter_clockwise(n):
    for P, C in zip(many := points(50, n, n), recipe.hulls(many), strict=True):
        ring = ConvexHull(P).vertices
        first = np.roll(ring, -ring.argmin())
        assert C.tolist()[: len(ring) + 2] == [*(first + 1), first[0] + 1, 0]
        assert (C[len(ring) + 2 :] == recipe.PAD).all() and recipe.corners(C) == first.tolist()
        assert recipe.signed_area(P[recipe.corners(C)]) == pytest.approx(ConvexHull(P).volume)


def test_a_triangle_is_its_own_hull():
    for P, C in zip(many := points(20, 3), recipe.hulls(many), strict=True):
        assert C[0] == 1 and sorted(C[:3]) == [1, 2, 3] and C[3:].tolist() == [1, 0]
        assert recipe.signed_area(P[C[:3] - 1]) > 0


@pytest.mark.parametrize("n", [3, 5, 7])
def test_tours_are_the_shortest_of_all_and_counter_clockwise(n):
    for P, C in zip(many := points(6, n, n), recipe.tours(many), strict=True):
        brute = min(recipe.length(P[[0, *order]]) for order in permutations(range(1, n)))
        assert recipe.length(P[C - 1]) == pytest.approx(brute, abs=1e-12)
        assert C[0] == 1 and sorted(C) == list(range(1, n + 1)) and recipe.signed_area(P[C - 1]) > 0


def test_points_on_a_line_are_ambiguous_and_drawn_anew():
    line = np.array([[[0, 0], [1, 1], [2, 2], [0, 1.0]]])
    with pytest.raises(ValueError, match="line"):
        recipe.hulls(line)

    seen = []

    def once(P):
        seen.append(P)
        return recipe.hulls(line if len(seen) == 1 else P)

    P, C = recipe.batch(once, 4, 6, np.random.default_rng(0))
    assert len(seen) == 2 and P.shape == (4, 6, 2) and C.shape == (4, (C != recipe.PAD).sum(1).max())


# the network


@pytest.mark.parametrize("n", [3, 7, 40])
def test_a_distribution_over_the_points_and_stop_whatever_their_number(n):
    P, C = recipe.batch(recipe.hulls, 4, n, np.random.default_rng(n))
    model = net()
    p = model(P, C).softmax(2)
    assert p.shape == (*C.shape, n + 1)
    torch.testing.assert_close(p.sum(2), torch.ones(C.shape))
    model.v.data.zero_()
    assert (model(P, C) == 0).all()


def test_the_scores_are_the_paper_s_formula_term_by_term():
    model, (P, C) = net(), recipe.batch(recipe.hulls, 2, 5, np.random.default_rng(0))
    u = model(P, C)
    for b in range(2):
        e, state = model.encoder(P[b])
        e = torch.cat([model.stop[None], e])
        for i in range(C.shape[1]):
            x = model.begin if i == 0 else P[b, max(C[b, i - 1] - 1, 0)]
            d, state = model.decoder(x[None], state)
            for j in range(6):
                by_hand = model.v @ torch.tanh(model.W1.weight @ e[j] + model.W2.weight @ d[0])
                torch.testing.assert_close(u[b, i, j], by_hand, rtol=1e-4, atol=1e-5)


def test_what_is_behind_the_end_neither_costs_nor_changes_what_is_before():
    model, (P, C) = net(), recipe.batch(recipe.hulls, 3, 6, np.random.default_rng(0))
    longer = F.pad(C, (0, 4), value=pointer.PAD)
    torch.testing.assert_close(model(P, longer)[:, : C.shape[1]], model(P, C))
    losses = [
        F.cross_entropy(model(P, c).flatten(0, 1), c.flatten(), ignore_index=pointer.PAD) for c in (C, longer)
    ]
    torch.testing.assert_close(*losses)


def test_an_answer_does_not_depend_on_the_other_sets_of_its_batch():
    model, P = net(), torch.from_numpy(points(6, 9)).float()
    together = pointer.decode(model, P, beam=3)
    for one in range(6):
        assert torch.equal(pointer.decode(model, P[one : one + 1], beam=3)[0], together[one])


def test_initial_weights_are_the_paper_s_or_by_the_number_of_inputs():
    narrow, wide = pointer.PointerNet(32, bound=0.08), pointer.PointerNet(32)
    assert all(w.abs().max() <= 0.08 for w in narrow.parameters())
    assert (
        0.15 < wide.W1.weight.abs().max() <= 32**-0.5
        and 0.5 < wide.encoder.weight_ih_l0.abs().max() <= 2**-0.5
    )
    assert (
        wide.decoder.bias_ih_l0.tolist() == [0] * 32 + [1] * 32 + [0] * 64
        and not wide.decoder.bias_hh_l0.any()
    )


@pytest.mark.parametrize("attention", [False, True])
def test_the_rivals_have_a_fixed_dictionary_and_read_by_attention(attention):
    model, (P, C) = rival(attention), recipe.batch(recipe.hulls, 3, 6, np.random.default_rng(0))
    assert model(P, C).shape == (*C.shape, 7)
    with pytest.raises(ValueError, match="6 points"):
        model(P[:, :5], C)
    if attention:  # a step by hand, then one that is fed what the first has read
        e, (h, c) = model.encoder(P)
        read, x = torch.zeros_like(h[0]), pointer.fed(model.begin, P, C)
        for i in range(2):
            h, c = model.decoder(torch.cat([x[:, i], read], 1), (h, c) if i else (h[0], c[0]))
            a = torch.stack(
                [torch.tanh(model.W1(e[:, j]) + model.W2(h)) @ model.v for j in range(6)], 1
            ).softmax(1)
            read = torch.einsum("bj,bjh->bh", a, e)
            torch.testing.assert_close(model.out(torch.cat([read, h], 1)), model(P, C)[:, i])


def test_training_lowers_the_loss_and_bad_settings_change_nothing():
    model = net()
    before = [w.clone() for w in model.parameters()]
    sets = recipe.batches("hull", (4, 4), seed=0)
    for steps, lr in ((0, 0.1), (3, 0.0), (3, -1.0), (3, float("nan"))):
        with pytest.raises(ValueError, match="positive"):
            pointer.train(model, sets, steps, lr)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    losses = pointer.train(model, sets, 60, 0.02)
    assert len(losses) == 60 and np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


# answers


def log_p(model, P, answer):
    C = torch.tensor([answer])
    return model(P, C).log_softmax(2)[0, range(len(answer)), answer].sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_without_a_beam_every_step_is_the_likeliest(seed):
    model, P = net(seed=seed), torch.from_numpy(points(4, 6, seed)).float()
    C = pointer.decode(model, P)
    u = model(P, C)
    for c, chosen in zip(C.tolist(), u.argmax(2).tolist(), strict=True):
        end = c.index(0) + 1 if 0 in c else len(c)
        assert c[:end] == chosen[:end] and not any(c[end:])


@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_tours():
    for seed in range(4):
        model, P = net(seed=seed), torch.from_numpy(points(1, 4, seed)).float()

        def constrained(answer, model=model, P=P):
            u, total = model(P, torch.tensor([answer]))[0].clone(), 0.0
            for i, j in enumerate(answer):
                u[i, [0, *answer[:i]]] = -torch.inf
                total += u[i].log_softmax(0)[j].item()
            return total

        best = max((list(order) for order in permutations(range(1, 5))), key=constrained)
        found = [pointer.decode(model, P, beam=k, tour=True, constrained=True)[0].tolist() for k in (1, 4)]
        assert sorted(found[0]) == [1, 2, 3, 4] and constrained(found[0]) <= constrained(found[1]) + 1e-6
        assert constrained(found[1]) <= constrained(best) + 1e-6


@torch.no_grad()
def test_the_beam_is_the_plain_search_over_lists():
    model, P = net(seed=3), torch.from_numpy(points(1, 4, 3)).float()
    kept = [([], 0.0)]
    for _ in range(6):
        more = []
        for answer, total in kept:
            if answer and answer[-1] == 0:
                more.append((answer + [0], total))
                continue
            u = model(P, torch.tensor([answer + [0]]))[0, -1].log_softmax(0).tolist()
            more += [(answer + [j], total + u[j]) for j in range(5)]
        kept = sorted(more, key=lambda one: -one[1])[:3]
    assert pointer.decode(model, P, beam=3)[0].tolist() == kept[0][0]


def test_constrained_answers_visit_a_point_once_and_may_close_a_hull():
    model, P = net(), torch.from_numpy(points(30, 7)).float()
    for beam in (1, 3):
        for c in pointer.decode(model, P, beam=beam, tour=True, constrained=True).tolist():
            assert sorted(c) == list(range(1, 8))
        for c in pointer.decode(model, P, beam=beam, constrained=True).tolist():
            seen = [j for j in c if j]
            inner = seen[1:-1] if seen[-1:] == seen[:1] else seen[1:]
            assert len(set(inner)) == len(inner)


def test_bad_beams_and_points_are_refused():
    model, P = net(), torch.from_numpy(points(2, 5)).float()
    for beam, given in product((0, 6), [P]):
        with pytest.raises(ValueError, match="beam"):
            pointer.decode(model, given, beam=beam)
    with pytest.raises(ValueError, match="finite"):
        pointer.decode(model, P * torch.nan)
    for bad in (points(2, 2), points()[0], points()[..., :1], points() * np.inf):
        for targets in (recipe.hulls, recipe.tours):
            with pytest.raises(ValueError, match="finite"):
                targets(bad)
    with pytest.raises(ValueError, match="14"):
        recipe.tours(points(1, 15))


# scores


def test_the_same_polygon_wherever_it_starts_but_not_in_another_order():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.4]])
    C = recipe.hulls(square[None])[0]
    for right in ([1, 2, 3, 4, 1, 0], [3, 4, 1, 2], [4, 3, 2, 1, 4, 0], [2, 3, 4, 1, 2, 0, 0, 0]):
        assert recipe.judge(square, C, right) == {"accurate": True, "simple": True, "coverage": 1.0}
    crossed = recipe.judge(square, C, [1, 3, 2, 4, 1, 0])
    assert not crossed["accurate"] and not crossed["simple"] and np.isnan(crossed["coverage"])
    assert recipe.judge(square, C, [1, 2, 3, 1, 0]) == {"accurate": False, "simple": True, "coverage": 0.5}
    assert recipe.judge(square, C, [1, 2, 5, 3, 4, 1, 0])["coverage"] == pytest.approx(0.75)
    for short in ([0], [1, 0], [1, 2, 1, 0], [1, 2, 3, 2, 4, 1, 0], [1, 1, 1]):
        assert not recipe.judge(square, C, short)["simple"]


def test_of_orders_of_convex_corners_two_in_all_are_simple():
    ring = points(1, 5, 4)[0]
    ring = np.stack([np.cos(a := np.sort(2 * np.pi * ring[:, 0])), np.sin(a)], 1)
    simple = sum(recipe.simple(ring[[0, *order]]) for order in permutations(range(1, 5)))
    assert simple == 2  # of 24, the two directions


def test_simple_rules_by_hand():
    P = np.array([[0, 0], [1, 0.1], [0.9, 1], [0.1, 0.9], [0.5, 0.5]])
    assert recipe.corners(recipe.extremes(P[None], 4)[0]) == [1, 2, 0]  # right, up, left and down, each once
    assert set(recipe.corners(recipe.extremes(P[None], 16)[0])) == {0, 1, 2, 3}
    line = np.array([[0, 0], [0.3, 0.01], [1, 0], [0.6, 0.02]])
    assert recipe.nearest(line) == [0, 1, 3, 2]
    crossed = np.array([[0, 0], [1, 1], [1, 0], [0, 1]])
    assert recipe.length(crossed[recipe.two_opt(crossed, [0, 1, 2, 3])]) == pytest.approx(4)
    lot = recipe.by_lot(points(20, 9), recipe.hulls(points(20, 9)), np.random.default_rng(0))
    for answer, target, P in zip(lot, recipe.hulls(points(20, 9)), points(20, 9), strict=True):
        found = recipe.corners(answer)
        assert (
            len(found) == len(set(found)) == len(recipe.corners(target)) and recipe.signed_area(P[found]) > 0
        )


# what is stored


def test_every_arm_is_stored_for_three_seeds_and_no_rate_lies_at_the_end_of_its_grid():
    table = papers.results("pointer-networks", "compare")
    assert len(table) == 2 * 3 * len(recipe.ARMS) and not table.duplicated(["arm", "seed", "beam"]).any()
    rates = papers.results("pointer-networks", "rates")
    for arm in recipe.ARMS:
        part = rates[rates["arm"] == arm]
        assert part["rate"].min() < part.loc[part["loss"].idxmin(), "rate"] < part["rate"].max()


def test_every_size_is_stored_and_no_tour_is_shorter_than_the_shortest():
    for task, rules in (("hull", 4), ("tour", 3)):
        table = papers.results("pointer-networks", task)
        assert len(table) == len(recipe.TESTED[task]) * (rules + 6)
    assert (papers.results("pointer-networks", "tour")["ratio"] >= 1).all()
    assert (papers.results("pointer-networks", "hull")["coverage"] <= 1).all()


def test_more_training_is_stored_for_one_seed_of_either_task():
    table = papers.results("pointer-networks", "longer")
    assert not table.duplicated(["arm", "rate", "n"]).any() and table["score"].notna().all()
    assert set(table["steps"]) == set(recipe.LONGER.values())
    assert (table.loc[table["arm"] == "tour", "score"] >= 1).all()
