"""What a network remembers beside its weights: a copy of all of it, and BatchNorm's statistics measured afresh."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.training._evaluate import check_whole


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, ``{name: tensor}``, to go back to with ``model.load_state_dict``.

    A copy: ``model.state_dict()`` holds the tensors themselves, which training changes.

    >>> before = state(nn.Linear(2, 1))
    """
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@forward.outside_inference_mode
@torch.no_grad()
def recalibrate(model: nn.Module, x: forward.Inputs, *, batch: int = 128) -> nn.Module:
    """A copy of ``model``, in evaluation mode, whose BatchNorm means and variances are those of ``x``.

    Pruning changes what reaches a BatchNorm, whose running statistics still describe the dense network. They are
    measured anew as the plain average over batches of ``batch`` examples, dropout off; no weight changes, and
    momentum stays what it was.

    Args:
        x: ``[N, ...]``, or a dict of tensors passed as keyword arguments.

    Raises: ValueError (no BatchNorm with running statistics, no data, a bad batch), NotFinite.

    >>> recalibrate(pruned, x_train[:1000])
    """
    check_whole(batch=batch)
    forward.check_inputs(x)
    result = copy.deepcopy(model).eval()
    norms = [m for m in result.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and _tracks(m)]
    if not norms:
        raise ValueError("there is no BatchNorm with running statistics to recalibrate in this model")
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.train()
        m.momentum = None  # the plain average over the batches
    for start in range(0, forward.batch_size(x), batch):
        forward.logits(result, forward.take(x, slice(start, start + batch)))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return result.eval()


def _tracks(norm: nn.Module) -> bool:
    return norm.track_running_stats and norm.running_mean is not None
