"""Tree SHAP through shap, where it explains the very number asked for: probabilities, also behind a Pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nbkit.shapley._game import Game
from nbkit.shapley._predict import class_index

# Whose trees hold the output itself, and whose hold log-odds that shap must turn into a probability.
_DIRECT = {
    "DecisionTreeClassifier", "DecisionTreeRegressor", "ExtraTreeClassifier", "ExtraTreeRegressor",
    "RandomForestClassifier", "RandomForestRegressor", "ExtraTreesClassifier", "ExtraTreesRegressor",
    "GradientBoostingRegressor", "HistGradientBoostingRegressor", "XGBRegressor", "LGBMRegressor",
}  # fmt: skip
_LOG_ODDS = {
    "GradientBoostingClassifier", "HistGradientBoostingClassifier", "XGBClassifier", "LGBMClassifier",
}  # fmt: skip
MAX_NODES = 32767  # shap numbers the nodes of a tree with 16 bits
# Preprocessing that works on each column alone: it commutes with taking some features from x and others from b, so
# the Shapley values of the trees on the transformed table are those of the Pipeline on the raw one.
_COLUMNWISE = {
    "SimpleImputer", "StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "PowerTransformer",
    "QuantileTransformer",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """shap's explainer of the trees, the rows [N, P] they are given, and which of its outputs is wanted."""

    explainer: Any
    x: np.ndarray
    column: int

    @property
    def probability(self) -> bool:
        """Whether shap turns log-odds into a probability."""
        return self.explainer.model_output == "probability"

    @property
    def exact(self) -> bool:
        """Whether the values are Shapley values of the output. In probabilities shap takes those of the log-odds
        and rescales them, background row by background row, so that they add up: an approximation."""
        return not self.probability


def plan(played: Game) -> Plan | str:
    """How to explain this model with Tree SHAP, or the reason why it cannot be."""
    steps, trees = _unwrap(played.model)
    reason = _unfit(played, steps, trees)
    if reason:
        return reason
    import shap

    table, kind = played.table, type(trees).__name__
    x, background = (_transformed(kind, steps, table.decode(m)) for m in (table.x, table.background))
    if x.shape[1] != table.x.shape[1]:
        return f"the trees take {x.shape[1]} features, the table has {table.x.shape[1]}"
    everything = shap.maskers.Independent(background, max_samples=len(background))  # shap would keep 100 rows
    output = "probability" if kind in _LOG_ODDS else "raw"
    try:
        explainer = shap.TreeExplainer(trees, everything, model_output=output)
    except Exception as error:  # shap raises many types for what it does not know
        return f"shap cannot read the trees: {error}"
    if explainer.model.trees is None or explainer.model.children_left.shape[1] > MAX_NODES:
        return f"shap cannot hold these trees (categories, or more than {MAX_NODES} nodes in one)"
    column = class_index(trees.classes_, played.target) if hasattr(trees, "classes_") else 0
    return Plan(explainer, _on_ranks(explainer, x, background), column)


def tree_shap(how: Plan) -> np.ndarray:
    """Interventional Tree SHAP [N, P] (Lundberg et al. 2020, algorithm 3) over the whole background."""
    from tqdm.auto import tqdm

    pieces = np.array_split(
        how.x, -(-len(how.x) // 16)
    )  # shap writes to stderr when one call takes ten seconds
    values = np.concatenate(
        [
            how.explainer.shap_values(piece, check_additivity=False)
            for piece in tqdm(pieces, desc="rows", delay=3, leave=False)
        ]
    )
    if values.ndim == 3:
        return values[:, :, how.column]
    # one column of log-odds stands for the second class; the first class is its mirror image
    return -values if how.probability and how.column == 0 else values


def _on_ranks(explainer: Any, x: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Put thresholds, background and rows on a scale of small integers; returns the rows on it.

    shap rounds thresholds to float32 and compares them with float64 data, which sends some rows down the wrong
    branch. x <= the k-th threshold of a feature exactly where at most k - 1 of its thresholds are below x.
    """
    model = explainer.model
    split = model.children_left >= 0
    thresholds, codes, others = model.thresholds.copy(), x.copy(), background.copy()
    for j in range(x.shape[1]):
        nodes = split & (model.features == j)
        known = np.unique(model.thresholds[nodes])
        thresholds[nodes] = np.searchsorted(known, model.thresholds[nodes])
        for matrix, source in ((codes, x), (others, background)):
            present = ~np.isnan(source[:, j])
            matrix[present, j] = np.searchsorted(known, source[present, j])
    model.thresholds, explainer.data = thresholds, others
    return codes


def _unfit(played: Game, steps: tuple[Any, ...], trees: Any) -> str | None:
    kind = type(trees).__name__
    if kind not in _DIRECT | _LOG_ODDS:
        return f"{kind} is no tree ensemble that shap can explain exactly"
    if callable(played.target):
        return "a callable target= is no output of the trees"
    blocked = [type(s).__name__ for s in steps if type(s).__name__ not in _COLUMNWISE]
    if blocked:
        return f"the pipeline mixes or recodes columns before the trees: {', '.join(blocked)}"
    if getattr(trees, "n_outputs_", 1) not in (1, None) or _unlike_raw(trees):
        return f"the trees of this {kind} do not add up to its prediction (several outputs, categories or a link)"
    if kind in _LOG_ODDS and len(trees.classes_) != 2:
        return f"shap turns the log-odds of {kind} into probabilities for two classes only"
    return None


def _unwrap(model: Any) -> tuple[tuple[Any, ...], Any]:
    model = getattr(model, "best_estimator_", model)
    if not hasattr(model, "named_steps"):
        return (), model
    *before, (_, last) = model.steps
    return tuple(s for _, s in before if s is not None and s != "passthrough"), last


def _unlike_raw(trees: Any) -> bool:
    """A link, categorical splits or a custom start, which shap's reading of the trees leaves out."""
    if getattr(trees, "is_categorical_", None) is not None and np.any(trees.is_categorical_):
        return True
    if type(trees).__name__ == "HistGradientBoostingRegressor":
        return trees.loss not in ("squared_error", "absolute_error", "quantile")
    if type(trees).__name__.startswith("XGB"):
        return str(trees.objective) not in ("reg:squarederror", "reg:absoluteerror", "binary:logistic")
    if type(trees).__name__.startswith("GradientBoosting"):
        return trees.init is not None or trees.loss == "exponential"
    return False


def _transformed(kind: str, steps: tuple[Any, ...], table: Any) -> np.ndarray:
    for step in steps:
        table = step.transform(table)
    compared = np.float64 if kind.startswith(("Hist", "LGBM")) else np.float32  # what is compared at a split
    return np.asarray(table, dtype=float).astype(compared).astype(float)
