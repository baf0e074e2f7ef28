"""The method cells of the coreinfer notebook on small transformers with random weights, and what its recipe stored."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from nbkit import datasets, hooks, language, papers, recipes
from nbkit.errors import NotFinite

method = papers.method("coreinfer")
recipe = recipes.load("papers/coreinfer/recipe.py")
LAYERS = (1, 2)


def built(kind: str = "llama", **config) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    if kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=64, vocab_size=40))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(**sizes | config, num_attention_heads=2, num_key_value_heads=1))
    for p in model.parameters():  # the initial weights are too small for a mask to show
        p.data = torch.randn_like(p) * 0.3 + (1 if p.ndim == 1 else 0)
    return model.double().eval()


def tokens(n: int, length: int) -> torch.Tensor:
    return torch.randint(0, 40, (n, length), generator=torch.Generator().manual_seed(1))


# the sets


def test_the_two_counts_by_hand():
    one, other = torch.tensor([3.0, 2, 1, -5]), torch.tensor([1.0, -1, 4, 2])
    assert method.core_counts(one[None], 0.67).tolist() == [1, 1, 0, 0]
    assert method.core_counts(other[None], 0.67).tolist() == [0, 0, 1, 1]
    counts = method.core_counts(torch.stack([one, one, other]), 0.67)
    assert counts.tolist() == [2, 2, 1, 1] and method.core_set(counts, 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.4, 1.0])
def test_counts_are_the_definition_token_by_token(alpha):
    h = torch.randn(2, 3, 7, 40, generator=torch.Generator().manual_seed(0))
    found = method.core_counts(h, alpha)
    for layer in range(2):
        for text in range(3):
            expected = torch.zeros(40, dtype=torch.long)
            for token in h[layer, text]:
                order = sorted((n for n in range(40) if token[n] > 0), key=lambda n: -token[n])
                expected[order[: int(alpha * len(order) + 1e-9)]] += 1
            assert torch.equal(found[layer, text], expected)


def test_a_token_without_positive_values_has_no_core_and_a_neuron_never_core_is_in_no_set():
    assert not method.core_counts(-torch.ones(3, 5)).any()
    counts = torch.tensor([0, 4, 0, 1, 0])
    assert method.core_set(counts, 0.8).tolist() == [False, True, False, True, False]
    assert method.core_set(torch.tensor([2, 2, 2, 2, 1]), 0.4).tolist() == [True, True, False, False, False]
    assert method.core_set(torch.rand(3, 2, 1536) + 1, 0.4).sum(-1).eq(614).all()


# decoding


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_set_of_all_neurons_is_the_dense_model_to_the_last_bit(kind):
    model, ids = built(kind), tokens(2, 12)
    h, output = method.read(model, ids[:, :8], LAYERS)
    past = output.past_key_values
    dense = method.continuation_nll(model, ids[:, 8:], past)
    every = torch.ones(h.shape[0], 2, h.shape[-1], dtype=torch.bool)
    assert torch.equal(method.continuation_nll(model, ids[:, 8:], past, every, LAYERS), dense)
    torch.testing.assert_close(dense.float(), language.nll(model, ids, start=9).float())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_prompt_stays_dense_and_what_follows_is_masked(kind):
    """With kept keys and values, and by one pass over all with the mask on the later positions."""
    model, ids = built(kind), tokens(2, 14)
    h, output = method.read(model, ids[:, :8], LAYERS)
    core = method.core_set(method.core_counts(h), 0.3)
    past = output.past_key_values
    found = method.continuation_nll(model, ids[:, 8:], past, core, LAYERS)
    names = [language.mlp_hidden(model)[i] for i in LAYERS]
    edits = {
        name: hooks.replace(lambda part, kept=kept: part * kept[:, None], at="input", positions=slice(8, None))
        for name, kept in zip(names, core, strict=True)
    }
    with hooks.edit(model, edits):
        torch.testing.assert_close(found.float(), language.nll(model, ids, start=9).float())
    assert (found - method.continuation_nll(model, ids[:, 8:], past)).abs().max() > 1e-3
    assert past.get_seq_length() == 8


def test_decoding_takes_its_set_from_the_prompt_and_goes_on_greedily():
    model, ids = built(), tokens(1, 9)
    new, core = method.decode(model, ids, alpha=0.5, beta=0.25, layers=LAYERS, new=6)
    h, _ = method.read(model, ids, LAYERS)
    assert torch.equal(core, method.core_set(method.core_counts(h[:, 0], 0.5), 0.25)) and core.sum(-1).max() <= 6
    text = torch.cat([ids, new[None]], 1)
    edits = {
        language.mlp_hidden(model)[layer]: hooks.replace(
            lambda part, kept=kept: part * kept, at="input", positions=slice(9, None)
        )
        for layer, kept in zip(LAYERS, core, strict=True)
    }
    with torch.no_grad():
        assert model(ids).logits[0, -1].argmax() == new[0]  # the dense pass says the first
        with hooks.edit(model, edits):
            assert torch.equal(model(text).logits[0, 9:-1].argmax(-1), new[1:])


def test_sliced_is_masked():
    mlp, x = built().model.layers[1].mlp, torch.randn(5, 16).double()
    core = torch.rand(24, generator=torch.Generator().manual_seed(3)) < 0.4
    masked = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * core)
    torch.testing.assert_close(method.sliced(mlp, core)(x), masked, rtol=1e-12, atol=1e-12)
    small = method.sliced(mlp, core)
    assert small.gate_proj.weight.shape == small.up_proj.weight.shape == small.down_proj.weight.T.shape
    assert small.up_proj.weight.shape == (core.sum(), 16) and mlp.up_proj.weight.shape == (24, 16)
    with pytest.raises(TypeError, match="gate_proj"):
        method.sliced(built(mlp_bias=True).model.layers[1].mlp, core)
    with pytest.raises(TypeError, match="gate_proj"):
        method.sliced(built("gpt2").transformer.h[0].mlp, core)


# the Mantel test


def similarity(m: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).random((m, m))
    return (values + values.T) / 2


def test_mantel_is_spearman_and_its_null_centres_on_0():
    a, b = similarity(12, 0), similarity(12, 1)
    pairs = np.triu_indices(12, 1)
    rho, null = recipe.mantel(a, b, n=400)
    assert rho == pytest.approx(stats.spearmanr(a[pairs], b[pairs]).statistic)
    assert abs(null.mean()) < 0.05 and 0.08 < null.std() < 0.2
    rho, null = recipe.mantel(a, a**3, n=50)
    assert rho == pytest.approx(1) and null.max() < 0.8
    assert (recipe.mantel(a, b, n=5, seed=3)[1] == recipe.mantel(a, b, n=5, seed=3)[1]).all()


def test_partial_mantel_is_the_textbook_partial_correlation():
    a, b, c = (similarity(12, seed) for seed in range(3))
    a, b = a + c, b + c
    pairs = np.triu_indices(12, 1)
    r = stats.spearmanr(np.stack([m[pairs] for m in (a, b, c)], 1)).statistic
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert recipe.mantel(a, b, c, n=3)[0] == pytest.approx(expected)


# bad input


def test_bad_input_raises_and_changes_nothing():
    model, ids = built(), tokens(2, 9)
    h, output = method.read(model, ids[:, :5], LAYERS)
    past, core = output.past_key_values, method.core_set(method.core_counts(h), 0.5)
    clean = method.continuation_nll(model, ids[:, 5:], past)
    narrow = core[..., :-1]
    for call, error in (
        (lambda: method.read(model, ids[:, :0], LAYERS), ValueError),
        (lambda: method.read(model, ids[0], LAYERS), ValueError),
        (lambda: method.read(model, ids, ()), IndexError),
        (lambda: method.read(model, ids, (1, 3)), IndexError),
        (lambda: method.read(model, ids, (-1,)), IndexError),
        (lambda: method.read(nn.Linear(2, 2), ids, (0,)), TypeError),
        (lambda: method.core_counts(h, 0.0), ValueError),
        (lambda: method.core_counts(h, 1.2), ValueError),
        (lambda: method.core_counts(h, float("nan")), ValueError),
        (lambda: method.core_counts(h[..., :0, :]), ValueError),
        (lambda: method.core_counts(h * float("nan")), NotFinite),
        (lambda: method.core_set(core.int(), 0.0), ValueError),
        (lambda: method.core_set(core.int(), -0.4), ValueError),
        (lambda: method.core_set(core.int(), 0.01), ValueError),
        (lambda: method.continuation_nll(model, ids[:, 5:6], past), ValueError),
        (lambda: method.only(model, core[:1], LAYERS), ValueError),
        (lambda: method.only(model, core.float(), LAYERS), ValueError),
        (lambda: method.continuation_nll(model, ids[:, 5:], past, narrow, LAYERS), RuntimeError),
        (lambda: method.decode(model, ids, layers=LAYERS), ValueError),
        (lambda: method.decode(model, ids[:1], layers=LAYERS, beta=0.0), ValueError),
        (lambda: method.decode(model, ids[:1], layers=LAYERS, new=0), ValueError),
        (lambda: recipe.mantel(np.eye(3), np.eye(4)), ValueError),
        (lambda: recipe.mantel(np.ones((3, 4)), np.ones((3, 4))), ValueError),
    ):
        with pytest.raises(error):
            call()
    assert past.get_seq_length() == 5
    assert torch.equal(method.continuation_nll(model, ids[:, 5:], past), clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# the recipe and what it stored


def test_overlap_is_the_shared_part_of_the_larger_set():
    a = torch.tensor([[[True, True, False, False]], [[True, False, False, False]]])
    b = torch.tensor([[[True, False, True, False]], [[True, False, True, True]]])
    torch.testing.assert_close(recipe.overlap(a, b), torch.tensor([(1 / 2 + 1 / 3) / 2]))
    assert recipe.random_set((3, 2, 1536), 0.4, 0).sum(-1).eq(614).all()


def test_every_rule_is_stored_for_every_text():
    table = papers.results("coreinfer", "quality")
    key = ["rule", "layers", "alpha", "kept", "prompt", "text"]
    assert not table.duplicated(key).any() and (table.groupby(key[:-1]).size() == recipe.TEXTS).all()
    main = table.query("layers == 'inner' and alpha == 0.4 and prompt == 256")
    rules = main.groupby("kept")["rule"].nunique()
    assert rules.to_dict() == {1.0: 1, 0.6: 6, 0.4: 13, 0.2: 13, 0.1: 6}


def test_what_is_stored_of_people_follows_from_the_pairs():
    table, people = papers.results("coreinfer", "pairs"), datasets.load("lee").similarity
    judged = people[table["first"], table["second"]]
    rho = papers.results("coreinfer", "meaning").set_index("score")["rho"]
    for name in table.columns[2:]:
        assert rho[name] == pytest.approx(stats.spearmanr(table[name], judged).statistic, abs=1e-3)
    layers = papers.results("coreinfer", "layers")
    assert len(layers) == 30 and (layers["low"] <= layers["rho"]).all() and (layers["rho"] <= layers["high"]).all()


def test_correlations_by_layer_are_spearmans():
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(50, 1)
    overlaps, judged = rng.random((30, 1225)), rng.random(1225)
    found = recipe.by_depth(overlaps, judged, pd.DataFrame({"first": first, "second": second}), n=50)
    for layer in (0, 29):
        assert found["rho"][layer] == pytest.approx(stats.spearmanr(overlaps[layer], judged).statistic, abs=1e-4)


def test_a_text_is_in_every_comparison_of_stability():
    table = papers.results("coreinfer", "stability")
    assert (table.groupby(["kept", "what"])["text"].nunique() == recipe.TEXTS).all()
    rank = table[table["what"] == "continuation, rank of own"]["value"]
    assert rank.between(1, recipe.TEXTS).all() and pd.api.types.is_numeric_dtype(rank)
