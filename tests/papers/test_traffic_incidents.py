"""traffic-incidents: bouts and onset features by a plain loop, targets, scores, folds, importance, the tables."""

from __future__ import annotations

import lightgbm
import numpy as np
import pandas as pd
import pytest
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LinearRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score
from sklearn.tree import DecisionTreeRegressor

from nbkit import papers, recipes

ti = papers.method("traffic-incidents")
recipe = recipes.load("papers/traffic-incidents/recipe.py")
SLUG = "traffic-incidents"


def recording(n=400, seed=0):
    """Stages of three series, sticky, with hours and clock."""
    draw = np.random.default_rng(seed)
    stage = draw.integers(0, 6, n)
    stay = draw.random(n) < 0.6
    for i in range(1, n):
        stage[i] = stage[i - 1] if stay[i] else stage[i]
    series = np.sort(draw.integers(1, 4, n))
    return stage, series, pd.DataFrame({"hours": np.arange(n) / 120, "clock": np.arange(n) / 120 - 2})


# --- events and what is known of them


def test_bouts_are_those_of_a_plain_loop():
    stage, series, _ = recording()
    found, start = [], 0
    for i in range(1, len(stage) + 1):
        if i == len(stage) or stage[i] != stage[start] or series[i] != series[start]:
            found.append((series[start], stage[start], start, i - start, i == len(stage) or series[i] != series[start]))
            start = i
    events = ti.bouts(stage, series)
    assert [tuple(row) for row in events.values.tolist()] == found
    assert events.columns.tolist() == ["series", "stage", "start", "epochs", "censored"]


def test_bouts_by_hand():
    events = ti.bouts([*"AABBBA"], [1] * 6)
    assert events["epochs"].tolist() == [2, 3, 1] and events["censored"].tolist() == [False, False, True]
    two = ti.bouts([*"AAAA"], [1, 1, 2, 2])  # the same stage goes on in another recording
    assert two["epochs"].tolist() == [2, 2] and two["censored"].all()


def test_onset_features_are_those_of_a_plain_loop():
    stage, series, when = recording()
    events = ti.bouts(stage, series)
    X = ti.onset_features(events, when)
    assert X.shape == (len(events), 17) and X.notna().all(axis=None)
    for i, event in events.iterrows():
        past = events[:i][events["series"][:i] == event["series"]]
        minutes = past["epochs"] / 2
        row = X.loc[i]
        assert row["hours"] == when["hours"][event["start"]] and row["clock"] == when["clock"][event["start"]]
        assert row["stage"] == event["stage"] and row["bouts so far"] == len(past)
        for lag, name in ((1, "before"), (2, "2 before"), (3, "3 before")):
            known = len(past) >= lag
            assert row[f"stage {name}"] == (past["stage"].iloc[-lag] if known else 7)
            assert row[f"minutes {name}"] == (minutes.iloc[-lag] if known else 0)
        same = minutes[past["stage"] == event["stage"]]
        assert row["minutes same stage"] == (same.iloc[-1] if len(same) else 0)
        for code, name in enumerate(("W", "R", "S1", "S2", "S3", "S4")):
            share = minutes[past["stage"] == code].sum() / minutes.sum() if len(past) else 0
            assert row[f"share {name}"] == pytest.approx(share)


def test_a_feature_does_not_know_how_the_bout_goes_on():
    stage, series, when = recording()
    events = ti.bouts(stage, series)
    later = events.copy()
    later.loc[40:, "epochs"] = 99
    before = ti.onset_features(events, when).loc[:40]
    pd.testing.assert_frame_equal(before, ti.onset_features(later, when).loc[:40])


def test_the_sleep_table_is_as_described():
    X, y, night = ti.sleep_events()
    assert X.shape == (4240, 17) and len(y) == len(night) == 4240 and len(np.unique(night)) == 61
    assert y.median() == 3.5 and y.min() == 0.5 and round(y.mean(), 2) == 7.17
    assert set(X["stage"]) == set(range(6)) and 6 in set(X["stage before"])  # MT is history alone


# --- predicting


def test_the_stage_value_is_the_mean_or_median_of_the_stage():
    X, new = pd.DataFrame({"stage": [0.0, 0, 0, 1]}), pd.DataFrame({"stage": [1.0, 0]})
    y = pd.Series([1.0, 2, 9, 5])
    assert ti.stage_value(X, y, new).tolist() == [5, 4]
    assert ti.stage_value(X, y, new, "median").tolist() == [5, 2]
    with pytest.raises(ValueError, match="3"):
        ti.stage_value(X, y, pd.DataFrame({"stage": [3.0]}))


