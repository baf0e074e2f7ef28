"""All tables of this folder: what notebooks/04-features/02-traffic-incidents measures beforehand.

Bouts of sleep (sleep-stages): the errors of every model on nights that were held out, its setting and target chosen on
inner folds; thresholds between short and long bouts; other splits and cuts of the tail. Simulated incidents: the ranks
that each kind of importance gives to columns whose effect is known. About 8 minutes on one core; a run that was stopped
goes on where it was (delete the folder --work for a fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.compose import make_column_transformer
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeRegressor

from nbkit.recipes import Work, part_option, run, work_option, write_table

SEEDS = 3  # of the folds
DRAWS = 5  # simulated tables
THRESHOLDS = (1, 2, 2.5, 3, 3.5, 5, 7, 9, 12)  # minutes
MEDIAN = 3.5
SCALES = (0.35, 0.7)
FORESTS = ("random forest", "extra trees")
KINDS = ("tuned for RMSE", "tuned for MAE", "first, raw", "first, log", "first, log, smeared")
CODES = ["stage", "stage before", "stage 2 before", "stage 3 before"]  # a column a code where a number has no sense
CODED = ("ridge", "neighbours", "network")
# the settings a model may choose from; the first is the library's own (but for "network")
BOOSTING = [
    {},
    {"n_estimators": 50, "learning_rate": 0.05, "num_leaves": 15},
    {"n_estimators": 200, "learning_rate": 0.03, "num_leaves": 7, "min_child_samples": 50},
    {"n_estimators": 100, "learning_rate": 0.05, "num_leaves": 15, "min_child_samples": 50, "colsample_bytree": 0.5},
]
FOREST = [
    {},
    {"min_samples_leaf": 5, "max_features": 0.66},
    {"min_samples_leaf": 20, "max_features": 0.66},
]
SETTINGS = {
    "stage mean": [{}],
    "stage median": [{}],
    "stage pair mean": [{"shrink": s} for s in (1, 10, 30, 100)],
    "ridge": [{"alpha": a} for a in (1, 10, 100, 1000)],
    "neighbours": [{"n_neighbors": k} for k in (5, 20, 50, 100)],
    "network": [{}, {"alpha": 1}, {"alpha": 10}, {"alpha": 1, "max_iter": 50}],
    "decision tree": [{"min_samples_leaf": k} for k in (1, 20, 50, 100)],
    "random forest": [*FOREST, {"min_samples_leaf": 20, "max_features": 0.33}],
    "extra trees": [*FOREST, {"min_samples_leaf": 5, "max_features": 0.33}],
    "LightGBM": BOOSTING,
    "LightGBM, L1": BOOSTING,
    "XGBoost": [
        {},
        {"n_estimators": 50, "learning_rate": 0.05, "max_depth": 4},
        {"n_estimators": 200, "learning_rate": 0.03, "max_depth": 3, "min_child_weight": 50},
        {"n_estimators": 100, "learning_rate": 0.05, "max_depth": 4, "min_child_weight": 50, "colsample_bytree": 0.5},
    ],
}
# read in the stored outputs of the public code (classification.ipynb): minutes, % long, accuracy and F1 of XGBoost
PUBLISHED = [
    (20, 64.50, 0.70, 0.79), (25, 55.49, 0.67, 0.71), (30, 47.53, 0.67, 0.64), (35, 40.47, 0.69, 0.57),
    (40, 34.59, 0.71, 0.50), (45, 29.53, 0.74, 0.44), (50, 25.44, 0.77, 0.38), (55, 22.02, 0.79, 0.34),
    (60, 19.27, 0.82, 0.31),
]  # fmt: skip
# simulated incidents: the effect of each vehicle type on the log of minutes
PRIMARY = (0, 0.5, -0.4, 0.3, -0.2, 0.6, -0.5, 0.1)
SECONDARY = (0, 0.2, -0.2, 0.3, -0.1, 0.1, -0.3, 0.2, 0, -0.2)


@functools.cache
def method():
    from nbkit import papers

    return papers.method("traffic-incidents")


@functools.cache
def table():
    return method().sleep_events()


def xgboost_here() -> bool:
    try:
        import xgboost  # noqa: F401
    except ImportError:
        return False
    return True


class GroupMean(RegressorMixin, BaseEstimator):
    """Mean or median of y by one column of X; by two, each cell is shrunk to the first column's value."""

    def __init__(self, by=("stage",), statistic="mean", shrink=0):
        self.by = by
        self.statistic = statistic
        self.shrink = shrink

    def fit(self, X, y):
        y = pd.Series(np.asarray(y), index=X.index)
        self.first_ = y.groupby(X[self.by[0]]).agg(self.statistic)
        excess = (y - X[self.by[0]].map(self.first_)).groupby([X[name] for name in self.by])
        self.excess_ = excess.sum() / (excess.count() + self.shrink)
        return self

    def predict(self, X):
        base = X[self.by[0]].map(self.first_)
        if base.isna().any():
            raise ValueError(f"{self.by[0]} was not seen: {set(X[self.by[0]]) - set(self.first_.index)}")
        if len(self.by) == 1:
            return base.to_numpy()
        cell = pd.MultiIndex.from_frame(X[list(self.by)])
        return base.to_numpy() + self.excess_.reindex(cell).fillna(0).to_numpy()


