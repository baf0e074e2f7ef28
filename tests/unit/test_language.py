"""Language models: MLPs found by what flows where, windows of text, likelihoods by hand, draws as the softmax says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nbkit import hooks, language, models
from nbkit.errors import NotFinite


def built(kind: str) -> nn.Module:
    """A transformer of two layers with random weights; hidden width 20 where the stream has 16."""
    import transformers as t

    torch.manual_seed(0)
    common = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide = common | {"intermediate_size": 20}
    names = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 30}
    heads = {"num_key_value_heads": 1}
    opt = common | {"ffn_dim": 20, "max_position_embeddings": 32, "word_embed_proj_dim": 8}
    makers = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**names, n_inner=20)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**wide, **heads)),
        "narrow llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**common, **heads, intermediate_size=5)),
        "llama as wide as its vocabulary": lambda: t.LlamaForCausalLM(t.LlamaConfig(**wide | {"vocab_size": 16})),
        "bert": lambda: t.BertModel(t.BertConfig(**wide)),
        "bert without a pooler": lambda: t.BertModel(t.BertConfig(**wide), add_pooling_layer=False),
        "bert with its head": lambda: t.BertForMaskedLM(t.BertConfig(**wide)),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**opt)),
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**wide)),
        "albert": lambda: t.AlbertModel(t.AlbertConfig(**wide, embedding_size=8)),
    }
    return makers[kind]().eval()


DOWN = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "llama": "model.layers.{}.mlp.down_proj",
    "narrow llama": "model.layers.{}.mlp.down_proj",
    "llama as wide as its vocabulary": "model.layers.{}.mlp.down_proj",
    "bert": "encoder.layer.{}.output.dense",
    "bert without a pooler": "encoder.layer.{}.output.dense",
    "bert with its head": "bert.encoder.layer.{}.output.dense",
    "opt": "model.decoder.layers.{}.fc2",
    "neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}


@pytest.mark.parametrize("kind", DOWN)
def test_down_projections_are_found_by_what_flows_into_them(kind):
    model = built(kind)
    grads = [p.requires_grad for p in model.parameters()]
    model.train()
    assert language.mlp_hidden(model) == [DOWN[kind].format(layer) for layer in range(2)]
    assert model.training and all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == grads and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_layer_that_runs_twice_is_named_once():
    assert len(language.mlp_hidden(built("albert"))) == 1


def test_what_is_read_there_is_the_product_of_gate_and_up():
    model, ids = built("llama"), torch.tensor([[3, 1, 4, 1]])
    first = language.mlp_hidden(model)[0]
    mlp = model.model.layers[0].mlp
    taken = {}
    handle = mlp.register_forward_hook(lambda module, args, out: taken.update(x=args[0]))
    with torch.no_grad(), hooks.record(model, first, at="input") as acts:
        model(input_ids=ids)
    handle.remove()
    torch.testing.assert_close(acts[first], nn.functional.silu(mlp.gate_proj(taken["x"])) * mlp.up_proj(taken["x"]))


def test_frozen_and_inference_models_are_the_same_models():
    model = built("llama").requires_grad_(False)
    with torch.inference_mode():
        assert language.mlp_hidden(model) == [DOWN["llama"].format(layer) for layer in range(2)]


def test_an_open_recording_and_edit_do_not_notice():
    model, ids = built("llama"), torch.tensor([[3, 1, 4, 1]])
    name = DOWN["llama"].format(1)
    with hooks.record(model, name) as acts, hooks.edit(model, {name: hooks.zero()}):
        assert len(language.mlp_hidden(model)) == 2
        with torch.no_grad():
            model(input_ids=ids)
    assert acts[name].shape == (1, 4, 16)  # of one pass, and of the caller's
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_was_changed_is_looked_at_again():
    model = built("llama")
    assert len(language.mlp_hidden(model)) == 2
    del model.model.layers[1]
    found = language.mlp_hidden(model)
    assert found == [DOWN["llama"].format(0)]
    found.append("not mine")
    assert language.mlp_hidden(model) == [DOWN["llama"].format(0)]


def test_a_vision_transformer_is_asked_with_a_picture():
    model = models.load("tiny-vit", seed=0)
    found = language.mlp_hidden(model, torch.randn(1, 1, 28, 28))
    assert found and found == [f"blocks.{i}.mlp.fc2" for i in range(len(model.blocks))]


def test_a_low_rank_adapter_is_no_mlp():
    class Adapted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.a, self.b = inner, nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

        def forward(self, x):
            return self.inner(x) + 2 * self.b(self.a(x))

    model = built("llama")
    attention = model.model.layers[1].self_attn
    attention.o_proj = Adapted(attention.o_proj)
    attention.q_proj = Adapted(attention.q_proj)
    assert language.mlp_hidden(model) == [DOWN["llama"].format(layer) for layer in range(2)]


@pytest.mark.parametrize("model, says", [
    (nn.Sequential(nn.Linear(2, 2)), "give inputs="),
    (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), "no MLP|give inputs="),
])  # fmt: skip
def test_a_model_without_mlps_is_told_so(model, says):
    with pytest.raises(TypeError, match=says):
        language.mlp_hidden(model)


class Letters:
    """A token a character; special tokens where they are not refused."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}


