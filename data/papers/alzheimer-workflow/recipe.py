"""metrics.csv, selection.csv and importance.csv: the whole workflow of notebooks/04-features/01-alzheimer-workflow.

Ten subject-level splits of two tables. For each: forward selection and a random search for five model families, the
measures on held-out subjects (OASIS-2: also on their later visits), and three kinds of importance, in the tables
metrics, selection and importance. The functions are the notebook's own method cells. About twenty minutes of processor
time; a split that is done is kept in --work.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, run, seeds_option, work_option, write_table

TABLES = {"oasis2": ("Nondemented", "Demented"), "csf-biomarkers": ("Control", "Impaired")}
TABLE_NAMES = ("metrics", "selection", "importance")
EXPLAINED, BACKGROUND = 60, 50  # rows of the CSF table; all rows of the smaller one


class Split:
    """One split of one table: fills ``metrics``, ``selection`` and ``importance`` with rows."""

    def __init__(self, method, name: str, seed: int):
        from nbkit import datasets

        self.method, self.name, self.seed = method, name, seed
        table = datasets.load(name)
        self.X, self.y = method.subjects(table, *TABLES[name])
        self.train, self.held = method.split(self.X, self.y, seed)
        self.cohorts = {"held out": (self.X.loc[self.held], self.y[self.held])}
        if table.groups is not None:
            X, y = method.subjects(table, *TABLES[name], visits="later")
            known = X.index.isin(self.held)
            self.cohorts["later visits"] = (X[known], y[known])
        self.metrics, self.selection, self.importance = [], [], []

    def measured(self) -> dict[str, list]:
        """The rows of the three tables."""
        m, X, y = self.method, self.X.loc[self.train], self.y[self.train]
        if self.name == "oasis2":
            always, sets = [*m.DEMOGRAPHY, "MMSE"], {"A": m.SET_A, "C": m.SET_C}
            explained = "C", False
        else:
            always, sets = m.CSF_KEPT, {"B": list(self.X.columns)}
            explained = "B", True
        largest = list(sets)[-1]
        self.baselines(["MMSE", "nWBV"] if self.name == "oasis2" else ["tau"])
        for family in m.FAMILIES:
            found = m.select(family, X, y, always, self.seed)
            for step in found.path.itertuples():
                row = {"step": step.step, "feature": step.feature, "accuracy": round(step.score, 6)}
                self.selection.append(self.key(family) | row)
            columns = {(name, False): c for name, c in sets.items()} | {(largest, True): found.selected}
            for (name, selected), chosen in columns.items():
                params = m.tune(family, X[chosen], y, self.seed)
                model = m.build(family, params, self.seed).fit(X[chosen], y)
                self.measure(family, name, selected, chosen, model, params)
                if (name, selected) == explained:
                    self.explain(family, model, chosen)
        return {table: getattr(self, table) for table in TABLE_NAMES}

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
    paths = [out / f"{table}.csv" for table in TABLE_NAMES]
    for path, stored in zip(paths, rows.values(), strict=True):
        write_table(path, pd.DataFrame(stored))
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option("alzheimer-workflow"), seeds=seeds_option(10, "splits"))
