"""The method cells of the LM-head decoding notebook, used without the notebook, on tiny models built by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

from nbkit import papers, recipes
from nbkit.errors import LayerNotFound, NotFinite

method = papers.method("lm-head-decoding")
recipe = recipes.load("papers/lm-head-decoding/recipe.py")
VOCAB, WIDTH, HIDDEN, GATE = 12, 12, 5, 0.7
prompts = torch.tensor([[3, 1, 4], [1, 5, 9]])


def llama(layers: int = 2, **config) -> nn.Module:
    """A Llama with random weights, float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **config))
    for p in model.parameters():  # the initial weights are too small for anything to show; norms get gains
        p.data = torch.randn_like(p) * 0.3 + (1 if p.ndim == 1 else 0)
    return model.double().eval()


def fixed_gate() -> nn.Module:
    """One layer, gate fixed at GATE, no final norm, orthonormal LM head; neuron 2 writes token 7."""
    model = llama(1, mlp_bias=True)
    mlp, E = model.model.layers[0].mlp, torch.linalg.qr(torch.randn(WIDTH, WIDTH).double()).Q
    mlp.gate_proj.weight.data.zero_()
    mlp.gate_proj.bias.data.fill_(GATE)
    model.lm_head.weight.data = E
    mlp.down_proj.weight.data[:, 2] = E[7]
    model.model.norm = nn.Identity()
    return model


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_a_neuron_along_a_row_of_an_orthonormal_head_decodes_to_it_at_any_scale(scale):
    E = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()).Q
    found = method.decode(torch.stack([scale * E[4], -scale * E[6]]), E, k=2, rows=1)
    assert found.ids[0, 0, 0] == 4 and found.ids[1, 1, 0] == 6  # +w says 4; of -e_6 it is the other sign that says 6
    torch.testing.assert_close(found.s[[0, 1], [0, 1]], torch.ones(2).double())
    assert found.logits[0, 0, 0].item() == pytest.approx(scale)


def test_decoding_agrees_with_the_full_table_whatever_the_chunk():
    g = torch.Generator().manual_seed(1)
    W, E = torch.randn(7, 6, generator=g).double(), torch.randn(40, 6, generator=g).double()
    found, z = method.decode(W, E, k=3, rows=2), W @ E.T
    assert torch.equal(found.ids[:, 0], z.topk(3).indices) and torch.equal(found.ids[:, 1], (-z).topk(3).indices)
    torch.testing.assert_close(found.logits[:, 0], z.topk(3).values)
    torch.testing.assert_close(found.logits[:, 1], (-z).topk(3).values)
    cosine = nn.functional.cosine_similarity(W[:, None], E[None], dim=2)
    torch.testing.assert_close(found.s, torch.stack([cosine.amax(1), (-cosine).amax(1)], 1))
    spread = z.std(1, correction=0)
    both = torch.stack([(z.amax(1) - z.mean(1)) / spread, (z.mean(1) - z.amin(1)) / spread], 1)
    torch.testing.assert_close(recipe.z_scores(W, E, found.logits[:, :, 0]), both)


def test_rows_of_zeros_have_cosine_zero_and_spoil_no_other():
    E, W = torch.eye(4), torch.tensor([[0.0, 0, 0, 0], [3, 4, 0, 0]])
    E[3] = 0  # a token that was never trained
    found = method.decode(W, E, k=1)
    torch.testing.assert_close(found.s, torch.tensor([[0.0, 0], [0.8, 0]]))
    assert found.ids[1, 0] == 1


def test_a_label_is_read_at_the_end_nearer_to_a_token():
    E = torch.eye(4).double()
    label = recipe.better_end(method.decode(torch.tensor([[0.9, -0.1, 0, 0], [0.1, 0, -2, 0.3]]).double(), E, k=2))
    assert label.token.tolist() == [0, 2] and label.sign.tolist() == [1, -1]
    assert label.s.tolist() == pytest.approx([0.9 / 0.82**0.5, 2 / 4.1**0.5])