def coded(model):
    """A column a stage and scaled numbers in front of a model for which a code is no number."""
    codes = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return make_pipeline(make_column_transformer((codes, CODES), remainder=StandardScaler()), model)


def make(name: str, setting: int = 0, **more):
    """An estimator that is not fitted yet."""
    quiet = method().QUIET
    chosen = SETTINGS[name][setting] | more
    if name == "XGBoost":
        import xgboost

        return xgboost.XGBRegressor(n_jobs=1, random_state=0, **chosen)
    model = {
        "stage mean": GroupMean(),
        "stage median": GroupMean(statistic="median"),
        "stage pair mean": GroupMean(by=("stage", "stage before")),
        "ridge": Ridge(),
        "neighbours": KNeighborsRegressor(),
        "network": MLPRegressor(hidden_layer_sizes=(50,), max_iter=30, random_state=0),
        "decision tree": DecisionTreeRegressor(random_state=0),
        "random forest": RandomForestRegressor(random_state=0),
        "extra trees": ExtraTreesRegressor(random_state=0),
        "LightGBM": lightgbm.LGBMRegressor(**quiet),
        "LightGBM, L1": lightgbm.LGBMRegressor(objective="l1", **quiet),
    }[name].set_params(**chosen)
    return coded(model) if name in CODED else model


def names() -> list[str]:
    return [name for name in SETTINGS if name != "XGBoost" or xgboost_here()]


def every_target(model, X, y, new) -> dict[str, np.ndarray]:
    """The notebook's ``predicted`` for all targets from two fits."""
    fitted = clone(model).fit(X, np.log1p(y))
    z = fitted.predict(new)
    smeared = np.exp(z) * np.exp(np.log1p(y) - fitted.predict(X)).mean() - 1
    return {"raw": clone(model).fit(X, y).predict(new), "log": np.expm1(z), "log, smeared": smeared}


def tried(name: str, X, y, night, seed: int = 0) -> pd.DataFrame:
    """RMSE and MAE of every setting and target on two inner folds of nights; forests have 20 trees here."""
    few = {"n_estimators": 20} if name in FORESTS else {}
    rows = []
    for setting in range(len(SETTINGS[name])):
        p = {target: np.empty(len(y)) for target in method().TARGETS}
        for train, test in method().folds(night, seed=seed, k=2):
            found = every_target(make(name, setting, **few), X.iloc[train], y.iloc[train], X.iloc[test])
            for target, new in found.items():
                p[target][test] = new
        rows += [{"setting": setting, "target": target, **method().errors(y, p[target])} for target in p]
    return pd.DataFrame(rows)


