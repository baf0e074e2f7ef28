"""Importances: equal to scikit-learn's where it has them, found on known truths, and compared by rank."""

from __future__ import annotations

import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_selector
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.feature_selection import SelectKBest
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from nbkit import importance
from nbkit.errors import NotFinite, UnknownName


class AsClassifier(ClassifierMixin, BaseEstimator):
    """A torch module as scikit-learn sees it."""

    def __init__(self, net, classes=None):
        self.net, self.classes_ = net, classes

    def fit(self, X, y):
        return self

    def __sklearn_is_fitted__(self):
        return True

    def _logits(self, X):
        where = next(self.net.parameters())
        with torch.no_grad():
            return self.net(torch.as_tensor(np.asarray(X)).to(where)).double().cpu()

    def predict_proba(self, X):
        return self._logits(X).softmax(1).numpy()

    def predict(self, X):
        return self.classes_[self._logits(X).argmax(1).numpy()]


class AsRegressor(RegressorMixin, AsClassifier):
    def predict(self, X):
        return self._logits(X)[:, 0].numpy()


def mlp(features, outputs, device="cpu", seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, outputs)).to(device).eval()


def table(n=90, features=5, seed=0):
    """Normal columns, one binary, one constant: some shuffles change no row."""
    X = np.random.default_rng(seed).normal(size=(n, features)).astype("f4")
    X[:, 1], X[:, 2] = X[:, 1] > 0, 3
    return X


@pytest.fixture(scope="module")
def cells():
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    return X.iloc[:200, :6], y[:200]


# ---- permutation


@pytest.mark.parametrize(
    "scoring", ["accuracy", "neg_log_loss", "balanced_accuracy", "roc_auc_ovr", "f1_macro"]
)
def test_permutation_of_a_module_equals_scikit_learns_with_the_same_seed(scoring, device):
    X, net = table(), mlp(5, 3, device)
    y = np.random.default_rng(1).integers(0, 3, len(X))
    ours = importance.permutation(net, X, y, scoring=scoring, n_repeats=4, seed=7)
    wrapped = AsClassifier(net, np.arange(3))
    theirs = permutation_importance(wrapped, X, y, scoring=scoring, n_repeats=4, random_state=7)
    np.testing.assert_allclose(ours.values, theirs.importances, atol=1e-6)
    if scoring == "accuracy":
        np.testing.assert_allclose(ours.values, theirs.importances, atol=1e-12)
    np.testing.assert_allclose(ours.mean, theirs.importances_mean, atol=1e-6)
    np.testing.assert_allclose(ours.std, theirs.importances_std, atol=1e-6)
    assert (ours.values[2] == 0).all()  # a constant column


@pytest.mark.parametrize(
    "scoring", ["r2", "neg_mean_squared_error", "neg_mean_absolute_error", "neg_median_absolute_error"]
)
def test_permutation_of_a_regression_module_equals_scikit_learns(scoring, device):
    X, net = table(), mlp(5, 1, device)
    y = X[:, 0] + np.random.default_rng(1).normal(size=len(X))
    ours = importance.permutation(
        net, torch.tensor(X, device=device), y, scoring=scoring, n_repeats=3, seed=2
    )
    wrapped = AsRegressor(net)
    theirs = permutation_importance(wrapped, X, y, scoring=scoring, n_repeats=3, random_state=2)
    np.testing.assert_allclose(ours.values, theirs.importances, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(2, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1), st.integers(1, 50)
)
def test_batch_bounds_the_rows_of_a_forward_and_changes_no_value(n, features, repeats, seed, batch):
    rng = np.random.default_rng(n)
    X, y = rng.integers(0, 3, size=(n, features)).astype(float), rng.integers(0, 2, n)
    sizes = []

    def model(rows):
        sizes.append(len(rows))
        p = 1 / (1 + np.exp(-rows.sum(1) + 2))
        return np.stack([1 - p, p], axis=1)

    class Wrapped(AsClassifier):
        def predict(self, rows):
            return model(rows).argmax(1)

    ours = importance.permutation(model, X, y, n_repeats=repeats, seed=seed, batch=batch).values
    assert max(sizes) <= batch
    theirs = permutation_importance(
        Wrapped(None, np.arange(2)), X, y, scoring="accuracy", n_repeats=repeats, random_state=seed
    )
    np.testing.assert_allclose(ours, theirs.importances, atol=1e-12)


