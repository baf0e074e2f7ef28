"""The method cells of the milan notebook, used without the notebook."""

from __future__ import annotations

import math
import random

import pandas as pd
import pytest
import torch
from torch import nn

from nbkit import models, papers, recipes
from nbkit.errors import NotFinite

method = papers.method("milan")
world = recipes.load("papers/milan/recipe.py")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(words: int = 4, features: int = 6):
    """A describer and a language model of a few words, untrained but far from uniform."""
    torch.manual_seed(0)
    nets = method.Describer(words, features, 5, 7).eval(), method.LanguageModel(words, 5, 7).eval()
    for net in nets:
        for p in net.parameters():
            nn.init.normal_(p, std=0.8)
    return *nets, torch.rand(3, features)


def subject():
    return models.build("small-cnn", seed=0, widths=(16, 32, 64)).eval()


def test_the_threshold_of_three_texts_is_the_ratio_of_the_logarithms():
    table = pd.DataFrame({"text": list("abc"), "given E": [math.log(p) for p in (0.5, 0.3, 0.2)],
                          "prior": [math.log(p) for p in (0.6, 0.1, 0.3)]})  # fmt: skip
    at = math.log(0.5 / 0.3) / math.log(0.6 / 0.1)
    assert at == pytest.approx(0.285, abs=5e-4)
    assert [method.rerank(table, lam)["text"][0] for lam in (0, at - 1e-6, at + 1e-6, 1)] == list("aabb")
    assert list(table.columns) == ["text", "given E", "prior"]


@pytest.mark.parametrize("lam", [0.0, 0.2, 1.0])
def test_with_a_beam_of_all_texts_reranking_is_the_exhaustive_arg_max(lam):
    describer, lm, feats = small()
    every = torch.cartesian_prod(*[torch.arange(7)] * 3)
    exact = method.logp(describer, every, feats.expand(len(every), -1, -1)) - lam * method.logp(lm, every, every)
    found = method.rerank(method.candidates(describer, lm, feats, list("wxyz"), beam=1000, length=3), lam)
    assert found["score"][0] == pytest.approx(exact.max().item(), abs=1e-5)


def test_texts_of_a_whole_beam_have_probabilities_that_add_up_to_one_and_a_beam_of_one_is_greedy():
    describer, _, feats = small()
    _, score = method.beam_search(describer, feats, beam=1000, length=3)
    assert score.exp().sum().item() == pytest.approx(1, abs=1e-5)
    state, word, words = describer.start(feats[None]), torch.tensor([4]), []
    for _ in range(3):
        scores, state = describer.step(feats[None], word, state)
        word = scores.argmax(1)
        words.append(word.item())
        if words[-1] == 5:
            break
    greedy = method.beam_search(describer, feats, beam=1, length=3)[0][0].tolist()
    assert greedy[: len(words)] == words


def test_log_probability_counts_the_stop_and_nothing_after_it():
    describer, _, feats = small()
    with_rest = torch.tensor([[0, 1, 5, 2, 3], [0, 1, 5, 6, 6]])
    short = torch.tensor([[0, 1, 5]]).expand(2, -1)
    both = [method.logp(describer, words, feats.expand(2, -1, -1)) for words in (with_rest, short)]
    torch.testing.assert_close(*both)
    state, total = describer.start(feats[None]), 0
    for before, word in ((4, 0), (0, 1), (1, 5)):
        scores, state = describer.step(feats[None], torch.tensor([before]), state)
        total += scores[0, word].item()
    assert both[0][0].item() == pytest.approx(total, abs=1e-5)


def test_the_language_model_is_torchs_lstm_and_sees_nothing():
    _, lm, feats = small()
    whole = nn.LSTM(5, 7, batch_first=True)
    whole.load_state_dict({f"{k}_l0": v for k, v in lm.lstm.state_dict().items()})
    words = torch.tensor([[2, 0, 5]])
    hidden, _ = whole(lm.embedding(torch.tensor([[4, 2, 0]])))
    expected = lm.output(hidden).log_softmax(2).gather(2, words[..., None]).sum()
    torch.testing.assert_close(method.logp(lm, words, feats[None])[0], expected)
    torch.testing.assert_close(method.logp(lm, words, 9 * feats[None])[0], expected)