def incidents(n: int = 6000, scale: float = 0.35, seed: int = 0, turned: bool = False):
    """Simulated: X [n, 14], y [n] in minutes, and the five effects [n, 5] on log y that made it.

    log y = log 25 + sum of effects, centred, + scale * logistic noise. Lanes, primary vehicle and volume carry most,
    secondary vehicle and hour a little; the nine columns of date, advice and area carry nothing. Where ``turned``,
    every other primary vehicle turns the sign of what lanes and volume do: no column shows that by itself.
    """
    if n < 1 or not scale > 0:
        raise ValueError(f"n >= 1 and scale > 0, not {n} and {scale}")
    draw = np.random.default_rng(seed)
    X = pd.DataFrame({"lanes": draw.choice(5, n, p=[0.35, 0.35, 0.18, 0.08, 0.04])})
    X["volume"] = draw.lognormal(0, 0.6, n)
    levels = {"primary vehicle": 8, "secondary vehicle": 10, "hour": 24, "weekday": 7, "month": 12, "advice": 20,
              "suburb": 600, "street": 2500}  # fmt: skip
    for name, k in levels.items():
        X[name] = draw.integers(0, k, n)
    for name in ("longitude", "latitude", "income", "distance"):
        X[name] = draw.normal(size=n)
    effects = pd.DataFrame({"lanes": 0.35 * X["lanes"], "volume": 0.5 * np.log(X["volume"])})
    effects["primary vehicle"] = np.take(PRIMARY, X["primary vehicle"])
    effects["secondary vehicle"] = np.take(SECONDARY, X["secondary vehicle"])
    effects["hour"] = 0.15 * np.sin(2 * np.pi * X["hour"] / 24)
    if turned:
        sign = 1 - 2 * (X["primary vehicle"] % 2)
        effects["lanes"] = (effects["lanes"] - effects["lanes"].mean()) * sign
        effects["volume"] *= sign
    y = 25 * np.exp((effects - effects.mean()).sum(axis=1) + scale * draw.logistic(size=n))
    return X.astype(float), y.rename("minutes"), effects


def regression(name: str, seed: int) -> dict:
    """Errors of one model on held-out nights: in all and by night."""
    m = method()
    X, y, night = table()
    p = {kind: np.empty(len(y)) for kind in KINDS}
    for train, test in m.folds(night, seed=seed):
        data = X.iloc[train], y.iloc[train], X.iloc[test]
        inner = tried(name, *data[:2], night[train], seed)
        for measure in ("RMSE", "MAE"):
            best = inner.loc[inner[measure].idxmin()]
            p[f"tuned for {measure}"][test] = m.predicted(make(name, best["setting"]), *data, best["target"])
        for target, new in every_target(make(name), *data).items():
            p[f"first, {target}"][test] = new
    scores = [{"model": name, "kind": kind, "seed": seed, **m.errors(y, p[kind])} for kind in KINDS]
    nights = {kind: by_night((y - p[kind]).abs() ** (1 if "MAE" in kind else 2), night) for kind in KINDS}
    return {"scores": scores, "nights": nights}


def by_night(loss, night) -> list[float]:
    return pd.Series(np.asarray(loss)).groupby(night).sum().tolist()


def classifiers() -> dict:
    """By name: (X, long, X_new) -> calls of 0 and 1."""
    models = {
        "LightGBM": lightgbm.LGBMClassifier(**method().QUIET),
        "logistic regression": coded(LogisticRegression(max_iter=1000)),
    }
    if xgboost_here():
        import xgboost

        models["XGBoost"] = xgboost.XGBClassifier(n_jobs=1, random_state=0)
    found = {name: partial(calls, model) for name, model in models.items()}
    return found | {"stage majority": lambda X, long, new: method().stage_value(X, long, new) > 0.5}


def calls(model, X, long, new):
    return clone(model).fit(X, long).predict(new)


def classification(tau: float, seed: int) -> dict:
    m = method()
    X, y, night = table()
    long = (y > tau).astype(int)
    parts = m.folds(night, seed=seed)
    rows, hits = [], {}
    for name, classify in classifiers().items():
        called = m.held_out(classify, X, long, parts)
        rows.append({"model": name, "tau": tau, "seed": seed, "share long": long.mean(), **m.scores(long, called)})
        weight = np.where(long, 0.5 / long.sum(), 0.5 / (1 - long).sum())
        hits[name] = by_night(weight * (called == long), night)
    return {"rows": rows, "hits": hits}


def splits(seed: int) -> list[dict]:
    """RMSE by the way rows are held out, raw minutes."""
    m = method()
    X, y, night = table()
    rows = []
    for how in ("rows", "nights", "time"):
        parts = m.folds(night, how, seed)
        for name, setting in (("LightGBM", 0), ("LightGBM", 3), ("extra trees", 0), ("extra trees", 1), ("ridge", 1),
                              ("stage mean", 0)):  # fmt: skip
            p = m.held_out(partial(cut_and_fit, make(name, setting), 0.0), X, y, parts)
            rows.append({"split": how, "model": name, "setting": setting, "seed": seed, "RMSE": m.errors(y, p)["RMSE"]})
    return rows


