"""How well a language model predicts a text."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.errors import NotFinite


def check_ids(model: nn.Module, ids: Tensor, least: int = 1) -> None:
    """Raise where ``ids`` are not token numbers ``[N, T]`` of the model: TypeError, ValueError, IndexError."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be a tensor of ints, not {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.ndim != 2 or not len(ids) or ids.shape[1] < least:
        raise ValueError(f"ids must be [N, T], with at least {least} tokens in a row, not {tuple(ids.shape)}")
    forward.check_device(model, ids)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embedding, "num_embeddings", None)
    if ids.min() < 0 or (size is not None and ids.max() >= size):
        raise IndexError(f"ids hold {ids.min()} to {ids.max()}; tokens are counted from 0 to {(size or 0) - 1}")


def last_logits(model: nn.Module, ids: Tensor, k: int, **inputs) -> tuple[Tensor, object]:
    """The logits after the last ``k`` tokens, ``[N, k, V]``, float32 or better; and all that the model returned.

    Raises: ValueError (logits of another shape), NotFinite.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # spares the LM head the other places
        inputs["logits_to_keep"] = k
    output = model(input_ids=ids, **inputs)
    logits = forward.first_tensor(output)
    if logits.ndim != 3 or len(logits) != len(ids) or logits.shape[1] not in (k, ids.shape[1]):
        raise ValueError(f"the model gave {tuple(logits.shape)} for ids {tuple(ids.shape)}, not logits [N, T, V]")
    logits = forward.wide(logits[:, -k:])
    if logits.isnan().any():
        raise NotFinite("the model's logits are NaN")
    return logits, output


def nll(model: nn.Module, ids: Tensor, *, start: int = 1, batch: int = 8) -> Tensor:
    """Negative log-likelihood in nats of tokens ``start`` to T - 1, each given all before it in its row.

    Args:
        ids: ``[N, T]`` tokens, on the model's device; no padding.
        start: the first token that is predicted; the tokens before it are only read.
        batch: rows at a time.

    Returns: ``[N, T - start]`` float32 (or better) on the CPU.

    Raises: TypeError, ValueError, IndexError (ids, start, batch, or an output that is no ``[N, T, V]``), NotFinite.

    >>> nll(model, ids, start=48).mean()
    """
    check_ids(model, ids, least=2)
    if not 1 <= start < ids.shape[1]:
        raise ValueError(f"start must lie in 1 to {ids.shape[1] - 1}: token 0 has nothing before it; it is {start}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    rows = []
    with forward.evaluating(model), torch.no_grad():
        for part in ids.split(batch):
            logits, _ = last_logits(model, part[:, :-1], ids.shape[1] - start)
            told = logits.gather(2, part[:, start:, None])[:, :, 0]
            rows.append((logits.logsumexp(2) - told).cpu())
    return torch.cat(rows)


def perplexity(model: nn.Module, ids: Tensor, *, start: int = 1, batch: int = 8) -> float:
    """exp of the mean of :func:`nll` over all rows and tokens from ``start`` on. Raises: as there.

    >>> perplexity(model, ids)
    """
    return nll(model, ids, start=start, batch=batch).double().mean().exp().item()
