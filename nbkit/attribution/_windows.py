"""A batch of feature maps that differ from one reference map inside a small window each: computed window by window.

An occluded picture equals the clean one but for a patch, and so do its feature maps, with a patch that grows by the
receptive field of every layer. Early layers, the most expensive ones, therefore need only patches. The idea is that of
S. Nakandala et al., *Incremental and Approximate Inference for Faster Occlusion-Based Deep CNN Explanations*, 2019;
here it works for any torch model: :class:`Windowed` is a tensor that knows its reference and its patches, convolutions,
pooling and elementwise functions act on the patches, and the first function that is none of these, or a patch that
covers most of the map, turns it into the ordinary tensor it stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST = 0.5  # of a map: with larger patches the bookkeeping costs more than it saves

aten = torch.ops.aten


class NotWindowed(Exception):
    """The model does something that cannot be followed window by window; run it on whole inputs."""


class Reference:
    """What the clean input becomes, function by function; kept while its windows are run batch after batch."""

    def __init__(self) -> None:
        self._values: dict[tuple, Any] = {}
        self._uses: Counter = Counter()
        self._map = self._row = 1  # numbers in the largest clean map, and in the most that one row took

    def fits(self, rows: int, enough: int) -> int:
        """How many rows, up to ``enough``, take no more memory than ``rows`` whole ones (known after one forward).

        It goes by what was followed, and by the map that was made whole; what a model widens again is not seen.
        """
        return max(rows, min(enough, rows * self._map // self._row))

    def note(self, row: Tensor) -> None:
        self._row = max(self._row, row[0].numel())

    def rewind(self) -> None:
        """Before each forward."""
        self._uses.clear()

    def value(self, func: Any, *sources: Windowed, compute: Callable[..., Any]) -> Any:
        """``compute(clean maps of the sources)``, or what it was in an earlier forward.

        Found by function and sources, and by how often that function met them: a batch whose patches grow large early
        leaves out some of the functions of another, so a mere count would not do.
        """
        key = (func, *(id(s.clean) for s in sources))
        self._uses[key] += 1
        key = (*key, self._uses[key])
        if key not in self._values:
            # the sources are kept as well: an id means something only while its object lives
            self._values[key] = compute(*(s.clean for s in sources)), [s.clean for s in sources]
            self._map = max(self._map, self._values[key][0].numel())
        return self._values[key][0]


class Windowed(Tensor):
    """``[B, C, H, W]``: row ``i`` is ``clean`` ``[1, C, H, W]`` with ``patch[i]`` at ``(top[i], left[i])``.

    Patches lie wholly inside the map.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, clean: Tensor, patch: Tensor, top: list[int], left: list[int], reference: Reference):
        shape = (patch.shape[0], *clean.shape[1:])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=clean.dtype, device=clean.device)

    def __init__(self, clean: Tensor, patch: Tensor, top: list[int], left: list[int], reference: Reference):
        self.clean, self.patch, self.top, self.left, self.reference = clean, patch, top, left, reference
        reference.note(patch)

    def whole(self) -> Tensor:
        """The ordinary tensor this one stands for."""
        self.reference.note(self.clean)
        return self.crop([0] * len(self.top), [0] * len(self.left), *self.clean.shape[2:], 0.0)

    def crop(self, top: list[int], left: list[int], height: int, width: int, fill: float) -> Tensor:
        """A piece of every row at its own place, ``[B, C, height, width]``; outside of the map there is ``fill``."""
        rows, columns = self.clean.shape[2:]
        above, before = max(0, -min(top)), max(0, -min(left))
        below, after = max(0, max(top) + height - rows), max(0, max(left) + width - columns)
        clean = self.clean[0]
        if above or below or before or after:
            clean = F.pad(clean, (before, after, above, below), value=fill)
        piece = clean.new_empty((len(top), clean.shape[0], height, width))
        tall, wide = self.patch.shape[2:]
        for i, (y, x) in enumerate(zip(top, left, strict=True)):
            piece[i] = clean[:, y + above : y + above + height, x + before : x + before + width]
            down, across = self.top[i] - y, self.left[i] - x  # where the patch starts in the piece
            y0, y1 = max(down, 0), min(down + tall, height)
            x0, x1 = max(across, 0), min(across + wide, width)
            if y0 < y1 and x0 < x1:
                piece[i, :, y0:y1, x0:x1] = self.patch[i, :, y0 - down : y1 - down, x0 - across : x1 - across]
        return piece

    def with_patch(self, clean: Tensor, patch: Tensor, top: list[int], left: list[int]) -> Windowed:
        return Windowed(clean, patch, top, left, self.reference)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = _RULES.get(func.overloadpacket)
        result = rule(func, *args, **kwargs) if rule is not None else NotImplemented
        if result is not NotImplemented:
            return result
        if func._schema.is_mutable:
            raise NotWindowed(f"{func} writes in place")
        args, kwargs = torch.utils._pytree.tree_map_only(Windowed, Windowed.whole, (args, kwargs))
        return func(*args, **kwargs)