def cuts(seed: int) -> list[dict]:
    """RMSE by what is cut: nothing, training rows, or the whole table before it is split; nights held out."""
    m = method()
    X, y, night = table()
    rows = []
    for where, share in (("nothing", 0.0), ("training rows", 0.01), ("training rows", 0.05), ("whole table", 0.01),
                         ("whole table", 0.05)):  # fmt: skip
        keep = m.trimmed(y, share) if where == "whole table" else m.trimmed(y, 0)
        inside = X[keep].reset_index(drop=True), y[keep].reset_index(drop=True)
        parts = m.folds(night[keep], seed=seed)
        for name, setting in (("LightGBM", 3), ("stage mean", 0)):
            fit = partial(cut_and_fit, make(name, setting), share if where == "training rows" else 0.0)
            p = m.held_out(fit, *inside, parts)
            rows.append({"cut": where, "share": share, "model": name, "seed": seed, **m.errors(inside[1], p)})
    return rows


def cut_and_fit(model, share, X, y, new):
    keep = method().trimmed(y, share)
    return method().predicted(model, X[keep], y[keep], new)


def ranks(scale: float, seed: int) -> list[dict]:
    """Of a column by each kind of importance, 1 the highest; a quarter of the rows is held out."""
    X, y, effects = incidents(scale=scale, seed=seed)
    found = method().importances(X[:4500], y[:4500], X[4500:], y[4500:], seed)
    found["alone"] = {name: alone(X[[name]], y) for name in X}
    place = found.rank(ascending=False, method="first").astype(int)
    explained = effects.sum(axis=1).var() / np.log(y).var()
    return [{"scale": scale, "seed": seed, "column": column, **place.loc[column].to_dict(), "explained": explained}
            for column in X]  # fmt: skip


def alone(X, y) -> float:
    """Held-out R2 of log y by a small boosted model of one column."""
    model = make("LightGBM", 1).fit(X[:4500], np.log1p(y[:4500]))
    return model.score(X[4500:], np.log1p(y[4500:]))


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, found = Work(work), {}
    if part in ("all", "importance"):
        found["ranks"] = [kept.once(f"ranks-{s}-{i}", partial(ranks, s, i)) for s in SCALES for i in range(DRAWS)]
    if part in ("all", "classification"):
        found["calls"] = [kept.once(f"calls-{tau}-{seed}", partial(classification, tau, seed))
                          for tau in THRESHOLDS for seed in range(SEEDS)]  # fmt: skip
    if part in ("all", "splits"):
        found["splits"] = [kept.once(f"splits-{seed}", partial(splits, seed)) for seed in range(SEEDS)]
        found["cuts"] = [kept.once(f"cuts-{seed}", partial(cuts, seed)) for seed in range(SEEDS)]
    if part in ("all", "regression"):
        found["errors"] = [kept.once(f"errors-{name}-{seed}", partial(regression, name, seed))
                           for name in names() for seed in range(SEEDS)]  # fmt: skip
    if part != "all":
        return []
    errors = found["errors"]
    median = [one for one in found["calls"] if one["rows"][0]["tau"] == MEDIAN]
    tables = {
        "errors.csv": flat(one["scores"] for one in errors).round(4),
        "nights.csv.gz": losses(errors),
        "calls.csv": flat(one["rows"] for one in found["calls"]).round(4),
        "hits.csv": pd.DataFrame({name: np.mean([one["hits"][name] for one in median], 0) for name in median[0]["hits"]}
                                 ).round(6),
        "splits.csv": flat(found["splits"]).round(4),
        "cuts.csv": flat(found["cuts"])[["cut", "share", "model", "seed", "RMSE"]].round(4),
        "ranks.csv": flat(found["ranks"]).round(3),
        "published.csv": pd.DataFrame(PUBLISHED, columns=["tau", "percent long", "accuracy", "F1"]),
    }  # fmt: skip
    for name, one in tables.items():
        write_table(out / name, one)
    return [out / name for name in tables]


def flat(lists) -> pd.DataFrame:
    return pd.DataFrame([row for rows in lists for row in rows])


def losses(errors: list[dict]) -> pd.DataFrame:
    """A row a model and kind, a column a night: the summed loss, a mean over the seeds."""
    rows = {}
    for one in errors:
        for kind, values in one["nights"].items():
            rows.setdefault((one["scores"][0]["model"], kind), []).append(values)
    means = {key: np.mean(values, 0).round(1) for key, values in rows.items()}
    index = pd.MultiIndex.from_tuples(means, names=["model", "kind"])
    return pd.DataFrame([*means.values()], index=index).reset_index()


if __name__ == "__main__":
    run(build, __doc__, work=work_option("traffic-incidents"),
        part=part_option("importance", "classification", "splits", "regression"))  # fmt: skip
