"""Shapley values: the axioms by brute force, agreement with shap, and every gap said aloud."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)  # fmt: skip
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from torch import nn

from nbkit import shapley
from nbkit.errors import NotFinite, UnknownName
from nbkit.shapley import AdditivityWarning

P = 6


@pytest.fixture(scope="module", autouse=True)
def interpreted_shap():
    """shap's explainers compile for half a minute, and are asked about a few rows here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DISABLE_JIT", "1")
        import shap  # noqa: F401


@pytest.fixture(scope="module")
def cells():
    """Ten measurements of breast cancer cells and the diagnosis."""
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    return X.iloc[:, :P], y


@pytest.fixture(scope="module")
def split(cells):
    """Rows to explain, more than there are columns, and a background."""
    return cells[0].iloc[:8], cells[0].iloc[100:140]


def by_permutations(f, x, background):
    """Shapley values of one row by the definition: the mean marginal contribution over all orders of the features."""
    p, phi = len(x), np.zeros(len(x))
    for order in itertools.permutations(range(p)):
        mixed = background.copy()
        before = f(mixed).mean()
        for j in order:
            mixed[:, j] = x[j]
            after = f(mixed).mean()
            phi[j] += after - before
            before = after
    return phi / math.factorial(p)


def mlp(features, outputs, device="cpu", seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, outputs)).to(device)


# ---- the definition and its axioms


def test_exact_is_the_mean_over_all_orders_of_joining():
    rng = np.random.default_rng(0)
    X, background = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))

    def f(rows):
        return rows[:, 0] * rows[:, 1] + np.sin(rows[:, 2]) * rows[:, 3] + np.maximum(rows[:, 0], rows[:, 3])

    found = shapley.explain(f, X, background, method="exact")
    expected = [by_permutations(f, x, background) for x in X]
    np.testing.assert_allclose(found.values, expected, atol=1e-12)


def test_a_linear_model_gets_weight_times_distance_from_the_background_mean(cells, split):
    X, background = split
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(*cells)
    margin = shapley.explain(model.decision_function, X, background, method="exact")
    scaler, linear = model
    expected = linear.coef_[0] / scaler.scale_ * (X.to_numpy() - background.to_numpy().mean(0))
    np.testing.assert_allclose(margin.values, expected, atol=1e-8)
    assert margin.output == "decision_function"


games = st.integers(2, 5).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, 10_000)))


def random_function(p, rng):
    """A polynomial with interactions of every order."""
    terms = [(rng.normal(), rng.random(p) < 0.5) for _ in range(6)]
    return lambda rows: sum(w * np.prod(rows[:, s], axis=1) for w, s in terms)


