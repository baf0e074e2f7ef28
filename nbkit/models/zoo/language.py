"""A network of text, of the same class and with the same module names as the pretrained ``smollm2``."""

from __future__ import annotations

from torch import nn


def tiny_llama(
    *, vocab: int = 1024, width: int = 64, layers: int = 8, heads: int = 4, hidden: int = 192, positions: int = 512
) -> nn.Module:
    """A ``transformers.LlamaForCausalLM``: token ids ``[N, T]`` to logits ``[N, T, vocab]``, input and output tied.

    ``hidden`` is the width of the gated MLP, ``positions`` the longest text. Blocks: ``model.layers.0`` and on. Token 0
    stands between texts. Nothing is padded, so that token has a gradient like any other.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=hidden,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