def _reach(start: list[int], length: int, kernel: int, stride: int, padding: int, size: int) -> tuple[list[int], int]:
    """First output that each patch reaches along one axis, and how many; ``size`` is the number of outputs."""
    first = [max(-((kernel - 1 - padding - s) // stride), 0) for s in start]
    last = [min((s + length - 1 + padding) // stride, size - 1) for s in start]
    count = max(max(b - a + 1 for a, b in zip(first, last, strict=True)), 1)
    # all rows compute equally many: those with fewer recompute unchanged neighbours
    return [max(min(a, size - count), 0) for a in first], count


def _sliding(
    func: Any,
    x: Windowed,
    run: Callable[[Tensor, Any], Any],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    fill: float = 0.0,
) -> Any:
    """A convolution or a pooling: ``run(maps, padding)``; ``kernel`` counts the dilation in."""
    clean = x.reference.value(func, x, compute=lambda clean: run(clean, padding))
    size = clean.shape[2:]
    top, tall = _reach(x.top, x.patch.shape[2], kernel[0], stride[0], padding[0], size[0])
    left, wide = _reach(x.left, x.patch.shape[3], kernel[1], stride[1], padding[1], size[1])
    if tall * wide > _MOST * size[0] * size[1]:
        return run(x.whole(), padding)
    y = [t * stride[0] - padding[0] for t in top]
    z = [t * stride[1] - padding[1] for t in left]
    piece = x.crop(y, z, (tall - 1) * stride[0] + kernel[0], (wide - 1) * stride[1] + kernel[1], fill)
    return x.with_patch(clean, run(piece, (0, 0)), top, left)


def _convolution(func, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed or x.ndim != 4 or not isinstance(x, Windowed) or isinstance(weight, Windowed):
        return NotImplemented
    kernel = tuple(d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True))

    def run(maps: Tensor, pad: Any) -> Tensor:
        return func(maps, weight, bias, stride, pad, dilation, False, output_padding, groups)

    return _sliding(func, x, run, kernel, tuple(stride), tuple(padding))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _max_pool(func, x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False):
    if ceil_mode or x.ndim != 4:
        return NotImplemented
    kernel, padding, dilation = _pair(kernel), _pair(padding), _pair(dilation)
    stride = _pair(stride) if stride else kernel
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))

    def run(maps: Tensor, pad: Any) -> Tensor:
        return func(maps, kernel, stride, pad, dilation)[0]

    out = _sliding(func, x, run, reach, stride, padding, float("-inf"))
    # nobody may want the places of the maxima; an empty tensor fails loudly where somebody does
    return out, torch.empty(0, dtype=torch.long)


def _avg_pool(func, x, kernel, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
    kernel, padding = _pair(kernel), _pair(padding)
    if ceil_mode or x.ndim != 4 or (any(padding) and not count_include_pad):
        return NotImplemented
    stride = _pair(stride) if stride else kernel

    def run(maps: Tensor, pad: Any) -> Tensor:
        return func(maps, kernel, stride, pad, False, True, divisor_override)

    return _sliding(func, x, run, kernel, stride, padding)


def _pad(func, x, pad, value=0):
    if x.ndim != 4 or len(pad) > 4 or min(pad) < 0:
        return NotImplemented
    before, _, above, _ = [*pad, 0, 0][:4]
    clean = x.reference.value(func, x, compute=lambda clean: func(clean, pad, value))
    return x.with_patch(clean, x.patch, [t + above for t in x.top], [t + before for t in x.left])


def _elementwise(func, x, *args, **kwargs):
    if x.ndim != 4 or any(isinstance(a, Tensor) and a.ndim for a in (*args, *kwargs.values())):
        return NotImplemented
    clean = x.reference.value(func, x, compute=lambda clean: func(clean, *args, **kwargs))
    return x.with_patch(clean, func(x.patch, *args, **kwargs), x.top, x.left)


def _batch_norm(func, x, *args, **kwargs):
    training = func.overloadpacket is aten.native_batch_norm and args[4]
    if training or x.ndim != 4:
        return NotImplemented
    clean = x.reference.value(func, x, compute=lambda clean: func(clean, *args, **kwargs)[0])
    patch, *saved = func(x.patch, *args, **kwargs)
    return x.with_patch(clean, patch, x.top, x.left), *saved


def _in_place(func, x, *args, **kwargs):
    outside = getattr(aten, func.overloadpacket.__name__.rstrip("_"))
    result = outside(x, *args, **kwargs)
    if not isinstance(x, Windowed) or not isinstance(result, Windowed):
        raise NotWindowed(f"{func} writes in place")
    x.clean, x.patch, x.top, x.left = result.clean, result.patch, result.top, result.left
    return x


def _binary(func, x, other, **kwargs):
    """With a number, or of two tensors that follow the same windows: at the patch that holds both."""
    if not isinstance(other, Tensor) or other.ndim == 0:
        return _elementwise(func, x, other, **kwargs) if isinstance(x, Windowed) else NotImplemented
    if not (isinstance(x, Windowed) and isinstance(other, Windowed)) or x.shape != other.shape or x.ndim != 4:
        return NotImplemented
    clean = x.reference.value(func, x, other, compute=lambda a, b: func(a, b, **kwargs))
    top, tall = _union(x.top, x.patch.shape[2], other.top, other.patch.shape[2], clean.shape[2])
    left, wide = _union(x.left, x.patch.shape[3], other.left, other.patch.shape[3], clean.shape[3])
    patches = [
        t.patch if (t.top, t.left, *t.patch.shape[2:]) == (top, left, tall, wide) else t.crop(top, left, tall, wide, 0)
        for t in (x, other)
    ]
    return x.with_patch(clean, func(*patches, **kwargs), top, left)


def _union(a: list[int], long_a: int, b: list[int], long_b: int, size: int) -> tuple[list[int], int]:
    first = [min(p, q) for p, q in zip(a, b, strict=True)]
    count = max(max(p + long_a, q + long_b) - f for p, q, f in zip(a, b, first, strict=True))
    return [max(min(f, size - count), 0) for f in first], count


_ELEMENTWISE = (
    "relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "sigmoid", "tanh", "silu", "gelu", "mish", "elu", "celu",
    "hardswish", "hardsigmoid", "leaky_relu", "softplus", "neg", "exp", "abs",
)  # fmt: skip
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")

_RULES: dict[Any, Callable] = {
    aten.convolution: _convolution,
    aten.max_pool2d_with_indices: _max_pool,
    aten.avg_pool2d: _avg_pool,
    aten.constant_pad_nd: _pad,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm,
    **{getattr(aten, name): _elementwise for name in _ELEMENTWISE},
    **{getattr(aten, name): _binary for name in _BINARY},
    **{getattr(aten, f"{n}_"): _in_place for n in (*_ELEMENTWISE, *_BINARY) if hasattr(aten, f"{n}_")},
}