@pytest.mark.parametrize("wide_first", [nn.Identity(), nn.Flatten()])
def test_a_wide_first_layer_updated_instead_of_run_gives_the_same(device, wide_first):
    X, net = table(60, 80), mlp(80, 3, device)
    y = np.random.default_rng(1).integers(0, 3, len(X))
    plain = nn.ModuleList([net])

    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = plain

        def forward(self, x):
            return self.parts[0](x)

    asked = {"scoring": "neg_log_loss", "n_repeats": 2}
    for rows in (X, (X > 1).astype("f4")):  # whole copies, and picked rows
        updated = importance.permutation(nn.Sequential(wide_first, *net), rows, y, **asked)
        run = importance.permutation(Opaque(), rows, y, **asked)
        np.testing.assert_allclose(updated.values, run.values, atol=1e-6)
        assert np.abs(run.values).max() > 1e-3


@pytest.mark.parametrize("before", [[], [nn.Identity()], [nn.Flatten()]], ids=["plain", "identity", "flatten"])
@pytest.mark.parametrize("features", [64, 63])
def test_only_a_wide_first_layer_is_run_once_for_all_shuffles(monkeypatch, before, features):
    X, net = table(60, features), mlp(features, 3)
    y, ran = np.random.default_rng(1).integers(0, 3, len(X)), []

    def counted(layer, rows, forward=nn.Linear.forward):
        ran.extend([layer] * len(rows))
        return forward(layer, rows)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    importance.permutation(nn.Sequential(*before, *net), X, y, n_repeats=2)
    first, last = ran.count(net[0]), ran.count(net[2])
    assert last > features * len(X)
    assert first == 1 + len(X) if features == 64 else first == last  # one row ahead, to see whether it runs at all


def test_a_hook_on_the_first_layer_still_counts():
    X, net = table(40, 70), mlp(70, 2)
    y = np.random.default_rng(1).integers(0, 2, len(X))
    with net[0].register_forward_hook(lambda module, args, output: output * 0):
        assert (importance.permutation(net, X, y, scoring="neg_log_loss").values == 0).all()


class Rescaling(nn.Module):
    """A linear model whose first operations work in place, or not."""

    def __init__(self, features, inplace):
        super().__init__()
        self.layer, self.inplace = mlp(features, 3)[0], inplace

    def forward(self, x):
        return self.layer(x.mul_(2).sub_(1) if self.inplace else x * 2 - 1)[:, :3]


def after_a_wide_layer(features, inplace):
    first, _, last = mlp(features, 3)
    return nn.Sequential(first, nn.ReLU(inplace), last)


def function(features, inplace):
    net = Rescaling(features, inplace)
    return lambda rows: net(rows).detach()


@pytest.mark.parametrize("make", [Rescaling, after_a_wide_layer, function])
def test_operations_in_place_change_neither_the_values_nor_x(make, device):
    X = torch.tensor(table(60, 70))
    y, before = np.random.default_rng(1).integers(0, 3, len(X)), X.clone()
    asked = {"scoring": "neg_log_loss", "n_repeats": 2}
    inplace, plain = (importance.permutation(make(70, way), X, y, **asked) for way in (True, False))
    np.testing.assert_array_equal(inplace.values, plain.values)
    assert torch.equal(X, before)


def test_permutation_of_an_estimator_is_scikit_learns(cells):
    model = RandomForestClassifier(5, random_state=0).fit(*cells)
    ours = importance.permutation(model, *cells, scoring="roc_auc", n_repeats=3, seed=5)
    theirs = permutation_importance(model, *cells, scoring="roc_auc", n_repeats=3, random_state=5)
    np.testing.assert_array_equal(ours.values, theirs.importances)
    assert ours.feature_names == list(cells[0].columns)
    assert ours.baseline == pytest.approx(1, abs=0.01)
    with joblib.parallel_config(backend="threading", n_jobs=2):
        again = importance.permutation(model, *cells, scoring="roc_auc", n_repeats=3, seed=5)
    np.testing.assert_array_equal(ours.values, again.values)