TEXTS = ["abcdefghij", "xyz", "ABCDEFGHIJKL", "0123456789"]


def test_windows_are_pieces_of_their_text_without_special_tokens():
    ids, text = language.token_windows(Letters(), TEXTS, 4, per_text=None, seed=0)
    assert ids.shape == (2 + 3 + 2, 4) and text.tolist() == [0, 0, 2, 2, 2, 3, 3]
    for row, number in zip(ids.tolist(), text.tolist(), strict=True):
        assert "".join(map(chr, row)) in TEXTS[number]
    for number in (0, 2, 3):  # none overlapping, in order
        flat = ids[text == number].flatten().tolist()
        assert flat == sorted(set(flat))


def test_windows_repeat_with_their_seed_and_lie_anywhere():
    draws = [language.token_windows(Letters(), TEXTS, 4, seed=seed)[0] for seed in range(40)]
    assert torch.equal(draws[0], language.token_windows(Letters(), TEXTS, 4, seed=0)[0])
    assert {d[0, 0].item() for d in draws} == {ord(c) for c in "abcdefg"}
    ids, text = language.token_windows(Letters(), TEXTS, 4, n=2, per_text=9, seed=1)
    assert len(ids) == 2 and (text.diff() >= 0).all()


@pytest.mark.parametrize("settings, says", [
    ({"length": 13}, "give 0 .the longest has 12"),
    ({"length": 4, "n": 4}, "4 windows"),
    ({"length": 0}, "length must be"),
    ({"length": 4, "per_text": 0}, "per_text must be"),
    ({"length": 2.5}, "length must be"),
])  # fmt: skip
def test_windows_that_cannot_be_had(settings, says):
    with pytest.raises(ValueError, match=says):
        language.token_windows(Letters(), TEXTS, seed=0, **settings)
    with pytest.raises(TypeError, match="several strings"):
        language.token_windows(Letters(), "abcdefgh", 2, seed=0)


