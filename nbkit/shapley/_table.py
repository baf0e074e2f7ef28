"""X and its background as one finite float matrix that a game may mix, and the way back to what the model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd

MAX_DEFAULT_BACKGROUND = 100


@dataclass(frozen=True, eq=False)
class Table:
    """``x`` [N, P] and ``background`` [B, P] hold the numbers themselves, or codes for a column of text, of categories
    or with missing values; ``decode`` turns rows of such a matrix into the container and dtypes the model takes.
    """

    x: np.ndarray
    background: np.ndarray
    names: list[str]
    frame: pd.DataFrame
    decode: Callable[[np.ndarray], Any]
    missing: dict[str, int]


def tabulate(model: Any, X: Any, background: Any, seed: int) -> Table:
    """Read ``X`` [N, P] and ``background`` [B, P]: DataFrame, array or tensor each. Without a background, rows of X.

    Raises: ValueError (not two axes, no rows, no columns, other columns in the background), TypeError (not numeric).
    """
    import pandas as pd

    columns = _column_names(model, X, background)
    rows = as_frame(X, columns, "X")
    if background is None:
        take = np.random.default_rng(seed).permutation(len(rows))[:MAX_DEFAULT_BACKGROUND]
        others = rows.iloc[np.sort(take)]
    else:
        others = as_frame(background, columns, "background")
    others = _match_columns(rows, others)
    joint = pd.concat([rows, others], ignore_index=True)
    matrix, lookups = _encode(joint)
    named = getattr(model, "feature_names_in_", None)
    as_rows = any(hasattr(table, "columns") for table in (X, background)) or (
        named is not None and list(named) == list(joint.columns)
    )
    decode = _decoder(model, X, joint, lookups, as_rows=as_rows)
    names = [str(c) for c in rows.columns]
    return Table(matrix[: len(rows)], matrix[len(rows) :], names, rows, decode, _missing(joint))


def as_frame(values: Any, columns: Any, what: str) -> pd.DataFrame:
    """``values`` [N, P] as a DataFrame with these column names (a DataFrame keeps its own).

    Raises: ValueError (not two axes, empty, a column name used twice), TypeError (an array that is not numeric).
    """
    import pandas as pd

    if isinstance(values, pd.DataFrame):
        if values.columns.has_duplicates:
            twice = sorted({str(c) for c in values.columns[values.columns.duplicated()]})
            raise ValueError(f"{what} has columns of the same name: {', '.join(twice)}")
        frame = values
    else:
        if hasattr(values, "toarray"):  # scipy's sparse tables
            values = values.toarray()
        if isinstance(values, Tensor):  # numpy has no bfloat16
            values = (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()
        array = np.asarray(values)
        if array.ndim != 2:
            raise ValueError(
                f"{what} must be [rows, features], not of shape {tuple(array.shape)}; one row is X[:1]"
            )
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"{what} holds {array.dtype}; text and categories need a DataFrame with a dtype a column"
            )
        if columns is None or len(columns) != array.shape[1]:
            columns = [f"x{j}" for j in range(array.shape[1])]
        frame = pd.DataFrame(array, columns=list(columns))
    if frame.shape[0] == 0 or frame.shape[1] == 0:
        raise ValueError(f"{what} is empty: its shape is {frame.shape}")
    return frame


def _column_names(model: Any, X: Any, background: Any):
    for table in (X, background):
        if hasattr(table, "columns"):
            return table.columns
    return getattr(model, "feature_names_in_", None)


def _match_columns(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    missing = [str(c) for c in rows.columns if c not in others.columns]
    extra = [str(c) for c in others.columns if c not in rows.columns]
    if missing or extra:
        said = [f"{word} {', '.join(map(repr, those))}" for word, those in
                (("missing", missing), ("extra", extra)) if those]  # fmt: skip
        raise ValueError(f"the background has other columns than X: {'; '.join(said)}")
    return others[list(rows.columns)]


def _missing(joint: pd.DataFrame) -> dict[str, int]:
    """How many values of each column are missing or infinite, for the columns with any."""
    bad = joint.isna()
    for name in joint.columns:
        if joint[name].dtype.kind == "f":
            bad[name] |= np.isinf(joint[name])
    counts = bad.sum()
    return {str(name): int(n) for name, n in counts.items() if n}


def _encode(joint: pd.DataFrame) -> tuple[np.ndarray, dict[int, Any]]:
    """A float64 matrix, and for each column that is not finite numbers float64 holds the values its codes stand for."""
    import pandas as pd

    matrix, lookups = np.empty(joint.shape), {}
    for j, name in enumerate(joint.columns):
        column = joint[name]
        if pd.api.types.is_numeric_dtype(column.dtype) and column.dtype.kind in "biuf":
            numbers = column.to_numpy(dtype=float, na_value=np.nan)
            if np.isfinite(numbers).all() and not _rounded(column):
                matrix[:, j] = numbers
                continue
        matrix[:, j], lookups[j] = pd.factorize(column, use_na_sentinel=False)
    return matrix, lookups


def _rounded(column: pd.Series) -> bool:
    """Whether float64 would change some of a column's integers, as it may above 2**53: ids, nanoseconds."""
    if column.dtype.kind not in "iu":
        return False
    return max(abs(int(column.min())), abs(int(column.max()))) > 2**53


def _decoder(model: Any, X: Any, joint: pd.DataFrame, lookups: dict[int, Any], *, as_rows: bool):
    import pandas as pd

    dtypes = list(joint.dtypes)

    def column(j: int, values: np.ndarray):
        return (
            lookups[j].take(values.astype(np.intp)) if j in lookups else pd.Series(values).astype(dtypes[j])
        )

    if isinstance(model, nn.Module) or (isinstance(X, Tensor) and not hasattr(model, "predict")):
        dtype, where = _tensor_type(model, X, joint)

        def tensor(rows: np.ndarray) -> Tensor:
            # a copy, as what runs may work in place
            out = torch.as_tensor(rows).to(dtype, copy=True)
            for j in lookups:
                out[:, j] = torch.as_tensor(np.array(column(j, rows[:, j]))).to(dtype)
            return out.to(where)  # in two steps, as mps has no float64

        return tensor

    def frame(rows: np.ndarray) -> pd.DataFrame:
        if not lookups and all(d == np.float64 for d in dtypes):
            return pd.DataFrame(rows, columns=joint.columns, copy=False)
        return pd.DataFrame({name: column(j, rows[:, j]) for j, name in enumerate(joint.columns)})

    def array(rows: np.ndarray) -> np.ndarray:
        out = rows.astype(np.result_type(*dtypes))
        for j in lookups:
            out[:, j] = column(j, rows[:, j])
        return out

    return frame if as_rows else array


def _tensor_type(model: Any, X: Any, joint: pd.DataFrame):
    if isinstance(X, Tensor):
        return X.dtype, X.device
    text = [str(name) for name, dtype in joint.dtypes.items() if dtype.kind not in "biuf"]
    if text:
        raise TypeError(f"a torch module takes numbers; these columns hold none: {', '.join(text)}")
    weights = [p for p in model.parameters() if p.is_floating_point()]
    return (
        (weights[0].dtype, weights[0].device) if weights else (torch.get_default_dtype(), torch.device("cpu"))
    )
