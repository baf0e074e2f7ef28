"""Which tensors of a model may be pruned, and the checks every function of the package shares."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nbkit.errors import LayerNotFound, NotFinite, did_you_mean

Names = str | Iterable[str] | None


def prunable(model: nn.Module, *, layers: Names = None, exclude: Names = ()) -> dict[str, nn.Parameter]:
    """The weights a mask may cover: ``weight`` of every linear layer and convolution, in the order of the model.

    Linear is what multiplies its input with the weight, whatever its class (GPT-2's ``Conv1D``: it is tried). Biases,
    normalisations, recurrent layers, the packed ``in_proj_weight`` of ``nn.MultiheadAttention`` and embeddings are left
    out, also where a head shares an embedding's weight, unless ``layers`` names it. Where what is covered is less than
    half of all matrices a warning says what is not. A weight shared by several layers counts once.

    ``layers`` keeps only, ``exclude`` drops, what they name: a layer (``"fc1"``), its weight (``"fc1.weight"``), or a
    block that holds layers (``"encoder"``).

    Raises: LayerNotFound for an unknown name; ValueError where nothing is left to prune, or where a layer computes
    its weight (torch's own pruning, a parametrization), so that a mask on it would be lost.

    >>> list(prunable(model, exclude="head"))
    ['conv1.weight', 'fc.weight']
    """
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if not is_product(module):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(computed(path))
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {path!r} is lazy and has no weight yet; run one forward pass first")
        if not any(weight is other for other in found.values()):
            found[f"{path}.weight" if path else "weight"] = weight
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if layers is not None:
        keep = select(layers, found)
        found = {name: w for name, w in found.items() if name in keep}
    elif any(id(w) not in embedded for w in found.values()):
        found = {name: w for name, w in found.items() if id(w) not in embedded}
        _report_uncovered(model, found, embedded)
    others = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    dropped = select(exclude, found, also=others)
    found = {name: w for name, w in found.items() if name not in dropped}
    if not found or not any(w.numel() for w in found.values()):
        raise ValueError("no prunable layers: the model (or what was selected of it) has no Linear or Conv weight")
    return found


def is_product(module: nn.Module) -> bool:
    """Whether a module multiplies what it is given with its weight: a convolution, or :func:`outputs_axis` is one."""
    return isinstance(module, _ConvNd) or outputs_axis(module) is not None


def outputs_axis(module: nn.Module) -> int | None:
    """The axis of a linear layer's weight that counts outputs; None for what is none, which trying it tells."""
    if isinstance(module, nn.Linear):
        return 0
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding) or next(module.children(), None):
        return None
    bias = getattr(module, "bias", None)
    for axis in (0, 1):
        w = weight.detach().movedim(axis, 0)
        x = torch.linspace(-1, 1, 2 * w.shape[1], device=w.device).view(2, -1).to(w.dtype)
        try:
            with torch.no_grad():
                got = module.forward(x)
                wanted = x @ w.T + (bias if isinstance(bias, Tensor) else 0)
        except Exception:  # whatever another kind of layer says to such an input
            continue
        if isinstance(got, Tensor) and got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-2, atol=1e-3):
            return axis
    return None


def n_outputs(module: nn.Module) -> int:
    """How many outputs a layer has that :func:`is_product` knows."""
    return module.out_channels if isinstance(module, _ConvNd) else module.weight.shape[outputs_axis(module)]


def computed(path: str) -> str:
    """What to say of a layer whose weight is no plain parameter."""
    return (
        f"layer {path!r} computes its weight (torch pruning, weight norm or a parametrization); make it a plain "
        "parameter first, for example with torch.nn.utils.prune.remove(layer, 'weight')"
    )


def _report_uncovered(model: nn.Module, found: Mapping[str, Tensor], embedded: set[int]) -> None:
    ids = {id(w) for w in found.values()}
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in embedded}
    left = sorted((n for n, p in matrices.items() if id(p) not in ids), key=lambda n: -matrices[n].numel())
    covered = 1 - sum(matrices[n].numel() for n in left) / max(1, sum(p.numel() for p in matrices.values()))
    if covered < 0.5:
        names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        warnings.warn(
            f"linear and convolutional layers hold only {covered:.0%} of the model's matrices; not covered: {names}",
            stacklevel=3,
        )


def attention_around(model: nn.Module, layer: str) -> str | None:
    """The ``nn.MultiheadAttention`` whose ``out_proj`` a layer is, None for any other layer. It uses the weight without
    calling the layer, so that a hook sees only the attention run."""
    path, _, name = layer.rpartition(".")
    inside = name == "out_proj" and isinstance(model.get_submodule(path), nn.MultiheadAttention)
    return path if inside else None


def select(names: Names, known: Iterable[str], *, also: Iterable[str] = ()) -> set[str]:
    """The parameter names among ``known`` that ``names`` mean: a parameter, its layer, or a block around it.

    Names in ``also`` exist too, but select nothing.
    """
    known, also = list(known), set(also)
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else (names or ()):
        hits = [k for k in known if k == name or k.startswith(f"{name}.")]
        if not hits and name not in also:
            layers = [k.rpartition(".")[0] or k for k in known]
            raise LayerNotFound(f"no prunable layer {name!r}{did_you_mean(name, layers)}")
        chosen.update(hits)
    return chosen


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """``sparsity`` as a float in [0, 1). Raises: TypeError, ValueError."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"{name} must be a number in [0, 1), not {type(sparsity).__name__}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"{name} must lie in [0, 1), the fraction of weights removed; it is {sparsity}")
    return float(sparsity)


def check_scope(scope: str) -> None:
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', not {scope!r}")


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise NotFinite, naming the tensor. The sum is finite only if all are, so the slow look is rarely taken."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value.detach().sum()):
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise NotFinite(f"{what} {name!r} holds {bad} NaN or infinite values of {value.numel()}")


def same_names(first: Mapping, second: Mapping, what: str) -> None:
    """Raise ValueError where two mappings do not speak of the same parameters."""
    missing, extra = [n for n in first if n not in second], [n for n in second if n not in first]
    if missing or extra:
        raise ValueError(f"{what}: missing {missing}, not expected {extra}")
