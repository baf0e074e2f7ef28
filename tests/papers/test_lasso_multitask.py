"""The method cells of the notebook on buying examples from source tasks, used without the notebook."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from nbkit import datasets, papers, recipes
from nbkit.errors import UnknownName

method = papers.method("lasso-multitask")
recipe = recipes.load("papers/lasso-multitask/recipe.py")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def small(seed: int = 0, *, k: int = 2, sigma: float = 0.7, **given):
    tasks, X, y, *truth = recipe.simulate(seed, d=6, k=k, T=7, length=40, n_target=50, sigma=sigma, **given)
    return tasks, X, y, truth


# --- nu


def test_two_tasks_on_a_line_by_hand():
    W, w = np.array([[1.0, 2.0]]), np.array([2.0])
    nu2, nu1 = method.minimum_norm(W, w), method.smallest_sum(W, w)
    np.testing.assert_allclose(nu2, [0.4, 0.8], atol=1e-12)
    np.testing.assert_allclose(nu1, [0, 1], atol=1e-9)
    share = nu2**2 / (nu2**2).sum()
    assert (nu2**2 / share).sum() == pytest.approx(1.6) and abs(nu1).sum() ** 2 == pytest.approx(1.0)


def test_a_target_that_is_a_source_task_is_that_task():
    W = np.linalg.qr(draw(4, 4))[0]  # unit and independent columns
    for solve in (method.minimum_norm, method.smallest_sum):
        np.testing.assert_allclose(solve(W, W[:, 2]), np.eye(4)[2], atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_sum_is_that_of_the_best_basis_and_has_at_most_k_entries(seed):
    W, w = draw(3, 8, seed=seed), draw(3, seed=seed + 50)
    nu = method.smallest_sum(W, w)
    bases = [list(chosen) for chosen in itertools.combinations(range(8), 3)]
    best = min(abs(np.linalg.solve(W[:, basis], w)).sum() for basis in bases)
    assert abs(nu).sum() == pytest.approx(best, abs=1e-9) and (abs(nu) > 1e-9).sum() <= 3
    np.testing.assert_allclose(W @ nu, w, atol=1e-9)
    assert abs(nu).sum() <= abs(method.minimum_norm(W, w)).sum() + 1e-9


@pytest.mark.parametrize("strength", [0.03, 0.1, 0.5])
def test_lasso_is_what_proximal_gradient_steps_reach(strength):
    W, w = draw(4, 9), draw(4, seed=1)
    penalty, size, nu = strength * abs(W.T @ w).max(), np.linalg.norm(W, 2) ** 2, np.zeros(9)
    for _ in range(20_000):
        step = nu - W.T @ (W @ nu - w) / size
        nu = np.sign(step) * np.maximum(abs(step) - penalty / size, 0)
    np.testing.assert_allclose(method.lasso(W, w, strength), nu, atol=1e-6)


def test_lasso_ends_at_zero_and_begins_at_the_linear_program():
    W, w = draw(3, 8, seed=4), draw(3, seed=54)
    assert not method.lasso(W, w, 1.0).any() and method.lasso(W, w, 0.99).any()
    gaps = [abs(method.lasso(W, w, s) - method.smallest_sum(W, w)).max() for s in (0.1, 0.01, 0.001)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 5e-3


RULES = [*method.RULES.values(), recipe.shortest]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_is_the_same_in_any_basis_and_by_either_sign_of_the_target(rule):
    W, w = draw(3, 8, seed=7), draw(3, seed=57)
    Q = np.linalg.qr(draw(3, 3, seed=9))[0]
    weight = rule(W, w)
    assert weight.shape == (8,) and (weight >= 0).all() and weight.any()
    np.testing.assert_allclose(rule(Q.T @ W, Q.T @ w), weight, atol=1e-5)
    np.testing.assert_allclose(rule(W, -w), weight, atol=1e-5)


def test_one_equation_in_place_of_k_depends_on_the_basis():
    W, w = draw(3, 8, seed=7), draw(3, seed=57)
    nu, Q = recipe.scalar(W, w), np.linalg.qr(draw(3, 3, seed=9))[0]
    assert abs(recipe.scalar(Q.T @ W, Q.T @ w) - nu).max() > 0.01
    signed = W.sum(0) * w.sum() / (W.sum(0) @ W.sum(0))  # the sum is met, and no shorter vector meets it
    assert (W @ signed - w).sum() == pytest.approx(0, abs=1e-12) and np.linalg.norm(W @ signed - w) > 0.1
    np.testing.assert_allclose(nu, abs(signed))
    np.testing.assert_allclose(signed, np.linalg.pinv(np.ones((1, 3)) @ W)[:, 0] * w.sum(), atol=1e-12)


def test_nearest_takes_the_largest_cosines_of_either_sign_and_breaks_ties_by_order():
    W, w = np.array([[1.0, -9, 0, 1, 2], [0, 1, 1, 0, 2]]), np.array([1.0, 0])
    assert method.nearest(W, w, 3).tolist() == [1, 1, 0, 1, 0] and method.nearest(W, w, 1).tolist() == [1, 0, 0, 0, 0]
    assert method.nearest(W, w).sum() == 2


# --- the budget


def test_budget_is_spent_to_the_last_example_in_proportion():
    for seed in range(20):
        weight, N = abs(draw(9, seed=seed)), int(np.random.default_rng(seed).integers(0, 500))
        n = method.allocate(weight, N, np.full(9, 10_000))
        assert n.sum() == N and (abs(n - N * weight / weight.sum()) < 1).all()


def test_remainders_ties_and_room_by_hand():
    assert method.allocate([1, 1, 1], 5, [9, 9, 9]).tolist() == [2, 2, 1]
    assert method.allocate([1, 3, 0], 2, [9, 9, 9]).tolist() == [1, 1, 0]  # 0.5 and 1.5: a tie of remainders
    assert method.allocate([1, 3, 0], 8, [9, 4, 9]).tolist() == [4, 4, 0]
    assert method.allocate([1, 0, 0], 8, [4, 9, 9]).tolist() == [4, 2, 2]  # no weight is left: evenly
    assert method.allocate([1, 2], 0, [1, 1]).tolist() == [0, 0]
    with pytest.warns(UserWarning, match="spread evenly"):
        assert method.allocate([0, 0], 4, [9, 9]).tolist() == [2, 2]


def test_the_bound_in_both_allocations_is_the_formula():
    W, w, N = draw(3, 12), draw(3, seed=1), 500.0
    nu = method.minimum_norm(W, w)
    by_size, by_square = N * abs(nu) / abs(nu).sum(), N * nu**2 / (nu**2).sum()
    assert (nu**2 / by_size).sum() == pytest.approx(abs(nu).sum() ** 2 / N)
    assert (nu**2 / by_square).sum() == pytest.approx(12 * (nu**2).sum() / N)
    other = by_size + 3 * (draw(12, seed=2) - draw(12, seed=2).mean())  # the same total, elsewhere
    assert (other > 0).all() and (nu**2 / other).sum() > (nu**2 / by_size).sum()


# --- the fit


def test_sums_are_of_the_first_examples():
    tasks, *_ = small()
    G, c = tasks.sums([0, 1, 2, 3, 40, 5, 6])
    assert not G[0].any() and not c[0].any()
    np.testing.assert_allclose(G[4], tasks.X[4].T @ tasks.X[4])
    np.testing.assert_allclose(c[2], tasks.y[2][:2] @ tasks.X[2][:2])


def test_each_step_is_the_least_squares_problem_it_stands_for():
    tasks, *_ = small()
    n, B, W = np.array([1, 9, 12, 20, 30, 40, 7]), np.linalg.qr(draw(6, 2))[0], draw(2, 7)
    G, c = tasks.sums(n)
    X, y = ([one[:m] for one, m in zip(part, n, strict=True)] for part in (tasks.X, tasks.y))
    for t in range(7):  # also the smallest solution of the task with one example
        found = np.linalg.lstsq(X[t] @ B, y[t], rcond=None)[0]
        np.testing.assert_allclose(method.heads(B, G, c)[:, t], found, atol=1e-5)
    design = np.concatenate([np.kron(X[t], W[:, t]) for t in range(7)])  # rows: the entries of B one after another
    best = np.linalg.lstsq(design, np.concatenate(y), rcond=None)[0].reshape(6, 2)
    span = method.representation(W, G, c)
    np.testing.assert_allclose(span.T @ span, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(span @ span.T @ best, best, atol=1e-8)
    squared = sum(((X[t] @ B @ W[:, t] - y[t]) ** 2).sum() - (y[t] ** 2).sum() for t in range(7))
    assert method.loss(B, W, G, c) == pytest.approx(squared)


@pytest.mark.parametrize("seed", range(3))
def test_alternating_steps_reach_what_lbfgs_reaches_from_anywhere(seed):
    tasks, *_ = small(seed)
    n = np.random.default_rng(seed).integers(3, 40, 7)
    G, c = tasks.sums(n)
    B, W = method.mlls(G, c, method.ridge_start(G, c, 2), steps=1000, tol=1e-12)
    X = torch.tensor(np.concatenate([one[:m] for one, m in zip(tasks.X, n, strict=True)]))
    y = torch.tensor(np.concatenate([one[:m] for one, m in zip(tasks.y, n, strict=True)]))
    task, lowest = torch.tensor(np.repeat(np.arange(7), n)), []
    for start in range(2):
        g = torch.Generator().manual_seed(start)
        parts = [torch.randn(*s, generator=g, dtype=torch.double).requires_grad_() for s in ((6, 2), (2, 7))]
        optimizer = torch.optim.LBFGS(parts, max_iter=500, tolerance_change=1e-13, line_search_fn="strong_wolfe")

        def closure(parts=parts, optimizer=optimizer):
            optimizer.zero_grad()
            total = ((X * (parts[0] @ parts[1]).T[task]).sum(1) - y).square().sum() - y.square().sum()
            total.backward()
            return total

        optimizer.step(closure)
        lowest.append(closure().item())
    assert method.loss(B, W, G, c) == pytest.approx(min(lowest), abs=1e-6)


def test_without_noise_the_true_span_is_found_and_the_target_with_it():
    tasks, X, y, (B, _, w) = small(sigma=0.0)
    found, _, head = method.learn(tasks, np.full(7, 30), X, y, 2)
    assert np.linalg.svd(found.T @ B)[1].min() > 1 - 1e-8
    assert recipe.excess(found @ head, B, w) < 1e-8


def test_the_lowest_of_several_starts_is_kept(monkeypatch):
    tasks, X, y, _ = small()
    n = np.full(7, 3)
    G, c = tasks.sums(n)
    monkeypatch.setattr(method.mlls, "__defaults__", (5, 1e-7))
    starts = [np.linalg.qr(draw(6, 2, seed=s))[0] for s in range(6)]
    one_by_one = [method.loss(*method.mlls(G, c, start), G, c) for start in starts]
    found = method.loss(*method.learn(tasks, n, X, y, 2, starts)[:2], G, c)
    assert found == min(one_by_one) < max(one_by_one) - 1e-3


def test_joining_makes_the_target_one_more_task_of_the_representation():
    tasks, X, y, _ = small()
    n = np.full(7, 20)
    B, W, w = method.learn(tasks, n, X, y, 2, join=True)
    both = recipe.Tasks([*tasks.X, X], [*tasks.y, y])
    alone = method.learn(both, np.append(n, len(y)), X, y, 2)
    np.testing.assert_allclose(B @ B.T, alone[0] @ alone[0].T, atol=1e-10)
    assert W.shape == (2, 7) and abs(B @ w - np.matmul(*method.learn(tasks, n, X, y, 2)[::2])).max() > 1e-3


def test_all_of_the_budget_is_bought_on_top_and_earlier_examples_stay(monkeypatch):
    tasks, X, y, _ = small()
    first = np.array([6, 7, 8, 9, 10, 11, 12])
    for rounds in (1, 3):
        n, *_ = method.active(tasks, X, y, 2, first, 50, method.sparse, rounds=rounds)
        assert n.sum() == first.sum() + 50 and (n >= first).all()
    n, B, W, w = method.active(tasks, X, y, 2, first, 50, method.uniform, restart=False)
    again = method.learn(tasks, n, X, y, 2, [method.learn(tasks, first, X, y, 2)[0]])
    for a, b in zip((B, W, w), again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_known_relevance_is_used_in_place_of_the_estimate():
    tasks, X, y, (_, W, w) = small()
    first = np.full(7, 8)
    n, *_ = method.active(tasks, X, y, 2, first, 70, method.squares, known=(W, w))
    np.testing.assert_array_equal(n - first, method.allocate(method.squares(W, w), 70, tasks.length - first))


def test_relevance_is_estimated_from_the_first_examples_alone():
    tasks, X, y, _ = small()
    first, seen = np.full(7, 12), []
    method.active(tasks, X, y, 2, first, 40, lambda W, w: seen.append((W, w)) or np.ones(7))
    early = recipe.Tasks([one[:12] for one in tasks.X], [one[:12] for one in tasks.y])
    _, W, w = method.learn(early, first, X, y, 2)
    np.testing.assert_array_equal(seen[0][0], W)
    np.testing.assert_array_equal(seen[0][1], w)


# --- data


def test_simulated_tasks_are_what_their_mix_says():
    for mix in recipe.MIXES:
        tasks, X, y, B, W, w = recipe.simulate(3, sigma=0.0, length=50, mix=mix)
        np.testing.assert_allclose(B.T @ B, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(W, axis=0), 1)
        np.testing.assert_allclose(tasks.X[4] @ B @ W[:, 4], tasks.y[4], atol=1e-12)
        np.testing.assert_allclose(X @ B @ w, y, atol=1e-12)
        assert mix == "sparse" or np.linalg.norm(w) == pytest.approx(1)
    sums = [abs(solve(W, w)).sum() for solve in (method.minimum_norm, method.smallest_sum)]
    assert sums == pytest.approx([3**0.5] * 2)  # balanced: nothing to gain
    theta = B @ w + draw(20)
    assert recipe.excess(theta, B, w) == pytest.approx(np.mean((draw(100_000, 20, seed=1) @ draw(20)) ** 2), rel=0.02)


@pytest.fixture(scope="module")
def digits():
    g = torch.Generator().manual_seed(0)
    pictures = torch.rand(1700, 1, 28, 28, generator=g)
    labels = torch.arange(1700) % 10
    pictures[torch.arange(1700), 0, labels] += 1  # a row of light for each digit
    pictures = pictures.clamp(max=1)
    data = SimpleNamespace(x_train=pictures[:1500], x_test=pictures[1500:], y_train=labels[:1500], y_test=labels[1500:])
    return recipe.Digits(data)


def test_corruptions_are_repeatable_change_the_image_and_leave_their_input():
    pictures = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before = pictures.clone()
    for kind in recipe.KINDS:
        once = recipe.corrupt(pictures, kind)
        assert torch.equal(once, recipe.corrupt(pictures, kind)) and once.shape == pictures.shape
        assert 0 <= once.min() and once.max() <= 1 and (once - pictures).abs().max() > 0.1
        assert torch.equal(pictures, before)
    centre = torch.zeros(1, 1, 28, 28)
    centre[0, 0, 13:15, 20] = 1  # right of the centre: turned by 20 degrees it is up or down, as far out
    turned = recipe.corrupt(centre, "rotate")[0, 0].nonzero().float().mean(0)
    assert ((turned - 13.5) ** 2).sum().sqrt() == pytest.approx(6.5, abs=0.3) and abs(turned[0] - 13.5) > 1.5


def test_sources_target_and_test_share_no_image_under_any_corruption(digits):
    assert not set(digits.pool) & set(digits.own) and len(digits.pool) + len(digits.own) == 1500
    names, tasks, X, y = recipe.problem(digits, "blur", 3, seed=0, n_target=60)
    assert len(names) == 70 and not [name for name in names if name[0] == "blur"]
    rows = {tuple(row): i for i, row in enumerate(digits.features["blur"])}
    assert {rows[tuple(row)] for row in X} <= set(digits.own) and len({tuple(row) for row in X}) == 60
    t = names.index(("noise", 7))
    rows = {tuple(row): i for i, row in enumerate(digits.features["noise"])}
    bought = [rows[tuple(row)] for row in tasks.X[t]]
    assert set(bought) <= set(digits.pool) and len(set(bought)) == len(bought)
    assert (np.where(digits.y[bought] == 7, 1, -1) == tasks.y[t]).all()


def test_labels_are_balanced_whatever_is_bought_and_features_are_standardised_on_the_pool(digits):
    _, tasks, X, y = recipe.problem(digits, "noise", 0, seed=1, n_target=40)
    assert y.sum() == 0 and all(one[:64].sum() == 0 for one in tasks.y) and X.shape == (40, 25)
    for values in digits.features.values():
        np.testing.assert_allclose(values[digits.pool, :24].mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(values[digits.pool, :24].std(0, ddof=1), 1, atol=1e-9)
        assert (values[:, 24] == 1).all()


def test_errors_weigh_both_sides_alike(digits):
    theta = np.zeros(25)
    theta[24] = -1.0  # always "another digit"
    assert recipe.errors(digits, "blur", 4, theta) == (0.5, 2.0)
    assert recipe.errors(digits, "blur", 4, 0 * theta) == (1.0, 1.0)  # a score of 0 is an error


def test_pairs_of_digits_share_no_image_with_the_target():
    ink = datasets.load("optdigits")
    tasks, X, y = recipe.pairs(ink, 0)
    assert len(tasks.y) == 44 and X.shape == (len(y), 17) and set(y) == {-1, 1} and (X[:, 16] == 1).all()
    used = {tuple(row) for one in tasks.X for row in one}
    assert not used & {tuple(row) for row in X} and len(used) <= 3000


# --- the recipe


def test_options_are_chosen_by_folds_of_the_targets_examples():
    tasks, X, y, (B, W, w) = small(sigma=0.1)
    options = (1.0, 0.3, 0.03)
    B, W, _ = method.learn(tasks, np.full(7, 40), X, y, 2)
    assert recipe.by_folds(method.lasso, options, X, y, B, W) == 0.03  # little noise: little shrinkage
    np.testing.assert_allclose(recipe.ridge(W, w, 0.0), method.minimum_norm(W, w), atol=1e-10)
    assert np.linalg.norm(recipe.ridge(W, w, 1.0)) < np.linalg.norm(recipe.ridge(W, w, 0.1))
    assert (recipe.among(W, w, 3) != 0).sum() == 3 and recipe.largest([-3, 1, 2], 2).tolist() == [3, 0, 2]


def test_pooled_is_one_regression_of_all_tasks_scaled_to_the_target():
    g = np.random.default_rng(0)
    theta, xs = g.normal(size=6), g.normal(size=(4, 300, 6))
    tasks = recipe.Tasks(xs, xs @ theta)
    X = g.normal(size=(50, 6))
    np.testing.assert_allclose(recipe.pooled(tasks, np.full(4, 300), X, -2 * X @ theta), -2 * theta, atol=1e-3)


def test_the_stored_rows_come_out_again():
    table = papers.results("lasso-multitask", "synthetic")
    stored = table[table["seed"] == 3].set_index(["setting", "mix"])
    for name, mix, given in (recipe.SETTINGS[0], recipe.SETTINGS[3], recipe.SETTINGS[12]):
        now = pd.Series({k: v for k, v in recipe.simulated(name, mix, 3, **given).items() if k != "seed"})
        now = now.drop(["setting", "mix"]).astype(float)
        # its folds cannot tell k or more nearest tasks apart, all solve W nu = w: the processor's rounding chooses
        now = now.drop("nearest, tuned", errors="ignore")
        np.testing.assert_allclose(stored.loc[(name, mix), now.index].astype(float), now, rtol=0.02)
    assert len(table) == len(recipe.SETTINGS) * recipe.SEEDS and not table["true B"].isna().any()
    assert len(papers.results("lasso-multitask", "mnist")) == 2 * len(recipe.MNIST) * 10 * recipe.MNIST_SEEDS


def test_better_is_an_interval_of_paired_differences_above_zero():
    runs = pd.DataFrame({"Lasso": [1.0, 2, 3, 4], "a": [2.0, 3.2, 4, 5.2], "b": [1.0, 3, 2, 6]})
    mean, half = recipe.gap(runs, "a")
    assert mean == pytest.approx(1.1) and half == pytest.approx(3.182446 * 0.2 / 3**0.5 / 2, rel=1e-5)
    assert recipe.gap(pd.concat([runs, runs.assign(a=np.nan)]), "a") == (mean, half)
    groups = [(("x", "y"), runs)]
    assert recipe.better(groups, ["a"]) == {"x, y": True} and recipe.better(groups, ["a", "b"]) == {"x, y": False}
    assert recipe.better(groups, ["Lasso"], "a") == {"x, y": False}


# --- bad input


def test_bad_input_raises():
    tasks, X, y, (_, W, w) = small()
    n = np.full(7, 10)
    for call in (
        lambda: recipe.Tasks([X, X[:5]], [y, y]),
        lambda: recipe.Tasks([X, X[:, :3]], [y, y]),
        lambda: recipe.Tasks([X, X], [y, np.ones(50)]),
        lambda: recipe.Tasks([X[0]], [y]),
        lambda: tasks.sums(np.full(7, 41)),
        lambda: tasks.sums(np.full(7, -1)),
        lambda: tasks.sums(np.full(6, 1)),
        lambda: tasks.sums(np.full(7, 1.5)),
        lambda: method.learn(tasks, n, X, y, 0),
        lambda: method.learn(tasks, n, X, y, 7),
        lambda: method.learn(tasks, n, X[:, :5], y, 2),
        lambda: method.learn(tasks, n, X, y[:9], 2),
        lambda: method.active(tasks, X, y, 2, n, -1, method.uniform),
        lambda: method.active(tasks, X, y, 2, n, 10_000, method.uniform),
        lambda: method.active(tasks, X, y, 2, n, 10, method.uniform, rounds=0),
        lambda: method.allocate([1, -1], 3, [9, 9]),
        lambda: method.allocate([1, 1], 19, [9, 9]),
        lambda: method.allocate([1, 1], -1, [9, 9]),
        lambda: method.allocate([1, 1, 1], 3, [9, 9]),
        lambda: method.allocate([1, 1], 2.5, [9, 9]),
        lambda: method.nearest(W, w, 0),
        lambda: method.nearest(W, w, 8),
        lambda: method.lasso(W, w, 0),
        lambda: method.lasso(W, w, -0.1),
        lambda: method.smallest_sum(np.array([[1.0], [0.0]]), np.array([0.0, 1.0])),
        lambda: method.minimum_norm(w, w),
        lambda: method.minimum_norm(W[:, :0], w),
    ):
        with pytest.raises(ValueError):
            call()
    for call in (
        lambda: recipe.Tasks([X], [y / 0]),
        lambda: method.learn(tasks, n, X, np.where(y > 0, np.nan, y), 2),
        lambda: method.smallest_sum(W, w * np.nan),
        lambda: method.allocate([np.nan, 1], 3, [9, 9]),
    ):
        with pytest.raises(ValueError, match="finite"), np.errstate(all="ignore"):
            call()
    for call in (lambda: recipe.simulate(0, mix="even"), lambda: recipe.corrupt(torch.zeros(1, 1, 28, 28), "fog")):
        with pytest.raises(UnknownName):
            call()
