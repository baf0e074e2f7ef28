"""The Alzheimer workflow: no subject on two sides, no label among the features, a selection that repeats."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nbkit import datasets, papers, recipes, shapley
from nbkit.errors import UnknownName

workflow = papers.method("alzheimer-workflow")
recipe = recipes.load("papers/alzheimer-workflow/recipe.py")


@pytest.fixture(scope="module")
def oasis():
    return datasets.load("oasis2")


@pytest.fixture(scope="module")
def data(oasis):
    return workflow.subjects(oasis, "Nondemented", "Demented")


@pytest.fixture(scope="module")
def coins():
    """120 rows of five coin tosses."""
    tosses = np.random.default_rng(0).integers(0, 2, size=(120, 5))
    return pd.DataFrame(tosses, columns=[f"x{j}" for j in range(5)])


def test_a_subject_has_one_row_and_converters_none(oasis, data):
    X, y = data
    assert X.shape == (136, 8) and not X.index.has_duplicates and y.sum() == 64
    assert not set(X.columns) & {"CDR", "Visit", "MR.Delay", "Hand", "Group"}
    converted = set(oasis.groups[oasis.labels == "Converted"])
    later, later_y = workflow.subjects(oasis, "Nondemented", "Demented", later=True)
    assert not converted & (set(X.index) | set(later.index))
    assert len(X) + len(later) == (oasis.labels != "Converted").sum()
    assert (later_y == y[later.index].to_numpy()).all()


def test_a_table_without_subjects_has_a_row_each():
    X, y = workflow.subjects(datasets.load("csf-biomarkers"), "Control", "Impaired")
    assert X.shape == (333, 130) and y.sum() == 91 and not X.index.has_duplicates


def test_infinite_values_become_missing():
    frame = pd.DataFrame({"a": [1.0, np.inf, -np.inf]})
    labels = pd.Series(["no", "yes", "no"])
    table = SimpleNamespace(X=frame, frame=frame, groups=None, labels=labels, classes=("no", "yes"))
    X, y = workflow.subjects(table, "no", "yes")
    assert X["a"].isna().tolist() == [False, True, True] and y.tolist() == [0, 1, 0]


@pytest.mark.parametrize("labels", [("Nondemented", "demented"), ("Healthy", "Demented")])
def test_an_unknown_label_is_named(oasis, labels):
    with pytest.raises(ValueError, match="'demented' is not|'Healthy' is not"):
        workflow.subjects(oasis, *labels)


def test_a_split_keeps_subjects_apart_and_the_share_of_patients(data):
    X, y = data
    train, held = workflow.split(X, y, seed=3)
    assert not set(train) & set(held) and len(train) + len(held) == len(X) and len(held) == 41
    assert abs(y[held].mean() - y.mean()) < 0.02
    again, _ = workflow.split(X.sample(frac=1, random_state=0).sort_index(), y.sort_index(), seed=3)
    assert again.equals(workflow.split(X.sort_index(), y.sort_index(), seed=3)[0])


def test_two_rows_of_a_subject_cannot_be_split(oasis):
    X, y = workflow.subjects(oasis, "Nondemented", "Demented", later=True)
    with pytest.raises(ValueError, match="has several rows"):
        workflow.split(X, y, seed=0)


@pytest.mark.parametrize("family", workflow.FAMILIES)
def test_a_pipeline_learns_imputation_and_scale_from_its_training_rows(data, family):
    X, y = data
    train, held = workflow.split(X, y, seed=0)
    model = workflow.build(family, {}, seed=0).fit(X.loc[train], y[train])
    assert model[0].statistics_ == pytest.approx(X.loc[train].median())
    p = model.predict_proba(X.loc[held])
    assert p.shape == (41, 2) and np.allclose(p.sum(1), 1) and X["SES"].isna().any()


def test_an_unknown_family_is_named():
    with pytest.raises(UnknownName, match="boosting"):
        workflow.build("bosting", {}, seed=0)


def test_the_search_repeats_and_its_settings_fit(data):
    X, y = data
    found = recipe.tune(workflow, "DT", X, y, seed=1, draws=3, folds=3)
    assert found == recipe.tune(workflow, "DT", X, y, seed=1, draws=3, folds=3)
    assert all(isinstance(v, (str, int, float)) for v in found.values())
    workflow.build("DT", found, seed=1).fit(X, y)


def test_a_search_needs_both_classes_in_every_fold(data):
    X, y = data
    with pytest.raises(ValueError, match="each fold needs both classes"):
        recipe.tune(workflow, "LR", X, y * 0, seed=0)
    few = y.index.isin(y.index[y == 1][:3]) | (y == 0).to_numpy()
    with pytest.raises(ValueError, match="for 5 folds"):
        recipe.tune(workflow, "LR", X[few], y[few], seed=0)


@pytest.mark.parametrize("family", workflow.FAMILIES)
def test_a_label_that_is_a_column_is_found_and_ends_the_selection(coins, family):
    assert workflow.select(family, coins, coins["x3"], [], seed=0).selected == ["x3"]


def test_columns_kept_anyway_are_no_candidates_and_order_does_not_matter(coins):
    y = coins["x3"] | coins["x1"]
    found = workflow.select("LR", coins, y, ["x1"], seed=0)
    assert found.selected[-1] == "x1" and "x1" not in found.scores.columns
    assert workflow.select("LR", coins[coins.columns[::-1]], y, ["x1"], seed=0).selected == found.selected
    assert (np.diff(found.path["score"]) > 0).all()


def test_measures_by_hand():
    y, p = pd.Series([0, 0, 0, 1]), np.array([0.1, 0.2, 0.7, 0.6])
    found = workflow.evaluate(y, p)
    assert found["AUROC"] == pytest.approx(2 / 3) and found["accuracy"] == 0.75
    assert found["balanced accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["macro F1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["MCC"] == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(2 * 1 * 2 * 3))
    with pytest.raises(ValueError, match="there is no AUROC"):
        workflow.evaluate(y * 0, p)


def test_importances_know_what_a_model_uses():
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(120, 3)), columns=list("abc"))
    y = (X["a"] - 0.5 * X["b"] > 0).astype(int)
    model = workflow.build("LR", {"C": 0.1}, seed=0).fit(X, y)
    model[-1].coef_[0, 2] = 0
    found = workflow.importances("LR", model, X[:40], y[:40], X[40:80])
    assert list(found.index) == list("abc")
    assert found.loc["c"].to_numpy() == pytest.approx(0, abs=1e-12)  # its direction, too: rounding has none
    for kind in ("Shapley", "permutation", "native"):
        assert found.loc["a", kind] > found.loc["b", kind] > 0
    assert found.loc["a", "direction"] > 0.9 and found.loc["b", "direction"] < -0.9
    svm = workflow.build("SVM", {}, seed=0).fit(X, y)
    assert workflow.importances("SVM", svm, X[:10], y[:10], X[40:50])["native"].isna().all()


@pytest.mark.parametrize("h", [0.2, 0.5, 0.9])
def test_a_volume_and_its_reciprocal_share_an_aspect(data, h):
    groups = shapley.aspects(data[0], h).values()
    assert any({"eTIV", "ASF"} <= set(members) for members in groups)


def test_agreement_is_recomputed_from_the_stored_importances():
    agreed, deals = recipe.agreement(papers.results("alzheimer-workflow", "importance"), draws=50)
    stored = papers.results("alzheimer-workflow", "agreement")
    pd.testing.assert_frame_equal(agreed, stored)
    kept = papers.results("alzheimer-workflow", "deals")
    assert list(deals.columns) == list(kept.columns) and len(kept) == recipe.DEALS
    assert np.abs(deals.mean() - kept.mean()).max() < 0.06  # fifty of the two thousand


def test_the_stored_tables_are_whole_and_hold_no_leak():
    measures, chosen, leaned = (papers.results("alzheimer-workflow", n) for n in ("metrics", "selection", "importance"))
    assert measures.seed.nunique() == 10 and set(workflow.FAMILIES) < set(measures.model)
    settings = measures[measures.model.isin(workflow.FAMILIES)].groupby(["data", "columns", "selected", "cohort"])
    assert (settings.size() == 50).all() and len(settings) == 8
    assert (measures[measures.model == "majority"].AUROC == 0.5).all()
    assert not set(chosen.feature) & {"CDR", "Visit", "MMSE", *workflow.CSF_KEPT}
    assert chosen.groupby("data").seed.nunique().eq(10).all() and chosen.data.nunique() == 3
    assert chosen.kept.between(0, 1).all()
    assert (chosen.sort_values("step").groupby(["data", "seed", "model"]).accuracy.diff().dropna() > 0).all()
    assert set(leaned.feature[leaned.data == "oasis2"]) == set(workflow.SETS["C"])
    assert leaned.groupby(["data", "seed", "model"]).size().max() <= 20


def test_kernel_shap_as_the_public_code_calls_it_gives_the_exact_values(data):
    import shap

    X, y = data
    X = X[workflow.SETS["C"]].fillna(X.median())
    train, held = workflow.split(X, y, seed=0)
    model = workflow.build("LR", {}, seed=0).fit(X.loc[train], y[train])
    background, some = X.loc[train[:30]], X.loc[held[:3]]
    kernel = shap.KernelExplainer(
        lambda rows: model.predict_proba(pd.DataFrame(rows, columns=X.columns))[:, 1], background
    )
    theirs = kernel.shap_values(some, nsamples=1000, silent=True)
    ours = shapley.explain(model, some, background, method="exact").values
    assert np.abs(theirs - ours).max() < 1e-9


def test_forward_selection_is_the_loop_of_the_public_code(data):
    """Their loop, in our words: fit on four fifths, score the rest, stop when nothing is strictly better."""
    from sklearn.model_selection import train_test_split

    X, y = data
    fit, judge = train_test_split(X.index, test_size=0.2, random_state=5, stratify=y)
    chosen, best = [], 0.0
    while len(chosen) < 8:
        scores = {}
        for column in sorted(set(X.columns) - set(chosen)):
            model = workflow.build("DT", {}, 5).fit(X.loc[fit, [*chosen, column]], y[fit])
            scores[column] = model.score(X.loc[judge, [*chosen, column]], y[judge])
        if max(scores.values()) <= best:
            break
        best = max(scores.values())
        chosen.append(max(scores, key=scores.get))
    assert workflow.select("DT", X, y, [], seed=5).selected == chosen


@pytest.mark.parametrize("seed", range(3))
def test_the_corrected_t_is_the_plain_one_with_a_wider_error(seed):
    gains = np.random.default_rng(seed).normal(0.1, 0.2, size=10)
    plain = stats.ttest_1samp(gains, 0).statistic
    corrected = plain * np.sqrt((1 / 10) / (1 / 10 + 41 / 95))
    assert workflow.corrected_t(gains, 41, 95) == pytest.approx(stats.t.sf(corrected, 9))
    assert workflow.corrected_t(-gains, 41, 95) == pytest.approx(1 - workflow.corrected_t(gains, 41, 95))


def test_gains_that_never_vary():
    assert [workflow.corrected_t([g, g], 1, 2) for g in (0.5, 0, -0.5)] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize("gains", [[0.1], [], [0.1, np.nan]])
def test_a_test_needs_two_finite_gains(gains):
    with pytest.raises(ValueError, match="at least two finite gains"):
        workflow.corrected_t(gains, 41, 95)


def test_new_deals_are_rank_correlations_with_the_leader_in_its_place():
    rng = np.random.default_rng(0)
    a, b, keys = rng.normal(size=7), rng.integers(0, 4, size=7).astype(float), rng.random((50, 7))
    before = a.copy(), b.copy(), keys.copy()
    found = recipe.dealt_anew(a, b, keys)
    rest = np.delete(np.arange(7), a.argmax())
    for key, value in zip(keys, found, strict=True):
        dealt = b.copy()
        dealt[rest] = b[rest][np.argsort(key[rest])]
        assert value == pytest.approx(stats.spearmanr(a, dealt).statistic)
    assert all(np.array_equal(x, y) for x, y in zip(before, (a, b, keys), strict=True))


def test_deals_need_shapes_that_fit():
    with pytest.raises(ValueError, match="do not fit"):
        recipe.dealt_anew(np.ones(3), np.ones(4), np.ones((5, 3)))
    with pytest.raises(ValueError, match="do not fit"):
        recipe.dealt_anew(np.ones(3), np.ones(3), np.ones((5, 4)))
