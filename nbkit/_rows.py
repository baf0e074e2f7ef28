"""Running many altered copies of examples in batches of bounded size: which tensor is altered, which target goes along.

A *row* is one altered copy of one example: a step of a path, a noisy copy, an occluded picture. Methods that make many
rows take ``batch=``, the number of rows in one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.errors import UnknownName, did_you_mean

_NUMBERS_AT_ONCE = 2**20  # input numbers in one forward where the caller names no batch: 7 pictures of 3 x 224 x 224
_MOST_ROWS = 512
_TABLE_AT_ONCE = 2**22


def explained(inputs: forward.Inputs, wrt: str | None = None) -> tuple[Tensor, Callable[[Tensor, Tensor], Any]]:
    """The floating tensor that is explained, detached, and ``put(rows, index) -> inputs`` with those rows in its place.

    ``index`` says of which example each row is a copy; whatever else a dict holds is repeated along with it. ``wrt``
    names the tensor of a dict of inputs; ``None`` takes the only floating one.

    Raises: as ``forward.check_inputs``; TypeError (not floating), ValueError (several to choose from),
    UnknownName, a KeyError (``wrt`` is not there).
    """
    forward.check_inputs(inputs)
    if not isinstance(inputs, Mapping):
        if wrt is not None:
            raise ValueError(f"wrt={wrt!r} names a tensor of a dict of inputs, but inputs is a tensor")
        return _plain(inputs, "inputs"), lambda rows, index: rows
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    if wrt is None:
        floating = [k for k, v in tensors.items() if v.is_floating_point()]
        if not floating:
            raise TypeError(
                f"none of the inputs {', '.join(map(repr, tensors))} is floating, so none can be varied a little; "
                "pass embeddings (inputs_embeds) in place of token ids"
            )
        if len(floating) > 1:
            raise ValueError(f"inputs holds {len(floating)} floating tensors, {floating}: say which with wrt=")
        wrt = floating[0]
    if wrt not in tensors:
        raise UnknownName(f"wrt={wrt!r} is not a tensor of the inputs{did_you_mean(wrt, tensors)}")
    return _plain(tensors[wrt], wrt), lambda rows, index: {**forward.take(inputs, index), wrt: rows}


def _plain(x: Tensor, name: str) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"{name} holds {x.dtype}; it must be floating to be varied a little")
    return x.detach()


def batches(n: int, size: int | None = None) -> list[slice]:
    """``n`` rows as slices of at most ``size`` (``None``: one slice). Raises ValueError for a size below 1."""
    check_batch(size)
    return [slice(start, min(start + (size or n), n)) for start in range(0, n, size or n)]


def check_batch(size: int | None) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"batch must be an int of at least 1, or None, not {size!r}")


def default_batch(x: Tensor, batch: int | None) -> int:
    """``batch``, or for ``None`` as many rows like those of ``x`` as make about a million numbers (4 to 512 rows).

    More does not run faster on a CPU: the activations leave its caches. A GPU takes sixteen times as many.
    """
    check_batch(batch)
    if batch is not None:
        return batch
    scale = 1 if x.device.type == "cpu" else 16
    return min(max(scale * _NUMBERS_AT_ONCE // max(x[0].numel(), 1), 4), scale * _MOST_ROWS)


def rows_at_once(rows: int, width: int) -> int:
    """``rows``, or as many fewer as keep a table of that width to four million numbers: 32 MB in float64."""
    return max(1, min(rows, _TABLE_AT_ONCE // width))


def check_target(target: forward.Target, n: int) -> None:
    """Raise ValueError where a tensor of targets does not hold one for each of the ``n`` inputs."""
    if isinstance(target, Tensor) and target.ndim and target.shape != (n,):
        raise ValueError(f"target has shape {tuple(target.shape)}; for {n} inputs it must be an int or [{n}]")


def target_of(target: forward.Target, index: slice | Tensor) -> forward.Target:
    """The target of the rows that copy the examples ``index``."""
    if not isinstance(target, Tensor) or target.ndim == 0:
        return target
    return target[index] if isinstance(index, slice) else target[index.to(target.device)]


def fixed_target(
    model: nn.Module, put: Callable[[Tensor, Tensor], Any], x: Tensor, target: forward.Target, batch: int | None
) -> forward.Target:
    """``target``, where ``None`` has become the class that each unaltered example is given, ``[N]`` (one forward).

    Raises: as ``check_target`` and ``forward.resolve_target``.
    """
    check_target(target, x.shape[0])
    if target is not None:
        return target
    found = []
    with torch.no_grad():
        for part in batches(x.shape[0], batch):
            index = torch.arange(part.start, part.stop, device=x.device)
            found.append(forward.resolve_target(forward.call(model, put(x[part], index)), None))
    return torch.cat(found) if isinstance(found[0], Tensor) else found[0]
