"""nbkit: hooks, attribution, Shapley explanations, feature importance and sparsity for research notebooks.

Submodules load on first use (PEP 562), so ``import nbkit`` costs milliseconds and does not import torch:

>>> import nbkit
>>> nbkit.sparsity.magnitude_mask          # torch is imported here
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_SUBMODULES = (
    # floor 0: the ground
    "errors", "runtime", "weights", "datasets", "models", "recipes", "forward",
    # floor 1: the instruments
    "hooks", "training",
    # floor 2: the methods
    "attribution", "neurons", "shapley", "importance", "sparsity", "concepts", "faithfulness", "language",
    "representations",
    # floor 3: the paper's shelf
    "papers", "claims", "notebooks", "exercises",
    # floor 4: the reader's hands
    "widgets", "plots",
)  # fmt: skip

__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"nbkit.{name}")
    raise AttributeError(f"module 'nbkit' has no attribute {name!r}; it has {', '.join(_SUBMODULES)}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:  # lets editors complete what __getattr__ loads
    from nbkit import (  # noqa: F401
        attribution, claims, concepts, datasets, errors, exercises, faithfulness, forward, hooks, importance,
        language, models, neurons, notebooks, papers, plots, recipes, representations, runtime, shapley, sparsity,
        training, weights, widgets,
    )  # fmt: skip
