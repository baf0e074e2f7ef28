"""Keeping what layers put out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from nbkit.errors import LayerDidNotRun, LayerNotFound, did_you_mean
from nbkit.hooks._attach import attach, check_at
from nbkit.hooks._names import get_layer, resolve


class Recording(Mapping):
    """What :func:`record` kept: layer name -> tensor. Reading a layer that never ran raises LayerDidNotRun."""

    def __init__(self, names: Sequence[str], concat: bool):
        self._names, self._concat = list(names), concat
        self._kept: dict[str, list[Tensor]] = defaultdict(list)
        self._calls: dict[str, list[int]] = defaultdict(list)
        self._pass, self._finished = 0, True

    def _begin(self) -> None:
        """A pass of the whole model begins; of one that broke off between the layers nothing is kept."""
        if not self._finished and any(self._pass not in self._calls[name] for name in self._names):
            for name, calls in self._calls.items():
                kept = self._kept[name]
                kept[:] = [t for t, p in zip(kept, calls, strict=True) if p != self._pass]
                calls[:] = [p for p in calls if p != self._pass]
        self._pass, self._finished = self._pass + 1, False

    def _end(self) -> None:
        self._finished = True

    def _add(self, name: str, tensor: Tensor) -> None:
        if not self._concat:
            self._kept[name].clear()
            self._calls[name].clear()
        self._kept[name].append(tensor)
        self._calls[name].append(self._pass)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise LayerNotFound(f"layer {name!r} was not recorded{did_you_mean(name, self._names)}")
        kept, calls = self._kept[name], self._calls[name]
        if not kept:
            raise LayerDidNotRun(f"layer {name!r} did not run in the forward pass, so there is nothing recorded for it")
        # pass 0 means that the layer was called on its own, outside a forward of the whole model
        twice = [p for p in calls if p and calls.count(p) > 1]
        if twice:
            raise ValueError(
                f"layer {name!r} ran {calls.count(twice[0])} times in one forward pass; its outputs are not one "
                "tensor. Record with concat=False to keep the last, or record the layers around it"
            )
        if len(kept) > 1:
            shapes = {tuple(t.shape[1:]) for t in kept}
            if len(shapes) > 1:
                raise ValueError(f"layer {name!r} gave shapes {sorted(shapes)} over several passes; cannot concatenate")
            kept[:], calls[:] = [torch.cat(kept)], [0]
        return kept[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        shown = {n: [tuple(t.shape) for t in self._kept[n]] or "did not run" for n in self._names}
        return f"Recording({shown})"


@contextmanager
def record(
    model: nn.Module,
    layers: str | Iterable[str],
    *,
    detach: bool = True,
    to: str | torch.device | None = "cpu",
    at: str = "output",
    concat: bool = True,
) -> Iterator[Recording]:
    """Keep what ``layers`` put out (``at="output"``) or take in (``at="input"``) in every forward inside the context.

    Args:
        layers: a dotted name, a shell pattern (``"blocks.*.mlp.act"``), or several.
        detach: keep copies without autograd. ``False`` keeps the very tensors of the graph, on their device, so that
            ``torch.autograd.grad(score, acts[name])`` works; an in-place operation that follows cannot touch them.
        to: device of the detached copies; ``None`` leaves them where the model runs.
        concat: join the batches of several forwards along axis 0; ``False`` keeps only the last.

    Yields: a mapping name -> tensor (a module that returns a tuple or dict: its first tensor), readable inside and
    after the context.

    Raises: LayerNotFound; on reading, LayerDidNotRun, or ValueError for a layer that ran twice in one pass.
    """
    check_at(at)
    names = resolve(model, layers)
    kept = Recording(names, concat)

    def keep(name: str, tensor: Tensor) -> Tensor | None:
        if not detach:
            kept._add(name, tensor)
            # what follows gets a copy: an in-place activation would overwrite what was kept
            return tensor.clone()
        copy = tensor.detach()
        # a copy even on the same device, for the same reason
        kept._add(name, copy.clone() if to is None or copy.device == torch.device(to) else copy.to(to))
        return None

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda *_: kept._begin()).remove)
        stack.callback(model.register_forward_hook(lambda *_: kept._end()).remove)
        for name in names:
            stack.callback(attach(get_layer(model, name), at, lambda t, m, name=name: keep(name, t)))
        yield kept
