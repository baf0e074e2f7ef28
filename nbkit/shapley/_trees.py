"""Tree SHAP through shap, where it explains the very number asked for: probabilities, also behind a Pipeline.

What shap reads out of a model is tried, not looked up: its trees must answer every row, and mixtures of rows, as the
model does. An objective with a link, a split on categories or a custom start that shap leaves out shows there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbkit.shapley._game import Game

_PATHS_AT_ONCE = 2**22  # rows x background rows x trees in one call of shap: a second or two
MAX_NODES = 32767  # shap numbers the nodes of a tree with 16 bits
# Preprocessing that works on each column alone: it commutes with taking some features from x and others from b, so
# the Shapley values of the trees on the transformed table are those of the Pipeline on the raw one.
_COLUMNWISE = {
    "SimpleImputer", "StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "PowerTransformer",
    "QuantileTransformer",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """shap's explainer of the trees, the rows [N, P] they are given, which of its outputs is wanted, and what the model
    predicts for the rows and for the background."""

    explainer: Any
    x: np.ndarray
    column: int
    predicted: tuple[np.ndarray, np.ndarray]

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
    if not hasattr(trees, "predict"):
        return f"{type(trees).__name__} is no estimator, and holds no trees"
    if callable(played.target):
        return "a callable target= is no output of the trees"
    blocked = [type(s).__name__ for s in steps if type(s).__name__ not in _COLUMNWISE]
    if blocked:
        return f"the pipeline mixes or recodes columns before the trees: {', '.join(blocked)}"
    try:
        return _tried(played, steps, trees)
    except Exception as error:  # shap, a booster or numpy, each with types of its own for what it does not know
        return f"shap cannot read {type(trees).__name__} on this table: {str(error).strip().splitlines()[0]}"


def _tried(played: Game, steps: tuple[Any, ...], trees: Any) -> Plan | str:
    import shap

    table, kind = played.table, type(trees).__name__
    x, background = (_transformed(kind, steps, table.decode(m.copy())) for m in (table.x, table.background))
    if x.shape[1] != table.x.shape[1]:
        return f"the trees take {x.shape[1]} features, the table has {table.x.shape[1]}"
    everything = shap.maskers.Independent(background, max_samples=len(background))  # shap would keep 100 rows
    explainer = shap.TreeExplainer(trees, everything, model_output="raw")  # raises where there are no trees
    mixed = _mixtures(table.x, table.background)
    wanted = played.predict(mixed.copy())
    mixed = _transformed(kind, steps, table.decode(mixed))
    for output in ("raw", "probability") if hasattr(trees, "predict_proba") else ("raw",):
        if output != "raw":
            explainer = shap.TreeExplainer(trees, everything, model_output=output)
        if explainer.model.trees is None or explainer.model.children_left.shape[1] > MAX_NODES:
            return f"shap cannot hold these trees (categories, or more than {MAX_NODES} nodes in one)"
        ranks = _to_ranks(explainer, background)
        column = _column(explainer.model.predict(ranks(mixed), output=output), wanted)
        if column is not None:
            return Plan(explainer, ranks(x), column, tuple(np.split(wanted, [len(x), len(x) + len(background)])[:2]))
    return (
        f"the trees of this {kind}, as shap reads them, do not add up to its prediction (a link, categories, several "
        "outputs or more than two classes)"
    )


def _mixtures(x: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Rows, background rows, and as many with features from both: what the game asks."""
    rng = np.random.default_rng(0)
    n = min(len(x) + len(background), 256)
    mine, theirs = x[rng.integers(len(x), size=n)], background[rng.integers(len(background), size=n)]
    return np.concatenate([x, background, np.where(rng.random(mine.shape) < 0.5, mine, theirs)])


def _column(found: np.ndarray, wanted: np.ndarray) -> int | None:
    """Which of shap's outputs is the wanted one; -1 where it is 1 minus the only one."""
    found = found.reshape(len(wanted), -1)
    allowed = 1e-4 * max(np.abs(wanted).max(), 1e-12)  # shap holds leaves in float32
    for column in range(found.shape[1]):
        if np.abs(found[:, column] - wanted).max() <= allowed:
            return column
    mirrored = found.shape[1] == 1 and np.abs(1 - found[:, 0] - wanted).max() <= allowed
    return -1 if mirrored else None


def tree_shap(how: Plan) -> np.ndarray:
    """Interventional Tree SHAP [N, P] (Lundberg et al. 2020, algorithm 3) over the whole background."""
    from tqdm.auto import tqdm

    # shap writes to stderr when one call takes ten seconds
    rows = max(16, _PATHS_AT_ONCE // max(1, len(how.explainer.data) * len(how.explainer.model.trees)))
    pieces = np.array_split(how.x, -(-len(how.x) // rows))
    values = np.concatenate(
        [
            how.explainer.shap_values(piece, check_additivity=False)
            for piece in tqdm(pieces, desc="rows", delay=3, leave=False)
        ]
    )
    if values.ndim == 3:
        return values[:, :, how.column]
    # one column stands for the second class; the first class is its mirror image
    return -values if how.column == -1 else values


def _to_ranks(explainer: Any, background: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Put the explainer's thresholds and background on a scale of small integers; returns what puts rows on it.

    shap rounds thresholds to float32 and compares them with float64 data, which sends some rows down the wrong
    branch. x <= the k-th threshold of a feature exactly where at most k - 1 of its thresholds are below x.
    """
    model = explainer.model
    split = model.children_left >= 0
    nodes = [split & (model.features == j) for j in range(background.shape[1])]
    known = [np.unique(model.thresholds[at]) for at in nodes]
    thresholds = model.thresholds.copy()
    for at, levels in zip(nodes, known, strict=True):
        thresholds[at] = np.searchsorted(levels, model.thresholds[at])

    def ranks(rows: np.ndarray) -> np.ndarray:
        codes = rows.copy()
        for j, levels in enumerate(known):
            present = ~np.isnan(rows[:, j])
            codes[present, j] = np.searchsorted(levels, rows[present, j])
        return codes

    model.thresholds, explainer.data = thresholds, ranks(background)
    return ranks


def _unwrap(model: Any) -> tuple[tuple[Any, ...], Any]:
    model = getattr(model, "best_estimator_", model)
    if not hasattr(model, "named_steps"):
        return (), model
    *before, (_, last) = model.steps
    return tuple(s for _, s in before if s is not None and s != "passthrough"), last


def _transformed(kind: str, steps: tuple[Any, ...], table: Any) -> np.ndarray:
    for step in steps:
        table = step.transform(table)
    compared = np.float64 if kind.startswith(("Hist", "LGBM")) else np.float32  # what is compared at a split
    return np.asarray(table, dtype=float).astype(compared).astype(float)