class Bigram(nn.Module):
    """Logits that depend on the last token alone: P(b | a) can be read off a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids):
        return self.table[input_ids]


TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
PAIRS = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0]])


def test_likelihood_and_perplexity_worked_by_hand():
    model = Bigram(TABLE.log())
    expected = -torch.tensor([[0.25, 0.8, 0.1], [0.6, 0.2, 0.5]]).log()
    torch.testing.assert_close(language.nll(model, PAIRS), expected)
    torch.testing.assert_close(language.nll(model, PAIRS, start=3, batch=1), expected[:, 2:])
    by_hand = (0.25 * 0.8 * 0.1 * 0.6 * 0.2 * 0.5) ** (-1 / 6)
    assert language.perplexity(model, PAIRS) == pytest.approx(by_hand)
    assert language.perplexity(Bigram(torch.zeros(3, 3)), PAIRS, start=2) == pytest.approx(3)


def test_likelihood_is_the_models_own_loss():
    model, ids = built("llama"), torch.randint(0, 30, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert language.nll(model, ids, batch=2).mean().item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(language.nll(model, ids, start=9), language.nll(model, ids)[:, 8:])
    half = language.nll(model.to(torch.bfloat16), ids)
    assert half.dtype == torch.float32 and half.mean().item() == pytest.approx(loss, rel=0.02)


def test_samples_follow_the_softmax_at_any_temperature():
    model = Bigram(TABLE.log())
    for temperature, wanted in ((1.0, TABLE), (0.5, TABLE**2 / (TABLE**2).sum(1, keepdim=True))):
        drawn = language.sample(model, PAIRS[:, :1], 4000, new=1, temperature=temperature, seed=0)
        assert drawn.shape == (2, 4000, 1)
        for row, start in zip(drawn[:, :, 0], PAIRS[:, 0], strict=True):
            share = torch.bincount(row, minlength=3) / 4000
            assert (share - wanted[start]).abs().max() < 4 * (0.25 / 4000) ** 0.5
    greedy = language.sample(model, PAIRS, 2, new=3, temperature=0, seed=0)
    assert greedy.tolist() == [[[2, 2, 2]] * 2, [[0, 0, 0]] * 2]


def test_samples_with_kept_keys_are_those_without(monkeypatch):
    model, ids = built("llama"), torch.tensor([[3, 1, 4], [1, 5, 9]])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    kept = language.sample(model, ids, 3, new=6, temperature=0.7, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    whole = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, logits_to_keep=0: whole(input_ids).logits)
    assert torch.equal(language.sample(model, ids, 3, new=6, temperature=0.7, seed=2), kept)
    assert not torch.equal(language.sample(model, ids, 3, new=6, temperature=0.7, seed=3), kept)
    assert torch.equal(language.sample(model, ids, new=1, temperature=1e-9, seed=0)[:, 0, 0],
                       whole(ids).logits[:, -1].argmax(1))  # fmt: skip


class OneAnswer(Bigram):
    """Logits [N, V]: of the last token only."""

    def forward(self, input_ids):
        return super().forward(input_ids)[:, -1]


def test_bad_input_is_refused_and_the_model_is_as_it_was():
    model = built("llama").train()
    ids = torch.tensor([[3, 1, 4]])
    broken = Bigram(TABLE * math.nan)
    for call, error in (
        (lambda: language.nll(model, ids[0]), ValueError),
        (lambda: language.nll(model, ids[:, :1]), ValueError),
        (lambda: language.nll(model, ids.float()), TypeError),
        (lambda: language.nll(model, ids.tolist()), TypeError),
        (lambda: language.nll(model, ids + 27), IndexError),
        (lambda: language.nll(model, ids - 2), IndexError),
        (lambda: language.nll(model, ids, start=0), ValueError),
        (lambda: language.nll(model, ids, start=3), ValueError),
        (lambda: language.nll(model, ids, batch=0), ValueError),
        (lambda: language.nll(OneAnswer(TABLE), PAIRS), ValueError),
        (lambda: language.nll(broken, PAIRS), NotFinite),
        (lambda: language.sample(broken, PAIRS, new=1, seed=0), NotFinite),
        (lambda: language.sample(model, ids, 0, new=1, seed=0), ValueError),
        (lambda: language.sample(model, ids, new=0, seed=0), ValueError),
        (lambda: language.sample(model, ids, new=1, temperature=-1.0, seed=0), ValueError),
        (lambda: language.sample(model, ids, new=1, temperature=math.nan, seed=0), ValueError),
        (lambda: language.sample(model, ids[:, :0], new=1, seed=0), ValueError),
    ):
        with pytest.raises(error):
            call()
    assert model.training