def test_targets_of_a_constant_by_hand():
    X, y = pd.DataFrame({"a": np.zeros(4)}), pd.Series([1.0, 3, 7, 15])  # log2(1 + y) = 1, 2, 3, 4
    found = {t: ti.predicted(DummyRegressor(), X, y, X[:1], t)[0] for t in ti.TARGETS}
    assert found["raw"] == pytest.approx(6.5)
    assert found["log"] == pytest.approx(2**2.5 - 1)
    assert found["log, smeared"] == pytest.approx(6.5)  # the mean of e^z over the residuals is that of 1 + y


def test_log_and_smeared_are_the_formulas_and_the_model_stays_unfitted():
    draw = np.random.default_rng(0)
    X, new = pd.DataFrame(draw.normal(size=(80, 3))), pd.DataFrame(draw.normal(size=(9, 3)))
    y = pd.Series(np.exp(X[0] + draw.normal(size=80)))
    model = LinearRegression()
    fitted = LinearRegression().fit(X, np.log1p(y))
    z, e = fitted.predict(new), np.log1p(y) - fitted.predict(X)
    np.testing.assert_allclose(ti.predicted(model, X, y, new, "log"), np.exp(z) - 1)
    smeared = [np.mean([np.exp(a + b) - 1 for b in e]) for a in z]
    np.testing.assert_allclose(ti.predicted(model, X, y, new, "log, smeared"), smeared)
    np.testing.assert_allclose(ti.predicted(model, X, y, new), LinearRegression().fit(X, y).predict(new))
    assert not hasattr(model, "coef_")
    every = recipe.every_target(model, X, y, new)
    for target in ti.TARGETS:
        np.testing.assert_allclose(every[target], ti.predicted(model, X, y, new, target))


def test_a_constant_at_the_training_mean_has_the_error_of_variance_and_bias():
    draw = np.random.default_rng(1)
    train, test = draw.exponential(size=50), draw.exponential(size=30)
    found = ti.errors(test, np.full(30, train.mean()))
    assert found["RMSE"] == pytest.approx(np.sqrt(test.var() + (test.mean() - train.mean()) ** 2))
    assert found["MAE"] == pytest.approx(abs(test - train.mean()).mean())
    assert ti.errors([1.0, 2], np.array([np.nan, 4]))["RMSE"] == 2  # what was not predicted does not count


def test_trimmed_keeps_what_the_public_code_keeps():
    y = pd.Series(np.random.default_rng(2).lognormal(size=500))
    low, high = y.quantile(0.01), y.quantile(0.99)
    assert ti.trimmed(y, 0.01).tolist() == ((y >= low) & (y <= high)).tolist()
    assert ti.trimmed(y, 0).all()


# --- splits


def test_nights_are_held_out_whole_and_every_row_once():
    night = np.repeat(np.arange(12), 7)
    for seed in (0, 1):
        parts = ti.folds(night, seed=seed)
        assert sorted(np.concatenate([test for _, test in parts])) == list(range(84))
        assert all(not set(night[train]) & set(night[test]) for train, test in parts)
    assert any(set(night[train]) & set(night[test]) for train, test in ti.folds(night, "rows"))
    ((train, test),) = ti.folds(night, "time")
    assert all(train[night[train] == n].max() < test[night[test] == n].min() for n in range(12))
    assert len(test) == 12 * 2  # of seven, ranks 6 / 7 and 1 are over 0.8


def test_held_out_predicts_a_row_from_the_other_folds_alone():
    night = np.repeat(np.arange(10), 4)
    X, y = pd.DataFrame({"stage": np.zeros(40)}), pd.Series(np.arange(40.0) + 1)
    parts = ti.folds(night, k=5)
    found = ti.held_out(ti.stage_value, X, y, parts)
    for train, test in parts:
        assert found[test] == pytest.approx(y[train].mean())
    assert np.isnan(ti.held_out(ti.stage_value, X, y, parts[:1])).sum() == 40 - len(parts[0][1])


# --- scores


def test_scores_are_those_of_scikit_learn():
    draw = np.random.default_rng(3)
    long, called = draw.integers(0, 2, 200), draw.integers(0, 2, 200)
    found = ti.scores(long, called)
    assert found["accuracy"] == pytest.approx(accuracy_score(long, called))
    assert found["balanced accuracy"] == pytest.approx(balanced_accuracy_score(long, called))
    assert found["F1"] == pytest.approx(f1_score(long, called))
    assert found["recall long"] == pytest.approx(recall_score(long, called))
    assert found["recall short"] == pytest.approx(recall_score(long, called, pos_label=0))


