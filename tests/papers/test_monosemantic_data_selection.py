"""The method cells of the monosemantic-data-selection notebook, its recipe and what that stored."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from nbkit import hooks, models, papers, recipes
from nbkit.errors import LayerNotFound, NotFinite

SLUG = "monosemantic-data-selection"
method = papers.method(SLUG)
recipe = recipes.load(f"papers/{SLUG}/recipe.py")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llama():
    return models.load("tiny-llama", seed=0), models.tokenizer("tiny-llama")


# similarity and selection


def test_jaccard_is_min_over_max_and_of_sets_the_set_jaccard():
    z, target = random(40, 30).relu(), random(30, seed=1).relu()
    brute = torch.minimum(z, target).sum(1) / torch.maximum(z, target).sum(1)
    torch.testing.assert_close(method.jaccard(z, target), brute)
    sets = (z > 0.5).float(), (target > 0.5).float()
    both, either = (sets[0] * sets[1]).sum(1), ((sets[0] + sets[1]) > 0).sum(1)
    torch.testing.assert_close(method.jaccard(*sets), both / either)


def test_jaccard_identities():
    z = random(30).relu()
    assert method.jaccard(z[None], z).item() == pytest.approx(1)
    for c in (0.25, 3.0):
        assert method.jaccard(c * z[None], z).item() == pytest.approx(min(c, 1 / c))
    assert method.jaccard(torch.tensor([[1.0, 2, 0]]), torch.tensor([2.0, 1, 1])).item() == pytest.approx(2 / 5)
    assert method.jaccard(torch.tensor([[1.0, 0]]), torch.tensor([0.0, 1])).item() == 0
    assert method.jaccard(torch.zeros(1, 3), torch.zeros(3)).item() == 0


def test_selection_is_by_similarity_to_the_mean_example_and_ties_go_to_the_lower_number():
    z, examples = random(50, 20).relu(), random(4, 20, seed=1).relu()
    for metric, score in method.METRICS.items():
        best = method.select(z, examples, 7, metric)
        expected = score(z, examples.mean(0))
        assert set(best.tolist()) == set(expected.topk(7).indices.tolist()), metric
        assert (expected[best].diff() <= 0).all()
    same = torch.ones(6, 3)
    assert method.select(same, same[:1], 4).tolist() == [0, 1, 2, 3]


def test_mean_pooling_forgets_how_often_a_text_is_said_and_sum_pooling_does_not():
    z = random(9, 12).relu()
    of = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    mean, total = method.pool_tokens(z, of), method.pool_tokens(z, of, "sum")
    torch.testing.assert_close(mean[1], z[4:6].mean(0))
    torch.testing.assert_close(total[2], z[6:].sum(0))
    twice = method.pool_tokens(torch.cat([z, z]), torch.cat([of, of]))
    torch.testing.assert_close(twice, mean)
    double = method.pool_tokens(torch.cat([z, z]), torch.cat([of, of]), "sum")
    torch.testing.assert_close(method.jaccard(double, total[0])[0], torch.tensor(0.5))


# the autoencoder


def test_a_code_has_at_most_k_entries_and_none_below_zero():
    sae = method.TopKSAE(16, 64, 5, seed=2)
    z = sae.encode(random(3, 10, 16))
    assert z.shape == (3, 10, 64) and ((z > 0).sum(-1) <= 5).all() and (z >= 0).all()
    full = torch.relu((random(10, 16) - sae.b_pre) @ sae.W_enc.T + sae.b_enc)
    kept = sae.encode(random(10, 16))
    torch.testing.assert_close(kept.sum(-1), full.topk(5).values.sum(-1))
    torch.testing.assert_close(sae.encode(random(10, 16), 64), full)


def test_with_identity_weights_and_all_latents_the_code_is_relu():
    sae = method.TopKSAE(8, 8, 8)
    sae.W_enc.data = torch.eye(8)
    torch.testing.assert_close(sae.encode(random(5, 8)), random(5, 8).relu())


def test_training_follows_the_public_steps():
    """EleutherAI/sparsify's, written out: FVU, no gradient along a latent's direction, unit directions."""
    h = random(200, 12) @ random(12, 12, seed=1) + 3
    ours = method.TopKSAE(12, 30, 4, seed=0)
    theirs = copy.deepcopy(ours)
    history = method.train(ours, h, steps=15, batch=50, seed=3)
    x = h / (h - h.mean(0)).norm(dim=1).mean()
    theirs.b_pre.data = x.mean(0)
    adam, generator = torch.optim.Adam(theirs.parameters(), lr=1e-3), torch.Generator().manual_seed(3)
    for step in range(15):
        some = x[torch.randint(200, (50,), generator=generator)]
        a = ((some - theirs.b_pre) @ theirs.W_enc.T + theirs.b_enc).relu()
        values, at = a.topk(4)
        back = F.embedding_bag(at, theirs.W_dec, per_sample_weights=values, mode="sum") + theirs.b_pre
        loss = (back - some).pow(2).sum() / (some - some.mean(0)).pow(2).sum()
        assert history[step] == pytest.approx(loss.item(), rel=1e-4)
        adam.zero_grad()
        loss.backward()
        parallel = torch.einsum("ij,ij->i", theirs.W_dec.grad, theirs.W_dec.data)
        theirs.W_dec.grad -= parallel[:, None] * theirs.W_dec.data
        adam.step()
        theirs.W_dec.data /= theirs.W_dec.data.norm(dim=1, keepdim=True)
    assert history[-1] < history[0]
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(30))
    assert method.unexplained(ours, h).item() == pytest.approx(method.unexplained(theirs, x).item(), rel=1e-4)


# states and tuning


def test_states_are_those_of_each_text_read_alone():
    model, tokenizer = llama()
    texts = ["a bird", "a small boat with two oars", "milk"]
    h, of = method.token_states(model, tokenizer, texts, "model.layers.5")
    for number, text in enumerate(texts):
        ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad(), hooks.record(model, "model.layers.5") as acts:
            model(input_ids=ids)
        torch.testing.assert_close(h[of == number], acts["model.layers.5"][0, 1:], rtol=1e-4, atol=1e-4)


def test_batch_loss_is_the_loss_of_the_texts_read_alone():
    model, tokenizer = llama()
    ids = tokenizer(["a bird", "a small boat with two oars"], add_special_tokens=False)["input_ids"]
    total = 0.0
    for some in ids:
        row = torch.tensor([[0, *some]])
        total += F.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="sum").item()
    assert recipe.batch_loss(model, ids).item() == pytest.approx(total / sum(map(len, ids)), rel=1e-4)


def test_tuning_on_a_few_texts_makes_them_likelier_and_is_repeatable():
    model, tokenizer = llama()
    ids = tokenizer(["a bird that sings", "a fish that swims"], add_special_tokens=False)["input_ids"]
    before = recipe.batch_loss(model, ids).item()
    after = [recipe.batch_loss(recipe.tune(copy.deepcopy(model), ids, steps=3, batch=2), ids).item() for _ in "ab"]
    assert after[0] == after[1] < before


# bad input


def test_bad_input_raises_and_changes_nothing():
    model, tokenizer = llama()
    sae, h, of = method.TopKSAE(6, 12, 3), random(20, 6), torch.arange(20)
    z = h.relu()
    before = [copy.deepcopy(part.state_dict()) for part in (model, sae)]
    ids = [[1, 2, 3], [4, 5]]
    for call, error in (
        (lambda: method.token_states(model, tokenizer, "a bird", "model.layers.5"), ValueError),
        (lambda: method.token_states(model, tokenizer, [], "model.layers.5"), ValueError),
        (lambda: method.token_states(model, tokenizer, ["a", ""], "model.layers.5"), ValueError),
        (lambda: method.token_states(model, tokenizer, ["a"], "model.layers.99"), LayerNotFound),
        (lambda: method.TopKSAE(6, 12, 0), ValueError),
        (lambda: method.TopKSAE(6, 12, 13), ValueError),
        (lambda: sae.encode(h, 0), ValueError),
        (lambda: sae.encode(h, 13), ValueError),
        (lambda: sae.encode(h[:, :5]), ValueError),
        (lambda: method.train(sae, h, steps=0, batch=4), ValueError),
        (lambda: method.train(sae, h, batch=21), ValueError),
        (lambda: method.train(sae, h, batch=1), ValueError),
        (lambda: method.train(sae, h[:, :5], batch=4), ValueError),
        (lambda: method.train(sae, torch.ones(20, 6), batch=4), ValueError),
        (lambda: method.train(sae, h * float("nan"), batch=4), NotFinite),
        (lambda: method.pool_tokens(z, of, "max"), ValueError),
        (lambda: method.pool_tokens(z, of[:-1]), ValueError),
        (lambda: method.pool_tokens(z[:0], of[:0]), ValueError),
        (lambda: method.jaccard(h, z[0]), ValueError),
        (lambda: method.jaccard(z, h[0]), ValueError),
        (lambda: method.jaccard(z, z[0, :1]), ValueError),
        (lambda: method.jaccard(z * float("nan"), z[0]), ValueError),
        (lambda: method.select(z, z[:2], 0), ValueError),
        (lambda: method.select(z, z[:2], 21), ValueError),
        (lambda: method.select(z, z[:0], 3), ValueError),
        (lambda: method.select(z, z[0], 3), ValueError),
        (lambda: method.select(z, z[:2, :5], 3), ValueError),
        (lambda: method.select(z * float("nan"), z[:2], 3, "cosine"), ValueError),
        (lambda: method.select(z, torch.zeros(2, 6), 3), ValueError),
        (lambda: method.select(z, z[:2], 3, "dot"), ValueError),
        (lambda: recipe.tune(model, ids, steps=0, batch=2), ValueError),
        (lambda: recipe.tune(model, ids, batch=3), ValueError),
    ):
        with pytest.raises(error):
            call()
    for part, old in zip((model, sae), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in part.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# the recipe and what it stored


def test_pool_examples_and_test_texts_are_apart_and_every_topic_has_as_many():
    texts = recipe.texts()
    assert not texts["entry"].duplicated().any() and not texts["text"].duplicated().any()
    assert (texts.query("use == 'pool'").groupby("topic").size() == recipe.PER_TOPIC).all()
    assert (texts.query("use == 'example'").groupby(["topic", "draw"]).size() == recipe.M).all()
    stored = papers.results(SLUG, "texts")
    assert stored["entry"].tolist() == texts.query("use != 'other'")["entry"].tolist()


def test_bm25_is_the_formula_and_a_text_without_a_shared_word_gets_nothing(monkeypatch):
    use = ["other"] * 2 + ["pool"] * 3 + ["example"]
    text = ["bird sings", "fish swims", "bird bird nest", "fish", "stone", "bird sings"]
    monkeypatch.setattr(recipe, "texts", lambda: pd.DataFrame({"use": use, "text": text}))
    monkeypatch.setattr(recipe, "POOL", 3)
    found = recipe.counted()
    scores = found["BM25"][:3] @ found["BM25"][3]
    rare = np.log((5 - 2 + 0.5) / (2 + 0.5) + 1)  # bird: in 2 of the 5 texts of pool and others
    length = 0.25 + 0.75 * 3 / (5 / 3)
    assert scores.tolist() == pytest.approx([rare * 2 * 2.2 / (2 + 1.2 * length), 0, 0])
    alike = F.cosine_similarity(found["TF-IDF"][:3], found["TF-IDF"][3:])
    assert alike[0] > 0 and alike[1:].tolist() == [0, 0]


def test_tuning_reads_every_text_once_before_any_again(monkeypatch):
    seen = []
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(recipe, "batch_loss", lambda m, ids: (seen.extend(ids), m(torch.ones(1)).sum())[1])
    recipe.tune(model, list(range(12)), steps=6, batch=4)
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]


def test_packing_keeps_codes_to_half_a_255th():
    code = random(7, 40).relu()
    parts = recipe.packed(code)
    bits = np.unpackbits(parts["bits"].numpy(), axis=1)[:, :40].astype(bool)
    back = torch.zeros(7, 40)
    back[torch.from_numpy(bits)] = parts["values"].float()
    back *= parts["scale"][:, None] / 255
    assert ((back - code).abs() <= code.amax(1, keepdim=True) / 509).all()


def test_every_selection_is_stored_for_every_target_and_draw():
    table = papers.results(SLUG)
    key = ["features", "layer", "K", "pooling", "seed", "metric", "examples"]
    assert (table.groupby(key, dropna=False).size() == recipe.TOPICS * recipe.DRAWS).all()
    assert table["precision"].between(0, 1).all()
    picked = papers.tensors(SLUG, "selections")["selected"].long()
    topic = papers.results(SLUG, "texts")["topic"].to_numpy()[: recipe.POOL]
    for t, name in enumerate(recipe.topics()):
        best = picked[t, -1, 2, 0, 0]
        assert best.unique().numel() == recipe.K
        row = table.query(
            "features == 'SAE' and layer == 28 and K == 32 and pooling == 'mean' and seed == 0 and metric == 'Jaccard'"
            " and examples == 8 and draw == 0 and topic == @name"
        )
        assert row["precision"].item() == pytest.approx((topic[best] == name).mean(), abs=1e-4)


def test_each_way_of_tuning_has_all_targets_and_draws():
    table = papers.results(SLUG, "downstream")
    sizes = table.groupby("selected by").size()
    assert sizes.drop("before").eq(recipe.TOPICS * recipe.DRAWS).all() and sizes["before"] == recipe.TOPICS
    assert (table.groupby("selected by")["rate"].nunique() == 1).all()
