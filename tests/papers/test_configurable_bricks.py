"""The method cells of the configurable-bricks notebook on small transformers, and what its recipe stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from nbkit import hooks, language, papers, recipes
from nbkit.errors import NotFinite

method = papers.method("configurable-bricks")
recipe = recipes.load("papers/configurable-bricks/recipe.py")


def built(kind: str = "llama") -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    if kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=64, vocab_size=40))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    for p in model.parameters():  # the initial weights are too small for a mask to show
        p.data = torch.randn_like(p) * 0.3 + (1 if p.ndim == 1 else 0)
    return model.double().eval()


def tokens(n: int, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 40, (n, length), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def random_brick(model, share=0.25, seed=0):
    shape = method.lengths(model).shape
    return method.top(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), share)


# the score


@pytest.mark.parametrize("values", [2, 5, 50, 10**6])  # the fewer values, the more ties
def test_average_precision_is_that_of_scikit_learn_with_ties_and_without(values):
    generator = torch.Generator().manual_seed(values)
    scores = torch.randint(0, values, (200, 70), generator=generator).float()
    relevant = torch.rand(70, generator=generator) < 0.3
    found = method.average_precision(method.places(scores), relevant)
    expected = [average_precision_score(relevant.numpy(), row.numpy()) for row in scores]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_a_neuron_that_is_the_label_scores_1_and_a_constant_one_the_share():
    relevant = torch.tensor([True, False, False, True, False])
    scores = torch.stack([relevant.float(), torch.ones(5), -relevant.float()])
    found = method.average_precision(method.places(scores), relevant)
    assert found[:2].tolist() == [1.0, 0.4] and found[2] < 0.5


def test_scores_follow_the_groups_and_not_the_order_of_the_texts():
    generator = torch.Generator().manual_seed(0)
    A, group = torch.rand(12, 2, 7, generator=generator), torch.arange(12) % 3
    scores = method.func_scores(A, group)
    order = torch.randperm(12, generator=generator)
    assert scores.shape == (3, 2, 7)
    torch.testing.assert_close(method.func_scores(A[order], group[order]), scores)
    expected = average_precision_score((group == 1).numpy(), A[:, 1, 4].numpy())
    assert scores[1, 1, 4].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_activation_is_the_mean_size_of_what_the_down_projection_reads_without_the_first_token(kind):
    model, ids = built(kind), tokens(5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    A = method.activations(model, ids, batch=2)
    names = language.mlp_hidden(model)
    with hooks.record(model, names, at="input") as h:
        logits(model, ids)
    for layer, name in enumerate(names):
        torch.testing.assert_close(A[:, layer], h[name][:, 1:].abs().mean(1))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_magnitude_is_the_length_of_what_a_neuron_adds():
    model, ids = built(), tokens(1, 4)
    name = language.mlp_hidden(model)[1]
    with hooks.record(model, name, at="input") as h:
        logits(model, ids)
    W, a = model.get_submodule(name).weight.detach(), h[name][0, 2]
    torch.testing.assert_close((W * a).norm(dim=0), a.abs() * method.lengths(model)[1])


# bricks and masks


def test_top_takes_the_share_of_each_layer_ties_by_place():
    scores = torch.tensor([[1.0, 3, 2, 3], [0, 0, 0, 0]])
    assert method.top(scores, 0.5).tolist() == [[False, True, False, True], [True, True, False, False]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_removed_brick_is_the_network_without_its_columns(kind):
    model, ids = built(kind), tokens(3)
    brick, dense = random_brick(model), logits(model, ids)
    with method.removed(model, brick):
        masked = logits(model, ids)
    assert torch.equal(logits(model, ids), dense) and (masked - dense).abs().max() > 1e-3
    for name, row in zip(language.mlp_hidden(model), brick, strict=True):
        weight = model.get_submodule(name).weight  # GPT-2's has a row a neuron
        (weight if kind == "gpt2" else weight.T).data[row] = 0
    torch.testing.assert_close(logits(model, ids), masked)


def test_nothing_removed_changes_nothing():
    model, ids = built(), tokens(2)
    dense = logits(model, ids)
    with method.removed(model, torch.zeros(3, 24, dtype=torch.bool)):
        assert torch.equal(logits(model, ids), dense)
    with method.lowest_zeroed(model, 0.0, method.lengths(model)):
        assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("by", ["activation", "output magnitude"])
def test_of_every_token_the_lowest_are_zeroed(by):
    model, ids = built(), tokens(2)
    name = language.mlp_hidden(model)[0]
    with hooks.record(model, name, at="input") as h:
        logits(model, ids)
    weight = method.lengths(model) if by == "output magnitude" else torch.ones(3, 24).double()
    with method.lowest_zeroed(model, 0.5, weight), hooks.record(model, name, at="input") as low:
        logits(model, ids)
    size = h[name].abs() * weight[0]
    expected = torch.where(size > size.sort(-1).values[..., 11:12], h[name], 0.0)
    torch.testing.assert_close(low[name], expected)


def test_matched_neurons_are_others_as_many_and_near_in_rank():
    size = torch.rand(4, 200, generator=torch.Generator().manual_seed(0))
    brick = method.top(size, 0.2)
    found = method.matched(brick, size, 0, near=4)
    assert not (found & brick).any() and torch.equal(found.sum(1), brick.sum(1))
    assert torch.equal(found, method.matched(brick, size, 0, near=4))
    assert not torch.equal(found, method.matched(brick, size, 1, near=4))
    scattered = method.top(torch.rand(4, 200, generator=torch.Generator().manual_seed(1)), 0.05)
    rank = size.argsort(1).argsort(1).double()
    like = method.matched(scattered, size, 0, near=4)
    for r, a, b in zip(rank, scattered, like, strict=True):
        assert abs(r[a].mean() - r[b].mean()) < 10


def test_overlap_counts_shared_neurons_over_the_rows():
    bricks = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 1]]]).bool()
    torch.testing.assert_close(method.overlap(bricks), torch.tensor([[1, 1 / 2], [1 / 3, 1]]).double())


# bad input


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: method.activations(built(), tokens(2, 1)), ValueError),
        (lambda: method.activations(built(), tokens(2)[0]), ValueError),
        (lambda: method.activations(nn.Linear(2, 2), tokens(2)), TypeError),
        (lambda: method.lengths(nn.Linear(2, 2)), TypeError),
        (lambda: method.places(torch.tensor([[1.0, float("nan")]])), NotFinite),
        (lambda: method.average_precision(torch.ones(2, 3), torch.zeros(3, dtype=torch.bool)), ValueError),
        (lambda: method.average_precision(torch.ones(2, 3), torch.ones(2, dtype=torch.bool)), ValueError),
        (lambda: method.average_precision(torch.ones(2, 3), torch.ones(3)), ValueError),
        (lambda: method.func_scores(torch.rand(4, 1, 2), torch.zeros(4, dtype=torch.long)), ValueError),
        (lambda: method.func_scores(torch.rand(4, 1, 2), torch.tensor([0, 0, 0, 1])), ValueError),
        (lambda: method.func_scores(torch.rand(4, 1, 2), torch.tensor([0, 0, 2, 2])), ValueError),
        (lambda: method.func_scores(torch.rand(4, 2), torch.tensor([0, 0, 1, 1])), ValueError),
        (lambda: method.top(torch.rand(2, 50), 0.0), ValueError),
        (lambda: method.top(torch.rand(2, 50), 1.0), ValueError),
        (lambda: method.top(torch.rand(2, 5), 0.05), ValueError),
        (lambda: method.top(torch.tensor([float("nan"), 1.0]), 0.5), NotFinite),
        (lambda: method.matched(torch.ones(1, 40).bool(), torch.rand(1, 40), 0), ValueError),
        (lambda: method.matched(torch.ones(1, 40).bool(), torch.rand(1, 41), 0), ValueError),
        (lambda: method.func_scores(torch.rand(4, 1, 2), torch.tensor([0.5, 0.5, 1, 1])), ValueError),
        (lambda: method.func_scores(torch.rand(4, 1, 2), torch.tensor([-1, -1, 0, 0])), ValueError),
        (lambda: method.matched(torch.zeros(1, 40), torch.rand(1, 40), 0), ValueError),
        (lambda: method.matched(torch.zeros(1, 40).bool(), torch.rand(1, 40), 0, near=0), ValueError),
        (lambda: method.matched(torch.zeros(1, 40).bool(), torch.full((1, 40), float("nan")), 0), ValueError),
        (lambda: method.overlap(torch.ones(4).bool()), ValueError),
        (lambda: method.overlap(torch.zeros(2, 1, 4).bool()), ValueError),
        (lambda: method.overlap(torch.ones(2, 1, 4)), ValueError),
    ],
)
def test_bad_input_is_refused(call, error):
    with pytest.raises(error):
        call()


def test_bad_masks_are_refused_and_the_model_stays_as_it_is():
    model, ids = built(), tokens(2)
    dense = logits(model, ids)
    bad = [
        lambda: method.removed(model, torch.ones(3, 24)),
        lambda: method.removed(model, torch.ones(2, 24).bool()),
        lambda: method.lowest_zeroed(model, 1.0, torch.ones(3, 24)),
        lambda: method.lowest_zeroed(model, -0.1, torch.ones(3, 24)),
        lambda: method.lowest_zeroed(model, 0.5, torch.ones(24)),
    ]
    for context in bad:
        with pytest.raises(ValueError), context():
            pass
    assert torch.equal(logits(model, ids), dense)


# what is stored


def test_the_windows_are_equally_long_and_no_two_are_the_same():
    ids = papers.tensors("configurable-bricks", "windows")["ids"]
    assert ids.shape == (len(method.GROUPS), recipe.N, recipe.LENGTH) and 0 <= ids.min() and ids.max() < 49152
    assert len({tuple(row) for row in ids.flatten(0, 1).tolist()}) == len(method.GROUPS) * recipe.N


def test_no_window_is_scored_from_and_evaluated_on_in_one_fold_and_folds_evaluate_on_different_ones():
    ids = papers.tensors("configurable-bricks", "windows")["ids"]
    seen = []
    for fold in range(recipe.FOLDS):
        held, rest = recipe.split(ids, fold)
        assert not set(held.flatten().tolist()) & set(rest.flatten().tolist())
        assert (held // recipe.N == torch.arange(len(ids))[:, None]).all()
        seen += held.flatten().tolist()
    assert len(set(seen)) == len(seen) == recipe.FOLDS * recipe.HELD * len(ids)


def test_functions_come_without_docstrings():
    source = b'"""top"""\n@deco\ndef f(x):\n    """doc"""\n    # note\n    return x\n\nclass C:\n    pass\n'
    assert recipe.functions(source) == "def f(x):\n    return x"


def test_the_tables_are_whole():
    table = papers.results("configurable-bricks", "damage")
    kinds = table.groupby("kind")["draw"].nunique()
    assert kinds["matched"] == kinds["matched own"] == recipe.MATCHED
    own = table.query("kind == 'brick'")
    assert len(own) == recipe.FOLDS * len(method.GROUPS) ** 2 and table["loss"].between(0, 20).all()
    per_case = table[table["kind"].isin(["matched", "matched own"])].groupby(["fold", "kind", "brick"]).size()
    assert (per_case == recipe.MATCHED).all() and len(per_case) == 2 * recipe.FOLDS * len(method.GROUPS)
    at = ["fold", "brick", "draw", "texts"]
    blind = table[table["kind"] == "blind"].set_index(at)["loss"]
    assert len(blind) == recipe.BLIND * recipe.FOLDS * len(method.GROUPS) ** 2
    matched = table[table["kind"] == "matched own"].set_index(at)["loss"]
    both = blind.index.intersection(matched.index)  # the same masks, on the texts they match
    assert len(both) == recipe.BLIND * recipe.FOLDS * len(method.GROUPS)
    assert (blind[both] - matched[both]).abs().max() < 1e-3
    masking = papers.results("configurable-bricks", "masking")
    assert not masking.duplicated(["fold", "by", "share", "group"]).any()