def test_a_neuron_reads_rows_of_up_and_writes_columns_of_down():
    model = llama()
    mlp = model.model.layers[1].mlp
    assert torch.equal(method.neuron_vectors(model, 1), mlp.up_proj.weight)
    assert torch.equal(method.neuron_vectors(model, 1, "down_proj")[3], mlp.down_proj.weight[:, 3])


def test_nulls_keep_the_entries_of_a_row_or_the_directions_of_a_layer():
    W = torch.randn(6, 20, generator=torch.Generator().manual_seed(2)).double()
    for kind in ("permuted", "mixed"):
        null = method.null_vectors(W, kind, seed=3)
        assert torch.equal(null, method.null_vectors(W, kind, seed=3)) and not torch.equal(null, W)
    assert torch.equal(method.null_vectors(W, "permuted").sort(1).values, W.sort(1).values)
    outside = torch.linalg.svd(W).Vh[6:]  # what no row of W has a share in
    torch.testing.assert_close(method.null_vectors(W, "mixed") @ outside.T, torch.zeros(6, 14).double())


def test_clamping_adds_c_silu_gate_to_its_token_and_to_no_other():
    model, logits = fixed_gate(), {}
    contribution = 2.5 * nn.functional.silu(torch.tensor(GATE)).item()
    for c in (0.0, 2.5):
        with method.held(model, 0, 2, c), torch.no_grad():
            logits[c] = model(input_ids=prompts).logits
    rise = logits[2.5] - logits[0.0]
    expected = torch.zeros(VOCAB).double().index_fill(0, torch.tensor(7), contribution)
    torch.testing.assert_close(rise, expected.expand_as(rise), rtol=1e-6, atol=1e-6)
    with method.held(model, 0, 2, contribution, site="product"), torch.no_grad():
        torch.testing.assert_close(model(input_ids=prompts).logits, logits[2.5], rtol=1e-6, atol=1e-6)


def test_clamping_to_the_value_it_has_is_bitwise_nothing():
    model = llama(1).float()
    one = prompts[:1, :1]  # one position: one value to hold
    with torch.no_grad():
        clean = model(input_ids=one).logits
        u = model.model.layers[0].mlp
        values = {}
        handle = u.up_proj.register_forward_hook(lambda m, a, out: values.update(u=out))
        model(input_ids=one)
        handle.remove()
        with method.held(model, 0, 3, values["u"][0, 0, 3].item()):
            assert torch.equal(model(input_ids=one).logits, clean)
        with method.held(model, 0, 3, values["u"][0, 0, 3].item() + 1):
            assert not torch.equal(model(input_ids=one).logits, clean)


def test_both_signs_of_a_neuron_are_one_network_with_swapped_labels():
    model = llama()
    mlp, E = model.model.layers[1].mlp, model.lm_head.weight.detach()
    before, clean = method.decode(method.neuron_vectors(model, 1), E, k=4), method.log_p(model, prompts)
    mlp.up_proj.weight.data[2] *= -1
    mlp.down_proj.weight.data[:, 2] *= -1
    after = method.decode(method.neuron_vectors(model, 1), E, k=4)
    assert torch.equal(method.log_p(model, prompts), clean)
    assert torch.equal(after.ids[2], before.ids[2].flip(0)) and torch.equal(after.ids[1], before.ids[1])


def test_held_log_p_is_one_clamp_after_another():
    model = llama()
    c = torch.tensor([-3.0, 0.5, 8.0])
    together = method.held_log_p(model, prompts, 1, 4, c)
    assert together.shape == (3, 2, VOCAB)
    for value, got in zip(c.tolist(), together, strict=True):
        with method.held(model, 1, 4, value):
            torch.testing.assert_close(got, method.log_p(model, prompts))


