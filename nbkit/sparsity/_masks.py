"""Masks: which weights of a model are kept, put on a model, held there while it trains, rewound and stored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nbkit._files import write_whole
from nbkit.errors import LayerNotFound, NotFittedError, UnknownName, did_you_mean
from nbkit.sparsity._weights import check_finite, same_names

_FORMAT = "nbkit masks 1"


class Masks(Mapping):
    """A mapping from parameter name to a bool tensor of the parameter's shape; True is kept.

    ``Masks({"fc.weight": mask})`` holds bool tensors as they are, and turns tensors of zeros and ones into bool ones.
    Two masks over the same parameters meet in ``a & b`` and compare with ``a == b``. Copied or sent to a worker, a
    ``Masks`` leaves behind the original weights that ``apply`` kept.

    Raises: ValueError for values other than 0 and 1, or no tensor at all; TypeError for what is no tensor; UnknownName,
    a KeyError, for the mask of a parameter that is not there.

    >>> masks = magnitude_mask(model, 0.9)
    >>> masks.apply(model)                      # pruned weights are exactly 0 ...
    >>> with masks.enforced(model):             # ... and stay so while an optimiser steps
    ...     train(model)
    >>> masks.rewind(model, initial_state)      # back to the initial values, under the mask
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        if not masks:
            raise ValueError("Masks needs at least one mask; it got none")
        self._masks = {name: _as_bool(name, mask) for name, mask in masks.items()}
        self._originals: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._masks:
            raise UnknownName(f"there is no mask of {name!r}{did_you_mean(str(name), self)}")
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            m.shape == other[n].shape and torch.equal(m, other[n].to(m.device)) for n, m in self.items()
        )

    __hash__ = None

    def __reduce__(self):
        return Masks, (self._masks,)

    def __and__(self, other: Masks) -> Masks:
        """What both keep. Raises: ValueError where they cover other parameters or shapes."""
        if not isinstance(other, Masks):
            return NotImplemented
        same_names(self, other, "masks of different parameters")
        for name, mask in self.items():
            if mask.shape != other[name].shape:
                raise ValueError(f"{name!r}: masks of shapes {tuple(mask.shape)} and {tuple(other[name].shape)}")
        return Masks({name: mask & other[name].to(mask.device) for name, mask in self.items()})

    @property
    def sparsity(self) -> float:
        """Fraction of the covered weights that is removed."""
        total = sum(mask.numel() for mask in self.values())
        return (total - sum(self.kept().values())) / total

    def kept(self) -> dict[str, int]:
        """Number of weights kept, by parameter."""
        return {name: int(torch.count_nonzero(mask)) for name, mask in self.items()}

    def densities(self) -> dict[str, float]:
        """Fraction of weights kept, by parameter."""
        return {name: kept / self[name].numel() for name, kept in self.kept().items()}

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device. Masks are made on the CPU; every method works from any device."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    def shuffled(self, seed: int) -> Masks:
        """As many weights in every layer, but which ones drawn at random: the control for a choice of weights."""
        chance = torch.Generator().manual_seed(seed)
        order = {name: torch.randperm(mask.numel(), generator=chance).to(mask.device) for name, mask in self.items()}
        return Masks({name: mask.flatten()[order[name]].view_as(mask) for name, mask in self.items()})

    def report(self):
        """A DataFrame with a row a parameter: ``shape``, ``weights``, ``kept``, ``density`` (kept / weights)."""
        import pandas as pd

        kept = self.kept()
        rows = {
            name: (tuple(mask.shape), mask.numel(), kept[name], kept[name] / mask.numel())
            for name, mask in self.items()
        }
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["shape", "weights", "kept", "density"])
        return frame.rename_axis("parameter")

    def apply(self, model: nn.Module, *, keep_original: bool = True) -> nn.Module:
        """Set the pruned weights of ``model`` to 0, in place; the others keep every bit. Twice is as good as once.

        ``keep_original`` stores a copy of the covered weights for :meth:`remove`; a second ``apply`` does not replace
        it. Returns the model.

        Raises: LayerNotFound (no such parameter), ValueError (other shape); the model is unchanged then.
        """
        weights = self._weights(model)
        if keep_original and model not in self._originals:
            self._originals[model] = {name: w.detach().clone() for name, w in weights.items()}
        return self.post_step(model)

    def remove(self, model: nn.Module) -> nn.Module:
        """Give the covered weights back the exact values they had before :meth:`apply`, and forget the copy.

        Raises: NotFittedError where no original was kept for this model.
        """
        if model not in self._originals:
            raise NotFittedError("no original weights of this model: call apply(model, keep_original=True) first")
        weights = self._weights(model)
        originals = self._originals.pop(model)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(originals[name])
        return model

    def post_step(self, model: nn.Module) -> nn.Module:
        """Set the pruned weights to 0 again: call it after ``optimizer.step()``, which may have moved them."""
        with torch.no_grad():
            for name, weight in self._weights(model).items():
                # not a product: 0 * -1 is -0, 0 * inf is NaN
                weight.masked_fill_(~self[name].to(weight.device), 0)
        return model

    @contextmanager
    def enforced(self, model: nn.Module) -> Iterator[nn.Module]:
        """Train under the mask: inside, pruned weights are 0 after every optimiser step and get no gradient.

        Applies the masks on entry. Momentum, weight decay or Adam's running means cannot revive a weight: besides
        the gradients, the weights are masked after each step of any ``torch.optim`` optimiser. An update written by
        hand needs :meth:`post_step`. The hooks are gone when the context closes.
        """
        weights = self._weights(model)
        pruned = {name: ~self[name].to(weight.device) for name, weight in weights.items()}

        @torch.no_grad()
        def flush(*_):
            for name, weight in weights.items():
                weight.masked_fill_(pruned[name].to(weight.device), 0)

        def mask_gradient(name: str):
            return lambda gradient: gradient.masked_fill(pruned[name].to(gradient.device), 0)

        flush()
        handles = [w.register_hook(mask_gradient(n)) for n, w in weights.items() if w.requires_grad]
        handles.append(register_optimizer_step_post_hook(flush))
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()
            flush()

    def rewind(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
        """Load ``state_dict`` (say, the initial values) and apply the masks: covered weights are ``initial * mask``.

        Everything else (biases, normalisations, buffers) goes back to ``state_dict`` too. Survivors equal their
        initial values bit for bit (Frankle and Carbin 2019, step 4). Take the state as a copy before training:
        ``{k: v.clone() for k, v in model.state_dict().items()}``.

        Raises: ValueError (entries missing, unknown or of another shape), NotFinite; the model is unchanged then.
        """
        weights, state = self._weights(model), model.state_dict()
        same_names(state, state_dict, "the state does not fit the model")
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape != state_dict[name].shape:
                there = tuple(state_dict[name].shape)
                raise ValueError(f"{name!r} is {tuple(value.shape)} in the model but {there} in the state")
        check_finite({name: state_dict[name] for name in weights}, "initial weight")
        model.load_state_dict(state_dict)
        return self.post_step(model)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the masks as safetensors, one bit a weight. The file appears whole or not at all. Returns its path.

        Raises: FileNotFoundError where its folder does not exist.
        """
        import numpy as np
        from safetensors.torch import save

        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} in")
        bits = {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in self.items()
        }
        shapes = json.dumps({name: list(mask.shape) for name, mask in self.items()})
        write_whole(path, save(bits, metadata={"format": _FORMAT, "shapes": shapes}))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Masks:
        """Read masks written by :meth:`save`. Raises: FileNotFoundError; ValueError where the file is no such file."""
        import numpy as np
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no masks: its format is {about.get('format')!r}, not {_FORMAT!r}")
                shapes = {name: tuple(shape) for name, shape in json.loads(about["shapes"]).items()}
                bits = {name: file.get_tensor(name) for name in shapes}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as masks: {error}") from error
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        flat = {name: np.unpackbits(bits[name], count=sizes[name]).astype(bool) for name in shapes}
        return cls({name: torch.from_numpy(flat[name].reshape(shapes[name])) for name in shapes})

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        known = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.items():
            if name not in known:
                raise LayerNotFound(f"the model has no parameter {name!r}{did_you_mean(name, known)}")
            if known[name].shape != mask.shape:
                there = tuple(known[name].shape)
                raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, the weight {there}")
        return {name: known[name] for name in self}

    def __repr__(self) -> str:
        kept, total = sum(self.kept().values()), sum(mask.numel() for mask in self.values())
        return f"Masks({len(self)} parameters, {kept:,} of {total:,} weights kept, sparsity {self.sparsity:.2%})"

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{'×'.join(map(str, row.shape))}</td><td>{row.kept:,}</td>"
            f"<td>{row.density:.2%}{'' if row.kept else ' (none left)'}</td>"
            f"<td style='width:160px'><div style='height:10px;background:#0072B2;width:{160 * row.density:.1f}px'>"
            "</div></td></tr>"
            for name, row in zip(self, self.report().itertuples(index=False), strict=True)
        )
        head = "<tr><th>parameter</th><th>shape</th><th>kept</th><th>density</th><th></th></tr>"
        return f"<p>{escape(repr(self))}</p><table>{head}{rows}</table>"


def _as_bool(name: str, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"the mask of {name!r} must be a tensor, not {type(mask).__name__}")
    if mask.dtype != torch.bool:
        wrong = mask[(mask != 0) & (mask != 1)]
        if wrong.numel():
            raise ValueError(f"the mask of {name!r} is not binary: it holds {wrong.reshape(-1)[0].item()}, not 0 or 1")
    return mask.detach().to(torch.bool).contiguous()
