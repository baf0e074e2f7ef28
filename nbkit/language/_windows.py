"""Cutting texts into pieces of equal length, in tokens."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

import torch
from torch import Tensor


def token_windows(
    tokenizer, texts: Iterable[str], length: int, *, n: int | None = None, per_text: int | None = 1, seed: int
) -> tuple[Tensor, Tensor]:
    """Pieces of ``length`` tokens from random places of the texts, in the order of the texts, none overlapping.

    Every text of at least ``length`` tokens gives ``per_text`` of them, or as many as it has room for (None: as many
    as fit). ``n`` keeps that many, drawn from all. No special token is added, and the end of a text ends no window.

    Args:
        tokenizer: called as those of transformers, ``tokenizer(text, add_special_tokens=False)["input_ids"]``.

    Returns: ids ``[N, length]``, and the number of the text each comes from, ``[N]``; both int64.

    Raises: TypeError (one string for texts), ValueError (length, n or per_text below 1; no text long enough; fewer
    than ``n`` windows).

    >>> ids, text = token_windows(models.tokenizer("smollm2"), datasets.load("lee").texts, 64, n=32, seed=0)
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several strings, not one; give [text]")
    for name, value in (("length", length), ("n", n), ("per_text", per_text)):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be an int of at least 1, not {value!r}")
    generator = torch.Generator().manual_seed(seed)
    pieces: list[Tensor] = []
    where: list[int] = []
    longest = 0
    for number, text in enumerate(texts):
        ids = torch.as_tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        longest = max(longest, len(ids))
        fits = len(ids) // length
        k = fits if per_text is None else min(per_text, fits)
        if k:
            # what is left over lies between the windows, at random
            gaps = torch.randint(len(ids) - k * length + 1, (k,), generator=generator).sort().values
            starts = gaps + length * torch.arange(k)
            pieces += [ids[s : s + length] for s in starts.tolist()]
            where += [number] * k
    if len(pieces) < (n or 1):
        raise ValueError(
            f"{n or 1} windows of {length} tokens were asked for, but these texts give {len(pieces)} (the longest has "
            f"{longest} tokens); take shorter ones, or more of each text (per_text)"
        )
    chosen = torch.arange(len(pieces))
    if n is not None:
        chosen = torch.randperm(len(pieces), generator=generator)[:n].sort().values
    return torch.stack(pieces)[chosen], torch.tensor(where)[chosen]
