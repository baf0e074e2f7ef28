"""What an explanation is: values that should add up, and how far they are from it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit.errors import UnknownName, did_you_mean

if TYPE_CHECKING:
    import pandas as pd


class AdditivityWarning(UserWarning):
    """The base value and the Shapley values do not add up to the prediction within the tolerance."""


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Shapley values of N rows and P features (or groups), with what they should add up to.

    ``values`` [N, P]; ``base_value`` the mean prediction over the background; ``prediction`` [N]; ``data`` the rows
    explained as a DataFrame [N, P] (None once features are grouped); ``feature_names`` [P]; ``method`` that was used;
    ``output`` the number explained, such as ``P(AD)``; ``background`` the number of background rows.
    """

    values: np.ndarray
    base_value: float
    prediction: np.ndarray
    data: pd.DataFrame | None
    feature_names: list[str]
    method: str
    output: str
    background: int

    @property
    def base_values(self) -> np.ndarray:
        """The base value once for every row, [N]."""
        return np.full(len(self.values), self.base_value)

    @property
    def additivity_gap(self) -> np.ndarray:
        """prediction - (base value + sum of the values), [N]: zero where the method is exact."""
        return self.prediction - (self.base_value + self.values.sum(1))

    def mean_abs(self) -> pd.Series:
        """Global importance: the mean over rows of |value|, a Series [P] in the order of the features."""
        import pandas as pd

        return pd.Series(np.abs(self.values).mean(0), index=self.feature_names, name="mean |Shapley value|")

    def to_frame(self) -> pd.DataFrame:
        """The values as a DataFrame [N, P], with the index of the data."""
        import pandas as pd

        index = None if self.data is None else self.data.index
        return pd.DataFrame(self.values, columns=self.feature_names, index=index)

    def to_shap(self) -> Any:
        """The same as a ``shap.Explanation``, for every plot shap has."""
        import shap

        data = None if self.data is None else _plottable(self.data)
        return shap.Explanation(
            self.values, base_values=self.base_values, data=data, feature_names=list(self.feature_names)
        )

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        n, p = self.values.shape
        return (
            f"Explanation of {self.output}: {n} rows x {p} features by {self.method}, "
            f"background {self.background} rows, base value {self.base_value:.4g}, {self._gap()}"
        )

    def _gap(self) -> str:
        gap = np.abs(self.additivity_gap)
        return f"additivity gap at most {gap.max():.2g} (mean {gap.mean():.2g})"

    def _repr_html_(self) -> str:
        importance = self.mean_abs().sort_values(ascending=False, kind="stable")
        top = importance.iloc[0] or 1.0
        shown = importance.head(10)
        bar = '<div style="background:#1f77b4;height:0.8em;width:{:.0f}px"></div>'
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(str(name))}</td><td>{value:.4g}</td>"
            f"<td style='text-align:left'>{bar.format(120 * value / top)}</td></tr>"
            for name, value in shown.items()
        )
        rest = len(importance) - len(shown)
        more = f"<tr><td colspan=3 style='text-align:left'>and {rest} more</td></tr>" if rest else ""
        return (
            f"<div>Shapley values of <b>{escape(self.output)}</b> by {self.method}: {len(self.values)} rows, "
            f"background {self.background} rows, base value {self.base_value:.4g}; <b>{self._gap()}</b></div>"
            "<table><thead><tr><th style='text-align:left'>feature</th><th>mean |value|</th><th></th></tr></thead>"
            f"<tbody>{rows}{more}</tbody></table>"
        )


def warn_of_gap(explanation: Explanation, tolerance: float) -> Explanation:
    """Warn where the gap exceeds ``tolerance`` times the largest distance of a prediction from the base value."""
    gap = np.abs(explanation.additivity_gap).max()
    reach = np.abs(explanation.prediction - explanation.base_value).max()
    rounding = 1e-6 * max(np.abs(explanation.prediction).max(), abs(explanation.base_value))  # float32 models
    if gap > tolerance * reach + rounding:
        warnings.warn(
            f"the Shapley values by method={explanation.method!r} miss the prediction by up to {gap:.3g}, "
            f"{gap / reach if reach else np.inf:.2%} of the largest effect {reach:.3g} (tolerance {tolerance:.2%}); "
            "raise n_samples or take another method",
            AdditivityWarning,
            stacklevel=3,
        )
    return explanation


def group(explanation: Explanation, groups: Mapping[str, Sequence[str | int]]) -> Explanation:
    """The same explanation with the values of each group's members summed; features in no group stay as they are.

    This is additive aggregation: it keeps the sum, but it is the Shapley value of the group as one player only where
    members do not interact with other features; ``group_shapley`` computes that one. A member is the name of a feature,
    or an int that is no name: its column.

    Raises: UnknownName (a feature that is not there), IndexError (a column), ValueError (empty group, or a feature in
    two groups).

    >>> group(explanation, {"anatomy": ["eTIV", "nWBV", "ASF"]})
    """
    names, owner = owners(groups, explanation.feature_names)
    values = np.zeros((len(explanation.values), len(names)))
    np.add.at(values.T, owner, explanation.values.T)
    data = explanation.data if len(names) == len(owner) else None
    if data is not None:
        data = data.iloc[:, np.argsort(owner)].set_axis(names, axis=1)
    return replace(explanation, values=values, feature_names=names, data=data)


def owners(
    groups: Mapping[str, Sequence[str | int]], features: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Names of the players, and for each feature [P] the index of its player: groups first, then what is left.

    Raises: TypeError (not a mapping), UnknownName, IndexError, ValueError.
    """
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups must map a name to its features, not {type(groups).__name__}")
    features = list(features)
    owner = np.full(len(features), -1)
    names = [str(name) for name in groups]
    for g, (name, members) in enumerate(groups.items()):
        members = [members] if isinstance(members, (str, Integral)) else list(members)
        if not members:
            raise ValueError(f"group {name!r} is empty")
        for member in members:
            j = _column(name, member, features)
            if owner[j] >= 0:
                raise ValueError(f"feature {features[j]!r} is in {names[owner[j]]!r} and again in {name!r}")
            owner[j] = g
    for j in np.flatnonzero(owner < 0):
        owner[j] = len(names)
        names.append(features[j])
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"a group and another group or feature share a name: {', '.join(twice)}")
    return names, owner


def _column(group: str, member: str | int, features: list[str]) -> int:
    if str(member) in features:
        return features.index(str(member))
    if not isinstance(member, Integral):
        raise UnknownName(f"group {group!r} names {member!r}{did_you_mean(str(member), features)}")
    if not 0 <= member < len(features):
        raise IndexError(f"group {group!r} names column {member}; there are columns 0 to {len(features) - 1}")
    return int(member)


def _plottable(data: pd.DataFrame) -> np.ndarray:
    """Numbers where all columns are numbers; else objects, which shap shows as text and draws in grey."""
    import pandas as pd

    numeric = all(pd.api.types.is_numeric_dtype(dtype) for dtype in data.dtypes)
    return data.to_numpy(dtype=float, na_value=np.nan) if numeric else data.to_numpy(dtype=object)