def test_likelier_texts_come_first_and_the_prior_falls_as_lambda_rises():
    describer, lm, feats = small()
    table = method.candidates(describer, lm, feats, list("wxyz"), beam=60, length=3)
    assert table["given E"].is_monotonic_decreasing
    priors = [method.rerank(table, lam)["prior"][0] for lam in (0, 0.1, 0.2, 0.5, 1, 3)]
    assert all(a >= b for a, b in zip(priors, priors[1:], strict=False))


def test_exemplars_are_the_largest_and_a_hundredth_of_all_places_is_above_the_level():
    maps = torch.rand(40, 3, 10, 10, generator=generator())
    top, levels = method.exemplars(maps, k=5, q=0.99)
    for unit in range(3):
        assert top[unit].tolist() == maps[:, unit].amax((1, 2)).argsort(descending=True)[:5].tolist()
        assert (maps[:, unit] > levels[unit]).sum() == 40
        assert levels[unit].item() == pytest.approx(maps[:, unit].quantile(0.99).item(), abs=1e-3)
    assert method.exemplars(torch.zeros(9, 1, 4, 4), k=3)[1].tolist() == [0]


def test_a_region_is_the_weighted_mean_of_the_maps_and_an_empty_mask_stays_empty():
    net, x = subject(), torch.rand(2, 1, 56, 56, generator=generator())
    masks = torch.zeros(2, 1, 56, 56)
    masks[0, 0, 8:24, 12:28] = 1
    feats = method.encode(net, x, masks)
    assert feats.shape == (2, 112) and not feats[1].any()
    torch.testing.assert_close(feats[0, :16], net[:2](x)[0, :, 8:24, 12:28].mean((1, 2)))


def test_cutting_a_unit_is_zeroing_the_weights_that_read_it():
    net, x = subject(), torch.rand(20, 1, 56, 56, generator=generator())
    y = torch.arange(20) % 10
    other = subject()
    with torch.no_grad():
        other.conv3.weight[:, [4, 9]] = 0
        other.head.weight[:, 3] = 0
    expected = (other(x).argmax(1) == y).float().mean().item()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert method.accuracy_without(net, [("relu2", 4), ("relu3", 3), ("relu2", 9)], x, y) == pytest.approx(expected)
    fast = world.Cutter(net, x, y)
    for units in ([], [("relu1", 2)], [("relu2", 4), ("relu3", 3)], [("relu1", 0), ("relu2", 1), ("relu3", 2)]):
        assert fast.accuracy(units) == pytest.approx(method.accuracy_without(net, units, x, y))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_descriptions_imply_what_every_category_with_the_word_has():
    assert world.read("some bootie") == {"boot", "footwear", "garment", "shaft"}
    assert world.read("long-sleeves") == {"long-sleeves", "upperwear", "garment"}
    assert world.read("the head of 7") == {"upper", "seven", "stroke", "digit"}
    assert world.read("mostly thing") == frozenset()
    assert world.f1(world.read("bootie"), world.HAS["boot"]) == 1 and world.f1(frozenset(), frozenset()) == 0
    assert world.f1(frozenset("ab"), frozenset("bcd")) == pytest.approx(0.4)
    assert world.shared([frozenset("ab"), frozenset("ac"), frozenset("a")]) == {"a"}


def test_the_annotator_is_wrong_in_a_tenth_of_its_words_and_varies():
    lot, true = random.Random(0), world.HAS["boot"] | {"upper"}
    texts = [world.annotate(true, lot) for _ in range(4000)]
    said = [world.MEANS[w] for text in texts for w in text.split() if w in world.MEANS]
    assert sum(a not in true for a in said) / len(said) == pytest.approx(0.1, abs=0.015)
    assert len(set(texts)) > 100 and all(set(text.split()) <= set(world.WORDS) for text in texts)
    assert len(world.tokens(texts[:5])[0]) <= 10


