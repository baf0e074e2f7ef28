"""A table whose rows are given to a model with one column shuffled, in the container the model takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.errors import NotFinite
from nbkit.importance._result import feature_names

WIDE = 64  # features from which updating a first Linear layer clearly beats running it


class Rows:
    """A table as one tensor [N, P], and a model of it: ``run`` gives outputs [n] or [n, C] for rows made here."""

    def __init__(self, values: Tensor, run: Callable[[Any], Tensor]):
        self.values, self.run = values, run
        self.features, self.device = values.shape[1], values.device

    def take(self, rows: slice) -> Any:
        """These rows as they are, in a copy: what runs may work in place."""
        return self.values[rows].clone()

    def changed(self, column: Tensor, source: Tensor) -> Tensor:
        """Which rows [K, N] get another value in ``column`` [K] when it is taken from the rows ``source`` [K, N]."""
        return self.values[source, column[:, None]] != self.values[:, column].T

    def shuffled(self, rows: Tensor, column: Tensor, source: Tensor) -> Any:
        """The rows ``rows`` [n] with the value of ``column`` [n] taken from the rows ``source`` [n]."""
        values = self.values[rows]
        values[torch.arange(len(rows), device=self.device), column] = self.values[source, column]
        return values

    def copies(self, column: Tensor, source: Tensor) -> Any:
        """The whole table K times, [K * N, P], with ``column`` [K] taken from the rows ``source`` [K, N]."""
        stacked = self.values.repeat(len(column), 1).view(len(column), *self.values.shape)
        values = self.values[source, column[:, None]][..., None]
        return stacked.scatter_(2, column[:, None, None].expand_as(values), values).flatten(0, 1)


class WideRows(Rows):
    """The same for a module that starts with a Linear layer: rows of what that layer gives, changed by
    weight * difference for the one feature that changed. P * H products a row become H."""

    def __init__(self, values: Tensor, run: Callable[[Any], Tensor], first: nn.Linear):
        super().__init__(values, run)
        with torch.no_grad():
            self.hidden, self.weight = first(values), first.weight.T.contiguous()

    def take(self, rows: slice) -> Tensor:
        return self.hidden[rows].clone()

    def shuffled(self, rows: Tensor, column: Tensor, source: Tensor) -> Tensor:
        step = self.values[source, column] - self.values[rows, column]
        return torch.addcmul(self.hidden[rows], step[:, None], self.weight[column])

    def copies(self, column: Tensor, source: Tensor) -> Tensor:
        step = self.values[source, column[:, None]] - self.values[:, column].T
        return torch.addcmul(self.hidden, step[..., None], self.weight[column][:, None]).flatten(0, 1)


class FrameRows(Rows):
    """The same for a DataFrame, whose columns keep their types; what changes is decided on codes of the values."""

    def __init__(self, frame: Any, run: Callable[[Any], Tensor]):
        import pandas as pd

        codes = [pd.factorize(frame[name], use_na_sentinel=False)[0] for name in frame.columns]
        super().__init__(torch.as_tensor(np.stack(codes, axis=1)), run)
        self.frame = frame.reset_index(drop=True)

    def take(self, rows: slice) -> Any:
        return self.frame.iloc[rows].copy()

    def shuffled(self, rows: Tensor, column: Tensor, source: Tensor) -> Any:
        origin = torch.where(column == torch.arange(self.features)[:, None], source, rows).numpy()  # [P, n]
        pieces = {name: self.frame[name].take(at).array for name, at in zip(self.frame, origin, strict=True)}
        return type(self.frame)(pieces)

    def copies(self, column: Tensor, source: Tensor) -> Any:
        rows = torch.arange(source.shape[1]).repeat(len(column))
        return self.shuffled(rows, column.repeat_interleave(source.shape[1]), source.flatten())


def make_rows(model: Any, X: Any, table: Any, labels: np.ndarray | None) -> Rows:
    """The table as the model takes it; text ``labels`` that a callable returns become their codes.

    Raises: TypeError (a model that cannot be called, a table or a type of number it cannot take), NotFinite (NaN or
    infinite in a tensor).
    """
    if isinstance(model, nn.Module):
        return _module_rows(model, _module_input(model, X, table))
    if not callable(model):
        raise TypeError(
            f"model must be a fitted estimator, a torch module or a callable, not {type(model).__name__}"
        )
    if hasattr(table, "columns"):
        return FrameRows(table, lambda rows: _plain(_coded(model(rows), labels)))
    if isinstance(X, Tensor):
        return Rows(X, lambda rows: _plain(_coded(model(rows), labels)).to(X.device))
    if table.dtype.kind not in "biuf":
        raise TypeError(f"X holds {table.dtype}; text and categories need a DataFrame with a dtype a column")
    return Rows(torch.tensor(table), lambda rows: _plain(_coded(model(rows.numpy()), labels)))


def _module_rows(model: nn.Module, values: Tensor) -> Rows:
    first, rest = _first_linear(model) if values.shape[1] >= WIDE else (None, model)

    def run(rows: Tensor) -> Tensor:
        with torch.no_grad(), forward.evaluating(model):
            return _plain(forward.first_tensor(rest(rows)))  # forward.call would copy the rows, which are copies

    return Rows(values, run) if first is None else WideRows(values, run, first)


def _first_linear(model: nn.Module) -> tuple[nn.Linear | None, nn.Module]:
    """``(first layer, the rest)`` of a plain Sequential that starts with a Linear layer, else ``(None, model)``."""
    steps = list(model) if type(model) is nn.Sequential else []
    while steps and type(steps[0]) in (nn.Flatten, nn.Identity):
        steps = steps[1:]
    watched = (model, *steps[:1])
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in watched)
    if len(steps) < 2 or type(steps[0]) is not nn.Linear or hooked:
        return None, model
    return steps[0], nn.Sequential(*steps[1:])


def _module_input(model: nn.Module, X: Any, table: Any) -> Tensor:
    if isinstance(X, Tensor):
        forward.check_device(model, X)
        values = X.detach()
    else:
        try:
            numbers = np.array(table, dtype=float)  # a copy: torch warns of a DataFrame's read-only values
        except (TypeError, ValueError) as error:
            raise TypeError(f"a torch module takes numbers; X holds something else: {error}") from None
        weights = [p for p in model.parameters() if p.is_floating_point()]
        like = weights[0] if weights else torch.empty(0)
        values = torch.as_tensor(numbers).to(like.dtype).to(like.device)
    if values.is_floating_point() and not torch.isfinite(values).all():
        bad = [
            n
            for n, ok in zip(feature_names(table), torch.isfinite(values).all(0).tolist(), strict=True)
            if not ok
        ]
        raise NotFinite(f"X holds NaN or infinite values in {', '.join(bad)}")
    # one row ahead of all: an embedding takes integers, and a module may convert what it is given
    with forward.naming_types(model, values), forward.evaluating(model), torch.no_grad():
        forward.call(model, values[:1])
    return values


def _coded(output: Any, labels: np.ndarray | None) -> Any:
    """Text labels as positions in ``labels``, -1 for one that is not there; numbers as they are."""
    if labels is None or isinstance(output, Tensor) or np.asarray(output).dtype.kind in "biuf":
        return output
    output = np.asarray(output)
    nearest = np.searchsorted(labels, output).clip(max=len(labels) - 1)
    return np.where(labels[nearest] == output, nearest, -1)


def _plain(output: Any) -> Tensor:
    """One tensor [n] or [n, C]; a single column counts as [n]."""
    # a copy of an array: torch warns of a DataFrame's read-only values
    values = output.detach() if isinstance(output, Tensor) else torch.as_tensor(np.array(output))
    values = values.long() if values.dtype == torch.bool else values
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (1, 2):
        raise ValueError(f"the model returns {tuple(values.shape)}; it must be [N] or [N, C]")
    return values
