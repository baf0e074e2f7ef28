"""Do importances agree? Rank correlations between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit.errors import NotFinite
from nbkit.importance._result import Importance

if TYPE_CHECKING:
    import pandas as pd


def compare(importances: Mapping[str, Any] | None = None, /, **named: Any) -> pd.DataFrame:
    """Rank correlations of K importances of the same features: a table [K, 2 K], ``spearman`` and ``kendall`` (tau-b).

    Each importance is an ``Importance``, a Shapley ``Explanation`` (its ``mean_abs()``), a Series or dict by feature,
    or an array [P]; given as a dict or by keyword. Those with names are matched by name, whatever their order; an
    array is taken to be in the order of the first. ``table["spearman"]`` is the square matrix a heat map draws. A
    constant importance has no ranks: NaN.

    Raises: ValueError (fewer than two importances or features, other features), NotFinite.

    >>> compare(shapley=explanation, permutation=shuffled, native=own)["spearman"].loc["shapley", "native"]
    """
    import pandas as pd

    series = {str(k): _series(str(k), v) for k, v in {**(importances or {}), **named}.items()}
    if len(series) < 2:
        raise ValueError(f"compare needs at least two importances, not {len(series)}")
    table = _aligned(series)
    if len(table) < 2:
        raise ValueError(f"ranks need at least two features, not {len(table)}")
    constant = table.nunique() < 2
    blocks = {}
    for method in ("spearman", "kendall"):
        square = table.corr(method=method)
        square.loc[constant] = np.nan  # pandas leaves 1 on the diagonal
        square.loc[:, constant] = np.nan
        blocks[method] = square
    return pd.concat(blocks, axis=1)


def _series(name: str, value: Any) -> pd.Series | np.ndarray:
    import pandas as pd

    if isinstance(value, Importance):
        value = value.mean
    elif hasattr(value, "mean_abs"):
        value = value.mean_abs()
    elif isinstance(value, Mapping):
        value = pd.Series(dict(value))
    elif not isinstance(value, pd.Series):
        value = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=float)
        if value.ndim != 1:
            raise ValueError(
                f"importance {name!r} must be one number a feature, [P], not of shape {value.shape}"
            )
    if not np.isfinite(np.asarray(value, dtype=float)).all():
        raise NotFinite(f"importance {name!r} holds NaN or infinite values")
    return value


def _aligned(series: Mapping[str, Any]) -> pd.DataFrame:
    """One column an importance, one row a feature."""
    import pandas as pd

    named = {k: v.rename(index=str) for k, v in series.items() if isinstance(v, pd.Series)}
    first = next(iter(named.values()), None)
    size = len(next(iter(series.values())))
    index = first.index if first is not None else pd.Index([f"x{j}" for j in range(size)])
    columns = {}
    for name, values in series.items():
        if name in named:
            missing = [f for f in index if f not in named[name].index]
            extra = [f for f in named[name].index if f not in index]
            if missing or extra or named[name].index.has_duplicates:
                raise ValueError(
                    f"importance {name!r} is of other features: missing {missing}, extra {extra}"
                )
            columns[name] = named[name].reindex(index).astype(float)
        elif len(values) == len(index):
            columns[name] = pd.Series(values, index=index)
        else:
            raise ValueError(f"importance {name!r} has {len(values)} entries for {len(index)} features")
    return pd.DataFrame(columns)