@pytest.mark.parametrize("p", [0.1, 0.4, 0.9])
def test_f1_of_calling_all_long(p):
    long = np.r_[np.ones(int(100 * p)), np.zeros(100 - int(100 * p))]
    found = ti.scores(long, np.ones(100))
    assert found["F1"] == pytest.approx(ti.all_long_f1(p)) == found["F1, all long"]
    assert found["balanced accuracy"] == 0.5
    assert ti.all_long_f1(0.4) == pytest.approx(0.8 / 1.4)


def test_the_stored_network_of_the_public_code_calls_all_long():
    """Accuracy and F1 as printed in A-time-evaluation.ipynb."""
    assert ti.all_long_f1(0.4726729291204099) == pytest.approx(0.6419251957089012, abs=1e-12)


# --- importance


def test_every_kind_finds_the_one_column_that_matters_and_counts_are_the_trees_own():
    draw = np.random.default_rng(4)
    X = pd.DataFrame(draw.normal(size=(600, 4)), columns=[*"abcd"])
    y = pd.Series(np.exp(2 * X["c"] + 0.1 * draw.normal(size=600)))
    found = ti.importances(X[:400], y[:400], X[400:], y[400:])
    assert (found.idxmax() == "c").all() and found.shape == (4, 4)
    model = lightgbm.LGBMRegressor(**ti.QUIET).fit(X[:400], np.log1p(y[:400]))
    nodes = model.booster_.trees_to_dataframe().groupby("split_feature")
    assert found["split count"].to_dict() == nodes.size().to_dict()
    np.testing.assert_allclose(found["gain"], nodes["split_gain"].sum()[X.columns], rtol=1e-4)


def test_a_column_of_noise_with_many_values_is_split_on_more_than_a_true_one_with_two():
    draw = np.random.default_rng(5)
    X = pd.DataFrame({"two values": draw.integers(0, 2, 2000), "code": draw.integers(0, 500, 2000)}).astype(float)
    y = pd.Series(np.exp(X["two values"] + draw.logistic(size=2000)))
    found = ti.importances(X[:1500], y[:1500], X[1500:], y[1500:])
    assert found["split count"].idxmax() == "code"
    assert found["permutation"].idxmax() == "two values" and found["permutation"]["code"] < 0.05


def test_simulated_incidents_have_the_effects_they_claim():
    X, y, effects = recipe.incidents(n=40_000, scale=0.35, seed=1)
    assert X.shape == (40_000, 14) and (y > 0).all() and list(effects) == [
        "lanes", "volume", "primary vehicle", "secondary vehicle", "hour"]  # fmt: skip
    order = effects.var().sort_values(ascending=False)
    assert set(order.index[:3]) == {"lanes", "volume", "primary vehicle"}
    noise = np.log(y / 25) - (effects - effects.mean()).sum(axis=1)
    assert noise.std() == pytest.approx(0.35 * np.pi / 3**0.5, rel=0.02)  # of a logistic of that scale
    others = X.drop(columns=list(effects))
    assert np.abs(np.corrcoef(others.T, np.log(y))[-1, :-1]).max() < 0.02


def test_turned_incidents_hide_lanes_and_volume_from_a_look_at_one_column():
    plain, turned = recipe.incidents(n=40_000, seed=1), recipe.incidents(n=40_000, seed=1, turned=True)
    assert (plain[0] == turned[0]).all(axis=None)
    odd = turned[0]["primary vehicle"] % 2 == 1
    np.testing.assert_allclose(turned[2]["volume"][odd], -plain[2]["volume"][odd])
    np.testing.assert_allclose(turned[2]["volume"][~odd], plain[2]["volume"][~odd])
    np.testing.assert_allclose(turned[2].var()[["lanes", "volume"]], plain[2].var()[["lanes", "volume"]], rtol=0.02)
    for name in ("lanes", "volume"):
        alone = [abs(np.corrcoef(one[0][name].rank(), np.log(one[1]))[0, 1]) for one in (plain, turned)]
        assert alone[0] > 0.3 and alone[1] < 0.02


# --- the recipe's rivals


def test_the_pair_mean_is_drawn_to_the_stage_mean():
    X = pd.DataFrame({"stage": [0.0, 0, 0, 0, 1], "stage before": [1.0, 1, 2, 2, 0]})
    y = pd.Series([1.0, 3, 5, 7, 9])
    plain = recipe.GroupMean(by=("stage", "stage before")).fit(X, y).predict(X)
    assert plain.tolist() == [2, 2, 6, 6, 9]
    shrunk = recipe.GroupMean(by=("stage", "stage before"), shrink=2).fit(X, y)
    assert shrunk.predict(X)[0] == 4 + (2 - 4) * 2 / (2 + 2)
    new = pd.DataFrame({"stage": [0.0], "stage before": [5.0]})
    assert shrunk.predict(new)[0] == 4  # a pair that was not seen
    with pytest.raises(ValueError, match="was not seen"):
        shrunk.predict(pd.DataFrame({"stage": [4.0], "stage before": [5.0]}))


