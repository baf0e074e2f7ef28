"""A small transformer for pictures whose perceptrons are mixtures of experts: a router sends every token to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nbkit.models.zoo.vision import Attention


class MoE(nn.Module):
    """A switch layer (Fedus et al. 2022): each token goes to its likeliest expert alone, ``[..., D]`` to ``[..., D]``.

    Expert ``e`` is ``w_out[slot[e]] @ relu(w_in[slot[e]] @ x)``, without biases, times the router's probability of
    ``e``. ``router`` is linear without bias, ``[..., D]`` to logits ``[..., E]``: record it to see who goes where.
    ``w_in [K, F, D]`` and ``w_out [K, D, F]`` are the experts stored, ``slot [E]`` says which of them each expert is:
    experts that share a slot are one.

    Raises: ValueError (stored outside 1 to experts).
    """

    def __init__(self, width: int, hidden: int, experts: int, stored: int | None = None):
        super().__init__()
        stored = experts if stored is None else stored
        if not 1 <= stored <= experts:
            raise ValueError(f"of {experts} experts between 1 and {experts} can be stored, not {stored}")
        self.router = nn.Linear(width, experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(stored, hidden, width))
        self.w_out = nn.Parameter(torch.empty(stored, width, hidden))
        self.register_buffer("slot", torch.arange(experts) % stored)
        for matrix in (*self.w_in, *self.w_out):
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return self.dispatch(x, self.router(x))

    def dispatch(self, x: Tensor, logits: Tensor) -> Tensor:
        """What the experts chosen by router ``logits [..., E]`` make of ``x [..., D]``."""
        probability, expert = logits.softmax(-1).max(-1)
        slot, w_in, w_out = self.slot[expert].flatten(), self.w_in, self.w_out
        order = slot.argsort(stable=True)
        parts = x.flatten(0, -2).index_select(0, order).split(slot.bincount(minlength=len(w_in)).tolist())
        done = [(part @ a.T).relu() @ b.T for part, a, b in zip(parts, w_in, w_out, strict=True)]
        back = torch.cat(done).index_select(0, order.argsort())
        return back.view_as(x) * probability.unsqueeze(-1)


class MoEBlock(nn.Module):
    """A pre-norm transformer block: attention, then a mixture of experts, each added to the residual stream."""

    def __init__(self, width: int, heads: int, hidden: int, experts: int, stored: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.moe = MoE(width, hidden, experts, stored)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stream, and the router's logits, ``[N, T, E]``."""
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        logits = self.moe.router(h)
        return x + self.moe.dispatch(h, logits), logits


class TinyMoE(nn.Module):
    """A small vision transformer of switch layers: ``[N, channels, size, size]`` to logits ``[N, classes]``.

    With the defaults 16 patches of 7 x 7 pixels, two blocks of width 32 with 8 experts of 64 hidden units, and the mean
    over patches before the head; 77,258 parameters, 65,536 of them the experts'. ``stored``: how many experts a block
    keeps where some share a slot, one number a block (default: all). Routers are ``blocks.{i}.moe.router``.

    ``model(x, routing=True)`` returns the logits and a list of the routers' logits ``[N, T, E]``, for ``balance``.

    Raises: ValueError (patch, heads, stored).
    """

    def __init__(
        self, *, size: int = 28, patch: int = 7, channels: int = 1, classes: int = 10, depth: int = 2, width: int = 32,
        heads: int = 4, hidden: int = 64, experts: int = 8, stored: Sequence[int] | None = None,
    ):  # fmt: skip
        super().__init__()
        if size % patch or width % heads:
            raise ValueError(
                f"patch {patch} must divide size {size}, and heads {heads} must divide width {width}"
            )
        if stored is not None and len(stored) != depth:
            raise ValueError(f"stored must hold a number for each of {depth} blocks, not {list(stored)}")
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        kept = [None] * depth if stored is None else stored
        self.blocks = nn.ModuleList(MoEBlock(width, heads, hidden, experts, k) for k in kept)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, routing: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        routed = []
        for block in self.blocks:
            x, logits = block(x)
            routed.append(logits)
        out = self.head(self.norm(x).mean(1))
        return (out, routed) if routing else out


def balance(routing: Sequence[Tensor]) -> Tensor:
    """The load-balancing loss, E times the sum over experts of (share of tokens) x (mean probability), averaged over
    blocks: 1 where all experts get the same, E where one gets everything. ``routing``: router logits ``[..., E]``.

    Its gradient goes through the probabilities alone. Raises: ValueError (no block).
    """
    if not len(routing):
        raise ValueError("routing is empty: call the model with routing=True")
    losses = []
    for logits in routing:
        probabilities = logits.flatten(0, -2).softmax(-1)
        share = probabilities.argmax(-1).bincount(minlength=logits.shape[-1]) / len(probabilities)
        losses.append(logits.shape[-1] * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()
