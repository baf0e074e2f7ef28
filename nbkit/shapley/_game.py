"""The game that Shapley values divide: v(S) = mean over the background of f(features of S from x, others from b)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import Any

import numpy as np
from torch import nn

from nbkit._rows import rows_at_once
from nbkit.errors import NotFinite
from nbkit.shapley._predict import Output, predictor
from nbkit.shapley._table import Table, tabulate

MAX_EXACT_PLAYERS = 12  # 4,096 coalitions; each more player doubles the model calls and the table of v


@dataclass(frozen=True, eq=False)
class Game:
    """A model, the rows to explain and the background they are compared with.

    ``predict`` takes coded rows and may hand them to the model as they are, which may write into them: copies only.
    """

    model: Any
    table: Table
    predict: Callable[[np.ndarray], np.ndarray]
    target: Output
    output_name: str
    batch: int

    def values(self, rows: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """v [len(rows), S] for ``masks`` [S, P] (True: from the row), in model calls of at most ``batch`` rows.

        Mixed rows that are alike (a coalition that leaves a few discrete features to the background) run once.
        """
        from tqdm.auto import tqdm

        x, background = self.table.x[rows], self.table.background
        coalitions, others = len(masks), len(background)
        together = rows_at_once(4 * self.batch, x.shape[1])
        alike = self._digits is not None
        if not alike and others <= together:
            return self._all_values(x, masks, together // others)
        if alike:
            mine = self._digits[rows] @ masks.T.astype(np.int64)  # [rows, S]
            theirs = self._digits[len(self.table.x) :] @ (~masks).T.astype(np.int64)  # [B, S]
        total = np.zeros(len(x) * coalitions)
        for start in tqdm(range(0, total.size * others, together), desc="coalitions", delay=3, leave=False):
            cell, b = np.divmod(np.arange(start, min(start + together, total.size * others)), others)
            i, s = np.divmod(cell, coalitions)
            first, which = slice(None), slice(None)
            if alike:
                _, first, which = np.unique(mine[i, s] + theirs[b, s], return_index=True, return_inverse=True)
            mixed = np.where(masks[s[first]], x[i[first]], background[b[first]])
            total[cell[0] : cell[-1] + 1] += np.bincount(cell - cell[0], weights=self.predict(mixed)[which])
        return (total / others).reshape(len(x), coalitions)

    def _all_values(self, x: np.ndarray, masks: np.ndarray, together: int) -> np.ndarray:
        """The same where no two mixed rows are alike: every coalition with the whole background, some at a time."""
        from tqdm.auto import tqdm

        background, found = self.table.background[None], np.empty(len(x) * len(masks))
        for start in tqdm(range(0, found.size, together), desc="coalitions", delay=3, leave=False):
            piece = slice(start, min(start + together, found.size))
            i, s = np.divmod(np.arange(piece.start, piece.stop), len(masks))
            mixed = np.where(masks[s, None], x[i, None], background)
            found[piece] = self.predict(mixed.reshape(-1, x.shape[1])).reshape(len(i), -1).mean(1)
        return found.reshape(len(x), len(masks))

    @cached_property
    def _digits(self) -> np.ndarray | None:
        """A number [N + B, P] for each value, with a digit (of its own base) for each feature, so that two mixed rows
        have the same sum only where they are the same. None where 64 bits do not hold the digits."""
        joint = np.concatenate([self.table.x, self.table.background])
        digits, base = np.empty(joint.shape, dtype=np.int64), 1
        for j in range(joint.shape[1]):
            known, codes = np.unique(joint[:, j], return_inverse=True)
            if base * len(known) > 2**62:
                return None
            digits[:, j] = codes * base
            base *= len(known)
        return digits


def game(model: Any, X: Any, background: Any, *, target: Output, seed: int, batch: int) -> Game:
    """Check the inputs and read them once.

    Raises: as ``tabulate`` and ``predictor``; NotFinite (missing values that the model does not accept, or predictions
    that are not finite).
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1 row, not {batch}")
    table = tabulate(model, X, background, seed)
    batch = rows_at_once(batch, table.x.shape[1])
    if table.missing and not _may_accept_missing(model):
        raise NotFinite(
            f"NaN or infinite values in {_shown(table.missing)}; {type(model).__name__} is given none"
        )
    try:
        native, name = predictor(model, target, table.decode(table.x[:1].copy()))
    except ValueError as error:
        raise _explained(error, table) from error

    def predict(coded: np.ndarray) -> np.ndarray:
        scores = np.empty(len(coded))
        for start in range(0, len(coded), batch):
            piece = slice(start, start + batch)
            try:
                scores[piece] = native(table.decode(coded[piece]))
            except ValueError as error:
                raise _explained(error, table) from error
        if not np.isfinite(scores).all():
            raise NotFinite(
                f"{(~np.isfinite(scores)).sum()} of {len(scores)} predictions are NaN or infinite"
            )
        return scores

    return Game(model, table, predict, target, name, batch)


def shapley_weights(players: int) -> tuple[np.ndarray, np.ndarray]:
    """``(masks [2**p, p] bool, weights [p, 2**p])`` with phi_j = sum over S of weights[j, S] v(S).

    Shapley (1953): a coalition of k without j has weight k! (p - k - 1)! / p!, here 1 / (p C(p - 1, k)); it counts
    positive with j and negative without.
    """
    masks = (np.arange(2**players)[:, None] >> np.arange(players)) & 1 == 1
    size = masks.sum(1, keepdims=True)
    share = np.array([1 / (players * comb(players - 1, k)) for k in range(players)])
    joined = share[np.maximum(size - 1, 0)]
    alone = share[np.minimum(size, players - 1)]
    return masks, np.where(masks, joined, -alone).T


def exact(played: Game, owner: np.ndarray) -> np.ndarray:
    """Exact Shapley values [N, players] of the game whose player ``owner[j]`` holds feature j.

    Raises: ValueError for more than 12 players.
    """
    players = int(owner.max()) + 1
    if players > MAX_EXACT_PLAYERS:
        raise ValueError(
            f"exact Shapley values need 2**p coalitions: p={players} is more than {MAX_EXACT_PLAYERS}; group the "
            "features (group_shapley) or use method='permutation'"
        )
    masks, weights = shapley_weights(players)
    return played.values(np.arange(len(played.table.x)), masks[:, owner]) @ weights.T


def _may_accept_missing(model: Any) -> bool:
    owner = getattr(model, "__self__", model)  # a bound method such as pipeline.decision_function
    return hasattr(owner, "predict") and not isinstance(owner, nn.Module)


def _explained(error: ValueError, table: Table) -> ValueError:
    if not table.missing or isinstance(error, NotFinite):
        return error
    first = str(error).strip().splitlines()[0]
    return NotFinite(f"NaN or infinite values in {_shown(table.missing)}, which the model refused: {first}")


def _shown(missing: dict[str, int]) -> str:
    return ", ".join(f"{name!r} ({n})" for name, n in missing.items())
