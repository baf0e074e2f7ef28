"""AMP: its scores against removal, counts by hand, masks, surgery with shared keys, and what is stored."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbkit import hooks, papers, recipes
from nbkit.errors import LayerNotFound

amp = papers.method("heads-and-mlp-pruning")
recipe = recipes.load("papers/heads-and-mlp-pruning/recipe.py")
SLUG = "heads-and-mlp-pruning"
HEADS, KV, D, WIDTH, UNITS, LAYERS = 6, 2, 8, 36, 40, 3  # the heads are wider together, 48, than the model


def llama(seed=0, kv=KV):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61, hidden_size=WIDTH, intermediate_size=UNITS, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=kv, head_dim=D, initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(*shape, seed=0):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def lots(seed=0, heads=HEADS, units=UNITS, layers=LAYERS):
    g = torch.Generator().manual_seed(seed)
    return amp.Pair(torch.rand(layers, heads, generator=g), torch.rand(layers, units, generator=g))


def sizes(body):
    return amp.Sizes(*recipe.sizes(body))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# scores


def test_a_head_scores_the_mean_change_when_it_alone_is_masked():
    net, ids = llama(), tokens(1, 9)
    scores = amp.measure(net.model, [ids], HEADS)
    for layer in range(LAYERS):
        name = f"layers.{layer}.self_attn.o_proj"
        for head in range(HEADS):
            heads = torch.ones(LAYERS, HEADS, dtype=torch.bool)
            heads[layer, head] = False
            with torch.no_grad(), hooks.record(net.model, name) as before:
                net.model(ids)
            kept = amp.Pair(heads, torch.ones(LAYERS, UNITS, dtype=torch.bool))
            with torch.no_grad(), amp.masked(net.model, kept), hooks.record(net.model, name) as after:
                net.model(ids)
            change = (before[name] - after[name]).abs().sum(-1).mean()
            torch.testing.assert_close(scores.heads[0, layer, head], change, rtol=1e-4, atol=1e-5)


def test_parts_of_heads_add_up_and_slices_are_blocks_of_columns():
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(5, 12, generator=g), torch.randn(7, 12, generator=g)
    for n in range(3):
        part = slice(4 * n, 4 * n + 4)
        by_hand = sum((W[:, part] @ h[t, part]).abs().sum() for t in range(5)) / 5
        torch.testing.assert_close(amp.head_scores(h, W, 3)[n], by_hand)


def test_a_unit_scores_its_mean_size():
    a = torch.tensor([[1.0, -4, 0], [3, 2, 0]])
    assert amp.unit_scores(a).tolist() == [2, 3, 0]


def test_prompts_weigh_the_same_whatever_their_length_and_batches_do_not_matter():
    net = llama()
    short, long = tokens(1, 4, seed=1), tokens(1, 13, seed=2)
    both = amp.measure(net.model, [short, long], HEADS)
    for i, ids in enumerate((short, long)):
        alone = amp.measure(net.model, [ids], HEADS)
        torch.testing.assert_close(both.heads[i], alone.heads[0])
    ids = tokens(6, 8)
    whole, pieces = amp.measure(net.model, [ids], HEADS), amp.measure(net.model, ids.split(4), HEADS)
    torch.testing.assert_close(tuple(whole), tuple(pieces), rtol=1e-4, atol=1e-5)


def test_half_precision_is_scored_in_single():
    h = torch.full((2, 64), 30000.0).half()
    assert amp.head_scores(h, torch.ones(64, 64).half(), 1).isfinite().all()


def test_what_is_silent_scores_0_goes_first_and_is_not_missed():
    net, ids = llama(), tokens(2, 7)
    with torch.no_grad():
        for layer in net.model.layers:
            layer.self_attn.o_proj.weight[:, 2 * D : 3 * D] = 0
            layer.mlp.up_proj.weight[5] = 0
    scores = amp.Pair(*(part.mean(0) for part in amp.measure(net.model, [ids], HEADS)))
    assert (scores.heads[:, 2] == 0).all() and (scores.units[:, 5] == 0).all()
    kept = amp.Pair(amp.lowest(scores.heads, 1), amp.lowest(scores.units, 1))
    assert not kept.heads[:, 2].any() and not kept.units[:, 5].any()
    before = logits(net, ids)
    torch.testing.assert_close(logits(recipe.surgery(net, kept), ids), before, rtol=1e-4, atol=1e-4)


# how many


@pytest.mark.parametrize("p", [0.0, 0.1, 0.2, 0.35, 0.5, 0.8, 0.99])
def test_numbers_by_hand(p):
    size = sizes(llama().model)
    assert size.head == size.kv == 2 * D * WIDTH and size.unit == 3 * WIDTH and size.group.tolist() == [0] * 3 + [1] * 3
    layer = llama().model.layers[0]
    block = sum(w.numel() for part in (layer.self_attn, layer.mlp) for w in part.parameters())
    assert amp.whole(lots(), size) == block
    n_h = min(round(p * HEADS), HEADS - 1)
    by_paper, exact = amp.amp(lots(), p, size, exact=False), amp.amp(lots(), p, size)
    assert (~by_paper.heads).sum(1).tolist() == (~exact.heads).sum(1).tolist() == [n_h] * LAYERS
    units = round(UNITS * ((HEADS / UNITS) * (p - n_h / HEADS) + p))
    assert (~by_paper.units).sum(1).tolist() == [min(units, UNITS - 1)] * LAYERS
    if p <= 0.5:
        assert ((amp.gone(exact, size) - p * block).abs() <= size.unit / 2 + 1e-6).all()


def test_every_criterion_removes_as_much_whatever_keys_go():
    net = llama()
    scores = amp.Pair(*(part.mean(0) for part in amp.measure(net.model, [tokens(2, 7)], HEADS)))
    size = sizes(net.model)
    for name in ("AMP", "reversed", "random", "magnitude", "projected"):
        kept = amp.amp(recipe.rival(name, scores, net.model), 0.5, size)
        assert ((amp.gone(kept, size) - 0.5 * amp.whole(kept, size)).abs() <= size.unit / 2).all()


def test_a_kv_head_goes_with_the_last_of_its_heads():
    size = amp.Sizes(10, 100, 1, torch.tensor([0, 0, 1, 1]))
    heads = torch.tensor([[True, False, True, True], [False, False, True, True], [True, False, False, True]])
    kept = amp.Pair(heads, torch.ones(3, 5, dtype=torch.bool))
    assert amp.gone(kept, size).tolist() == [10, 120, 20]


def test_the_lowest_go_layer_by_layer_ties_in_order_and_never_all():
    scores = torch.tensor([[3.0, 1, 2], [0, 0, 0]])
    assert amp.lowest(scores, 1).tolist() == [[True, False, True], [False, True, True]]
    assert amp.lowest(scores, torch.tensor([0, 2])).tolist() == [[True] * 3, [False, False, True]]
    reverse = recipe.rival("reversed", amp.Pair(scores, scores), None)
    assert amp.lowest(reverse.heads, 1)[0].tolist() == [False, True, True]


def test_rivals_are_their_definitions():
    net = llama()
    scores = lots(1)
    down = net.model.layers[1].mlp.down_proj.weight
    projected = recipe.rival("projected", scores, net.model)
    assert torch.equal(projected.heads, scores.heads)
    torch.testing.assert_close(projected.units[1, 4], (scores.units[1, 4] * down[:, 4].abs().sum()).detach())
    size = recipe.rival("magnitude", scores, net.model)
    o, mlp = net.model.layers[2].self_attn.o_proj.weight.detach(), net.model.layers[2].mlp
    torch.testing.assert_close(size.heads[2, 1], o[:, D : 2 * D].abs().sum())
    three = [mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7]]
    torch.testing.assert_close(size.units[2, 7], torch.cat(three).detach().abs().sum())
    again = [recipe.rival("random", scores, None, seed=s).units for s in (3, 3, 4)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


# masks and surgery


@pytest.mark.parametrize("kv", [1, 2, 3, 6])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_surgery_is_masking_and_saves_what_is_counted(kv, p):
    net, ids = llama(kv=kv), tokens(2, 11)
    size = sizes(net.model)
    kept = amp.amp(lots(kv), p, size)
    small = recipe.surgery(net, kept)
    with amp.masked(net.model, kept):
        masked = logits(net, ids)
    torch.testing.assert_close(logits(small, ids), masked, rtol=1e-4, atol=1e-4)
    counts = [sum(w.numel() for w in model.parameters()) for model in (net, small)]
    assert counts[0] - counts[1] == amp.gone(kept, size).sum()


def test_slices_by_query_heads_would_scramble_shared_keys():
    net, ids = llama(), tokens(1, 11)
    heads = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    heads[:, :2] = False  # one of three heads of K/V head 0 stays
    small = recipe.surgery(net, amp.Pair(heads, torch.ones(LAYERS, UNITS, dtype=torch.bool)))
    assert small.model.layers[0].self_attn.kv_of_head.tolist() == [0, 1, 1, 1]
    wrong = copy.deepcopy(small)
    for layer in wrong.model.layers:
        layer.self_attn.kv_of_head = torch.tensor([0, 0, 1, 1])  # equal groups
    assert (logits(wrong, ids) - logits(small, ids)).abs().max() > 0.1


def test_nothing_removed_changes_nothing_to_the_last_bit_and_weights_come_back():
    net, ids = llama(), tokens(2, 7)
    before = copy.deepcopy(net.state_dict())
    dense = logits(net, ids)
    with amp.masked(net.model, amp.amp(lots(), 0.0, sizes(net.model))):
        assert torch.equal(logits(net, ids), dense)
    with pytest.raises(ZeroDivisionError), amp.masked(net.model, amp.amp(lots(), 0.5, sizes(net.model))):
        assert not torch.equal(logits(net, ids), dense)
        raise ZeroDivisionError
    recipe.surgery(net, amp.amp(lots(), 0.5, sizes(net.model)))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# bad input


def test_bad_input_is_refused_and_changes_nothing():
    net = llama()
    before = copy.deepcopy(net.state_dict())
    size = sizes(net.model)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="p is"):
            amp.amp(lots(), p, size)
    for bad in (lots(heads=5), amp.Pair(lots().heads, lots().units[:2])):
        with pytest.raises(ValueError):
            amp.amp(bad, 0.2, size)
    for h, W, heads in (((0, 12), (7, 12), 3), ((5, 12), (7, 12), 5), ((5, 12), (7, 10), 3), ((5, 12), (7, 12), 0)):
        with pytest.raises(ValueError, match="heads"):
            amp.head_scores(torch.ones(h), torch.ones(W), heads)
    with pytest.raises(ValueError, match="token"):
        amp.unit_scores(torch.ones(0, 4))
    with pytest.raises(ValueError, match="prompts"):
        amp.measure(net.model, [], HEADS)
    with pytest.raises(LayerNotFound):
        amp.measure(net.model, [tokens(1, 3)], HEADS, {"o": "blocks.*.o", "down": "blocks.*.down"})
    for drop in (-1, HEADS, torch.tensor([0, 9, 0])):
        with pytest.raises(ValueError, match="can go"):
            amp.lowest(lots().heads, drop)
    with pytest.raises(ValueError, match="finite"):
        amp.lowest(lots().heads * float("nan"), 1)
    with pytest.raises(ValueError, match="criterion"):
        recipe.rival("wanda", lots(), net.model)
    kept = amp.amp(lots(), 0.5, size)
    wrong = (
        amp.Pair(kept.heads[:, :5], kept.units),
        amp.Pair(kept.heads, kept.units[:, :20]),
        amp.Pair(kept.heads, kept.units[:2]),
    )
    for bad in wrong:
        for use in (lambda k: amp.masked(net.model, k).__enter__(), lambda k: recipe.surgery(net, k)):
            with pytest.raises(ValueError):
                use(bad)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    broken = amp.Pair(*(part.mean(0) for part in amp.measure(net.model, [tokens(1, 3)], HEADS)))
    with pytest.raises(ValueError, match="finite"):
        amp.amp(broken, 0.2, size)


# what is stored


def test_every_arm_is_stored_for_every_network_and_split():
    table = papers.results(SLUG)
    assert len(table) == sum(recipe.SPLITS * len(recipe.arms(network)) for network in recipe.NETWORKS)
    assert not table.duplicated(["network", "split", "arm", "budget", "draw"]).any()
    draws = table.query("arm == 'random' and budget == 0.2").groupby(["network", "split"])["draw"].nunique()
    assert (draws == 7).all() and len(draws) == 9


def test_all_arms_of_a_budget_removed_as_much():
    table = papers.results(SLUG).query("arm != 'dense'")
    shares = table[table["budget"] < 1]
    block = {"SmolLM2": 3_538_944, "tiny-llama 0": 53_248, "tiny-llama 1": 53_248}
    unit = {"SmolLM2": 3 * 576, "tiny-llama 0": 3 * 64, "tiny-llama 1": 3 * 64}
    slack = shares["network"].map(unit) / shares["network"].map(block) / 2 + 1e-5
    assert ((shares["removed"] - shares["budget"]).abs() <= slack).all()
    for (network, *_), part in table[table["budget"] >= 1].groupby(["network", "split", "budget"]):
        assert np.ptp(part["removed"]) <= unit[network] / block[network] + 2e-5


def test_the_stored_means_are_those_of_the_parts():
    keys = ["network", "split", "arm", "budget", "draw"]
    mean = papers.results(SLUG, "parts").groupby(keys)["nats"].agg(["mean", "size"])
    table = papers.results(SLUG).set_index(keys)
    assert (mean["size"] == recipe.PARTS).all()
    assert (mean["mean"] - table["nats"]).abs().max() < 1e-3


def runs(ids, length=16):
    return {tuple(row[i : i + length].tolist()) for row in ids for i in range(len(row) - length + 1)}


def test_calibration_and_evaluation_share_no_sentence():
    for network in recipe.NETWORKS[1:]:
        for split in range(recipe.SPLITS):
            prompts, windows = recipe.texts(network, split)
            assert prompts.shape == (50, 32) and len(windows) == 32 and not runs(prompts) & runs(windows)
