"""The result of measuring an importance several times, and reading a table of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Importance:
    """The loss of score, ``values`` [P, R], for each of P features and R repeats or folds.

    ``baseline`` [R] or [1] is the score nothing was taken from; ``scoring`` its name; ``method`` how it was measured.
    """

    values: np.ndarray
    baseline: np.ndarray
    feature_names: list[str]
    method: str
    scoring: str

    @property
    def mean(self) -> pd.Series:
        """Mean over repeats, a Series [P] in the order of the features."""
        import pandas as pd

        return pd.Series(self.values.mean(1), index=self.feature_names, name=f"{self.method} importance")

    @property
    def std(self) -> pd.Series:
        """Standard deviation over repeats (of the population, as scikit-learn's), a Series [P]."""
        import pandas as pd

        return pd.Series(self.values.std(1), index=self.feature_names, name="std")

    def to_frame(self) -> pd.DataFrame:
        """Long form, a row for each feature and repeat: ``feature``, ``repeat``, ``importance``; P * R rows."""
        import pandas as pd

        features, repeats = self.values.shape
        return pd.DataFrame(
            {
                "feature": np.repeat(self.feature_names, repeats),
                "repeat": np.tile(np.arange(repeats), features),
                "importance": self.values.ravel(),
            }
        )

    def __repr__(self) -> str:
        top = self.mean.sort_values(ascending=False, kind="stable").head(3)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in top.items())
        return f"{self._caption()}; highest: {shown}"

    def _caption(self) -> str:
        features, repeats = self.values.shape
        return (
            f"{self.method} importance of {features} features, {repeats} repeats: loss of {self.scoring}, "
            f"which is {self.baseline.mean():.4g} with all"
        )

    def _repr_html_(self) -> str:
        mean, std = self.mean, self.std
        shown = mean.sort_values(ascending=False, kind="stable").head(15)
        top = max(shown.abs().max(), np.finfo(float).tiny)
        bar = '<div style="background:{};height:0.8em;width:{:.0f}px"></div>'
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(str(name))}</td><td>{value:.4g} ± {std[name]:.2g}</td>"
            f"<td>{bar.format('#1f77b4' if value >= 0 else '#d62728', 120 * abs(value) / top)}</td></tr>"
            for name, value in shown.items()
        )
        rest = len(mean) - len(shown)
        more = f"<tr><td colspan=3 style='text-align:left'>and {rest} more</td></tr>" if rest else ""
        return (
            f"<div>{escape(self._caption())}</div><table><thead><tr><th style='text-align:left'>feature</th>"
            f"<th>loss of score</th><th></th></tr></thead><tbody>{rows}{more}</tbody></table>"
        )


def read_table(X: Any, y: Any, what: str = "X") -> tuple[Any, np.ndarray, list[str]]:
    """``(X [N, P] as a DataFrame or array, y as an array [N, ...], feature names)``; y [N, 1] becomes [N].

    Raises: ValueError (not two axes, empty, another number of labels), NotFinite (NaN or infinite in y).
    """
    from nbkit.errors import NotFinite

    table, target = as_table(X, what), np.asarray(_cpu(y))
    if target.ndim == 0 or len(target) != len(table):
        raise ValueError(
            f"y has shape {target.shape}; it needs one entry for each of the {len(table)} rows of {what}"
        )
    if target.dtype.kind == "f" and not np.isfinite(target).all():
        raise NotFinite(f"y holds {(~np.isfinite(target)).sum()} NaN or infinite values")
    target = target[:, 0] if target.shape[1:] == (1,) else target
    return table, target, feature_names(table)


def as_table(X: Any, what: str = "X") -> Any:
    """``X`` as it is where it is a DataFrame, else as an array; [N, P] with N, P >= 1."""
    table = X if hasattr(X, "iloc") else np.asarray(_cpu(X))
    if len(table.shape) != 2 or 0 in table.shape:
        raise ValueError(f"{what} must be [rows, features] and not empty; its shape is {tuple(table.shape)}")
    if hasattr(table, "columns") and table.columns.has_duplicates:
        twice = sorted({str(c) for c in table.columns[table.columns.duplicated()]})
        raise ValueError(f"{what} has columns of the same name: {', '.join(twice)}")
    return table


def feature_names(table: Any) -> list[str]:
    """Column names as strings; x0, x1, ... where there are none."""
    return (
        [str(c) for c in table.columns]
        if hasattr(table, "columns")
        else [f"x{j}" for j in range(table.shape[1])]
    )


def take_rows(table: Any, rows: Any) -> Any:
    """Rows of a DataFrame or array."""
    return table.iloc[rows] if hasattr(table, "iloc") else table[rows]


def take_columns(table: Any, columns: Sequence[int]) -> Any:
    """Columns of a DataFrame or array, by position."""
    return table.iloc[:, list(columns)] if hasattr(table, "iloc") else table[:, list(columns)]


def scoring_name(scoring: Any) -> str:
    """How to call a scorer in a table."""
    return scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score")


def _cpu(values: Any) -> Any:
    if hasattr(values, "toarray"):  # scipy's sparse tables
        return values.toarray()
    if not hasattr(values, "detach"):
        return values
    values = values.detach().cpu()
    return values.float() if str(values.dtype) == "torch.bfloat16" else values  # NumPy has no bfloat16
