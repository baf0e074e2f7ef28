"""Zero-TPrune: votes, filter and stages, pruned passes against loops by hand, its rivals, and what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nbkit import hooks, papers, recipes, sparsity
from nbkit.errors import LayerNotFound

zero = papers.method("zero-tprune")
recipe = recipes.load("papers/zero-tprune/recipe.py")


def graph(n=3, heads=4, tokens=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, heads, tokens, tokens, generator=g, dtype=torch.float64)).softmax(-1)


def stage(n=3, heads=4, tokens=12, width=8, seed=0):
    g = torch.Generator().manual_seed(seed + 100)
    draw = lambda: torch.randn(n, tokens, width, generator=g)  # noqa: E731
    places = torch.arange(tokens).expand(n, -1)
    return zero.Stage(graph(n, heads, tokens, seed).float(), draw(), draw(), places)


# votes


@pytest.mark.parametrize("seed", range(5))
def test_many_votes_reach_the_left_eigenvector_and_keep_the_sum(seed):
    a = graph(seed=seed)
    values, vectors = np.linalg.eig(a[0, 0].T.numpy())
    perron = vectors[:, values.real.argmax()].real
    for boost in (True, False):
        s = zero.wpr(a, 500, boost)
        torch.testing.assert_close(s[0, 0], torch.from_numpy(perron / perron.mean()), rtol=1e-6, atol=1e-6)
        for steps in (1, 2, 7):
            total = zero.wpr(a, steps, boost).sum(-1)
            torch.testing.assert_close(total, torch.full_like(total, 12))


def test_a_vote_is_the_sum_over_those_who_attend():
    a = graph(1, 2, 5)
    start = torch.tensor([5**0.5, 1, 1, 1, 1], dtype=torch.float64)
    start = start / start.mean()
    for head in range(2):
        by_hand = [sum(start[i] * a[0, head, i, j] for i in range(5)) for j in range(5)]
        torch.testing.assert_close(zero.wpr(a, 1)[0, head], torch.stack(by_hand))


def test_a_doubly_stochastic_graph_leaves_equal_importance_alone():
    a = (torch.eye(8) + torch.eye(8).roll(1, 0) + torch.eye(8).roll(5, 0)).expand(1, 1, 8, 8) / 3
    torch.testing.assert_close(zero.wpr(a, 30, boost=False), torch.ones(1, 1, 8))


# heads


def test_without_limits_it_is_the_root_mean_square_and_of_one_head_its_own():
    s = zero.wpr(graph(), 3)
    torch.testing.assert_close(zero.together(s, zero.passing(s, zero.ANY)), s.square().mean(1).sqrt())
    torch.testing.assert_close(zero.together(s[:, :1], zero.passing(s[:, :1])), s[:, 0])
    torch.testing.assert_close(zero.together(s, zero.passing(s, zero.ANY), emphasise=False), s.mean(1))


def test_heads_outside_the_limits_have_no_say_and_none_inside_means_all():
    s = torch.tensor([[[1.0, 1, 1, 1], [0.5, 1.5, 0.5, 1.5], [0, 0, 0, 4.0]]])  # variances 0, 0.25, 3
    assert zero.passing(s).tolist() == [[False, True, False]]
    torch.testing.assert_close(zero.together(s, zero.passing(s)), s[:, 1])
    nobody = zero.passing(s, (0.3, 0.4))
    torch.testing.assert_close(zero.together(s, nobody), s.square().mean(1).sqrt())


def test_of_a_sum_of_one_no_head_would_pass():
    n = 50
    locked = torch.zeros(1, 1, n)
    locked[0, 0, 0] = 1
    assert locked.var(-1, correction=0).item() == pytest.approx((1 - 1 / n) / n) and (1 - 1 / n) / n < 0.02


# the two stages


def test_a_twin_of_an_important_patch_goes_first():
    for seed in range(5):
        keys = torch.randn(1, 10, 8, generator=torch.Generator().manual_seed(seed))
        keys[0, 1] = 3 * keys[0, 8]  # the cosine does not see the length
        assert zero.similar(keys, torch.arange(10.0)[None], 1).tolist() == [[1]]


@pytest.mark.parametrize("patches", [9, 10])
def test_the_s_stage_is_its_definition_patch_by_patch(patches):
    g = torch.Generator().manual_seed(patches)
    keys, importance = torch.randn(1, patches, 6, generator=g), torch.rand(1, patches, generator=g)
    order = importance[0].argsort()
    a, b = order[: patches // 2].tolist(), order[patches // 2 :].tolist()
    best = {i: max(F.cosine_similarity(keys[0, i], keys[0, j], dim=0).item() for j in b) for i in a}
    expected = sorted(a, key=lambda i: -best[i])[:3]
    assert zero.similar(keys, importance, 3)[0].tolist() == expected


def test_rows_and_columns_of_dropped_tokens_leave_and_rows_sum_to_one():
    a = graph(2, 3, 6)
    left = torch.tensor([[0, 2, 5], [0, 1, 4]])
    sub = zero.among(a, left)
    for n in range(2):
        by_hand = a[n][:, left[n]][:, :, left[n]]
        torch.testing.assert_close(sub[n], by_hand / by_hand.sum(-1, keepdim=True))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_class_token_stays_and_the_numbers_are_exact(share):
    for keep in range(1, 12):
        left, final = zero.zero_tprune(stage(), keep, share=share)
        assert left.shape[1] == 12 - min(round(share * (11 - keep)), 5) and final.shape == (3, 1 + keep)
        for before, after in zip(left.tolist(), final.tolist(), strict=True):
            assert after[0] == 0 and len(set(after)) == len(after) and set(after) <= set(before)


def test_without_an_s_stage_the_most_important_stay():
    given = stage()
    s = zero.wpr(given.attention, 8)
    ranking = zero.together(s, zero.passing(s))[:, 1:]
    _, final = zero.zero_tprune(given, 4, share=0.0)
    for n in range(3):
        assert set(final[n, 1:].tolist()) == set((1 + ranking[n].topk(4).indices).tolist())


def test_ties_keep_the_order_of_the_places():
    even = torch.full((1, 2, 9, 9), 1 / 9)
    keys = torch.ones(1, 9, 4)
    tied = zero.Stage(even, keys, keys, torch.arange(9)[None])
    assert zero.zero_tprune(tied, 4, boost=False, share=0.0)[1].tolist() == [[0, 1, 2, 3, 4]]
    assert zero.top(torch.zeros(1, 5), 2).tolist() == [[0, 1]]


# pruned passes


def test_a_keep_rate_of_one_changes_nothing_to_the_last_bit(vit, x):
    counts = zero.schedule(1.0, 49)
    for arm in (*recipe.GRAPHS, "ink", "CLS attention", "one vote", "random 0"):
        rule = recipe.rule(zero, arm, x, depth=6, patch=4, generator=torch.Generator())
        logits, kept = zero.prune(vit, x, counts, rule)
        assert torch.equal(logits, vit(x)) and all(len(p[0]) == 50 for p in kept.values())


def test_a_pruned_pass_is_the_blocks_one_after_the_other_on_the_tokens_left(vit, x):
    chosen = {}

    def rule(seen, keep, block):
        _, places = zero.zero_tprune(seen, keep, iterations=zero.votes(block - 1, 6))
        chosen[block] = seen.places.gather(1, places).sort(-1).values
        return places

    logits, kept = zero.prune(vit, x, {2: 20, 4: 6}, rule)
    with torch.no_grad():
        h = vit.patch_embed(x).flatten(2).transpose(1, 2)
        h = torch.cat([vit.cls_token.expand(len(h), -1, -1), h], 1) + vit.pos_embed
        left = torch.arange(50).expand(len(h), -1)
        for i, block in enumerate(vit.blocks):
            if i in chosen:
                at = (left.unsqueeze(1) == chosen[i].unsqueeze(2)).float().argmax(-1)
                h, left = h.gather(1, at.unsqueeze(-1).expand(-1, -1, 64)), chosen[i]
            h = block(h)
        torch.testing.assert_close(vit.head(vit.norm(h)[:, 0]), logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(kept[b], chosen[b]) for b in chosen)


def test_a_layer_sees_the_block_behind_it_among_the_tokens_left(vit, x):
    seen = {}

    def rule(given, keep, block):
        seen[block] = given
        return torch.arange(1 + keep).flip(0)

    with torch.no_grad(), hooks.record(vit, ["blocks.1.attn.weights", "blocks.1.attn.qkv", "blocks.1"]) as acts:
        zero.prune(vit, x, {2: 30, 3: 10}, rule)
    assert torch.equal(seen[2].attention, acts["blocks.1.attn.weights"])
    assert torch.equal(seen[2].keys, acts["blocks.1.attn.qkv"][..., 64:128])
    assert torch.equal(seen[2].hidden, acts["blocks.1"])
    assert seen[3].attention.shape == (6, 4, 31, 31) and torch.equal(seen[3].places, torch.arange(31).expand(6, -1))


def test_the_model_comes_back_without_a_hook(vit, x):
    before = vit(x)
    with pytest.raises(ZeroDivisionError):
        zero.prune(vit, x, {2: 5}, lambda *_: 1 / 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert torch.equal(vit(x), before)


def test_schedules_and_iterations():
    assert zero.schedule(0.3, 49) == {2: 33, 3: 22, 5: 15} and zero.schedule(0.02, 49, (1, 2)) == {1: 7, 2: 1}
    assert [zero.votes(b, 12) for b in range(12)] == [40] * 3 + [8] * 6 + [1] * 3
    assert zero.schedule(1e-6, 49) == {2: 1, 3: 1, 5: 1}


def test_own_multiply_adds_by_hand():
    # before block 2, 49 patches come in and 33 stay: 16 go, 8 by S; A has 24, B 25; 40 votes on 42 tokens
    assert recipe.own_macs(zero, "full", 49, 33, 2) == 4 * 50**2 + 24 * 25 * 64 + 40 * 4 * 42**2
    assert recipe.own_macs(zero, "WPR", 49, 33, 2) == 40 * 4 * 50**2
    assert recipe.own_macs(zero, "one vote", 49, 33, 2) == 4 * 50**2
    assert recipe.own_macs(zero, "ToMe", 49, 33, 2) == 25 * 25 * 16
    assert recipe.own_macs(zero, "ink", 49, 33, 2) == recipe.own_macs(zero, "random 1", 49, 33, 2) == 0


def test_the_cost_is_that_of_the_tokens_in_each_block():
    case = ("early", 0.02, (1, 2))  # 49 patches in block 0, 7 in block 1, then 1
    tokens = [50, 8, 2, 2, 2, 2]
    blocks = sparsity.transformer_macs(tokens, width=64, hidden=256).sum()
    whole = sparsity.transformer_macs([50] * 6, width=64, hidden=256).sum()
    assert recipe.cost(zero, "random 0", case) == pytest.approx(blocks / whole, abs=1e-4)
    own = sum(recipe.own_macs(zero, "full", *entry) for entry in ((49, 7, 1), (7, 1, 2)))
    assert recipe.cost(zero, "full", case) == pytest.approx((blocks + own) / whole, abs=1e-4)
    assert 0 < own < blocks


# rivals


@pytest.mark.parametrize("r", [0, 1, 5, 9])
def test_tome_merges_the_most_similar_of_every_other_token_by_size(r):
    g = torch.Generator().manual_seed(r)
    keys, hidden = torch.randn(1, 20, 6, generator=g), torch.randn(1, 20, 3, generator=g)
    size = torch.randint(1, 5, (1, 20), generator=g).float()
    places, states, sizes = recipe.merged(keys, hidden, size, r)
    cosine = F.cosine_similarity(keys[0, :, None], keys[0, None], dim=-1)
    partner = {i: max(range(1, 20, 2), key=lambda j: cosine[i, j]) for i in range(2, 20, 2)}
    gone = sorted(partner, key=lambda i: -cosine[i, partner[i]])[:r]
    for k, place in enumerate(places[0].tolist()):
        group = [place] + [i for i in gone if partner[i] == place]
        assert sizes[0, k] == size[0, group].sum() and place not in gone
        expected = (hidden[0, group] * size[0, group, None]).sum(0) / size[0, group].sum()
        torch.testing.assert_close(states[0, k], expected)
    assert len(places[0]) == 20 - r and places[0, 0] == 0


def test_tome_keeps_the_sum_of_sizes_and_goes_in_rounds_where_more_than_half_must_go(vit, x):
    tome = recipe.ToMe(4)
    with tome.proportional(vit):
        _, kept = zero.prune(vit, x, {1: 7, 3: 1}, tome)
        assert torch.equal(tome.size.sum(-1), torch.full((6,), 50.0)) and kept[3].shape == (6, 2)


def test_attention_proportional_to_size_is_that_of_repeated_tokens(vit, x):
    """A token of size 2 counts as two copies of it: softmax of scores + log 2."""
    scores = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    tome = recipe.ToMe(4)
    with tome.proportional(vit):
        tome.size = torch.tensor([[1.0, 2, 1, 3]])
        found = vit.blocks[0].attn.weights(scores.softmax(-1))
    torch.testing.assert_close(found, (scores + tome.size.log()[:, None, None]).softmax(-1))


def test_ink_keeps_the_brightest_and_chance_draws_anew_for_every_image(x):
    given = stage(6, 4, 50, 64)
    given = given._replace(places=torch.arange(50).expand(6, -1))
    ink = recipe.rule(zero, "ink", x, depth=6, patch=4, generator=torch.Generator())(given, 9, 2)
    bright = F.avg_pool2d(x, 4).flatten(1)
    for n in range(6):
        assert set(ink[n, 1:].tolist()) == set((1 + bright[n].topk(9).indices).tolist())
    lot = recipe.rule(zero, "random 0", x, depth=6, patch=4, generator=torch.Generator().manual_seed(0))
    first, second = lot(given, 9, 2), lot(given, 9, 2)
    assert len({tuple(sorted(row)) for row in [*first.tolist(), *second.tolist()]}) == 12


def test_inked_by_lot_keeps_patches_that_hold_something_while_there_are_any(x):
    given = stage(6, 4, 50, 64)._replace(places=torch.arange(50).expand(6, -1))
    half = x.clone()
    half[:, :, 12:] = 0  # three rows of seven patches hold something
    rule = recipe.rule(zero, "inked by lot", half, depth=6, patch=4, generator=torch.Generator().manual_seed(0))
    first, second = rule(given, 9, 2), rule(given, 9, 2)
    assert first.max() <= 21 and not torch.equal(first, second)
    many = rule(given, 30, 2)
    assert all(set(range(22)) <= set(row) for row in many.tolist())


def test_first_by_lot_is_chance_in_the_first_layer_and_the_whole_method_behind_it(x):
    mixed, full, lot = (
        recipe.rule(zero, arm, x, depth=6, patch=4, generator=torch.Generator().manual_seed(0))
        for arm in ("first by lot", "full", "random 0")
    )
    before = stage(6, 4, 50, 64)
    assert torch.equal(mixed(before, 15, 1), lot(before, 15, 1))
    behind = stage(6, 4, 16, 64)
    assert torch.equal(mixed(behind, 5, 2), full(behind, 5, 2))
    assert recipe.own_macs(zero, "first by lot", 49, 15, 1) == 0
    assert recipe.own_macs(zero, "first by lot", 15, 5, 2) == recipe.own_macs(zero, "full", 15, 5, 2)


@pytest.mark.parametrize("arm", [a for a in recipe.ARMS if a not in ("dense", "ToMe")])
def test_every_arm_keeps_as_many_and_the_class_token(vit, x, arm):
    counts = zero.schedule(0.1, 49, (1, 2))
    rule = recipe.rule(zero, arm, x, depth=6, patch=4, generator=torch.Generator().manual_seed(0))
    _, kept = zero.prune(vit, x, counts, rule)
    assert {b: p.shape[1] - 1 for b, p in kept.items()} == counts and all((p[:, 0] == 0).all() for p in kept.values())


# bad input


def test_what_is_no_attention_is_refused():
    good = graph(1, 1, 5)
    for bad in (good[0], good[..., :4], good * 2, good.log(), good * float("nan"), good.mT, graph(1, 1, 2)):
        with pytest.raises(ValueError):
            zero.wpr(bad, 3)
    with pytest.raises(ValueError, match="iterations"):
        zero.wpr(good, 0)


def test_numbers_that_make_no_sense_are_refused_and_change_nothing(vit, x):
    given = stage()
    copy = given._replace(attention=given.attention.clone())
    for keep, share in ((0, 0.5), (12, 0.5), (5, -0.1), (5, 1.1), (5, float("nan"))):
        with pytest.raises(ValueError, match="keep"):
            zero.zero_tprune(given, keep, share=share)
    assert torch.equal(given.attention, copy.attention)
    with pytest.raises(ValueError, match="limits"):
        zero.passing(torch.ones(1, 1, 3), (0.7, 0.01))
    for r in (-1, 6):
        with pytest.raises(ValueError, match="can go"):
            zero.similar(torch.ones(1, 10, 2), torch.ones(1, 10), r)
    for rate in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            zero.schedule(rate, 49)
    for block in (0, 9):
        with pytest.raises(LayerNotFound):
            zero.prune(vit, x, {block: 5}, zero.whole_method())
    for keep in (0, 50):
        with pytest.raises(ValueError, match="keep"):
            zero.prune(vit, x, {2: keep}, zero.whole_method())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    with pytest.raises(ValueError, match="merged"):
        recipe.merged(torch.ones(1, 9, 2), torch.ones(1, 9, 2), torch.ones(1, 9), 5)


# what is stored


def test_every_arm_is_stored_for_three_networks_in_every_case():
    table = papers.results("zero-tprune")
    cases = sum(map(len, recipe.CASES.values()))
    assert len(table) == 3 * cases * (len(recipe.ARMS) - 1)
    assert (table.groupby("seed")["dense"].nunique() == 1).all()
    assert not table.duplicated(["seed", "setting", "rate", "arm"]).any()


def test_the_stored_bits_are_the_stored_accuracies():
    table = papers.results("zero-tprune")
    bits = np.unpackbits(papers.tensors("zero-tprune", "right")["right"].numpy(), axis=1)[:, : recipe.TESTED]
    assert bits.mean(1) == pytest.approx(table["accuracy"].to_numpy(), abs=1e-4)


def test_shares_of_heads_add_up_and_every_photograph_is_there():
    heads = papers.results("zero-tprune", "heads")
    assert heads[["below", "inside", "above"]].sum(axis=1).to_numpy() == pytest.approx(1, abs=2e-3)
    photos = papers.results("zero-tprune", "photos")
    assert len(photos) == recipe.PHOTOS * len(recipe.PHOTO_RATES)
    assert (photos[list(recipe.PHOTO_ARMS)] <= 1).to_numpy().all()
