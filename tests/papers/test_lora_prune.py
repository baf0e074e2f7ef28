"""LoRAPrune: its surrogate against autograd, groups by hand, the schedule, masks that never regrow, the dense copy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import models, papers, recipes

lp = papers.method("lora-prune")
recipe = recipes.load("papers/lora-prune/recipe.py")
SLUG = "lora-prune"
SMALL = {"vocab": 50, "width": 16, "layers": 3, "heads": 2, "hidden": 12, "positions": 32}


def network(rank=3, seed=0, **changes):
    """A small Llama with adapters whose B is not 0 any more."""
    net = lp.adapted(models.build("tiny-llama", seed=seed, **{**SMALL, **changes}), rank, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return net


def tokens(*shape, seed=0):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def stand_in(module):
    """The surrogate of a matrix, after backward."""
    _, A, B, _ = lp.parts(module)
    return lp.surrogate(A, B, A.grad, B.grad)


def scored(net, seed=0):
    """The same after one backward with the gradients of all weights."""
    for name, p in net.named_parameters():
        p.requires_grad_("lora" in name or "base_layer" in name)
    lp.loss_of(net, tokens(2, 8, seed=seed)).backward()
    return net


# the surrogate


@pytest.mark.parametrize("seed", range(3))
def test_the_surrogate_is_the_gradient_seen_through_the_adapters(seed):
    for module in scored(network(seed=seed), seed).modules():
        if not hasattr(module, "lora_A"):
            continue
        W, A, B, s = lp.parts(module)
        G = W.grad
        torch.testing.assert_close(B.grad, s * G @ A.T, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(A.grad, s * B.T @ G, rtol=1e-4, atol=1e-7)
        expected = s * G @ A.T @ A + s * B @ B.T @ G - s**2 * G @ A.T @ B.T @ G
        torch.testing.assert_close(stand_in(module), expected, rtol=1e-4, atol=1e-7)


def test_it_is_what_one_gradient_step_takes_off_the_product():
    A, B = torch.randn(3, 7).double(), torch.randn(5, 3).double()
    g_A, g_B = torch.randn(3, 7).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(lp.surrogate(A, B, g_A, g_B), B @ A - (B - g_B) @ (A - g_A))


def test_at_full_rank_with_orthogonal_rows_lora_scores_are_grad_scores():
    net = lp.adapted(models.build("tiny-llama", seed=0, **SMALL), 16)
    for module in net.modules():
        if hasattr(module, "lora_A") and module.in_features == 16:
            A = lp.parts(module)[1]
            A.data = torch.linalg.qr(A.data).Q
    scored(net)
    layer = net.model.layers[1]
    ours, true = (lp.group_scores(layer, "heads", metric) for metric in ("lora", "grad"))
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=0)  # 1e-8 is added to norms that differ by s
    W, A, B, s = lp.parts(layer.mlp.up_proj)
    torch.testing.assert_close(stand_in(layer.mlp.up_proj), s * W.grad)


# groups and scores


def test_groups_by_hand():
    scores = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, 2.0], [4.0, 0.0]])
    torch.testing.assert_close(lp.by_group(scores, 0, 2), torch.tensor([3.0, 8.0]) / math.sqrt(73))
    torch.testing.assert_close(lp.by_group(scores, 1, 2), torch.tensor([7.0, 4.0]) / math.sqrt(65))
    assert lp.by_group(torch.zeros(4, 2), 0, 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("metric", ["lora", "grad", "magnitude"])
def test_group_scores_are_the_loops_one_would_write(metric):
    layer = scored(network()).model.layers[0]
    for kind, part, size, width in (("heads", "self_attn", 2, 8), ("channels", "mlp", 12, 1)):
        total = np.zeros(size)
        names = ("q_proj", "k_proj", "v_proj", "o_proj") if kind == "heads" else ("gate_proj", "up_proj", "down_proj")
        for name in names:
            module = getattr(getattr(layer, part), name)
            W, A, B, s = lp.parts(module)
            G = {"lora": lambda m=module: stand_in(m), "grad": lambda w=W: w.grad}.get(metric, lambda: 1.0)()
            element = (G * (W + s * B @ A)).abs().detach().numpy()
            sums = np.zeros(size)
            for j in range(element.shape[0]):
                for k in range(element.shape[1]):
                    sums[(k if name in ("o_proj", "down_proj") else j) // width] += element[j, k]
            total += sums / (np.linalg.norm(sums) + 1e-8)
        np.testing.assert_allclose(lp.group_scores(layer, kind, metric).numpy(), total, rtol=1e-4)


def test_a_head_of_zeros_scores_nothing():
    net = network()
    attention = net.model.layers[1].self_attn
    for name, axis in lp.AXES["heads"].items():
        W, A, B, _ = lp.parts(getattr(attention, name))
        W.data.narrow(axis, 0, 8).zero_()
        (A if axis else B).data.narrow(axis, 0, 8).zero_()
    scored(net)
    for metric in ("lora", "grad", "magnitude"):
        scores = lp.group_scores(net.model.layers[1], "heads", metric)
        assert scores[0] == 0 and scores[1] > 0


# schedule and masks


def test_the_schedule_is_flat_at_both_ends_and_never_falls():
    rho = [lp.sparsity(t, 100, 0.5) for t in range(101)]
    assert rho[:11] == [0.0] * 11 and rho[91:] == [0.5] * 10 and (np.diff(rho) >= 0).all()
    assert rho[50] == pytest.approx(0.5 * (1 - (1 - 40 / 80) ** 3))


def test_a_cut_takes_the_lowest_and_never_gives_back():
    S = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert lp.cut(S, torch.ones(4), 0.5).tolist() == [1, 0, 0, 1]
    generator, mask = torch.Generator().manual_seed(0), torch.ones(40)
    for rho in (0.1, 0.3, 0.3, 0.45):
        smaller = lp.cut(torch.rand(40, generator=generator), mask, rho)
        assert (smaller <= mask).all() and (smaller == 0).sum() == round(40 * rho)
        mask = smaller


def test_masks_silence_the_groups_and_are_gone_afterwards():
    net, ids = network(), tokens(2, 8)
    before = net(input_ids=ids).logits
    masks = lp.everything(net)
    assert sorted({n for n, _ in masks}) == [0, 1]  # of three layers the last stays whole
    with lp.masked(net, masks):
        torch.testing.assert_close(net(input_ids=ids).logits, before)
        masks[0, "channels"][:] = 0
        masks[0, "heads"][1] = 0
        inside = net(input_ids=ids).logits
    hand = network()
    lp.parts(hand.model.layers[0].mlp.down_proj)[0].data.zero_()
    lp.parts(hand.model.layers[0].mlp.down_proj)[2].data.zero_()
    lp.parts(hand.model.layers[0].self_attn.o_proj)[0].data[:, 8:] = 0
    lp.parts(hand.model.layers[0].self_attn.o_proj)[1].data[:, 8:] = 0
    torch.testing.assert_close(inside, hand(input_ids=ids).logits)
    torch.testing.assert_close(net(input_ids=ids).logits, before)


@pytest.mark.parametrize("seed", range(3))
def test_the_small_dense_copy_is_the_masked_network(seed):
    net, ids = network(seed=seed), tokens(2, 8)
    generator = torch.Generator().manual_seed(seed)
    masks = {key: lp.cut(torch.rand(len(m), generator=generator), m, 0.5) for key, m in lp.everything(net).items()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small = lp.slim(net, masks)
    with lp.masked(net, masks):
        torch.testing.assert_close(small(input_ids=ids).logits, net(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert lp.parts(small.model.layers[0].mlp.down_proj)[0].shape == (16, 6)
    assert lp.parts(small.model.layers[0].self_attn.q_proj)[0].shape == (8, 16)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# the loop


def test_the_average_and_a_batch_that_gives_no_numbers():
    net = scored(network())
    S = {(0, "heads"): torch.tensor([1.0, 1.0])}
    now = lp.group_scores(net.model.layers[0], "heads", "lora")
    lp.update(S, net, "lora")
    torch.testing.assert_close(S[0, "heads"], 0.9 + 0.1 * now)
    kept = S[0, "heads"].clone()
    lp.parts(net.model.layers[0].self_attn.q_proj)[1].grad[0, 0] = float("nan")
    lp.update(S, net, "lora")
    assert torch.equal(S[0, "heads"], kept)


@pytest.mark.parametrize("metric", ["lora", "grad", "magnitude"])
def test_training_removes_half_of_every_layer_and_moves_adapters_alone(metric):
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    masks, S, losses = lp.train(net, tokens(30, 2, 8), metric, lr=1e-2, every=2)
    assert {k: int(m.sum()) for k, m in masks.items()} == {
        (n, k): {"heads": 1, "channels": 6}[k] for n in (0, 1) for k in lp.AXES
    }
    assert len(losses) == 30 and all(v.isfinite().all() for v in S.values())
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all("lora" in k for k in moved)


def test_at_once_everything_goes_at_the_end_of_the_warmup_by_the_scores_of_then():
    batches = tokens(20, 2, 8)
    net = network()
    masks, _, losses = lp.train(net, batches, "lora", lr=1e-2, once=True)
    _, S, early = lp.train(network(), batches, "lora", lr=1e-2, ratio=0.0)
    assert losses[:3] == early[:3] and losses[4] != early[4]
    assert {int(m.sum()) for m in masks.values()} == {1, 6}


def test_a_function_can_score():
    in_order = lambda layer, kind: torch.arange(2.0 if kind == "heads" else 12.0)  # noqa: E731
    masks, _, _ = lp.train(network(), tokens(20, 1, 8), in_order, lr=1e-3, every=2)
    assert masks[0, "heads"].tolist() == [0, 1] and masks[1, "channels"].tolist() == [0] * 6 + [1] * 6


# bad input


def test_bad_input_is_refused_by_name():
    A, B = torch.randn(3, 7), torch.randn(5, 3)
    for wrong in ((A, B, A.T, B), (A, B, A, B.T), (A, B[:, :2], A, B[:, :2])):
        with pytest.raises(ValueError, match=r"\[r, i\]"):
            lp.surrogate(*wrong)
    for axis, groups in ((2, 1), (0, 3), (1, 0)):
        with pytest.raises(ValueError, match="groups"):
            lp.by_group(torch.ones(4, 4), axis, groups)
    for settings in ((1.0,), (-0.1,), (0.5, 0.5, 0.5), (0.5, -0.1, 0.1)):
        with pytest.raises(ValueError, match="warmup"):
            lp.sparsity(0, 100, *settings)
    for S, mask, rho in ((torch.ones(3), torch.ones(4), 0.5), (torch.ones(2, 2), torch.ones(2, 2), 0.5),
                         (torch.ones(4), torch.ones(4), 1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="rho"):
            lp.cut(S, mask, rho)


def test_models_that_do_not_fit_are_refused():
    net = network()
    layer = net.model.layers[0]
    with pytest.raises(ValueError, match="kind"):
        lp.group_scores(layer, "rows", "lora")
    for metric in ("size", "lora", "grad"):
        with pytest.raises(ValueError, match=f"no '{metric}': lora, grad, magnitude"):
            lp.group_scores(layer, "channels", metric)
    bare = models.build("tiny-llama", seed=0, **SMALL).model.layers[0]
    with pytest.raises(ValueError, match="no adapter"):
        lp.group_scores(bare, "channels", "magnitude")
    shared = nn.Module()
    shared.self_attn = nn.Module()
    for name, width in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8), ("o_proj", 16)):
        setattr(shared.self_attn, name, nn.Linear(16, width))
    with pytest.raises(ValueError, match="share a key"):
        lp.members(shared, "heads")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for batches, more in ((tokens(9, 1, 8), {}), (tokens(20, 1, 8), {"every": 0}), (tokens(20, 1, 8), {"ratio": 1.0})):
        with pytest.raises(ValueError):
            lp.train(net, batches, "lora", lr=1e-2, **more)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# the tables


def test_every_way_has_its_runs_and_its_own_rate_by_validation():
    table = papers.results(SLUG, "runs")
    assert not table.duplicated(["arm", "base", "seed", "lr"]).any()
    for arm, runs in table.groupby("arm"):
        chosen = runs[runs["chosen"]]
        assert len(chosen) == (2 if arm == "not pruned" else 6) and chosen["lr"].nunique() == 1
        if arm != "not pruned":
            grid = runs[(runs["base"] == 0) & (runs["seed"] == 0)]
            assert sorted(grid["lr"]) == sorted(recipe.RATES)
            assert grid.loc[grid["validation"].idxmin(), "chosen"]
            assert (runs["heads"] == 14).all() and (runs["channels"] == 7 * 96).all()


def test_all_ways_start_from_the_same_losses():
    table = papers.results(SLUG, "curves").query("step == 0 and arm not in ['not pruned']")
    same = papers.results(SLUG, "runs").query("chosen").groupby("arm")["lr"].first()
    alike = [arm for arm in same.index if same[arm] == same["lora"]]
    first = table[table["arm"].isin(alike)].groupby(["base", "seed"])["loss"].nunique()
    assert (first == 1).all()


def test_no_random_gradient_passes_the_rule_for_fidelity():
    table = papers.results(SLUG, "noise")
    assert len(table) == 8 and (table["passes"] <= 0.05 * recipe.DRAWS).all()
