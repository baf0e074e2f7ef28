"""The gradient of every example by itself, which a batch's gradient only shows the mean of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbkit import forward
from nbkit.errors import NotFinite
from nbkit.training._evaluate import check_pair, check_whole, labels_in_range, moved

Gradients = dict[str, Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean over all places of one example: one place for logits ``[1, C]``, T for ``[1, T, C]``."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


@forward.outside_inference_mode
def example_gradients(
    model: nn.Module,
    x: forward.Inputs,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    parameters: Iterable[str] | None = None,
    chunk: int = 32,
) -> Gradients:
    """The gradient of each example's own loss with respect to the weights.

    The model runs in evaluation mode, on one example as a batch of one, and comes back as it was: weights, their
    ``.grad``, buffers and mode. ``chunk`` examples go through ``torch.func.vmap`` together; a model that cannot be
    vectorised (a recurrent layer, a branch that depends on the data) is run one example at a time, with equal result.

    Args:
        x: ``[N, ...]``, or a dict of tensors passed as keyword arguments.
        y: targets ``[N, ...]``.
        loss: ``(logits [1, ...], y [1, ...]) -> one number``; by default cross-entropy, its mean over the places.
        parameters: names as in ``model.named_parameters()``; by default all of them.
        chunk: examples at a time: ``chunk`` times the weights is what stands in memory beside the result.

    Returns: ``{name: [N, *shape of the parameter]}``, on the CPU.

    Raises: ValueError (no or unknown parameters, a loss that is not one number, lengths that differ, a tensor of the
    dict that all examples share), TypeError, IndexError (a class out of range), NotFinite.

    >>> example_gradients(nn.Linear(2, 3), torch.rand(5, 2), torch.zeros(5, dtype=torch.long))["weight"].shape
    torch.Size([5, 3, 2])
    """
    parts = list(_chunks(model, x, y, loss, parameters, chunk))
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


@forward.outside_inference_mode
def gradient_norms(
    model: nn.Module,
    x: forward.Inputs,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    parameters: Iterable[str] | None = None,
    chunk: int = 32,
) -> Tensor:
    """The Euclidean length of every gradient of :func:`example_gradients`, over all parameters: ``[N]``, on the CPU.

    No more than ``chunk`` gradients stand in memory. Arguments and errors as there.

    Source: M. Paul, S. Ganguli, G. K. Dziugaite, *Deep Learning on a Data Diet*, 2021 (GraNd, of one network).

    >>> gradient_norms(nn.Linear(2, 3), torch.rand(5, 2), torch.zeros(5, dtype=torch.long)).shape
    torch.Size([5])
    """
    squares = []
    for part in _chunks(model, x, y, loss, parameters, chunk):
        squares.append(sum(forward.wide(g).flatten(1).square().sum(1) for g in part.values()))
    return torch.cat(squares).sqrt().cpu()


def _chunks(model, x, y, loss, parameters, chunk) -> Iterator[Gradients]:
    check_pair((x, y), "data")
    check_whole(chunk=chunk)
    weights = _chosen(model, parameters)
    device = next(iter(weights.values())).device
    forward.check_examples(model, moved(forward.take(x, slice(0, 2)), device))
    together = True
    with forward.evaluating(model), torch.enable_grad(), forward.requiring_grad(weights.values(), True):
        if loss is cross_entropy:
            with torch.no_grad():
                classes = forward.logits(model, moved(forward.take(x, slice(0, 1)), device)).shape[-1]
            labels_in_range(y, classes, strict=True)
        for start in range(0, len(y), chunk):
            part = slice(start, start + chunk)
            batch = moved(forward.take(x, part), device), y[part].to(device)
            found = _vectorised(model, weights, *batch, loss) if together else None
            together = found is not None
            yield _finite(found if together else _one_by_one(model, weights, *batch, loss), start)


def _vectorised(model, weights: Gradients, x, y: Tensor, loss) -> Gradients | None:
    """All gradients of a chunk in one call, or None where the model cannot be vectorised."""
    alone = _Alone(model)

    def value(given: Gradients, one, target: Tensor) -> Tensor:
        return loss(torch.func.functional_call(alone, given, (one,)), target[None])

    given = {f"model.{name}": weight.detach() for name, weight in weights.items()}
    try:
        with warnings.catch_warnings():  # vmap says where it loops over a kernel: slower, not wrong
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            found = torch.func.vmap(torch.func.grad(value), (None, 0, 0))(given, x, y)
    except Exception:  # whatever is wrong with the input and not with vmap is raised by the plain loop
        return None
    return {name: found[f"model.{name}"].detach() for name in weights}


def _one_by_one(model, weights: Gradients, x, y: Tensor, loss) -> Gradients:
    rows = []
    for i in range(len(y)):
        one = slice(i, i + 1)
        value = loss(forward.logits(model, forward.take(x, one)), y[one])
        if value.ndim != 0:
            raise ValueError(f"the loss of one example must be one number, not of shape {tuple(value.shape)}")
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        rows.append(gradients)
    columns = zip(weights.items(), zip(*rows, strict=True), strict=True)
    return {
        name: torch.stack([torch.zeros_like(weight) if g is None else g for g in column]).detach()
        for (name, weight), column in columns
    }


class _Alone(nn.Module):
    """The model's logits of one example, given without its batch axis."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, one: forward.Inputs) -> Tensor:
        batch = one[None] if isinstance(one, Tensor) else {name: value[None] for name, value in one.items()}
        return forward.logits(self.model, batch)


def _chosen(model: nn.Module, parameters: Iterable[str] | None) -> Gradients:
    own = dict(model.named_parameters())
    if parameters is None:
        chosen = own
    else:
        names = [parameters] if isinstance(parameters, str) else list(parameters)
        known = dict(model.named_parameters(remove_duplicate=False))
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"the model has no parameter {missing[0]!r}; it has {', '.join(own)}")
        chosen = {name: known[name] for name in names}
    if not chosen:
        raise ValueError("there is no parameter to take a gradient of")
    return chosen


def _finite(found: Gradients, start: int) -> Gradients:
    for name, gradients in found.items():
        bad = ~gradients.flatten(1).isfinite().all(1)
        if bad.any():
            raise NotFinite(f"the gradient of {name!r} is not finite for example {start + int(bad.nonzero()[0])}")
    return found