def test_a_function_of_a_frame_keeps_its_columns_and_labels(cells):
    X = cells[0].assign(sex=pd.Categorical(["F", "M"] * 100), note=["a", "b", "c", "d"] * 50)
    y = np.where(X["sex"] == "M", "tall", "short")

    def rule(rows):
        assert list(rows.dtypes) == list(X.dtypes)
        return np.where(rows["sex"] == "M", "tall", "short")

    ours = importance.permutation(rule, X, y, n_repeats=5, batch=300)
    assert ours.scoring == "accuracy" and ours.baseline == 1
    assert ours.mean.drop("sex").eq(0).all()
    assert ours.mean["sex"] == pytest.approx(0.5, abs=0.1)


def test_scoring_may_be_a_function_of_labels_and_outputs():
    X, net = table(), mlp(5, 2)
    y = np.random.default_rng(1).integers(0, 2, len(X))

    def agreement(labels, output):
        return float((output.argmax(1) == labels).mean())

    by_function = importance.permutation(net, X, y, scoring=agreement)
    np.testing.assert_allclose(by_function.values, importance.permutation(net, X, y).values, atol=1e-12)
    assert by_function.scoring == "agreement"


def test_one_output_is_ranked_by_auc_and_two_valued_targets_ask_for_a_scoring():
    X, net = table(), mlp(5, 1)
    y = (X[:, 0] > 0).astype(int)
    with pytest.raises(ValueError, match="name scoring="):
        importance.permutation(net, X, y)
    found = importance.permutation(net, X, y, scoring="roc_auc", n_repeats=2)
    from sklearn.metrics import roc_auc_score

    logit = AsRegressor(net).predict(X)
    assert found.baseline[0] == pytest.approx(roc_auc_score(y, logit))
    # a logit above 0 is the second label, whatever the labels are called; a function returns a probability
    column, named = y[:, None].astype(float), np.array(["no", "yes"])[y]
    for labels in (y, y.astype(bool), column, named):
        found = importance.permutation(net, X, labels, scoring="accuracy", n_repeats=2)
        assert found.baseline[0] == pytest.approx(((logit > 0) == y).mean())

    def sigmoid(rows):
        return 1 / (1 + np.exp(-AsRegressor(net).predict(rows)))

    again = importance.permutation(sigmoid, X, y, scoring="accuracy", n_repeats=2)
    np.testing.assert_array_equal(again.values, found.values)
    with pytest.raises(ValueError, match="two labels apart; y holds 3"):
        importance.permutation(net, X, np.arange(90) % 3, scoring="accuracy")


def test_labels_of_a_module_are_the_indices_of_its_outputs():
    X = np.random.default_rng(0).normal(size=(90, 3)).astype("f4")
    y, net = X.argmax(1), nn.Identity()
    for labels in (y, y.astype(float), np.array(["a", "b", "c"])[y]):
        assert importance.permutation(net, X, labels, n_repeats=1).baseline == 1
    for labels, wrong in ((y + 5, y[0] + 5), (y - 1, -1)):
        with pytest.raises(IndexError, match=f"label {wrong} is out of range; the model has classes 0 to 2"):
            importance.permutation(net, X, labels)
    with pytest.raises(ValueError, match="2 labels .'a' to 'b'. and the model has 3 outputs"):
        importance.permutation(net, X, np.array(["a", "b", "a"])[y])


def test_a_module_comes_back_as_it_was(device):
    net = (
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).to(device).train()
    )
    net[1].eval()
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, np.random.get_state()[1].copy()
    X, y = table(), np.arange(90) % 2
    first = importance.permutation(net, X, y).values
    np.testing.assert_array_equal(first, importance.permutation(net, X, y).values)
    assert net.training and not net[1].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert (np.random.get_state()[1] == random).all()


