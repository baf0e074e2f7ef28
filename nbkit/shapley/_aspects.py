"""Aspects: groups of features that all go together, by complete linkage on their rank correlations."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbkit.shapley._table import as_frame


class Aspects(dict):
    """A dict from the name of an aspect to its features, usable as ``groups``, with what a dendrogram needs.

    ``linkage`` [P - 1, 4] as scipy gives it (heights are 1 - |Spearman|), ``features`` [P] its leaves in order,
    ``association`` [P, P] the |Spearman| correlations as a DataFrame, ``threshold`` where it was cut.

    >>> scipy.cluster.hierarchy.dendrogram(found.linkage, labels=found.features, color_threshold=1 - found.threshold)
    """

    linkage: np.ndarray
    features: list[str]
    association: Any
    threshold: float


def aspects(X: Any, threshold: float = 0.5) -> Aspects:
    """Cluster the columns of ``X`` [N, P] so that any two features of an aspect have |Spearman| >= ``threshold``.

    Distance 1 - |Spearman|, complete linkage, cut at 1 - threshold (the "aspects" of Biecek and Burzykowski,
    Explanatory Model Analysis, as used by Bloch and Friedrich 2022). Missing values are left out pair by pair. A
    constant column associates with nothing and is an aspect of its own. Aspects come in the order of their first
    column, named after their features.

    Raises: ValueError (threshold outside (0, 1], text columns, fewer than two rows).

    >>> aspects(X_train, 0.5)
    {'Age': ['Age'], 'eTIV + ASF': ['eTIV', 'ASF'], ...}
    """
    import pandas as pd
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], not {threshold}")
    frame = as_frame(X, None, "X")
    text = [str(c) for c in frame.columns if not pd.api.types.is_numeric_dtype(frame[c])]
    if text:
        raise ValueError(f"rank correlation needs numbers; these columns hold none: {', '.join(text)}")
    if len(frame) < 2:
        raise ValueError(f"a correlation needs at least 2 rows, not {len(frame)}")
    features = [str(c) for c in frame.columns]
    association = _association(frame)
    distance = np.clip(1 - association, 0, 1)
    if len(features) == 1:
        tree, label = np.empty((0, 4)), np.array([1])
    else:
        tree = linkage(squareform(distance, checks=False), method="complete")
        label = fcluster(
            tree, t=1 - threshold + 1e-12, criterion="distance"
        )  # an association at the threshold is in
    found = Aspects()
    for cluster in dict.fromkeys(label):
        members = [f for f, c in zip(features, label, strict=True) if c == cluster]
        name = " + ".join(members) if len(members) <= 3 else f"{members[0]} + {len(members) - 1} more"
        while name in found or (len(members) > 1 and name in features):
            name += "'"
        found[name] = members
    found.linkage, found.features, found.threshold = tree, features, threshold
    found.association = pd.DataFrame(association, index=features, columns=features)
    return found


def _association(frame: Any) -> np.ndarray:
    """|Spearman| [P, P]; 0 where a column is constant or two columns share too few rows, 1 on the diagonal."""
    numbers = frame.astype(float).replace([np.inf, -np.inf], np.nan)
    if numbers.isna().any().any():
        correlation = numbers.corr(method="spearman").to_numpy()
    else:
        correlation = numbers.rank().corr().to_numpy()  # the same, hundreds of times faster on wide tables
    association = np.abs(np.nan_to_num(correlation, nan=0.0)).clip(max=1.0)
    np.fill_diagonal(association, 1.0)
    return association
