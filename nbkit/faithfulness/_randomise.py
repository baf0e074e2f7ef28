"""Sanity check: a map that explains the model changes when the model does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nbkit import forward, hooks
from nbkit.faithfulness._maps import rank_correlation

Method = Callable[[nn.Module, forward.Inputs, forward.Target], Tensor]


@dataclass(frozen=True, eq=False)
class Randomization:
    """``layers`` in the order they were randomised and ``correlations`` ``[len(layers), N]`` with the original maps."""

    layers: tuple[str, ...]
    correlations: Tensor

    def __repr__(self) -> str:
        last = f"; {self.correlations[-1].mean().item():.3f} after {self.layers[-1]!r}" if self.layers else ""
        return f"rank correlation over {len(self.layers)} randomised layers{last}"

    def _repr_html_(self) -> str:
        def row(name: str, value: float) -> str:
            bar = f'<div style="background:#c50;height:0.7em;width:{100 * abs(value):.0f}px"></div>'
            return f"<tr><td>{name}</td><td>{value:.3f}</td><td style='text-align:left'>{bar}</td></tr>"

        means = self.correlations.mean(1).tolist()
        rows = "".join(row(name, value) for name, value in zip(self.layers, means, strict=True))
        head = "<tr><th>randomised down to</th><th>rank correlation</th><th></th></tr>"
        return f"<table>{head}{rows}</table>"


@forward.outside_inference_mode
def randomization_check(
    model: nn.Module,
    inputs: forward.Inputs,
    method: Method,
    target: forward.Target = None,
    *,
    layers: Iterable[str] | None = None,
    cascade: bool = True,
    absolute: bool = True,
    seed: int = 0,
) -> Randomization:
    """How far maps survive when the model's weights are drawn anew, layer after layer from the output down.

    A method that explains the model must give other maps for a random one; maps that stay the same show the picture.

    Args:
        method: ``(model, inputs, target) -> maps [N, ...]``, such as ``saliency``. The model is in evaluation mode.
        target: ``None`` is the class of the untouched model, held throughout.
        layers: which to randomise, in this order; ``None``: every layer with parameters of its own, the last to run
            first. The output projection of an ``nn.MultiheadAttention`` goes with it.
        cascade: leave the layers above random as well; ``False`` randomises one at a time.
        absolute: compare magnitudes, so that a flip of sign alone does not count as change.
        seed: of the new weights. Layers with ``reset_parameters`` are initialised by it, parameters of others drawn
            from a normal distribution of their own mean and standard deviation.

    Returns: a :class:`Randomization`. The model comes back bit-identical, also after an exception.

    Raises: LayerNotFound; ValueError for a layer without parameters of its own; and what ``method`` raises.

    Source: J. Adebayo et al., *Sanity Checks for Saliency Maps*, 2018, section 4.

    >>> randomization_check(model, images, saliency, target=3).correlations.mean(1)
    """
    forward.check_inputs(inputs)
    forward.check_device(model, inputs)
    order = _parametric(model, inputs) if layers is None else hooks.resolve(model, layers)
    for name in order:
        if not any(True for _ in hooks.get_layer(model, name).parameters(recurse=False)):
            raise ValueError(f"layer {name!r} has no parameters of its own to randomise")
    compare = (lambda m: m.abs()) if absolute else (lambda m: m)
    correlations = []
    with forward.evaluating(model), _restored(model) as restore:
        with torch.no_grad():
            target = forward.resolve_target(forward.call(model, inputs), target)
        original = compare(method(model, inputs, target))
        for step, name in enumerate(order):
            if not cascade:
                restore()
            _randomise(hooks.get_layer(model, name), seed + step)
            correlations.append(rank_correlation(compare(method(model, inputs, target)), original))
    return Randomization(tuple(order), torch.stack(correlations))


def _parametric(model: nn.Module, inputs: forward.Inputs) -> list[str]:
    """Layers with parameters of their own, the last to run first."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        with forward.evaluating(model), torch.no_grad():
            forward.call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    order = list(dict.fromkeys(reversed(ran)))
    if not order:
        raise ValueError(f"no layer of {type(model).__name__} has parameters to randomise")
    return order


@contextmanager
def _restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Give all parameters and buffers back their values on leaving; yields the function that does so.

    All, not only those of the layers named: ``reset_parameters`` of a block may reach the layers in it.
    """
    kept = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

    try:
        yield restore
    finally:
        restore()


def _randomise(module: nn.Module, seed: int) -> None:
    # attention reads the weights of its out_proj without calling it, so that no hook sees that layer run
    parts = [module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module]
    cuda = sorted({t.device.index for t in module.parameters() if t.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for part in parts:
            if callable(getattr(part, "reset_parameters", None)):
                part.reset_parameters()
                continue
            for tensor in part.parameters(recurse=False):
                spread = tensor.std().item() if tensor.numel() > 1 else abs(tensor.item()) or 1.0
                tensor.normal_(tensor.mean().item(), spread)
