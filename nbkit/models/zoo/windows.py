"""A small Swin transformer (Liu et al. 2021, arXiv 2103.14030): attention in windows that shift, patches that merge."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class WindowAttention(nn.Module):
    """Self-attention within windows, ``[windows, tokens, D]`` to the same, with a learned bias for relative positions.

    The attention probabilities ``[windows, heads, tokens, tokens]`` pass through ``weights``, an identity: record or
    edit that layer. ``apart`` ``[windows of a picture, tokens, tokens]`` is True where two tokens may not meet.
    """

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.weights = nn.Identity()
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        down, right = places[:, :, None] - places[:, None, :] + side - 1
        self.register_buffer("relative", down * (2 * side - 1) + right, persistent=False)

    def forward(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.bias[self.relative].permute(2, 0, 1)
        if apart is not None:
            scores = scores.masked_fill(apart.repeat(n // len(apart), 1, 1).unsqueeze(1), -torch.inf)
        weights = self.weights(scores.softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, d))


class WindowBlock(nn.Module):
    """Pre-norm attention within windows, then a two-layer perceptron; a map ``[N, H, W, D]`` to the same."""

    def __init__(self, width: int, heads: int, hidden: int, side: int, size: int, shift: int):
        super().__init__()
        self.side, self.shift = side, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, side)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
        )
        self.register_buffer("apart", _apart(size, side, shift) if shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, size, _, d = x.shape
        h = self.norm1(x)
        if self.shift:  # wrap around, so that as many windows of the same size cover the picture
            h = h.roll((-self.shift, -self.shift), (1, 2))
        h = self.attn(_windows(h, self.side), self.apart)
        rows = size // self.side
        h = h.reshape(n, rows, rows, self.side, self.side, d).transpose(2, 3).reshape(n, size, size, d)
        if self.shift:
            h = h.roll((self.shift, self.shift), (1, 2))
        x = x + h
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """2 x 2 neighbours into one token: ``[N, H, W, D]`` to ``[N, H/2, W/2, 2D]``."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class TinySwin(nn.Module):
    """A small Swin transformer: ``[N, channels, size, size]`` to logits ``[N, classes]``.

    With the defaults 14 x 14 tokens of width 24, then 7 x 7 of width 48; two blocks a stage, the second with shifted
    windows where a stage has more than one. Members: ``patch_embed, patch_norm, stage1.{0,1}, merge1, stage2.{0,1},
    norm, head``.
    """

    def __init__(
        self, *, size: int = 28, patch: int = 2, channels: int = 1, classes: int = 10,
        width: int = 24, heads: int = 2, window: int = 7, ratio: int = 3,
    ):  # fmt: skip
        super().__init__()
        tokens = size // patch
        if size % patch or tokens % (2 * window) or width % heads:
            raise ValueError(
                f"patch {patch} must divide size {size}, 2 x window {window} the {tokens} tokens a side, "
                f"and heads {heads} width {width}"
            )
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.patch_norm = nn.LayerNorm(width)
        self.stage1 = _stage(width, heads, ratio, window, tokens)
        self.merge1 = Merge(width)
        self.stage2 = _stage(2 * width, 2 * heads, ratio, window, tokens // 2)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_norm(self.patch_embed(x).movedim(1, -1))
        x = self.stage2(self.merge1(self.stage1(x)))
        return self.head(self.norm(x).mean((1, 2)))


def _stage(width: int, heads: int, ratio: int, window: int, tokens: int) -> nn.Sequential:
    shifts = (0, window // 2 if tokens > window else 0)
    return nn.Sequential(*(WindowBlock(width, heads, ratio * width, window, tokens, shift) for shift in shifts))


def _windows(x: Tensor, side: int) -> Tensor:
    """``[N, H, W, D]`` to ``[N * windows, side * side, D]``, row by row."""
    n, h, w, d = x.shape
    x = x.reshape(n, h // side, side, w // side, side, d).transpose(2, 3)
    return x.reshape(-1, side * side, d)


def _apart(size: int, side: int, shift: int) -> Tensor:
    """Which tokens of a shifted window were not neighbours before the picture was wrapped around."""
    region = torch.zeros(size)
    region[size - side : size - shift] = 1
    region[size - shift :] = 2
    regions = _windows((3 * region[:, None] + region[None])[None, ..., None], side).squeeze(-1)
    return regions[:, :, None] != regions[:, None, :]
