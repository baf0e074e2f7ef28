"""SpAtten: who stays, how votes add up, what few bits do, and what is counted; facts, and slow versions beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nbkit import papers, recipes

spatten = papers.method("spatten")
recipe = recipes.load("papers/spatten/recipe.py")


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=6, num_attention_heads=6
    )
    return spatten.prepared(sharper(BertModel(config, add_pooling_layer=False)))


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    return spatten.prepared(sharper(LlamaForCausalLM(config)))


def sharper(model):
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 4  # else attention is nearly uniform
    return model.eval().requires_grad_(False)


@pytest.fixture
def ids():
    return torch.randint(0, 50, (3, 24), generator=torch.Generator().manual_seed(1))


# who stays


def test_the_best_three_keep_their_order_and_of_ties_the_first_stay():
    assert spatten.top(torch.tensor([[0.6, 0.1, 0.5, 1.2, 0.6]]), 3).tolist() == [[0, 3, 4]]
    assert spatten.top(torch.tensor([[1.0, 1, 1, 2]]), 2).tolist() == [[0, 3]]
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    for row, places in zip(scores, spatten.top(scores, 4), strict=True):
        assert places.tolist() == sorted(sorted(range(9), key=lambda i: -row[i])[:4])


def test_best_marks_candidates_only_even_where_they_are_fewer():
    among = torch.tensor([[True, False, True, False]])
    assert spatten.best(torch.tensor([[0.0, 9, 1, 8]]), among, 1).tolist() == [[False, False, True, False]]
    assert torch.equal(spatten.best(torch.zeros(1, 4), among, 3), among)


def test_schedules_spare_the_first_layers_and_average_what_was_asked():
    assert spatten.schedule(26, 6, 0.5) == [26, 19, 16, 13, 9, 6]
    assert spatten.schedule(12, 6, 0.25, skip=0.3) == [12, 12, 10, 9, 8, 7]
    shares = 1 - torch.tensor(spatten.schedule(10**6, 30, 0.4)) / 1e6
    assert (shares[:5] == 0).all() and shares[5:].mean() == pytest.approx(0.4, abs=1e-5)
    assert (shares.diff() >= 0).all()


def test_counts_are_those_of_the_authors_workload_files():
    # keys of 1,024 tokens with 90, 80, 70, 60, 30, 20 and 10 % left, and the values of some with 30 and 20 % of them
    found = [spatten.schedule(1024, 2, gone, rise=0)[1] for gone in (0.1, 0.2, 0.3, 0.4, 0.7, 0.8, 0.9)]
    assert found == [921, 819, 716, 614, 307, 204, 102]
    for rows, gone, values in ((921, 0.7, 276), (819, 0.7, 245), (307, 0.7, 92), (716, 0.8, 143), (204, 0.8, 40)):
        assert spatten.schedule(rows, 2, gone, rise=0)[1] == values


# the encoder


def test_unpruned_it_is_the_model_and_votes_are_columns(bert, ids):
    output, log = spatten.encode(bert, ids, [24] * 6)
    bert.set_attn_implementation("eager")
    plain = bert(input_ids=ids, output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=1e-4)
    votes = torch.zeros(3, 24)
    for P, (places, on, total, _, _) in zip(plain.attentions, log, strict=True):
        votes += P.sum((1, 2))
        torch.testing.assert_close(total, votes, rtol=1e-4, atol=1e-4)
        assert on.all() and torch.equal(places[0], torch.arange(24))
    assert torch.allclose(log[-1][2].sum(1), torch.tensor(6.0 * 6 * 24))


@pytest.mark.parametrize("rule", [spatten.cascade, lambda stage: stage.last])
def test_taking_tokens_out_is_masking_them(bert, ids, rule):
    """A pass over all tokens in which the pruned are hidden as keys, and do not vote."""
    heads = spatten.schedule(6, 6, 0.3, skip=0.3)
    output, log = spatten.encode(bert, ids, spatten.schedule(24, 6, 0.5), heads=heads, rule=rule)
    bert.set_attn_implementation("eager")
    h, votes = bert.embeddings(input_ids=ids), torch.zeros(3, 24)
    left, said, on = torch.ones(3, 24) > 0, torch.zeros(3, 6), torch.ones(3, 6) > 0
    last = votes
    for layer, block in enumerate(bert.encoder.layer):
        k = log[layer][0].shape[1]
        ranked = (votes if rule is spatten.cascade else last).masked_fill(~left, -1)
        if k < left[0].sum():
            left = torch.zeros_like(left).scatter(1, ranked.topk(k).indices, True)
        on = torch.zeros_like(on).scatter(1, said.masked_fill(~on, -1).topk(heads[layer]).indices, True) & on
        assert torch.equal(left.nonzero()[:, 1].view(3, -1), log[layer][0]) and torch.equal(on, log[layer][1])
        mask = torch.zeros(3, 1, 1, 24).masked_fill(~left[:, None, None], -torch.inf)
        own, P = block.attention.self(h, attention_mask=mask)
        own = own.unflatten(2, (6, -1)) * on[:, None, :, None]
        said = said + (own.abs().sum(3) * left[..., None]).sum(1)
        last = (P * on[:, :, None, None] * left[:, None, :, None]).sum((1, 2))
        votes = votes + last
        h = block.attention.output(own.flatten(2), h)
        h = block.output(block.intermediate(h), h)
    at = log[-1][0].unsqueeze(-1).expand(-1, -1, 48)
    torch.testing.assert_close(output.last_hidden_state, h.gather(1, at), rtol=1e-3, atol=1e-3)


def test_sets_of_tokens_and_heads_are_nested(bert, ids):
    heads = spatten.schedule(6, 6, 0.3, skip=0.3)
    _, log = spatten.encode(bert, ids, spatten.schedule(24, 6, 0.6), heads=heads)
    for before, after in zip(log[:-1], log[1:], strict=True):
        assert (after[1] <= before[1]).all()
        for a, b in zip(before[0].tolist(), after[0].tolist(), strict=True):
            assert set(b) <= set(a) and b == sorted(b)


# generation


def test_unpruned_decoding_is_the_models_own(llama, ids):
    told, _ = spatten.surprise(llama, spatten.read(llama, ids[:, :12]), ids[:, 12:])
    llama.set_attn_implementation("eager")
    logits = llama(input_ids=ids).logits[:, 12:-1]
    wanted = F.cross_entropy(logits.transpose(1, 2), ids[:, 13:], reduction="none")
    torch.testing.assert_close(told, wanted, rtol=1e-3, atol=1e-3)


def slow(model, ids, prompt: int, kept: list[int], rule: str) -> list[float]:
    """One text, step by step, with the keys and values left copied out: surprise of each token after the prompt."""
    core, cache, told = model.model, [None] * 6, []
    votes, voters = torch.zeros(len(ids)), torch.zeros(len(ids))
    alive = [set(range(prompt)) for _ in range(6)]
    for now in range(-1, len(ids) - prompt - 1):  # -1: the prompt
        at = torch.arange(prompt) if now < 0 else torch.tensor([prompt + now])
        x, inside = core.embed_tokens(ids[None, at]), set(range(prompt + now + 1))
        turn = core.rotary_emb(x, at[None])
        for layer, block in enumerate(core.layers):
            h, own = block.input_layernorm(x), block.self_attn
            q, k, v = (
                p(h).view(1, len(at), -1, 8).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *turn)
            cache[layer] = (k, v) if now < 0 else tuple(torch.cat(p, 2) for p in zip(cache[layer], (k, v), strict=True))
            if now >= 0:
                alive[layer] = inside & (alive[layer] | {prompt + now})
                if kept[layer] < prompt + now + 1:
                    worth = votes if rule == "cascade" else votes / voters.clamp(min=1)
                    ranked = sorted(alive[layer] - {prompt + now}, key=lambda j: (-worth[j].item(), j))
                    alive[layer] = {prompt + now, *ranked[: kept[layer] - 1]}
                inside = alive[layer]
            places = torch.tensor(sorted(alive[layer]))
            K, V = (p[:, :, places].repeat_interleave(3, 1) for p in cache[layer])
            scores = q @ K.mT / 8**0.5
            seen = places[None] <= at[:, None]
            P = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            votes[places] += P.sum((0, 1, 2))
            voters[places] += seen.sum(0)
            x = x + own.o_proj((P @ V).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.post_attention_layernorm(x))
        if now >= 0:
            told.append(F.cross_entropy(model.lm_head(core.norm(x))[0], ids[at + 1]).item())
    return told


@pytest.mark.parametrize("rule", ["cascade", "per_query"])
def test_the_cache_is_pruned_in_depth_and_time_as_a_slow_version_does(llama, ids, rule):
    kept = spatten.schedule(23, 6, 0.5)
    prompt = spatten.read(llama, ids[:, :12])
    told, _ = spatten.surprise(llama, prompt, ids[:, 12:], tokens=kept, rule=getattr(spatten, rule))
    for row, found in zip(ids, told, strict=True):
        assert found.tolist() == pytest.approx(slow(llama, row, 12, kept, rule), abs=1e-3)


def test_a_prompt_serves_many_times_and_stays_as_it_is(llama, ids):
    prompt = spatten.read(llama, ids[:, :12])
    votes = prompt[1].total.clone()
    settings = {"tokens": spatten.schedule(23, 6, 0.5), "values": 0.5, "bits": (4, 4, 0.2)}
    first = spatten.surprise(llama, prompt, ids[:, 12:], **settings)[0]
    assert torch.equal(first, spatten.surprise(llama, prompt, ids[:, 12:], **settings)[0])
    assert torch.equal(prompt[1].total, votes) and prompt[0].get_seq_length() == 12


def test_voters_are_the_queries_that_come_after(llama, ids):
    _, state = spatten.read(llama, ids[:, :12])
    assert torch.equal(state.voters, 6 * torch.arange(12, 0, -1.0).expand(3, -1))


# values


def test_local_value_pruning_keeps_what_a_key_heads_queries_want_most(llama, ids):
    """Half of the values of a key head, chosen by its three query heads together, summed by hand."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, length, 8, generator=g) for n, length in ((6, 1), (2, 10), (2, 10)))
    state, module = spatten.begin(values=0.5), llama.model.layers[0].self_attn
    E, P = spatten.spatten(module, q, k, v, None, scaling=8**-0.5, state=state)
    for head in range(6):
        group = P[0, 3 * (head // 3) : 3 * (head // 3) + 3, 0].sum(0)
        places = group.topk(5).indices
        torch.testing.assert_close(E[0, 0, head], P[0, head, 0, places] @ v[0, head // 3, places])


# bits


def test_msb_and_lsb_give_the_code_back_below_zero_too():
    q = torch.arange(-511, 512)
    for lsb in (1, 4, 6):
        high, low = spatten.parted(q, lsb)
        assert torch.equal((high << lsb) + low, q) and low.min() == 0 and low.max() == 2**lsb - 1
    assert [p.item() for p in spatten.parted(torch.tensor(-37), 4)] == [-3, 11]


def numbers():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 1, 8, generator=g), torch.randn(2, 2, 1, 20, 8, generator=g)
    return q, k, torch.zeros(2, 1, 1, 1, 20), k.abs().amax((3, 4), keepdim=True)


def test_tau_0_never_fetches_and_tau_above_1_always_and_is_then_all_bits():
    q, k, bias, largest = numbers()
    whole, _ = spatten.progressive(q, k, bias, largest / 511, 10, 0, 0.0)
    for middle in (False, True):
        _, none = spatten.progressive(q, k, bias, largest / 511, 6, 4, 0.0, middle)
        P, every = spatten.progressive(q, k, bias, largest / 511, 6, 4, 1.01, middle)
        assert not none.any() and every.all() and torch.equal(P, whole)
    torch.testing.assert_close(whole, spatten.attend(q, k, bias), rtol=0.05, atol=5e-3)


def test_only_flat_rows_change_and_they_are_those_whose_largest_is_below_tau():
    q, k, bias, largest = numbers()
    rough, _ = spatten.progressive(q, k, bias, largest / 127, 4, 4, 0.0)
    whole, _ = spatten.progressive(q, k, bias, largest / 127, 8, 0, 0.0)
    P, flat = spatten.progressive(q, k, bias, largest / 127, 4, 4, 0.2)
    assert torch.equal(flat, rough.amax(-1) < 0.2) and flat.any() and not flat.all()
    assert torch.equal(P[flat], whole[flat]) and torch.equal(P[~flat], rough[~flat])


def test_the_middle_of_a_step_is_right_on_average_and_its_lower_end_is_not():
    q = torch.arange(-512, 512)
    high = spatten.parted(q, 4)[0] << 4
    assert (q - high).double().mean() == 7.5 and (q - high - 7.5).abs().max() == 7.5


# the bill


@pytest.mark.parametrize(("rows", "transactions", "products"), [(128, 384, 24576), (64, 192, 12288), (16, 48, 3072)])
def test_counts_are_those_of_the_authors_simulator(rows, transactions, products):
    """12 heads, 128 queries, 8 bits: bursts of 32 bytes in 16 channels; cycles of 512 multipliers."""
    on, few = torch.ones(1, 12, 1, 1) > 0, torch.tensor([rows])
    bill = spatten.billed((8, 0), 64, 128, few, few, on, torch.zeros(1, 12, 1, 128) > 0)
    values = 12 * rows * 64  # of 8 bits there, of 16 here
    assert (bill.bits.item() / 8 + values) / (32 * 16) == transactions
    assert bill.macs.item() / 2 / 512 == products
    assert bill.bytes.item() == bill.bits.item() / 8 + 2 * values + 2 * 12 * 128 * 64


def test_lsbs_second_products_and_groups_by_hand():
    on = torch.tensor([[[1, 1, 0], [0, 0, 0]]]).bool()[..., None]  # two heads of group 0; group 1 has gone
    flat = torch.tensor([[[1, 0, 0], [0, 0, 0]]]).bool()[..., None]
    bill = spatten.billed((6, 4, 0.1), 8, 1, torch.tensor([10]), torch.tensor([5]), on, flat)
    assert bill.rows == 10 and bill.bits == 8 * 10 * (6 + 4) and bill.heads == 2 and bill.flat == 1
    assert bill.bytes == bill.bits / 8 + 2 * 8 * (5 + 2)
    assert bill.macs == 8 * (10 * 2 + 10 * 1 + 5 * 2)


def test_query_heads_save_key_bytes_only_when_their_group_has_gone(llama, ids):
    prompt = spatten.read(llama, ids[:, :12])
    whole, few = (
        spatten.cost(spatten.surprise(llama, prompt, ids[:, 12:], heads=heads)[1])
        for heads in (None, [6, 6, 2, 2, 2, 2])
    )
    assert few.heads == whole.heads * 20 / 36 and whole.rows / 2 < few.rows <= whole.rows


# bad input


def test_what_makes_no_sense_is_refused(bert, llama, ids):
    for k in (0, 6):
        with pytest.raises(ValueError, match="k ="):
            spatten.top(torch.zeros(1, 5), k)
    with pytest.raises(ValueError, match="NaN"):
        spatten.top(torch.tensor([[0.0, float("nan")]]), 1)
    for bad in ((26, 6, -0.1), (26, 6, 0.7), (26, 6, float("nan")), (0, 6, 0.5), (26, 1, 0.5)):
        with pytest.raises(ValueError, match="schedule"):
            spatten.schedule(*bad)
    for tokens in ([20, 10, 10, 10, 10, 10], [24, 10, 12, 10, 10, 10]):
        with pytest.raises(ValueError, match="layer 0"):
            spatten.encode(bert, ids, tokens)
    for settings in ({"values": 1.0}, {"values": -0.1}, {"bits": (6, 4)}):
        with pytest.raises(ValueError, match="values gone"):
            spatten.begin(**settings)
    q, k, bias, largest = numbers()
    for bad in ((1, 4, 0.1), (6, -1, 0.1), (6, 4, float("nan")), (6, 4, -0.1)):
        with pytest.raises(ValueError, match="msb"):
            spatten.progressive(q, k, bias, largest, *bad)
    with pytest.raises(ValueError, match="scale"):
        spatten.progressive(q, k, bias, 0 * largest, 6, 4, 0.1)
    with pytest.raises(ValueError, match="prepared"):
        spatten.read(llama, ids[:, :0])
    llama.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="prepared"):
        spatten.read(llama, ids)


def test_the_model_keeps_no_hook(bert, ids):
    with pytest.raises(ZeroDivisionError):
        spatten.encode(bert, ids, spatten.schedule(24, 6, 0.5), rule=lambda stage: 1 / 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bert.modules())


# what is stored


def test_every_arm_is_stored():
    topics, told = papers.results("spatten", "topics"), papers.results("spatten", "generation")
    assert len(topics) == 3 * (1 + len(recipe.TOKEN_ARMS) + 2 * len(recipe.FEW_TOKEN_ARMS) + len(recipe.HEAD_ARMS))
    assert len(told) == recipe.PROMPTS * len(recipe.arms())
    assert set(papers.results("spatten", "costs")["arm"]) == set(told["arm"])


def test_stored_bits_are_the_stored_accuracies_and_leads():
    topics = papers.results("spatten", "topics")
    shares = [bytes.fromhex(row) for row in topics["right"]]
    found = [sum(byte.bit_count() for byte in row) / (8 * len(row)) for row in shares]
    assert found == pytest.approx(topics["accuracy"].to_list(), abs=1e-4)
    half = topics.query("kind == 'tokens' and keep == 0.5").set_index("arm")["accuracy"]
    lead = papers.results("spatten", "leads").set_index(["kind", "keep", "rival"])["lead"]["tokens", 0.5, "local"]
    assert lead == pytest.approx(100 * (half["cascade"].mean() - half["local"].mean()), abs=0.02)


def test_all_token_rules_fetch_as_much():
    costs = papers.results("spatten", "costs").query("what == 'tokens'")
    assert (costs.groupby("keep")["bytes"].nunique() == 1).all()