def test_canvases_hold_what_their_categories_say_and_adversarial_digits_are_never_the_class():
    garments, digits = world.tiles("test")
    for agree, low, high in ((None, 0, 0), (0.5, 0.5, 0.6), (0, 0.05, 0.15)):
        x, y, categories = world.scenes(garments, digits, 600, agree=agree, seed=1)
        filled = x.view(-1, 2, 28, 2, 28).amax((2, 4)).view(-1, 4) > 0
        assert torch.equal(filled, categories >= 0)
        assert torch.equal(categories.masked_fill(categories >= 10, -1).amax(1), y)
        assert low <= (categories.amax(1) - 10 == y).float().mean().item() <= high
    masks = torch.zeros(600, 1, 56, 56)
    masks[:] = digit_tiles(categories)
    assert all("digit" in found for found in world.regions(masks, categories))
    used = [set(range(p.start, p.stop)) for p in world.POOLS.values()]
    assert sum(map(len, used)) == len(set().union(*used))


def test_beyond_the_kind_leaves_out_digit_and_garment_and_permutes_in_a_layer_among_texts_of_a_kind():
    kinds = [frozenset({"garment"}), frozenset({"digit"})]
    shapes = [{"laces"}, {"skirt"}, {"loop"}, {"curve"}]
    said = [kinds[i // 2] | frozenset(shape) for _ in range(6) for i, shape in enumerate(shapes)]
    layer = torch.arange(24) // 12
    found = world.beyond_the_kind(said, said, layer, generator())
    assert found["own"] == 1 and found["passed"] < 50 and found["kind only"] == 0
    assert found["F1"] == pytest.approx(0.5, abs=0.02)  # one of two shapes of the kind by lot
    bare = world.beyond_the_kind([s & frozenset(world.TYPES["kind"]) for s in said], said, layer, generator())
    assert bare["own"] == 0 and bare["passed"] == 1000 and bare["kind only"] == 24


def digit_tiles(categories: torch.Tensor) -> torch.Tensor:
    whole = (categories >= 10).float().view(-1, 1, 2, 2)
    return whole.repeat_interleave(28, 2).repeat_interleave(28, 3)


def test_bad_input_raises_and_changes_nothing():
    net, x = subject(), torch.rand(4, 1, 56, 56)
    describer, lm, feats = small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    maps = torch.rand(20, 2, 4, 4)
    table = pd.DataFrame({"text": ["a"], "given E": [0.0], "prior": [0.0]})
    for call, error, words in (
        (lambda: method.exemplars(maps, k=0), ValueError, "1 <= k"),
        (lambda: method.exemplars(maps, k=21), ValueError, "1 <= k"),
        (lambda: method.exemplars(maps, q=1.0), ValueError, "0 < q < 1"),
        (lambda: method.exemplars(maps[0]), ValueError, "maps"),
        (lambda: method.exemplars(maps / 0), NotFinite, "maps"),
        (lambda: method.encode(net, x, torch.zeros(4, 1, 56, 56)), ValueError, "every mask is empty"),
        (lambda: method.beam_search(describer, feats, beam=0), ValueError, "at least 1"),
        (lambda: method.beam_search(describer, feats, length=0), ValueError, "at least 1"),
        (lambda: method.beam_search(describer, feats * float("nan")), NotFinite, "feats"),
        (lambda: method.rerank(table, -0.1), ValueError, "0 or more"),
        (lambda: method.accuracy_without(net, [("relu9", 0)], x, torch.zeros(4).long()), KeyError, "relu9"),
        (lambda: method.accuracy_without(net, [("relu1", 16)], x, torch.zeros(4).long()), IndexError, "relu1"),
        (lambda: world.scenes(*world.tiles("test"), 0, agree=0, seed=0), ValueError, "n >= 1"),
        (lambda: world.tokens(["a cat"]), ValueError, "not known"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.training and not any(module._forward_hooks for module in net.modules())
    assert lm.words == describer.words == 4