def test_permutation_names_bad_input():
    X, net = table(), mlp(5, 2)
    y = np.arange(90) % 2
    holes = X.copy()
    holes[0, 3] = np.nan
    with pytest.raises(NotFinite, match="in x3"):
        importance.permutation(net, holes, y)
    with pytest.raises(NotFinite, match="y holds 1 NaN"):
        importance.permutation(mlp(5, 1), X, np.where(np.arange(90) == 3, np.nan, 1.0))
    with pytest.raises(ValueError, match=r"y has shape \(89,\).*90 rows"):
        importance.permutation(net, X, y[:-1])
    with pytest.raises(ValueError, match="'acuracy' is unknown; did you mean 'accuracy'"):
        importance.permutation(net, X, y, scoring="acuracy")
    with pytest.raises(IndexError, match="label 2 is out of range.*0 to 1"):
        importance.permutation(net, X, np.arange(90) % 6)
    with pytest.raises(TypeError, match="X holds torch.int64 and the model torch.float32"):
        importance.permutation(net, torch.ones(90, 5, dtype=torch.long), y)
    tokens = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 2))
    importance.permutation(tokens, torch.ones(90, 5, dtype=torch.long), y, n_repeats=1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        importance.permutation(net, X, y, n_repeats=0)
    with pytest.raises(ValueError, match=r"not empty; its shape is \(0, 5\)"):
        importance.permutation(net, X[:0], y[:0])
    with pytest.raises(TypeError, match="not str"):
        importance.permutation("net", X, y)
    with pytest.raises(TypeError, match="one scorer, not list"):
        importance.permutation(net, X, y, scoring=["accuracy", "r2"])


# ---- drop column


def test_drop_column_is_the_score_lost_by_refitting_without_it(cells):
    X, y = cells
    model = make_pipeline(StandardScaler(), LogisticRegression())
    folds = KFold(3)
    found = importance.drop_column(model, X, y, cv=folds, scoring="accuracy")
    whole = cross_val_score(model, X, y, cv=folds, scoring="accuracy")
    without = cross_val_score(model, X.drop(columns="mean area"), y, cv=folds, scoring="accuracy")
    np.testing.assert_allclose(found.baseline, whole)
    np.testing.assert_allclose(found.values[3], whole - without)
    assert found.values.shape == (6, 3)
    assert not hasattr(model[-1], "coef_")


def test_drop_column_on_held_out_rows_spreads_over_workers():
    X, noise = table(120), np.random.default_rng(0).normal(scale=0.1, size=120)
    y = 2 * X[:, 0] + X[:, 4] + noise
    one = importance.drop_column(LinearRegression(), X[:80], y[:80], validation=(X[80:], y[80:]))
    with joblib.parallel_config(backend="threading", n_jobs=2):
        two = importance.drop_column(LinearRegression(), X[:80], y[:80], validation=(X[80:], y[80:]))
    np.testing.assert_array_equal(one.values, two.values)
    assert one.mean.idxmax() == "x0" and one.mean.nlargest(2).index[1] == "x4"
    with pytest.raises(ValueError, match="only feature 'x0'"):
        importance.drop_column(LinearRegression(), X[:, :1], y)
    with pytest.raises(TypeError, match="cannot be refitted"):
        importance.drop_column(lambda rows: rows, X, y)
    with pytest.raises(ValueError, match="validation has the columns"):
        importance.drop_column(LinearRegression(), X, y, validation=(X[:, :3], y))


# ---- tables with columns of text


@pytest.fixture(scope="module")
def people():
    """Two columns of text, two of numbers and a note nobody needs; the target is 3 for men plus the age."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"sex": rng.choice(["F", "M"], 120), "site": rng.choice(["a", "b", "c"], 120)})
    frame = frame.assign(age=rng.normal(size=120), height=rng.normal(size=120))
    return frame, 3.0 * (frame["sex"] == "M") + frame["age"]


def encoded(*, text, numbers, **rest):
    """A linear model behind a ColumnTransformer that is told its columns."""
    columns = [("text", OneHotEncoder(), text), ("numbers", StandardScaler(), numbers)]
    return make_pipeline(ColumnTransformer(columns, **rest), LinearRegression())


BY_NAME = {"text": ["sex", "site"], "numbers": ["age", "height"]}


def test_a_column_transformer_by_name_is_refitted_with_the_names_that_are_left(people):
    X, y = people
    model, folds = encoded(**BY_NAME), KFold(4)
    found = importance.drop_column(model, X, y, cv=folds)
    by_hand = {
        "sex": encoded(text=["site"], numbers=["age", "height"]),
        "site": encoded(text=["sex"], numbers=["age", "height"]),
        "age": encoded(text=["sex", "site"], numbers=["height"]),
        "height": encoded(text=["sex", "site"], numbers=["age"]),
    }
    whole = cross_val_score(model, X, y, cv=folds)
    for losses, (left_out, without) in zip(found.values, by_hand.items(), strict=True):
        scores = cross_val_score(without, X.drop(columns=left_out), y, cv=folds)
        np.testing.assert_allclose(losses, whole - scores, atol=1e-12)
    assert found.feature_names == list(by_hand)
    chosen = importance.forward_selection(model, X, y, max_features=2)
    assert chosen.selected == ["sex", "age"]
    assert model.get_params()["columntransformer"].transformers[0][2] == ["sex", "site"]  # the caller's is untouched


def by_type():
    numbers, text = make_column_selector(dtype_include="number"), make_column_selector(dtype_exclude="number")
    return encoded(text=text, numbers=numbers)


@pytest.mark.parametrize(
    "model",
    [
        by_type(),
        encoded(text=np.array(["sex", "site"]), numbers=["age", "height"]),
        GridSearchCV(encoded(**BY_NAME), {"linearregression__fit_intercept": [True]}, cv=2),
        TransformedTargetRegressor(encoded(**BY_NAME)),
        encoded(text=["sex", "site"], numbers=["age"], remainder="passthrough"),
    ],
    ids=["selector", "array", "search", "target", "remainder"],
)
def test_names_are_found_however_they_are_given_and_wherever_they_stand(people, model):
    X, y = people
    expected = importance.drop_column(encoded(**BY_NAME), X, y, cv=3)
    np.testing.assert_allclose(importance.drop_column(model, X, y, cv=3).values, expected.values, atol=1e-9)
    assert importance.forward_selection(model, X, y).selected[:2] == ["sex", "age"]


def test_a_column_that_a_step_takes_alone_goes_with_its_step(people):
    X, y = people
    words = ColumnTransformer([("words", CountVectorizer(analyzer="char"), "sex")], remainder=OneHotEncoder())
    model = make_pipeline(words, LinearRegression())
    found = importance.drop_column(model, X[["sex", "site"]], y, cv=3)
    without = cross_val_score(make_pipeline(OneHotEncoder(), LinearRegression()), X[["site"]], y, cv=3)
    np.testing.assert_allclose(found.baseline - found.values[0], without, atol=1e-9)


def test_a_column_transformer_that_cannot_lose_a_column_says_so(people):
    X, y = people
    for by_position in (
        {"text": [0, 1], "numbers": ["age", "height"]},
        {"text": ["sex", "site"], "numbers": slice(2, 4)},
        {"text": [True, True, False, False], "numbers": ["age", "height"]},
    ):
        with pytest.raises(ValueError, match="by position .*name them, or use make_column_selector"):
            importance.drop_column(encoded(**by_position), X, y)
    lacking = encoded(text=["sex"], numbers=["age"])
    assert (importance.drop_column(lacking, X, y, cv=3).values[[1, 3]] == 0).all()  # it never saw site and height
    with pytest.raises(ValueError, match=r"takes none of the columns \['height'\]; leave out of X"):
        importance.forward_selection(lacking, X, y)


# ---- native


def test_native_reads_coefficients_impurity_and_gain_through_pipelines(cells):
    X, y = cells
    linear = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    own = importance.native(linear)
    assert own.name == "|coef_|" and list(own.index) == list(X.columns)
    np.testing.assert_allclose(own, np.abs(linear[-1].coef_[0]))

    forest = RandomForestClassifier(5, random_state=0).fit(X.to_numpy(), y)
    own = importance.native(forest, X.columns)
    assert own.name == "impurity" and own.sum() == pytest.approx(1)
    np.testing.assert_array_equal(own, forest.feature_importances_)

    signal = X.assign(noise=1.0)
    gain = importance.native(HistGradientBoostingClassifier(max_iter=5).fit(signal, y))
    assert gain.name == "gain" and gain.sum() == pytest.approx(1) and gain["noise"] == 0

    search = GridSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [2]}, cv=2).fit(X, y)
    np.testing.assert_array_equal(importance.native(search), search.best_estimator_.feature_importances_)


def test_native_gives_zero_to_dropped_features_and_names_recoded_ones(cells):
    X, y = cells
    chosen = make_pipeline(StandardScaler(), SelectKBest(k=2), LogisticRegression()).fit(X, y)
    own = importance.native(chosen)
    assert list(own.index) == list(X.columns) and (own > 0).sum() == 2
    recoded = make_pipeline(OneHotEncoder(), LogisticRegression()).fit(
        pd.DataFrame({"sex": ["F", "M"] * 100}), y
    )
    assert list(importance.native(recoded).index) == ["sex_F", "sex_M"]


def test_coefficients_are_put_on_one_scale_where_the_data_are_given():
    X = np.random.default_rng(0).normal(size=(200, 2)) * [1, 1000]
    model = LinearRegression().fit(X, X[:, 0] + X[:, 1] / 1000)
    raw, scaled = importance.native(model), importance.native(model, X=X)
    assert raw["x0"] / raw["x1"] == pytest.approx(1000)
    assert scaled["x0"] / scaled["x1"] == pytest.approx(X[:, 0].std() / X[:, 1].std() * 1000)


def test_native_says_what_it_cannot_read(cells):
    with pytest.raises(TypeError, match="SVC has no importance of its own"):
        importance.native(SVC().fit(*cells))
    with pytest.raises(ValueError, match="2 feature names for a model of 6"):
        importance.native(LogisticRegression(max_iter=9000).fit(*cells), ["a", "b"])


# ---- forward selection


@pytest.mark.parametrize("as_frame", [True, False])
def test_forward_selection_of_a_target_that_is_one_feature_returns_it_and_stops(as_frame):
    X = np.random.default_rng(0).integers(0, 2, size=(100, 6)).astype(float)
    data = pd.DataFrame(X, columns=list("abcdef")) if as_frame else X
    found = importance.forward_selection(DecisionTreeClassifier(random_state=0), data, X[:, 3].astype(int))
    assert found.selected == ["d" if as_frame else "x3"]
    assert found.path.to_dict("list") == {"step": [1], "feature": found.selected, "score": [1.0]}
    assert len(found.scores) == 2 and np.isnan(found.scores.loc[2, found.selected[0]])


def test_forward_selection_follows_the_definition(cells):
    X, y = cells
    model = make_pipeline(StandardScaler(), LogisticRegression())
    found = importance.forward_selection(model, X, y, seed=3, always=["mean area"], scoring="roc_auc")
    train, held, y_train, y_held = train_test_split(X, y, test_size=0.2, random_state=3, stratify=y)
    from sklearn.metrics import roc_auc_score

    chosen, best, names = [], -1.0, sorted(set(X.columns) - {"mean area"})
    while True:
        scores = {
            n: roc_auc_score(
                y_held, model.fit(train[[*chosen, n]], y_train).decision_function(held[[*chosen, n]])
            )
            for n in names
            if n not in chosen
        }
        if not scores or max(scores.values()) <= best:
            break
        best = max(scores.values())
        chosen.append(next(n for n in scores if scores[n] == best))
    assert found.selected == [*chosen, "mean area"]
    assert found.path["score"].iloc[-1] == pytest.approx(best)
    assert found.path["score"].is_monotonic_increasing
    limited = importance.forward_selection(
        model, X, y, seed=3, always=["mean area"], scoring="roc_auc", max_features=1
    )
    assert limited.selected == [chosen[0], "mean area"] and len(limited.scores) == 1


def test_ties_go_to_the_first_name_whatever_the_order_of_the_columns():
    twin = np.random.default_rng(0).integers(0, 2, 80)
    X = pd.DataFrame({"zeta": twin, "alpha": twin, "noise": 0})
    tree = DecisionTreeClassifier(random_state=0)
    for columns in (["zeta", "alpha", "noise"], ["noise", "alpha", "zeta"]):
        assert importance.forward_selection(tree, X[columns], twin).selected == ["alpha"]


def test_a_regressor_is_selected_for_by_r2_unless_told_otherwise():
    X = np.random.default_rng(0).normal(size=(80, 3))
    found = importance.forward_selection(LinearRegression(), X, X[:, 2])
    assert found.selected == ["x2"] and found.scoring == "r2" and found.path["score"][0] == pytest.approx(1)


def test_groups_stay_on_one_side_of_the_split():
    subject = np.repeat(np.arange(40), 3)
    X = np.random.default_rng(0).normal(size=(120, 2))
    seen = []

    class Watch(DecisionTreeClassifier):
        def fit(self, rows, y):
            seen.append(len(rows))
            assert len(rows) % 3 == 0
            return super().fit(rows, y)

    importance.forward_selection(Watch(), X, subject % 2, groups=subject, validation=0.25)
    assert set(seen) == {90}


def test_forward_selection_names_bad_input(cells):
    X, y = cells
    tree = DecisionTreeClassifier()
    with pytest.raises(UnknownName, match="'mean aria'; did you mean 'mean area'"):
        importance.forward_selection(tree, X, y, always=["mean aria"])
    with pytest.raises(ValueError, match="all are in always"):
        importance.forward_selection(tree, X, y, always=list(X.columns))
    with pytest.raises(ValueError, match=r"share in \(0, 1\).*not 1.5"):
        importance.forward_selection(tree, X, y, validation=1.5)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        importance.forward_selection(tree, X, y, max_features=0)
    with pytest.raises(ValueError, match="roc_auc is nan"):
        with pytest.warns(UserWarning, match="Only one class"):
            importance.forward_selection(tree, X, y, validation=(X[:3], np.ones(3, int)), scoring="roc_auc")


# ---- comparison


def test_rank_correlations_by_hand():
    # ranks 1 2 3 4 against 2 1 4 3: sum of squared differences 4, so rho = 1 - 6 * 4 / 60 = 0.6;
    # four of six pairs in order, two not: tau = 2 / 6
    found = importance.compare(a={"p": 1, "q": 2, "r": 3, "s": 4}, b={"s": 30, "r": 40, "q": 10, "p": 20})
    assert found["spearman"].loc["a", "b"] == pytest.approx(0.6)
    assert found["kendall"].loc["b", "a"] == pytest.approx(1 / 3)
    assert found.shape == (2, 4)
    np.testing.assert_array_equal(np.diag(found["spearman"]), 1)


def test_compare_takes_every_kind_of_importance(cells):
    from nbkit import shapley

    X, y = cells
    forest = RandomForestClassifier(5, random_state=0).fit(X, y)
    shuffled = importance.permutation(forest, X, y, n_repeats=2)
    values = shapley.explain(forest, X.iloc[:10], X.iloc[10:40])
    own = importance.native(forest)[::-1]
    array = np.arange(6.0)
    found = importance.compare({"permutation": shuffled, "shapley": values}, native=own, array=array)
    rho = spearmanr(shuffled.mean, values.mean_abs()).statistic
    assert found["spearman"].loc["permutation", "shapley"] == pytest.approx(rho)
    tau = kendalltau(own[list(X.columns)], array).statistic
    assert found["kendall"].loc["native", "array"] == pytest.approx(tau)


def test_compare_names_bad_input():
    with pytest.raises(ValueError, match="at least two importances, not 1"):
        importance.compare(a=[1, 2])
    with pytest.raises(ValueError, match=r"missing \['q'\], extra \['r'\]"):
        importance.compare(a={"p": 1, "q": 2}, b={"p": 1, "r": 2})
    with pytest.raises(NotFinite, match="'b' holds NaN"):
        importance.compare(a=[1, 2], b=[1, np.nan])
    with pytest.raises(ValueError, match="3 entries for 2 features"):
        importance.compare(a=[1, 2], b=[1, 2, 3])
    assert np.isnan(importance.compare(a=[1, 2, 3], b=[0, 0, 0])["kendall"].loc["a", "b"])


def test_results_read_well(cells):
    X, y = cells
    found = importance.permutation(RandomForestClassifier(5, random_state=0).fit(X, y), X, y, n_repeats=2)
    tidy = found.to_frame()
    assert tidy.shape == (12, 3) and list(tidy.columns) == ["feature", "repeat", "importance"]
    np.testing.assert_allclose(tidy.groupby("feature", sort=False)["importance"].mean(), found.mean)
    assert found.mean.idxmax() in repr(found) and "mean radius" in found._repr_html_()
    selection = importance.forward_selection(DecisionTreeClassifier(random_state=0), X, y)
    assert selection.selected[0] in repr(selection) and "<table" in selection._repr_html_()


def test_a_module_takes_a_table_and_a_series_without_a_warning(request):
    request.addfinalizer(lambda: torch.set_warn_always(False))
    torch.set_warn_always(True)  # otherwise torch warns of read-only arrays once a process
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(12, 3)), columns=list("abc"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importance.permutation(nn.Linear(3, 1), X, X["a"], n_repeats=2)
    assert found.values.shape == (3, 2)
