"""Leaving tokens out: with all of them kept nothing changes; with some, it is the model run on those alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit import hooks, models
from nbkit.errors import LayerDidNotRun, LayerNotFound

WIDTH = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4}
IDS = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[1, 6:] = 0


def transformer(kind: str, attention: str = "sdpa") -> nn.Module:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **WIDTH))
        elif kind == "llama":
            config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **WIDTH)
            model = transformers.LlamaForCausalLM(config)
        elif kind == "gpt2":
            config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_head=4, n_layer=4, n_positions=32)
            model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.Dinov2Config(image_size=28, patch_size=7, mlp_ratio=2, **WIDTH)
            model = transformers.Dinov2Model(config)
    model.set_attn_implementation(attention)
    return model.eval()


def answer(model: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


BLOCKS = {"bert": "encoder.layer.1", "llama": "model.layers.1", "gpt2": "transformer.h.1", "dinov2": "encoder.layer.1"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_keeping_all_tokens_changes_no_bit(kind, attention):
    model = transformer(kind, attention)
    inputs = [torch.randn(3, 3, 28, 28)] if kind == "dinov2" else [
        {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": PADDED},
    ]  # fmt: skip
    for some in inputs:
        whole = answer(model, some)
        with hooks.narrow(model, {BLOCKS[kind]: lambda h: torch.arange(h.shape[1]).flip(0)}) as kept:
            assert torch.equal(answer(model, some), whole)
            assert kept[BLOCKS[kind]].equal(torch.arange(whole.shape[1]).expand(3, -1))
        assert torch.equal(answer(model, some), whole)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-llama"])
def test_keeping_all_tokens_changes_no_bit_in_the_kits_own(name):
    model = models.build(name, seed=0).eval()
    block, x = ("blocks.2", torch.randn(2, 1, 28, 28)) if name == "tiny-vit" else ("model.layers.2", IDS)
    whole = answer(model, x)
    with hooks.narrow(model, {block: lambda h: torch.arange(h.shape[1])}):
        assert torch.equal(answer(model, x), whole)


CHOSEN = torch.tensor([[0, 2, 3, 6], [0, 1, 4, 5], [1, 2, 3, 7]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_narrowed_encoder_is_the_encoder_of_the_kept_tokens_and_their_mask(attention):
    model = transformer("bert", attention)
    with hooks.record(model, "embeddings") as states:
        answer(model, {"input_ids": IDS, "attention_mask": PADDED})
    some = states["embeddings"].gather(1, CHOSEN.unsqueeze(-1).expand(-1, -1, 32))
    mask = PADDED.gather(1, CHOSEN)[:, None, None].bool()
    with torch.no_grad():
        for block in model.encoder.layer:
            some = block(some, attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e9))
            some = some[0] if isinstance(some, tuple) else some
    with hooks.narrow(model, {"encoder.layer.0": lambda h: CHOSEN}):
        torch.testing.assert_close(answer(model, {"input_ids": IDS, "attention_mask": PADDED}), some)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("renumber", [False, True])
def test_a_narrowed_decoder_keeps_positions_or_counts_anew(attention, renumber):
    model = transformer("llama", attention)
    row = CHOSEN[:1]
    positions = torch.arange(4)[None] if renumber else row
    alone = answer(model, {"input_ids": IDS[:1].gather(1, row), "position_ids": positions})
    with hooks.narrow(model, {"model.layers.0": lambda h: row}, renumber=renumber):
        torch.testing.assert_close(answer(model, {"input_ids": IDS[:1]}), alone)
        torch.testing.assert_close(answer(model, {"input_ids": IDS[:1], "use_cache": False}), alone)


def test_what_comes_behind_what_is_left_out_was_seen_before():
    model = transformer("llama")
    with hooks.narrow(model, {"model.layers.2": lambda h: torch.arange(5)}):
        cut = answer(model, {"input_ids": IDS})
    torch.testing.assert_close(cut, answer(model, {"input_ids": IDS})[:, :5])


def test_as_many_tokens_as_a_head_is_wide_or_as_there_are_heads():
    model = transformer("llama")  # a head of 8, a text of 8; four heads, a text of four
    for ids in (IDS, IDS[:, :4]):
        mask = torch.ones_like(ids)
        with hooks.narrow(model, {"model.layers.0": lambda h: torch.arange(3)}):
            cut = answer(model, {"input_ids": ids, "attention_mask": mask})
        torch.testing.assert_close(cut, answer(model, {"input_ids": ids})[:, :3])


def test_several_blocks_compose_and_each_row_has_its_own():
    model = models.build("tiny-vit", seed=0).eval()
    generator = torch.Generator().manual_seed(1)

    def half(hidden):
        noise = torch.rand(hidden.shape[:2], generator=generator)
        noise[:, 0] = 2  # the class token
        return noise.topk(hidden.shape[1] // 2).indices

    x = torch.randn(4, 1, 28, 28)
    with hooks.narrow(model, {"blocks.1": half, "blocks.4": half}) as kept:
        with hooks.record(model, ["blocks.0", "blocks.3", "blocks.5"]) as states:
            narrowed = answer(model, x)
    assert [states[f"blocks.{i}"].shape[1] for i in (0, 3, 5)] == [50, 25, 12]
    assert kept["blocks.1"].shape == (4, 25) and kept["blocks.4"].shape == (4, 12)
    for first, second in zip(kept["blocks.1"].tolist(), kept["blocks.4"].tolist(), strict=True):
        assert set(second) <= set(first) and second == sorted(second) and second[0] == 0
    with torch.no_grad():  # by hand, an image at a time
        for i in range(4):
            hidden = model.patch_embed(x[i : i + 1]).flatten(2).transpose(1, 2)
            hidden = torch.cat([model.cls_token, hidden], 1) + model.pos_embed
            hidden = model.blocks[0](hidden)[:, kept["blocks.1"][i]]
            hidden = model.blocks[3](model.blocks[2](model.blocks[1](hidden)))
            places = [kept["blocks.1"][i].tolist().index(place) for place in kept["blocks.4"][i].tolist()]
            hidden = model.blocks[5](model.blocks[4](hidden[:, places]))
            torch.testing.assert_close(model.head(model.norm(hidden)[:, 0])[0], narrowed[i])


def test_other_states_may_take_their_place_in_any_order():
    model = models.build("tiny-vit", seed=0).eval()
    x = torch.randn(2, 1, 28, 28)
    with hooks.narrow(model, {"blocks.3": lambda h: (torch.tensor([4, 0]), h[:, [4, 0]] * 2)}):
        doubled = answer(model, x)
    with hooks.narrow(model, {"blocks.3": lambda h: torch.tensor([0, 4])}):
        with hooks.edit(model, {"blocks.3": hooks.scale(k=2.0, at="input")}):
            assert torch.equal(answer(model, x), doubled)


def test_gradients_flow_to_kept_tokens_alone():
    model = models.build("tiny-vit", seed=0).eval()
    with hooks.record(model, "blocks.1", detach=False) as states:
        with hooks.narrow(model, {"blocks.2": lambda h: torch.tensor([0, 7])}):
            score = model(torch.randn(1, 1, 28, 28))[0, 3]
    gradient = torch.autograd.grad(score, states["blocks.1"])[0].abs().sum(-1)[0]
    assert gradient.nonzero().flatten().tolist() == [0, 7]


WRONG = {
    "twice": (lambda h: torch.tensor([0, 0]), "chosen twice"),
    "outside": (lambda h: torch.tensor([0, 50]), "places 0 to 50 of 50"),
    "negative": (lambda h: torch.tensor([-1]), "places -1"),
    "a mask": (lambda h: torch.ones(50, dtype=torch.bool), "must be ints"),
    "a list": (lambda h: [0, 1], "not list"),
    "rows": (lambda h: torch.zeros(3, 1, dtype=torch.long), r"\[2, k\] is needed"),
    "none": (lambda h: torch.zeros(2, 0, dtype=torch.long), "is needed"),
    "states": (lambda h: (torch.tensor([0, 1]), h), "states of shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_places_that_are_none(case):
    model = models.build("tiny-vit", seed=0).eval()
    x = torch.randn(2, 1, 28, 28)
    whole = answer(model, x)
    chooser, message = WRONG[case]
    with hooks.narrow(model, {"blocks.3": chooser}), pytest.raises(ValueError, match=message):
        answer(model, x)
    assert torch.equal(answer(model, x), whole)


def test_wrong_blocks_and_caches():
    model = transformer("llama")
    with pytest.raises(LayerNotFound), hooks.narrow(model, {"model.layers.9": lambda h: h}):
        pass
    with pytest.raises(TypeError, match="a function of hidden states"), hooks.narrow(model, {"model.layers.1": 3}):
        pass
    with pytest.raises(TypeError, match="dict of block names"), hooks.narrow(model, "model.layers.1"):
        pass
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with hooks.narrow(model, {"model.layers.1": lambda h: torch.tensor([0])}):
            with pytest.raises(ValueError, match="holds earlier tokens"):
                model(IDS[:, :1], past_key_values=cache)
    flat = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="not hidden states"), hooks.narrow(flat, {"0": lambda h: torch.tensor([0])}):
        flat(torch.randn(2, 4))
    skips = _Skips()
    with pytest.raises(LayerDidNotRun), hooks.narrow(skips, {"a": lambda h: torch.tensor([0])}):
        skips(torch.randn(2, 3, 4))


class _Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(x)
