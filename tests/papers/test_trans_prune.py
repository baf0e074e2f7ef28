"""TransPrune: transitions and scores by hand, pruned passes against loops, its rivals, and what is stored."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from nbkit import attribution, hooks, papers, recipes
from nbkit.errors import LayerNotFound

tp = papers.method("trans-prune")
recipe = recipes.load("papers/trans-prune/recipe.py")
FREE, ASKING = (3, 19), (19, 24)  # of 28 tokens; the last four are the answer
SPANS = {"kind": tp.LLAMA, "free": FREE, "asking": ASKING}
PICTURE = {"kind": tp.TINY, "free": (1, 50), "asking": (0, 1), "collect": (0, 1)}
COUNTS = {2: 12, 3: 9, 5: 4}
COLLECT = (1, 2, 3, 4)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama():
    """Seven blocks, two key heads for four query heads, weights large enough that tokens differ."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for i, p in enumerate(model.parameters()):
        if p.ndim > 1:
            p.data = 0.3 * draw(*p.shape, seed=i)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 50, (2, 28), generator=torch.Generator().manual_seed(1))


# the score


@pytest.mark.parametrize("c", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_a_module_that_multiplies_gives_every_token_an_nth_of_the_factor(c, variant):
    before = draw(2, 9, 5)
    m, d = tp.transition(before, c * before)
    score = m * tp.turning(d, torch.ones(9, dtype=torch.bool), variant)
    torch.testing.assert_close(score, torch.full((2, 9), c / 9))


def test_one_token_turned_by_90_degrees_weighs_e_times_the_others():
    before = draw(1, 6, 2)
    after = before.clone()
    after[0, 2] = before[0, 2] @ torch.tensor([[0.0, 1], [-1, 0]])
    m, d = tp.transition(before, after)
    weight = tp.turning(d, torch.ones(6, dtype=torch.bool))[0]
    torch.testing.assert_close(m, torch.ones(1, 6))
    for other in (0, 1, 3, 4, 5):
        assert (weight[2] / weight[other]).item() == pytest.approx(math.e, rel=1e-5)


def test_negation_is_no_change_of_direction_for_the_paper_and_the_largest_for_the_code():
    before = draw(1, 6, 8)
    after = before.clone()
    after[0, 4] *= -1
    _, d = tp.transition(before, after)
    among = torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(tp.turning(d, among), torch.full((1, 6), 1 / 6))
    code = tp.turning(d, among, "code")[0]
    assert (code[4] / code[0]).item() == pytest.approx(math.e**2, rel=1e-5)


def test_the_paper_weighs_among_the_tokens_that_may_go_and_the_code_among_all():
    d = draw(2, 10).tanh()
    among = torch.zeros(10, dtype=torch.bool)
    among[3:8] = True
    paper, code = tp.turning(d, among), tp.turning(d, among, "code")
    torch.testing.assert_close(paper[:, 3:8].sum(1), torch.ones(2))
    assert (paper[:, ~among] == 0).all()
    torch.testing.assert_close(code.sum(1), torch.ones(2))
    torch.testing.assert_close(code, (1 - d).exp() / (1 - d).exp().sum(1, keepdim=True))


def stage(n=5, modules=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    draws = [torch.rand(2, 2, n, generator=g) + 0.1 for _ in range(modules)]
    moves = [(i // 2, m, tp.share(s)) for i, (m, s) in enumerate(draws)]
    places = torch.arange(3, 3 + n).expand(2, -1)
    return tp.Stage(moves, torch.rand(2, 3, n, generator=g), torch.randn(2, n, 6, generator=g), places)


def test_the_score_is_the_sum_of_shares_and_its_ends_are_ttv_and_iga():
    given = stage()
    ttv = sum(m * s for _, m, s in given.moves)
    iga = given.attention.mean(1)
    expected = 0.5 * ttv / ttv.sum(1, keepdim=True) + 0.5 * iga / iga.sum(1, keepdim=True)
    torch.testing.assert_close(tp.transprune(given), expected)
    torch.testing.assert_close(2 * tp.transprune(given).sum(1), torch.full((2,), 2.0))  # as the code adds them
    assert torch.equal(tp.transprune(given, 1.0).argsort(1), ttv.argsort(1))
    assert torch.equal(tp.transprune(given, 0.0).argsort(1), iga.argsort(1))


def test_an_even_ttv_leaves_the_order_to_iga():
    given = stage()
    even = given._replace(moves=[(0, torch.full((2, 5), 0.4), torch.full((2, 5), 0.2))])
    assert torch.equal(tp.transprune(even).argsort(1), tp.iga(even).argsort(1))


def test_rivals_are_the_parts_of_the_score():
    given = stage()
    (_, m0, s0), (_, m1, s1), (_, m2, s2), (_, m3, s3) = given.moves
    expected = {
        "TTV": m0 * s0 + m1 * s1 + m2 * s2 + m3 * s3,
        "magnitude": m0 + m1 + m2 + m3,
        "direction": s0 + s1 + s2 + s3,
        "TTV, last layer": m2 * s2 + m3 * s3,
        "last token": given.attention[:, 2],
        "norm": given.hidden.square().sum(-1).sqrt(),
        "recency": given.places.float(),
    }
    for name, by_hand in expected.items():
        torch.testing.assert_close(tp.CRITERIA[name](given), by_hand)


# attention


@pytest.mark.parametrize("block", [0, 2, 6])
def test_iga_of_a_llama_is_its_own_attention(llama, ids, block):
    probabilities = attribution.attention_probabilities(llama, {"input_ids": ids})[block].mean(1)
    with torch.no_grad():
        hidden = llama(input_ids=ids, output_hidden_states=True).hidden_states[block]
    positions = torch.arange(28).expand(2, -1)
    found = tp.ask_llama(llama, block, hidden, positions, torch.arange(*ASKING))
    torch.testing.assert_close(found, probabilities[:, 19:24], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("renumber", [True, False])
def test_iga_after_pruning_is_the_attention_of_the_tokens_left(llama, ids, renumber):
    seen = []

    def rule(given):
        seen.append(given)
        return tp.transprune(given)

    tp.prune(llama, {"input_ids": ids}, {2: 10, 4: 10}, rule, collect=(1,), renumber=renumber, **SPANS)
    left = torch.cat([torch.arange(3).expand(2, -1), seen[1].places, torch.arange(19, 28).expand(2, -1)], 1)
    with hooks.narrow(llama, {"model.layers.2": lambda hidden: left}, renumber=renumber):
        read = attribution.attention_probabilities(llama, {"input_ids": ids})[4].mean(1)
    torch.testing.assert_close(seen[1].attention, read[:, 13:18, 3:13], rtol=1e-4, atol=1e-5)


def test_iga_of_the_picture_networks_is_the_class_tokens_attention(vit, x):
    with torch.no_grad(), hooks.record(vit, ["blocks.2", "blocks.3.attn.weights"]) as acts:
        vit(x)
    found = tp.ask_tiny(vit, 3, acts["blocks.2"], None, torch.tensor([0]))
    torch.testing.assert_close(found[:, 0], acts["blocks.3.attn.weights"].mean(1)[:, 0])


# pruned passes


def by_hand(model, ids, counts, collect, variant, renumber):
    """TransPrune block by block on one sequence, by the equations; logits and the places left."""
    h = model.model.embed_tokens(ids)
    left, lists = list(range(ids.shape[1])), {}
    for i, block in enumerate(model.model.layers):
        if i in counts:
            images = [p for p in left if FREE[0] <= p < FREE[1]]
            ttv = torch.tensor([sum(past[p] for past in lists.values()) for p in images])
            numbers = torch.arange(len(left)) if renumber else torch.tensor(left)
            asks = torch.tensor([j for j, p in enumerate(left) if ASKING[0] <= p < ASKING[1]])
            iga = tp.ask_llama(model, i, h, numbers[None], asks)[0].mean(0)
            iga = torch.stack([iga[left.index(p)] for p in images])
            score = ttv / ttv.sum() + iga / iga.sum()
            best = {images[j] for j in score.topk(counts[i]).indices.tolist()}
            stay = [j for j, p in enumerate(left) if p not in images or p in best]
            h, left = h[:, stay], [left[j] for j in stay]
        numbers = torch.arange(len(left)) if renumber else torch.tensor(left)
        terms = model.model.rotary_emb(h, numbers[None])
        mask = torch.full((len(left), len(left)), -torch.inf).triu(1)[None, None]
        before = block.input_layernorm(h)
        after, _ = block.self_attn(before, position_embeddings=terms, attention_mask=mask)
        h = h + after
        pairs = [(before, after)]
        before = block.post_attention_layernorm(h)
        after = block.mlp(before)
        h = h + after
        pairs.append((before, after))
        for module, (a, b) in enumerate(pairs if i in collect else []):
            odds = {}
            for j, p in enumerate(left):
                cosine = F.cosine_similarity(a[0, j], b[0, j], dim=0).item()
                odds[p] = math.exp(1 - (abs(cosine) if variant == "paper" else cosine))
            total = sum(o for p, o in odds.items() if variant == "code" or FREE[0] <= p < FREE[1])
            ratio = b[0].norm(dim=-1) / a[0].norm(dim=-1)
            lists[i, module] = {p: (ratio[j] * odds[p] / total).item() for j, p in enumerate(left)}
    return model.lm_head(model.model.norm(h)), left


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("renumber", [True, False])
def test_a_pruned_pass_is_the_equations_block_by_block(llama, ids, variant, renumber):
    for row in ids.split(1):
        with torch.no_grad():
            expected, left = by_hand(llama, row, COUNTS, COLLECT, variant, renumber)
        how = {"variant": variant, "renumber": renumber, "collect": COLLECT}
        output, kept = tp.prune(llama, {"input_ids": row}, COUNTS, tp.transprune, **how, **SPANS)
        assert kept[5][0].tolist() == left
        torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-4)


def test_new_positions_and_the_variants_make_a_difference_here(llama, ids):
    """Else the test above could not tell them apart."""
    outputs = [
        tp.prune(llama, {"input_ids": ids}, COUNTS, tp.transprune, collect=COLLECT, **how, **SPANS)[0].logits
        for how in ({}, {"renumber": False}, {"variant": "code"})
    ]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01 and (outputs[0] - outputs[2]).abs().max() > 0.01


@pytest.mark.parametrize("arm", sorted(tp.CRITERIA))
def test_with_all_tokens_kept_nothing_changes_to_the_last_bit(llama, vit, ids, x, arm):
    rule = tp.CRITERIA[arm]
    with torch.no_grad():
        logits, whole = tp.prune(vit, x, {1: 49, 2: 49}, rule, **PICTURE)[0], vit(x)
        assert torch.equal(logits, whole)
        output, _ = tp.prune(llama, {"input_ids": ids}, {2: 16, 4: 16}, rule, collect=(0, 1), **SPANS)
        assert torch.equal(output.logits, llama(input_ids=ids).logits)


def test_what_is_no_image_token_stays_and_order_is_kept(llama, ids):
    _, kept = tp.prune(llama, {"input_ids": ids}, COUNTS, tp.transprune, collect=COLLECT, **SPANS)
    before = set(range(28))
    for block, places in kept.items():
        for row in places.tolist():
            assert row == sorted(set(row)) and {*range(3), *range(19, 28)} <= set(row)
            assert len(row) == 12 + COUNTS[block]
        assert set(places[0].tolist()) <= before
        before = set(places[0].tolist())


def test_the_answer_has_no_say_in_what_stays(llama, ids):
    other = ids.clone()
    other[:, 24:] = 49 - other[:, 24:]
    found = [
        tp.prune(llama, {"input_ids": i}, COUNTS, tp.transprune, collect=COLLECT, **SPANS)[1] for i in (ids, other)
    ]
    assert all(torch.equal(found[0][b], found[1][b]) for b in COUNTS)


def test_ties_keep_the_order_of_the_places(vit, x):
    _, kept = tp.prune(vit, x, {2: 5}, lambda given: torch.zeros(given.places.shape), **PICTURE)
    assert kept[2][0].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_scripts_staircase():
    assert tp.schedule(0.125, 40, (7, 9, 12)) == {7: 35, 9: 25, 12: 5}  # 0.875, 0.625, 0.125
    assert tp.schedule(0.125, 576, (7, 9, 12)) == {7: 504, 9: 360, 12: 72}
    assert tp.schedule(1.0, 49, (1, 2, 3)) == {1: 49, 2: 49, 3: 49}
    assert tp.schedule(0.05, 49, (1, 2, 3)) == {1: 42, 2: 29, 3: 2}  # rounded down


# bad input


def test_the_model_comes_back_without_a_hook(vit, x):
    before = vit(x)
    with pytest.raises(ZeroDivisionError):
        tp.prune(vit, x, {2: 5}, lambda *_: 1 / 0, **PICTURE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert torch.equal(vit(x), before)


def test_an_instruction_before_the_tokens_sees_none_of_them(llama, ids):
    spans = SPANS | {"asking": (0, 3)}
    with pytest.raises(ValueError, match="instruction"):
        tp.prune(llama, {"input_ids": ids}, COUNTS, tp.transprune, collect=COLLECT, **spans)


def test_what_makes_no_sense_is_refused(vit, x):
    with pytest.raises(ValueError, match="not 0"):
        tp.transition(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match=r"\[N, T, D\]"):
        tp.transition(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="variant"):
        tp.turning(torch.zeros(1, 3), torch.ones(3, dtype=torch.bool), "mine")
    with pytest.raises(ValueError, match="0 tokens"):
        tp.turning(torch.zeros(1, 3), torch.zeros(3, dtype=torch.bool))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            tp.transprune(stage(), alpha)
    for final, blocks in ((0.01, (1, 2, 3)), (1.2, (1, 2, 3)), (-0.1, (1, 2, 3)), (0.5, (1, 2)), (0.5, (1, 3, 2))):
        with pytest.raises(ValueError, match="three blocks"):
            tp.schedule(final, 49, blocks)
    rising, none, too_many = {2: 5, 3: 10}, {2: 0}, {2: 50}
    refused = [({2: 5}, ()), ({2: 5}, (2, 3)), ({}, (0,)), (rising, (0,)), (none, (0,)), (too_many, (0,))]
    for counts, collect in refused:
        with pytest.raises(ValueError, match="collected"):
            tp.prune(vit, x, counts, tp.ttv, **PICTURE | {"collect": collect})
    with pytest.raises(LayerNotFound):
        tp.prune(vit, x, {9: 5}, tp.ttv, **PICTURE)


class Words:
    """A tokenizer: a token a word."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [hash(w) % 1000 for w in text.split()]})


def test_a_prompt_is_context_instruction_answer():
    tokenizer, text = Words(), " ".join(f"w{i}" for i in range(130))
    words = tokenizer(text).input_ids
    for at in (0, 40, 66):
        given = recipe.prompt(tokenizer, text, at)
        ids = given.ids[0].tolist()
        assert ids[slice(*given.free)] == words[:96]
        assert ids[slice(*given.asking)][-6:] == words[at : at + 6]
        assert ids[given.asking[1] :] == words[at + 6 : at + 30] and given.answer == 24
    given = recipe.prompt(tokenizer, text)
    assert given.ids[0].tolist()[given.asking[1] :] == words[96:120] and given.asking[0] == given.free[1]
    for short, at in ((" ".join(text.split()[:110]), None), (text, 67), (text, -1), ("w w w", 0)):
        with pytest.raises(ValueError, match="do not fit"):
            recipe.prompt(tokenizer, short, at)


def test_nats_a_token_of_the_answer_by_hand(llama, ids):
    given = recipe.Prompt(ids[:1], FREE, ASKING, 4)
    output = llama(input_ids=ids[:1])
    told = output.logits[0].log_softmax(-1)
    by_hand = -sum(told[23 + i, ids[0, 24 + i]] for i in range(4)) / 4
    assert recipe.nll(output, given) == pytest.approx(by_hand.item(), rel=1e-5)


# the recipe


def test_a_head_start_changes_nothing(llama, ids):
    row = ids[:1]
    plain, kept = tp.prune(llama, {"input_ids": row}, COUNTS, tp.transprune, collect=COLLECT, **SPANS)
    with recipe.head_start(llama, row, 1):
        fast, again = tp.prune(llama, {"input_ids": row}, COUNTS, tp.transprune, collect=COLLECT, **SPANS)
    assert torch.equal(plain.logits, fast.logits) and torch.equal(kept[5], again[5])
    assert not any("forward" in vars(layer) for layer in llama.model.layers)


def test_ink_keeps_the_brightest_and_chance_draws_anew_for_every_image_and_layer(vit, x):
    ink = F.avg_pool2d(x, 4).flatten(1)
    _, kept = tp.prune(vit, x, {2: 9}, recipe.rule(tp, "ink", worth=ink), **PICTURE)
    for places, bright in zip(kept[2].tolist(), ink, strict=True):
        assert set(places[1:]) == set((1 + bright.topk(9).indices).tolist())
    lot = recipe.rule(tp, "random 0", generator=torch.Generator().manual_seed(0))
    drawn = [tp.prune(vit, x, {2: 9}, lot, **PICTURE)[1][2] for _ in range(2)]
    assert len({tuple(row) for places in drawn for row in places.tolist()}) == 12


@pytest.mark.parametrize("arm", sorted(set(recipe.GARMENT_ARMS)))
def test_every_arm_keeps_as_many(vit, x, arm):
    score = recipe.rule(tp, arm, worth=F.avg_pool2d(x, 4).flatten(1), generator=torch.Generator().manual_seed(0))
    _, kept = tp.prune(vit, x, {1: 30, 2: 7}, score, **PICTURE, **recipe.how(tp, arm))
    assert {b: p.shape[1] for b, p in kept.items()} == {1: 31, 2: 8} and (kept[2][:, 0] == 0).all()


def test_quotations_begin_all_over_the_article():
    cues = [recipe.cue(i) for i in range(recipe.ARTICLES)]
    assert sorted(cues)[::17] == [0, 66] and len(set(cues)) == recipe.ARTICLES


# what is stored


def test_the_tables_hold_every_arm_at_equal_budgets():
    table = papers.results("trans-prune")
    for (setting, share), (_, arms) in recipe.GARMENTS.items():
        part = table[(table["setting"] == setting) & (table["share"] == share)]
        assert sorted(part["arm"].unique()) == sorted(arms) and (part.groupby("arm")["seed"].nunique() == 3).all()
    places = papers.results("trans-prune", "places")
    tenths = places.filter(like="tenth").sum(axis=1)
    for (task, share), arms in recipe.TEXTS.items():
        mine = (places["task"] == task) & (places["share"] == share)
        assert (tenths[mine] == int(96 * share)).all() and mine.sum() == len(arms) * recipe.ARTICLES


def test_the_stored_bits_are_the_stored_accuracy():
    table = papers.results("trans-prune")
    bits = np.unpackbits(papers.tensors("trans-prune", "right")["right"].numpy(), axis=1)[:, : recipe.TESTED]
    assert np.allclose(bits.mean(1), table["accuracy"], atol=1e-4)
