"""The tables metrics, selection, importance, agreement and deals of notebooks/04-features/01-alzheimer-workflow.

Ten subject-level splits of two tables. For each: forward selection and a random search for five model families, the
measures on held-out subjects (OASIS-2: also on their later visits), and three kinds of importance, in the tables
metrics, selection and importance. Each step of a selection has the accuracy it promised, and the one that the same
fitted model keeps on held-out subjects; three families select on shuffled labels, too. The functions are the
notebook's own method cells. Agreement is the rank correlation of importances, deals what it would be by luck. About
twenty minutes of processor time; a split that is done is kept in --work.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, run, seeds_option, work_option, write_table

TABLES = {"oasis2": ("Nondemented", "Demented"), "csf-biomarkers": ("Control", "Impaired")}
TABLE_NAMES = ("metrics", "selection", "importance")
DEALS = 2000
EXPLAINED, BACKGROUND = 60, 50  # rows of the CSF table; all rows of the smaller one
SHUFFLED, QUICK_FAMILIES = "shuffled labels", ("LR", "DT", "SVM")


def space(family: str) -> dict:
    """What the search draws from; C = inf is no penalty, max_features a share of the columns."""
    from scipy.stats import loguniform, randint, uniform

    C = loguniform(1e-3, 1e3)
    if family == "LR":
        return {"C": [np.inf, *C.rvs(20, random_state=0)]}
    if family == "DT":
        kinds = {"criterion": ["gini", "entropy"], "splitter": ["best", "random"]}
        return {**kinds, "max_depth": randint(1, 101), "min_samples_split": uniform(0.01, 0.99)}
    if family == "RF":
        return {"max_features": uniform(0.1, 0.9), "min_samples_leaf": randint(1, 21)}
    if family == "SVM":
        return {"C": C, "gamma": ["scale", "auto"]}
    sizes = {"max_iter": randint(10, 101), "max_depth": randint(1, 21)}
    return {**sizes, "learning_rate": loguniform(1e-3, 1), "min_samples_leaf": randint(1, 31)}


def tune(method, family: str, X: pd.DataFrame, y: pd.Series, seed: int, draws: int = 8, folds: int = 5) -> dict:
    """The best of ``draws`` random settings by cross-validated accuracy. Raises: ValueError (class too small)."""
    from sklearn.model_selection import ParameterSampler, StratifiedKFold, cross_val_score

    if y.nunique() < 2 or y.value_counts().min() < folds:
        raise ValueError(f"each fold needs both classes: labels {y.value_counts().to_dict()} for {folds} folds")
    cv = StratifiedKFold(folds, shuffle=True, random_state=seed)
    tried = list(ParameterSampler(space(family), draws, random_state=seed))
    scores = [cross_val_score(method.build(family, p, seed, False), X, y, cv=cv).mean() for p in tried]
    return {k: v.item() if hasattr(v, "item") else v for k, v in tried[int(np.argmax(scores))].items()}


def dealt_anew(a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Spearman correlations [draws] of a and b [p] once b's values are dealt to other features.

    keys [draws, p] sort b anew; the feature with the largest a keeps its own value. Raises: ValueError.
    """
    from scipy.stats import rankdata

    if np.shape(a) != np.shape(b) or np.shape(keys)[1:] != np.shape(a) or len(a) < 2:
        raise ValueError(f"shapes {np.shape(a)}, {np.shape(b)}, {np.shape(keys)} do not fit")
    ranks = rankdata(np.stack([a, b]), axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    ranks /= np.linalg.norm(ranks, axis=1, keepdims=True)
    rest = np.arange(len(a)) != np.argmax(a)
    dealt = np.tile(ranks[1], (len(keys), 1))
    dealt[:, rest] = ranks[1, rest][keys[:, rest].argsort(1)]
    return dealt @ ranks[0]


def agreement(importances: pd.DataFrame, draws: int = DEALS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rank correlations with mean |Shapley value|, a row a split and model; and what luck makes of them.

    Each of the ``draws`` rows of the second table is one new deal for all splits and models (they share people and
    columns): the median over models, then the mean over splits, of every case.
    """
    from scipy.stats import kendalltau, spearmanr

    features = importances["feature"].unique()
    keys = pd.DataFrame(np.random.default_rng(0).random((draws, len(features))), columns=features)
    rows, dealt = [], {}
    for (data, model, seed), part in importances.groupby(["data", "model", "seed"]):
        for kind in ("permutation", "native"):
            if part[kind].isna().any():
                continue  # an SVM has none of its own
            a, b = part["Shapley"].to_numpy(), part[kind].to_numpy()
            case = f"{data.replace('csf-biomarkers', 'proteins')}, {kind}"
            found = {"spearman": spearmanr(a, b).statistic, "kendall": kendalltau(a, b).statistic}
            rows.append({"case": case, "model": model, "seed": seed} | {k: round(v, 4) for k, v in found.items()})
            dealt[case, seed, model] = dealt_anew(a, b, keys[part["feature"]].to_numpy())
    dealt = pd.DataFrame(dealt).T.rename_axis(["case", "seed", "model"])
    dealt = dealt.groupby(["case", "seed"]).median().groupby("case").mean().T
    return pd.DataFrame(rows), dealt.round(4)


class Split:
    """One split of one table: fills ``metrics``, ``selection`` and ``importance`` with rows."""

    def __init__(self, method, name: str, seed: int):
        from nbkit import datasets

        self.method, self.name, self.seed = method, name, seed
        shuffled = name == SHUFFLED
        table = datasets.load("csf-biomarkers" if shuffled else name)
        self.X, self.y = method.subjects(table, *TABLES["csf-biomarkers" if shuffled else name])
        if shuffled:
            self.y = self.y.sample(frac=1, random_state=seed).set_axis(self.y.index)
        self.train, self.held = method.split(self.X, self.y, seed)
        self.cohorts = {"held out": (self.X.loc[self.held], self.y[self.held])}
        if table.groups is not None:
            X, y = method.subjects(table, *TABLES[name], later=True)
            known = X.index.isin(self.held)
            self.cohorts["later visits"] = (X[known], y[known])
        self.metrics, self.selection, self.importance = [], [], []

    def measured(self) -> dict[str, list]:
        """The rows of the three tables."""
        m, X, y = self.method, self.X.loc[self.train], self.y[self.train]
        if self.name == "oasis2":
            always, sets = [*m.DEMOGRAPHY, "MMSE"], dict(m.SETS)
            explained = "C", False
        else:
            always, sets = m.CSF_KEPT, {"B": list(self.X.columns)}
            explained = "B", True
        largest = list(sets)[-1]
        self.baselines(["MMSE", "nWBV"] if self.name == "oasis2" else ["tau"])
        for family in m.FAMILIES:
            found = m.select(family, X, y, always, self.seed)
            self.promises(family, found)
            columns = {(name, False): c for name, c in sets.items()} | {(largest, True): found.selected}
            for (name, selected), chosen in columns.items():
                params = tune(m, family, X[chosen], y, self.seed)
                model = m.build(family, params, self.seed).fit(X[chosen], y)
                self.measure(family, name, selected, chosen, model, params)
                if (name, selected) == explained:
                    self.explain(family, model, chosen)
        return {table: getattr(self, table) for table in TABLE_NAMES}

    def measured_shuffled(self) -> dict[str, list]:
        """Selection alone, where no column knows anything of the labels."""
        for family in QUICK_FAMILIES:
            found = self.method.select(
                family, self.X.loc[self.train], self.y[self.train], self.method.CSF_KEPT, self.seed
            )
            self.promises(family, found)
        return {"selection": self.selection}

    def promises(self, family: str, found) -> None:
        """What each step of a selection promised, and what the same fitted model keeps on held-out subjects."""
        from sklearn.model_selection import train_test_split

        m, y = self.method, self.y
        fit, judge = train_test_split(self.train, test_size=0.2, random_state=self.seed, stratify=y[self.train])
        for step in found.path.itertuples():
            X = self.X[found.selected[: step.step]]
            model = m.build(family, m.QUICK.get(family, {}), self.seed, False).fit(X.loc[fit], y[fit])
            if abs(model.score(X.loc[judge], y[judge]) - step.score) > 1e-9:
                raise RuntimeError(f"{self.name}, split {self.seed}, {family}: not the model that was selected")
            kept = {"accuracy": step.score, "kept": model.score(X.loc[self.held], y[self.held])}
            row = {"step": step.step, "feature": step.feature} | {k: round(v, 6) for k, v in kept.items()}
            self.selection.append(self.key(family) | row)

    def key(self, family: str) -> dict:
        return {"data": self.name, "seed": self.seed, "model": family}

    def measure(self, family, name, selected, chosen, model, params) -> None:
        for cohort, (X, y) in self.cohorts.items():
            p = model.predict_proba(X[chosen])[:, 1]
            measured = {k: round(v, 6) for k, v in self.method.evaluate(y, p).items()}
            row = {"columns": name, "selected": int(selected), "cohort": cohort, "n": len(y), "p": len(chosen)}
            self.metrics.append(self.key(family) | row | measured | {"params": json.dumps(params)})

    def baselines(self, single: list[str]) -> None:
        from sklearn.dummy import DummyClassifier

        X, y = self.X.loc[self.train], self.y[self.train]
        for column in single:
            model = self.method.build("LR", {}, self.seed).fit(X[[column]], y)
            self.measure(f"{column} only", "one", False, [column], model, {})
        majority = DummyClassifier(strategy="most_frequent").fit(X, y)
        self.measure("majority", "none", False, list(X.columns[:1]), majority, {})

    def explain(self, family: str, model, chosen: list[str]) -> None:
        X, y = self.cohorts["held out"]
        background = self.X.loc[self.train, chosen]
        if self.name != "oasis2":
            rows = np.random.default_rng(self.seed).permutation(len(X))[:EXPLAINED]
            X, y, background = X.iloc[rows], y.iloc[rows], background.sample(BACKGROUND, random_state=self.seed)
        found = self.method.importances(family, model, X[chosen], y, background, self.seed)
        for feature, values in found.round(6).iterrows():
            self.importance.append(self.key(family) | {"feature": feature} | values.to_dict())


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import papers, runtime

    runtime.deterministic(seed=0)
    method = papers.method("alzheimer-workflow")
    finished, rows = Work(work), {table: [] for table in TABLE_NAMES}
    for name in TABLES:
        for seed in range(seeds):
            found = finished.once(f"{name}-{seed}", Split(method, name, seed).measured)
            for table, stored in found.items():
                rows[table] += stored
    for seed in range(seeds):
        found = finished.once(f"shuffled-{seed}", Split(method, SHUFFLED, seed).measured_shuffled)
        rows["selection"] += found["selection"]
    tables = {table: pd.DataFrame(stored) for table, stored in rows.items()}
    tables["agreement"], tables["deals"] = agreement(tables["importance"])
    for table, frame in tables.items():
        write_table(out / f"{table}.csv", frame)
    return [out / f"{table}.csv" for table in tables]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("alzheimer-workflow"), seeds=seeds_option(10, "splits"))
