"""Shapley explanations of scikit-learn estimators, torch modules and plain functions of a table, over shap.

>>> explanation = nbkit.shapley.explain(model, X_test, background=X_train)
>>> explanation.mean_abs()                       # global importance
>>> explanation.additivity_gap                   # prediction - (base value + sum of values), one a row
>>> nbkit.shapley.waterfall(explanation, 0)

Every method explains the same game: features outside a coalition come from the rows of the background
("interventional" Shapley values), and the number explained is named in ``explanation.output``.
"""

from __future__ import annotations

from nbkit.shapley._aspects import Aspects, aspects
from nbkit.shapley._explain import explain, group_shapley
from nbkit.shapley._explanation import AdditivityWarning, Explanation, group
from nbkit.shapley._plots import beeswarm, dendrogram, waterfall

__all__ = [
    "AdditivityWarning", "Aspects", "Explanation", "aspects", "beeswarm", "dendrogram", "explain", "group",
    "group_shapley", "waterfall",
]  # fmt: skip
