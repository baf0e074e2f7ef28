"""What tokens cost in a transformer: as torch counts the products of a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nbkit import models, sparsity


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2  # two operations a multiply-add


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_a_block_costs_what_torch_counts(tokens):
    block, x = models.build("tiny-vit", seed=0).blocks[0], torch.randn(1, tokens, 64)
    assert sparsity.transformer_macs(tokens, width=64, hidden=256).tolist() == [counted(lambda: block(x))]


def test_fewer_keys_and_a_gate():
    from transformers import LlamaConfig, LlamaModel

    settings = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = LlamaModel(LlamaConfig(vocab_size=20, num_hidden_layers=2, **settings)).eval()
    model.set_attn_implementation("eager")
    one = model.layers[0]
    hidden = torch.randn(1, 9, 32)
    rotary = model.rotary_emb(hidden, torch.arange(9)[None])
    wanted = sparsity.transformer_macs(9, width=32, hidden=48, key_width=16, gated=True)
    assert counted(lambda: one(hidden, position_embeddings=rotary)) == wanted[0]


def test_without_the_quadratic_term_it_is_the_count_by_hooks():
    model, x = models.build("tiny-vit", seed=0), torch.randn(1, 1, 28, 28)
    by_hooks = sparsity.flops(model, x)["macs"].filter(like="blocks.").sum()
    assert sparsity.transformer_macs([50] * 6, width=64, hidden=256).sum() - 6 * 2 * 50**2 * 64 == by_hooks


@pytest.mark.parametrize(
    ("tokens", "settings", "error"),
    [
        (0, {}, ValueError), ([], {}, ValueError), ([[3]], {}, ValueError), (2.5, {}, TypeError),
        (3, {"width": 0}, ValueError), (3, {"hidden": 1.5}, TypeError), (3, {"key_width": True}, TypeError),
    ],
)  # fmt: skip
def test_counts_that_are_none(tokens, settings, error):
    with pytest.raises(error):
        sparsity.transformer_macs(tokens, **({"width": 8, "hidden": 16} | settings))