@settings(max_examples=25, deadline=None)
@given(games)
def test_efficiency_the_values_sum_to_prediction_minus_mean_prediction(game):
    p, seed = game
    rng = np.random.default_rng(seed)
    f, X, background = random_function(p, rng), rng.normal(size=(3, p)), rng.normal(size=(4, p))
    found = shapley.explain(f, X, background, method="exact")
    np.testing.assert_allclose(found.values.sum(1), f(X) - f(background).mean(), atol=1e-10)
    np.testing.assert_allclose(found.additivity_gap, 0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(games)
def test_linearity_the_values_of_a_sum_are_the_sum_of_the_values(game):
    p, seed = game
    rng = np.random.default_rng(seed)
    f, g = random_function(p, rng), random_function(p, rng)
    X, background = rng.normal(size=(2, p)), rng.normal(size=(3, p))
    both = shapley.explain(lambda rows: 2 * f(rows) - g(rows), X, background, method="exact").values
    one, other = (shapley.explain(h, X, background, method="exact").values for h in (f, g))
    np.testing.assert_allclose(both, 2 * one - other, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_symmetry_and_dummy(seed):
    rng = np.random.default_rng(seed)
    X, background = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    X[:, 1], background[:, 1] = X[:, 0], background[:, 0]  # twins in a function that treats them alike
    f = random_function(4, rng)

    def unused_third(rows):
        twins = np.stack([rows[:, 0] * rows[:, 1], rows[:, 0] + rows[:, 1], rows[:, 2], rows[:, 4]], axis=1)
        return f(twins)

    values = shapley.explain(unused_third, X, background, method="exact").values
    np.testing.assert_allclose(values[:, 0], values[:, 1], atol=1e-10)
    np.testing.assert_allclose(values[:, 3], 0, atol=1e-12)


# ---- agreement with shap


def test_exact_agrees_with_shaps_exact_and_kernel_explainers(cells, split):
    import shap

    X, background = (t.to_numpy() for t in split)
    model = make_pipeline(StandardScaler(), SVC()).fit(cells[0].to_numpy(), cells[1])
    ours = shapley.explain(model.decision_function, X, background, method="exact").values
    theirs = shap.explainers.ExactExplainer(model.decision_function, shap.maskers.Independent(background))(
        X
    ).values
    np.testing.assert_allclose(ours, theirs, atol=1e-8)
    kernel = shap.KernelExplainer(model.decision_function, background).shap_values(
        X, silent=True, l1_reg=False
    )
    np.testing.assert_allclose(ours, kernel, atol=1e-6)


def test_permutation_and_kernel_draw_what_shap_draws_from_the_same_seed():
    import shap

    rng = np.random.default_rng(1)
    X, background = rng.normal(size=(2, 14)), rng.normal(size=(6, 14))

    def f(rows):
        return np.prod(rows[:, :3], axis=1) + np.sin(rows).sum(1) * np.cos(rows[:, 5])

    ours = shapley.explain(f, X, background, method="permutation", n_samples=3, seed=4)
    explainer = shap.explainers.PermutationExplainer(f, shap.maskers.Independent(background), seed=4)
    theirs = explainer(X, max_evals=3 * (2 * 14 + 1), silent=True).values
    np.testing.assert_allclose(ours.values, theirs, atol=1e-12)

    ours = shapley.explain(f, X, background, method="kernel", n_samples=200, seed=4)
    np.random.seed(4)
    theirs = shap.KernelExplainer(f, background).shap_values(X, nsamples=200, l1_reg=False, silent=True)
    np.testing.assert_allclose(ours.values, theirs, atol=1e-8)


@pytest.mark.parametrize(
    ("model", "output"),
    [
        (RandomForestClassifier(10, random_state=0), 1),
        (make_pipeline(SimpleImputer(), StandardScaler(), ExtraTreesClassifier(10, random_state=0)), 0),
        (GradientBoostingRegressor(n_estimators=10, random_state=0), None),
        (HistGradientBoostingRegressor(max_iter=10), None),
        (RandomForestRegressor(5, random_state=0), None),
        (Pipeline([("scale", "passthrough"), ("trees", RandomForestRegressor(5, random_state=0))]), None),
        (Pipeline([("none", None), ("trees", RandomForestRegressor(5, random_state=0))]), None),
    ],
    ids=["forest", "imputer-extra-trees", "boosting", "histogram", "regressor", "passthrough", "none"],
)
def test_auto_takes_tree_shap_where_it_is_exact(cells, split, model, output):
    model.fit(*cells)
    tree = shapley.explain(model, *split, target=output)
    assert tree.method == "tree"
    np.testing.assert_allclose(
        tree.values, shapley.explain(model, *split, method="exact", target=output).values, atol=1e-6
    )


def test_a_large_background_is_used_whole(cells):
    X, y = cells
    model = RandomForestClassifier(5, random_state=0).fit(X, y)
    found = shapley.explain(model, X.iloc[:3], X)  # shap would keep 100 of the 569 rows
    assert found.background == len(X)
    assert found.base_value == pytest.approx(model.predict_proba(X)[:, 1].mean())
    np.testing.assert_allclose(found.values, shapley.explain(model, X.iloc[:3], X, method="exact").values, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        RandomForestClassifier(5, random_state=0),
        GradientBoostingClassifier(n_estimators=10, random_state=0),
        HistGradientBoostingClassifier(max_iter=10),
    ],
    ids=["forest", "boosting", "histogram"],
)
def test_tree_agrees_with_shaps_tree_explainer_where_float32_holds_the_thresholds(cells, model):
    import shap

    X, y = (cells[0] * 1000).round(), cells[1]
    rows, background = X.iloc[:6], X.iloc[100:140]
    model.fit(X, y)
    space = "raw" if isinstance(model, RandomForestClassifier) else "probability"
    explainer = shap.TreeExplainer(model, background.to_numpy(), model_output=space)
    theirs = explainer.shap_values(rows.to_numpy())
    theirs = theirs[..., 1] if theirs.ndim == 3 else theirs
    np.testing.assert_allclose(shapley.explain(model, rows, background, method="tree").values, theirs, atol=1e-6)
    np.testing.assert_allclose(
        shapley.explain(model, rows, background, method="tree", target=0).values, -theirs, atol=1e-6
    )


def test_tree_holds_where_float32_does_not_and_with_missing_values(cells):
    X, y = cells
    X = X.mask(np.random.default_rng(0).random(X.shape) < 0.1)
    for model in (HistGradientBoostingRegressor(max_iter=10), RandomForestRegressor(5, random_state=0)):
        model.fit(X, y)
        tree, exact = (shapley.explain(model, X.iloc[:5], X.iloc[5:], method=method) for method in ("tree", "exact"))
        np.testing.assert_allclose(tree.values, exact.values, atol=1e-6)


def test_boosted_classifiers_are_explained_exactly_by_default_as_tree_shap_only_approximates(cells, split):
    model = GradientBoostingClassifier(n_estimators=10, random_state=0).fit(*cells)
    found, tree = shapley.explain(model, *split), shapley.explain(model, *split, method="tree")
    assert (found.method, found.output) == ("exact", "P(1)")
    np.testing.assert_allclose(found.prediction, model.predict_proba(split[0])[:, 1])
    # the rescaled values of the log-odds add up and yet are not the Shapley values of the probability
    np.testing.assert_allclose(tree.additivity_gap, 0, atol=1e-6)
    assert np.abs(tree.values - found.values).max() > 1e-3


def test_tree_says_why_it_cannot(cells, split):
    X, y = cells
    poisson = HistGradientBoostingRegressor(loss="poisson", max_iter=5).fit(X, y)
    three = GradientBoostingClassifier(n_estimators=2).fit(X, pd.cut(X.iloc[:, 0], 3, labels=False))
    for model, table, output, why in [
        (poisson, X, None, "link"),
        (three, X, 2, "cannot read GradientBoostingClassifier"),
        (LogisticRegression(max_iter=5000).fit(X, y), X, None, "cannot read LogisticRegression"),
        (RandomForestClassifier(3).fit(X, y), X, lambda p: p[:, 0] ** 2, "callable"),
    ]:
        rows, background = table.iloc[:3], table.iloc[100:120]
        with pytest.raises(ValueError, match=why):
            shapley.explain(model, rows, background, method="tree", target=output)
        assert shapley.explain(model, rows, background, target=output).method == "exact"


def test_values_far_apart_only_in_their_last_digits_still_count():
    """shap takes numbers within 1e-5 of each other for equal, so two timestamps of one week."""
    start = 1.7e9
    X, background = np.array([[start + 5e3, 1.0]]), np.array([[start, 0.0]])

    def f(rows):
        return (rows[:, 0] - start) / 1e3 + rows[:, 1]

    for method in ("exact", "permutation", "kernel"):
        np.testing.assert_allclose(shapley.explain(f, X, background, method=method).values, [[5, 1]], atol=1e-9)


# ---- the gap


def test_the_gap_is_stated_and_warned_of(split):
    net = mlp(P, 1)
    X, background = (torch.tensor(((t - t.mean()) / t.std()).to_numpy(), dtype=torch.float32) for t in split)
    with pytest.warns(AdditivityWarning, match="miss the prediction by up to"):
        rough = shapley.explain(net, X, background, method="gradient", n_samples=5)
    gap = np.abs(rough.prediction - rough.base_value - rough.values.sum(1))
    np.testing.assert_allclose(np.abs(rough.additivity_gap), gap)
    for said in (repr(rough), rough._repr_html_()):
        assert f"additivity gap at most {gap.max():.2g}" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapley.explain(net, X, background, method="gradient", n_samples=5, tolerance=10)
        shapley.explain(net, X, background, method="exact")


def test_more_gradients_close_the_gap(split, device):
    net = mlp(P, 1, device)
    X, background = (torch.tensor(((t - t.mean()) / t.std()).to_numpy(), dtype=torch.float32) for t in split)
    coarse, fine = (
        shapley.explain(net, X.to(device), background.to(device), method="gradient", n_samples=n, tolerance=10)
        for n in (20, 4000)
    )
    assert np.abs(fine.additivity_gap).max() < 0.1 * np.abs(coarse.additivity_gap).max()


# ---- torch modules


def test_gradient_is_exact_for_a_linear_module_and_agrees_with_shap_otherwise(device):
    import shap

    rng = np.random.default_rng(0)
    X, background = rng.normal(size=(3, 9)).astype("f4"), rng.normal(size=(50, 9)).astype("f4")
    linear = nn.Linear(9, 2).to(device)
    found = shapley.explain(linear, X, background, method="gradient", target=0)
    weight = linear.weight[0].detach().cpu().numpy()
    np.testing.assert_allclose(found.values, weight * (X - background.mean(0)), atol=1e-5)

    net = mlp(9, 1)
    ours = shapley.explain(net, X, background, method="gradient", n_samples=5000, tolerance=1)
    explainer = shap.GradientExplainer(net, torch.tensor(background))
    theirs, deviation = explainer.shap_values(torch.tensor(X), nsamples=1000, rseed=0, return_variances=True)
    error = np.sqrt(deviation[0] / np.sqrt(1000))  # shap returns variance / sqrt(n)
    assert (np.abs(ours.values - theirs[..., 0]) < 5 * error + 1e-3).all()


class Shifting(nn.Module):
    """A product whose first operation works in place, or not."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        x = x.sub_(1) if self.inplace else x - 1
        return x[:, :1] * x[:, 1:]


@pytest.mark.parametrize("method", ["exact", "permutation", "gradient"])
def test_a_module_may_work_in_place_and_the_caller_be_in_inference_mode(method, device):
    X = torch.tensor(np.random.default_rng(0).normal(size=(6, 2)), device=device)
    before, asked = X.clone(), {"method": method, "tolerance": 1}
    expected = shapley.explain(Shifting(False), X, X, **asked).values
    np.testing.assert_array_equal(shapley.explain(Shifting(True), X, X, **asked).values, expected)
    with torch.inference_mode():
        np.testing.assert_array_equal(shapley.explain(Shifting(False), X + 0, X, **asked).values, expected)
    if method != "gradient":
        function = Shifting(True).forward
        np.testing.assert_array_equal(shapley.explain(function, X, X, **asked).values, expected)
    assert torch.equal(X, before)


def test_a_module_and_every_global_state_come_back_as_they_were(split, device):
    net = (
        nn.Sequential(nn.Linear(P, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).to(device).train()
    )
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    for method in ("exact", "permutation", "kernel", "gradient"):
        shapley.explain(net, *split, method=method, tolerance=100, n_samples=50)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training and not net[1].training
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert (np.random.get_state()[1] == numpy_state).all() and torch.equal(torch.get_rng_state(), torch_state)


def test_frame_array_and_tensor_give_the_same(split, device):
    net = mlp(P, 2, device)
    frames = [t / 1000 for t in split]
    arrays = [t.to_numpy(dtype="f4") for t in frames]
    tensors = [torch.tensor(a, device=device) for a in arrays]
    found = [shapley.explain(net, X, background, target=1) for X, background in (frames, arrays, tensors)]
    assert [f.method for f in found] == ["exact"] * 3
    for other in found[1:]:
        np.testing.assert_allclose(other.values, found[0].values, atol=1e-6)
    assert found[0].feature_names == list(split[0].columns) and found[1].feature_names[1] == "x1"


def test_auto_takes_gradients_for_a_wide_module_and_permutations_for_a_wide_function():
    X, background = np.zeros((2, 20)), np.ones((3, 20))
    assert shapley.explain(nn.Linear(20, 1), X, background).method == "gradient"
    assert shapley.explain(lambda rows: rows.sum(1), X, background).method == "permutation"


def test_batch_bounds_the_rows_of_a_call_and_changes_nothing():
    rng = np.random.default_rng(0)
    X, background = rng.normal(size=(4, 5)), rng.normal(size=(7, 5))
    sizes = []

    def f(rows):
        sizes.append(len(rows))
        return rows.prod(1)

    for method in ("exact", "permutation", "kernel"):
        whole = shapley.explain(f, X, background, method=method).values
        sizes.clear()
        np.testing.assert_allclose(
            shapley.explain(f, X, background, method=method, batch=10).values, whole, atol=1e-12
        )
        assert max(sizes) <= 10


def test_mixed_rows_that_are_alike_run_once():
    rng = np.random.default_rng(0)
    X, background = (
        rng.integers(0, 2, size=(5, 6)).astype(float),
        rng.integers(0, 2, size=(40, 6)).astype(float),
    )
    ran = []

    def f(rows):
        ran.append(len(rows))
        return rows[:, 0] * rows[:, 1] + rows[:, 2] * rows[:, 3] * rows[:, 4]

    found = shapley.explain(f, X, background, method="exact")
    assert sum(ran) <= 2**6 + len(X) + len(background) + 1  # of 5 * 2**6 * 40 mixed rows
    np.testing.assert_allclose(found.values[0], by_permutations(f, X[0], background), atol=1e-12)


# ---- what is explained


def test_the_class_explained_is_the_second_of_two_or_the_one_named(cells, split):
    X, y = cells
    labels = np.where(y == 1, "benign", "AD")
    model = RandomForestClassifier(5, random_state=0).fit(X, labels)
    default, named = shapley.explain(model, *split), shapley.explain(model, *split, target="AD")
    assert (default.output, named.output) == ("P(benign)", "P(AD)")
    np.testing.assert_allclose(default.values, -named.values, atol=1e-7)
    with pytest.raises(ValueError, match="'CN' is not a class.*'AD', 'benign'"):
        shapley.explain(model, *split, target="CN")
    three = RandomForestClassifier(5).fit(X, pd.cut(X.iloc[:, 0], 3, labels=["a", "b", "c"]).astype(str))
    with pytest.raises(ValueError, match="3 classes; name the one"):
        shapley.explain(three, *split)
    log_odds = shapley.explain(model, *split, target=lambda p: np.log((p[:, 1] + 0.1) / (p[:, 0] + 0.1)))
    p = model.predict_proba(split[0])
    np.testing.assert_allclose(log_odds.prediction, np.log((p[:, 1] + 0.1) / (p[:, 0] + 0.1)))


def test_outputs_of_modules_and_functions(split):
    net = mlp(P, 3)
    X, background = (t.to_numpy(dtype="f4") for t in split)
    with pytest.raises(ValueError, match="3 outputs; name the one"):
        shapley.explain(net, X, background)
    with pytest.raises(IndexError, match="target 3 is out of range.*0 to 2"):
        shapley.explain(net, X, background, target=3)
    with pytest.raises(TypeError, match="X holds torch.int64 and the model torch.float32"):
        shapley.explain(net, torch.tensor(X).long(), target=1)
    probability = shapley.explain(net, X, background, target=lambda out: out.softmax(1)[:, 2])
    np.testing.assert_allclose(
        probability.prediction, net(torch.tensor(X)).softmax(1)[:, 2].detach(), atol=1e-6
    )
    with pytest.raises(ValueError, match="one score a row"):
        shapley.explain(lambda rows: rows[:, 0], X, background, target=lambda out: out.mean())
    with pytest.raises(ValueError, match="no probabilities.*decision_function"):
        shapley.explain(SVC().fit(X, [0, 1] * 4), X, background)


def test_text_and_missing_values_reach_a_pipeline_as_they_are():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"sex": rng.choice(["F", "M"], 40), "age": rng.integers(50, 90, 40), "ses": rng.normal(size=40)}
    )
    table.loc[::7, "ses"] = np.nan
    target = (table["sex"] == "M") * 10.0 + table["age"]
    from sklearn.compose import make_column_transformer

    encode = make_column_transformer((OneHotEncoder(), ["sex"]), (SimpleImputer(), ["age", "ses"]))
    model = make_pipeline(encode, LinearRegression()).fit(table, target)
    for method in ("auto", "permutation", "kernel"):
        found = shapley.explain(model, table.iloc[:4], table, method=method)
        shift = np.where(table["sex"] == "M", 10.0, 0.0)
        np.testing.assert_allclose(found.values[:, 0], shift[:4] - shift.mean(), atol=1e-6)
        np.testing.assert_allclose(found.values[:, 1], table["age"][:4] - table["age"].mean(), atol=1e-6)
    assert found.to_shap().data[0, 0] in ("F", "M")


# ---- groups and aspects


def test_singleton_groups_are_the_features_and_additive_models_add_up(cells, split):
    X, background = split
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(*cells)
    each = shapley.explain(model, X, background, method="exact")
    singles = shapley.group_shapley(model, X, background, {name: [name] for name in X.columns})
    np.testing.assert_allclose(singles.values, each.values, atol=1e-12)
    turned = {f"only {name}": [name] for name in X.columns[::-1]}  # each value keeps the data it is about
    for renamed in (shapley.group(each, turned), shapley.group_shapley(model, X, background, turned)):
        np.testing.assert_allclose(renamed.values, each.values[:, ::-1], atol=1e-12)
        pd.testing.assert_frame_equal(renamed.data, X[X.columns[::-1]].set_axis(list(turned), axis=1))

    size = {"size": ["mean radius", "mean area"], "shape": ["mean smoothness", "mean compactness"]}
    margin = shapley.explain(model.decision_function, X, background, method="exact")
    summed = shapley.group(margin, size)
    together = shapley.group_shapley(model.decision_function, X, background, size)
    assert (
        summed.feature_names == ["size", "shape", "mean texture", "mean perimeter"] == together.feature_names
    )
    np.testing.assert_allclose(summed.values[:, 0], margin.values[:, 0] + margin.values[:, 3], atol=1e-12)
    np.testing.assert_allclose(summed.values, together.values, atol=1e-9)
    np.testing.assert_allclose(together.additivity_gap, 0, atol=1e-10)


def test_where_members_interact_with_others_the_group_is_not_the_sum_of_its_members():
    X, background = np.ones((1, 3)), np.zeros((1, 3))
    groups = {"pair": ["x0", "x1"]}

    def f(rows):
        return rows.prod(1)

    # three members share 1 equally; a pair and a single share it in halves
    assert shapley.group(shapley.explain(f, X, background, method="exact"), groups).values == pytest.approx(
        np.array([[2 / 3, 1 / 3]])
    )
    assert shapley.group_shapley(f, X, background, groups).values == pytest.approx(np.array([[1 / 2, 1 / 2]]))


def test_groups_are_checked(split):
    found = shapley.explain(lambda rows: rows.sum(axis=1).to_numpy(), *split)
    with pytest.raises(UnknownName, match="'mean radios'; did you mean 'mean radius'"):
        shapley.group(found, {"a": ["mean radios"]})
    with pytest.raises(ValueError, match="'mean area' is in 'a' and again in 'b'"):
        shapley.group(found, {"a": ["mean area"], "b": ["mean area"]})
    with pytest.raises(ValueError, match="empty"):
        shapley.group(found, {"a": []})
    by_column = shapley.group(found, {"a": [0, 2], "b": 1})
    by_name = shapley.group(
        found, {"a": [split[0].columns[0], split[0].columns[2]], "b": split[0].columns[1]}
    )
    assert by_column.feature_names == by_name.feature_names
    np.testing.assert_array_equal(by_column.values, by_name.values)
    with pytest.raises(IndexError, match=f"column {P}; there are columns 0 to {P - 1}"):
        shapley.group(found, {"a": [P]})
    with pytest.raises(ValueError, match="share a name: mean area"):
        shapley.group(found, {"mean area": ["mean radius"]})
    wide = pd.DataFrame(np.zeros((2, 13)))
    with pytest.raises(ValueError, match="p=13 is more than 12"):
        shapley.group_shapley(lambda rows: rows.sum(axis=1), wide, wide, {})


def test_a_rescaled_column_shares_an_aspect_at_every_threshold_and_a_constant_one_never_does():
    rng = np.random.default_rng(0)
    volume = rng.normal(1500, 150, size=80)
    table = pd.DataFrame({"eTIV": volume, "ASF": 1755 / volume, "Age": rng.normal(size=80), "site": 1.0})
    table.loc[3, "Age"] = np.nan
    for threshold in (0.2, 0.5, 0.9, 1.0):
        found = shapley.aspects(table, threshold)
        assert found["eTIV + ASF"] == ["eTIV", "ASF"]
        assert found["site"] == ["site"]
        assert sorted(itertools.chain(*found.values())) == sorted(table.columns)
    assert found.linkage.shape == (3, 4) and found.features == list(table.columns)


def test_members_of_an_aspect_all_associate_by_hand():
    # rho = 1 - 6 (sum of squared rank differences) / (5 * 24); the sums are 4, 2 and 10
    table = pd.DataFrame({"a": [1, 2, 3, 4, 5], "b": [2, 1, 4, 3, 5], "c": [3, 1, 4, 2, 5]})
    rho = shapley.aspects(table).association
    assert [rho.loc["a", "b"], rho.loc["b", "c"], rho.loc["a", "c"]] == pytest.approx([0.8, 0.9, 0.5])
    # above 0.5 the pair a-c keeps the three apart, although a-b passes until 0.8; the closest pair joins first
    assert list(shapley.aspects(table, 0.5).values()) == [["a", "b", "c"]]
    for threshold in (0.6, 0.8, 0.9):
        assert list(shapley.aspects(table, threshold).values()) == [["a"], ["b", "c"]]
    assert list(shapley.aspects(table, 0.95).values()) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("holes", [0, 5])
def test_the_association_is_pandas_spearman_also_with_missing_values(holes):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)), columns=list("abc"))
    table["c"] += table["a"]
    table.loc[: holes - 1, "b"] = np.nan  # in one column of three: pair by pair, the others keep their rows
    expected = table.corr(method="spearman").abs()
    pd.testing.assert_frame_equal(shapley.aspects(table).association, expected)


def test_aspects_check_their_input():
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        shapley.aspects(np.eye(3), 0)
    with pytest.raises(ValueError, match="these columns hold none: sex"):
        shapley.aspects(pd.DataFrame({"sex": ["F", "M"], "age": [1, 2]}))
    assert shapley.aspects(np.arange(5.0)[:, None]) == {"x0": ["x0"]}


# ---- bad input


def test_another_background_is_refused_by_name(cells, split):
    X, background = split
    model = RandomForestClassifier(3, random_state=0).fit(*cells)
    other = background.drop(columns="mean area").assign(CDR=0.0)
    with pytest.raises(ValueError, match="missing 'mean area'; extra 'CDR'"):
        shapley.explain(model, X, other)
    with pytest.raises(ValueError, match="missing 'x5'"):
        shapley.explain(mlp(P, 1), X.to_numpy(), background.to_numpy()[:, :5])
    shuffled = shapley.explain(model, X, background[background.columns[::-1]])
    np.testing.assert_array_equal(shuffled.values, shapley.explain(model, X, background).values)


def test_without_a_background_rows_of_x_stand_in(cells):
    X, y = cells
    model = RandomForestClassifier(3, random_state=0).fit(X, y)
    found = shapley.explain(model, X.iloc[:200])
    assert found.background == 100
    again = shapley.explain(model, X.iloc[:200])
    np.testing.assert_array_equal(found.values, again.values)


def test_bad_input_is_named(cells, split):
    X, background = split
    model = LogisticRegression(max_iter=5000).fit(*cells)
    net = mlp(P, 1)
    holes = X.copy()
    holes.iloc[0, 1] = np.nan
    with pytest.raises(NotFinite, match=r"'mean texture' \(1\)"):
        shapley.explain(net, holes, background)
    with pytest.raises(NotFinite, match="'mean texture'.*refused: Input X contains NaN"):
        shapley.explain(model, holes, background)
    with pytest.raises(NotFinite, match="predictions are NaN"):
        shapley.explain(lambda rows: rows[:, 0] * np.nan, X.to_numpy(), background.to_numpy())
    with pytest.raises(ValueError, match="p=13 is more than 12"):
        shapley.explain(lambda rows: rows.sum(1), np.zeros((1, 13)), np.zeros((1, 13)), method="exact")
    with pytest.raises(ValueError, match="'kernal' is unknown; did you mean 'kernel'"):
        shapley.explain(model, X, background, method="kernal")
    with pytest.raises(ValueError, match="X is empty"):
        shapley.explain(model, X.iloc[:0], background)
    with pytest.raises(ValueError, match="background is empty"):
        shapley.explain(model, X, background.iloc[:0])
    with pytest.raises(ValueError, match=r"not of shape \(6,\)"):
        shapley.explain(net, X.to_numpy()[0], background)
    with pytest.raises(TypeError, match="needs a torch module, not LogisticRegression"):
        shapley.explain(model, X, background, method="gradient")
    with pytest.raises(ValueError, match="same name: a"):
        shapley.explain(net, pd.DataFrame(np.ones((2, 2)), columns=["a", "a"]))


# ---- the result


def test_an_explanation_reads_well(cells, split):
    found = shapley.explain(RandomForestClassifier(5, random_state=0).fit(*cells), *split)
    pd.testing.assert_series_equal(found.mean_abs(), found.to_frame().abs().mean(), check_names=False)
    assert (found.base_values == found.base_value).all() and found.base_values.shape == (len(found),)
    same = found.to_shap()
    np.testing.assert_array_equal(same.values, found.values)
    np.testing.assert_array_equal(same.data, split[0])
    np.testing.assert_allclose(same.base_values + same.values.sum(1), found.prediction, atol=1e-6)
    assert "P(1)" in found._repr_html_() and "mean radius" in found._repr_html_()
    with pytest.raises(AttributeError):
        found.values = None


def test_plots_draw_where_they_are_told_and_leave_pyplot_alone(cells, split):
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    found = shapley.explain(RandomForestClassifier(5, random_state=0).fit(*cells), *split)
    plt.ion()
    numbers, state = plt.get_fignums(), np.random.get_state()[1].copy()
    figure = Figure(figsize=(9, 4))  # unknown to pyplot
    left, right = figure.subplots(1, 2)
    assert shapley.beeswarm(found, ax=left) is left and shapley.waterfall(found, 2, ax=right) is right
    assert len(left.collections) >= P and len(right.patches) >= P
    first = shapley.waterfall(found, ax=Figure().subplots())
    assert f"{found.prediction[0]:.3f}".rstrip("0") in " ".join(
        t.get_text() for t in first.figure.findobj(plt.Text)
    )
    assert tuple(figure.get_size_inches()) == (9, 4)
    assert plt.get_fignums() == numbers and plt.isinteractive()
    assert (np.random.get_state()[1] == state).all()
    plt.ioff()
    with pytest.raises(IndexError, match="row 8 is out of range.*0 to 7"):
        shapley.waterfall(found, 8)
    shapley.beeswarm(shapley.group(found, {"size": ["mean radius", "mean area"]}), ax=Figure().subplots())


@pytest.mark.parametrize("most", [4, 10])
def test_every_arrow_of_the_waterfall_points_the_way_of_its_bar_and_ends_where_it_ends(most):
    """A bar shorter than an arrow's head as well; shap alone turns such arrows round."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrow

    weights = np.array([60.0, -25.0, 0.4, -0.3, 0.01, -0.002, 0.0])
    found = shapley.explain(lambda rows: rows @ weights, np.ones((1, 7)), np.zeros((2, 7)), method="exact")
    ax = shapley.waterfall(found, ax=Figure(figsize=(8, 4)).subplots(), max_display=most)
    arrows = {round(a.get_xy()[:, 1].mean()): a for a in ax.patches if isinstance(a, FancyArrow)}
    sizes = list(weights) if most > 7 else [*weights[:3], weights[3:].sum()]  # the rest share the last bar
    end = found.prediction[0]
    for place, size in zip(range(len(sizes) - 1, -1, -1), sizes, strict=True):
        if size:
            across = arrows[place].get_xy()[:, 0]
            assert [across.min(), across.max()] == pytest.approx(sorted([end - size, end]), abs=1e-4)
            tip = across[np.argmin(np.abs(arrows[place].get_xy()[:, 1] - place))]  # the only corner on the middle line
            assert tip == pytest.approx(end, abs=1e-4)
        end -= size
    assert end == pytest.approx(found.base_value)


def test_the_dendrogram_shows_every_feature_and_where_it_was_cut():
    from matplotlib.figure import Figure

    table = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)), columns=list("abc")).assign(d=lambda t: t["a"])
    found = shapley.aspects(table, 0.7)
    ax = shapley.dendrogram(found, ax=Figure().subplots())
    assert sorted(label.get_text() for label in ax.get_yticklabels()) == list("abcd")
    cut = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert cut == [pytest.approx(0.3)]
    with pytest.raises(ValueError, match="at least two features"):
        shapley.dendrogram(shapley.aspects(table[["a"]], 0.7))
