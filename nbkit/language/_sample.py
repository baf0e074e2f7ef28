"""Texts that a language model writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.language._likelihood import check_ids, last_logits


def sample(model: nn.Module, ids: Tensor, n: int = 1, *, new: int, temperature: float = 1.0, seed: int) -> Tensor:
    """``n`` continuations of ``new`` tokens of every prompt, drawn from the softmax of logits / temperature.

    Nothing else bends the distribution (no top-k, no penalty), and no token ends a text. Temperature 0 takes the most
    likely token. Where the model hands on its keys and values they are used, so that a token costs one token.

    Args:
        ids: ``[N, T]`` prompts of one length, on the model's device.

    Returns: the new tokens, ``[N, n, new]`` int64 on the CPU. The same ``seed`` gives the same tokens; the global
    random state is left alone.

    Raises: TypeError, ValueError, IndexError, NotFinite.

    >>> tokenizer.batch_decode(sample(model, ids[:1], 3, new=20, temperature=0.8, seed=0)[0])
    """
    check_ids(model, ids)
    if n < 1 or new < 1:
        raise ValueError(f"n and new must be at least 1; they are {n} and {new}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number from 0 on, not {temperature}")
    generator = torch.Generator(ids.device).manual_seed(seed)
    text = ids.repeat_interleave(n, 0)
    step, cache = text, {}
    with forward.evaluating(model), torch.no_grad():
        for _ in range(new):
            logits, output = last_logits(model, step, 1, **cache)
            token = _draw(logits[:, 0], temperature, generator)
            text = torch.cat([text, token], 1)
            state = getattr(output, "past_key_values", None)
            step, cache = (text, {}) if state is None else (token, {"past_key_values": state})
    return text[:, ids.shape[1] :].view(len(ids), n, new).cpu()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    # the largest logit becomes 0 first: a small temperature must not overflow
    scaled = (logits - logits.amax(1, keepdim=True)) / temperature
    return torch.multinomial(scaled.softmax(1), 1, generator=generator)
