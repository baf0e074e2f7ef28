"""How much a model leans on each feature, asked in several ways, and how far the answers agree.

>>> shuffled = nbkit.importance.permutation(model, X_test, y_test, n_repeats=30)
>>> without = nbkit.importance.drop_column(model, X, y, cv=5)
>>> own = nbkit.importance.native(model, X.columns)
>>> nbkit.importance.compare(permutation=shuffled, drop=without, native=own)["spearman"]
"""

from __future__ import annotations

from nbkit.importance._compare import compare
from nbkit.importance._native import native
from nbkit.importance._permutation import permutation
from nbkit.importance._refit import drop_column
from nbkit.importance._result import Importance
from nbkit.importance._selection import Selection, forward_selection

__all__ = [
    "Importance", "Selection", "compare", "drop_column", "forward_selection", "native", "permutation",
]  # fmt: skip