def test_all_models_have_as_many_settings_and_a_tree_gets_codes_where_ridge_gets_columns():
    several = {name: len(settings) for name, settings in recipe.SETTINGS.items() if len(settings) > 1}
    assert set(several.values()) == {4} and set(recipe.SETTINGS) - set(several) == {"stage mean", "stage median"}
    X, y, _ = ti.sleep_events()
    fitted = recipe.make("ridge").fit(X[:500], y[:500])
    assert fitted[-1].coef_.size > X.shape[1]
    relabelled = X.assign(stage=X["stage"].map(dict(enumerate([3, 5, 0, 1, 4, 2]))))
    again = recipe.make("ridge").fit(relabelled[:500], y[:500])
    np.testing.assert_allclose(fitted.predict(X[500:600]), again.predict(relabelled[500:600]), atol=1e-6)


# --- bad input


def test_bad_input_raises():
    X, y = pd.DataFrame({"stage": [0.0, 1, 0]}), pd.Series([1.0, 2, 3])
    tree = DecisionTreeRegressor()
    for call in (
        lambda: ti.bouts([], []),
        lambda: ti.bouts([1, 2], [1]),
        lambda: ti.bouts([1.0, np.nan], [1, 1]),
        lambda: ti.bouts([1, 1, 1], [1, 2, 1]),
        lambda: ti.predicted(tree, X, y, X, "sqrt"),
        lambda: ti.predicted(tree, X, y[:2], X),
        lambda: ti.predicted(tree, X, y - 1, X),
        lambda: ti.predicted(tree, X, y.where(y > 1), X),
        lambda: ti.trimmed(y, 0.5),
        lambda: ti.trimmed(y.where(y > 1), 0.1),
        lambda: ti.trimmed(y[:0], 0.1),
        lambda: ti.folds([1, 1, 2], "weeks"),
        lambda: ti.folds([1, 1, 2], k=3),
        lambda: ti.folds([1, 1, 2], k=1),
        lambda: ti.errors(y, np.full(3, np.nan)),
        lambda: ti.errors(y, np.ones((3, 1))),
        lambda: ti.errors(y.where(y > 1), np.ones(3)),
        lambda: ti.all_long_f1(0),
        lambda: ti.all_long_f1(1.0),
        lambda: ti.scores([1, 1], [1, 0]),
        lambda: ti.scores([1, 0], [1]),
        lambda: ti.scores([1, 0], [0.3, 1]),
        lambda: ti.importances(X, -y, X, y),
        lambda: recipe.incidents(0),
        lambda: recipe.incidents(scale=0),
    ):
        with pytest.raises(ValueError):
            call()


# --- the stored tables


def test_the_stored_table_of_nights_adds_up_to_the_stored_errors():
    errors, nights = (papers.results(SLUG, name) for name in ("errors", "nights"))
    nights = nights.set_index(["model", "kind"]).sum(axis=1) / 4240
    means = errors.assign(loss=np.where(errors["kind"] == "tuned for MAE", errors["MAE"], errors["RMSE"] ** 2))
    means = means.groupby(["model", "kind"])["loss"].mean()
    assert set(means.index) == set(nights.index) and len(means) == 12 * 5
    np.testing.assert_allclose(nights[means.index], means, atol=2e-3)


def test_stored_stage_means_come_out_again():
    X, y, night = ti.sleep_events()
    stored = papers.results(SLUG, "errors").set_index(["model", "kind", "seed"])
    for seed in range(3):
        p = ti.held_out(ti.stage_value, X, y, ti.folds(night, seed=seed))
        found = stored.loc[("stage mean", "first, raw", seed), "RMSE"]
        assert found == pytest.approx(ti.errors(y, p)["RMSE"], abs=1e-4)


def test_stored_calls_keep_the_identity():
    calls = papers.results(SLUG, "calls")
    p = calls["share long"]
    np.testing.assert_allclose(calls["F1, all long"], 2 * p / (1 + p), atol=2e-4)
    mean = calls[["recall long", "recall short"]].mean(axis=1)
    np.testing.assert_allclose(calls["balanced accuracy"], mean, atol=2e-4)
    hits = papers.results(SLUG, "hits").sum()
    means = calls[calls["tau"] == 3.5].groupby("model")["balanced accuracy"].mean()
    np.testing.assert_allclose(hits[means.index], means, atol=1e-3)