class Tokenizer:
    """Every character is a token, but " dog" is one too."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [6] if text == " dog" else [ord(c) for c in text]}

    def convert_ids_to_tokens(self, ids):
        return [" dog" if i == 6 else chr(i) for i in ids]


def test_search_finds_the_planted_neuron_under_either_sign():
    model = llama()
    E = model.lm_head.weight.detach()
    model.model.layers[1].mlp.up_proj.weight.data[3] = -4 * E[6]
    (layer, neuron, cosine), *_ = method.find_neurons(model, Tokenizer(), " dog", k=3)
    assert (layer, neuron) == (1, 3) and cosine == pytest.approx(-1)
    assert len(method.find_neurons(model, Tokenizer(), " dog", k=100)) == 2 * HIDDEN
    with pytest.raises(ValueError, match=r"'dog' is \['d', 'o', 'g'\]"):
        method.find_neurons(model, Tokenizer(), "dog")


def test_the_opposite_end_is_told_from_the_same_and_from_another_neurons():
    model = llama(1)
    model.lm_head.weight.data = torch.eye(WIDTH).double()
    mlp, E = model.model.layers[0].mlp, torch.eye(WIDTH).double()
    mlp.up_proj.weight.data = E[:HIDDEN].clone()
    mlp.up_proj.weight.data[1] *= -1  # read at the end of -w
    # against, against, with, another token, against
    mlp.down_proj.weight.data = torch.stack([-E[0], E[1], E[2], -E[8], -E[4]], 1)
    label = recipe.better_end(method.decode(method.neuron_vectors(model, 0), E, k=1))
    counted = recipe.written(method, model, label).sum(numeric_only=True)
    assert counted[["neurons", "opposite end", "same end", "another neuron's"]].tolist() == [5, 3, 1, 0]


def test_the_direction_of_a_clamp_is_chosen_on_half_a_alone():
    study = pd.DataFrame({"site": "up", "role": "neuron", "case": 0, "dose": [-16, 16, -4, 4],
                          "change_A": [0, 9, 1, 0.5], "change_B": [3.0, 4, -5, 7]})  # fmt: skip
    found = recipe.on_half_b(study)
    assert found.toward.tolist() == [16, -16, 4, -4]  # -4 raised half A more, whatever it did to half B
    study["change_B"] *= -1
    assert recipe.on_half_b(study).toward.tolist() == [16, -16, 4, -4]


def test_bad_input_raises_and_changes_nothing():
    model, tokenizer = llama(), Tokenizer()
    clean = method.log_p(model, prompts)
    E, W = model.lm_head.weight.detach(), method.neuron_vectors(model, 0)
    for call, error in (
        (lambda: method.gated_mlps(nn.Sequential(nn.Linear(2, 2))), TypeError),
        (lambda: method.neuron_vectors(model, 2), IndexError),
        (lambda: method.neuron_vectors(model, -1), IndexError),
        (lambda: method.neuron_vectors(model, 0, "rows"), LayerNotFound),
        (lambda: method.decode(W, E, k=VOCAB + 1), RuntimeError),
        (lambda: method.decode(W[:, 1:], E), RuntimeError),
        (lambda: method.decode(W * float("nan"), E), NotFinite),
        (lambda: method.null_vectors(W, "zero"), ValueError),
        (lambda: method.find_neurons(model, tokenizer, " dog", k=0), ValueError),
        (lambda: method.find_neurons(model, tokenizer, ""), ValueError),
        (lambda: method.held(model, -1, 0, 1.0), IndexError),
        (lambda: method.held_log_p(model, prompts, 0, HIDDEN, torch.ones(1)), IndexError),
        (lambda: method.held(model, 0, 0, float("inf")), NotFinite),
        (lambda: method.held(model, 0, 0, 1.0, site="gate"), ValueError),
        (lambda: method.log_p(model, prompts[:, :0]), ValueError),
        (lambda: method.held_log_p(model, prompts[:, :0], 0, 0, torch.ones(1)), ValueError),
    ):
        with pytest.raises(error):
            call()
    assert torch.equal(method.log_p(model, prompts), clean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
