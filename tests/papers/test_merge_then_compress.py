"""M-SMoE and MC-SMoE: alignment against brute force, groups by hand, what merging leaves alone, the row pruner."""

from __future__ import annotations

from copy import deepcopy
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nbkit import models, papers, recipes

m = papers.method("merge-then-compress")
recipe = recipes.load("papers/merge-then-compress/recipe.py")
SLUG = "merge-then-compress"


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net():
    return models.build("tiny-moe", seed=0).eval()


@pytest.fixture
def x():
    return torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def distance(w_in, w_out):
    return (w_in - w_in[0]).square().sum() + (w_out - w_out[0]).square().sum()


# alignment


@pytest.mark.parametrize("seed", range(3))
def test_alignment_is_the_best_of_all_orders_and_never_farther(seed):
    a, b = rand(2, 5, 7, seed=seed), rand(2, 7, 5, seed=seed + 10)
    near_in, near_out, orders = m.align(a, b)
    tried = [distance(torch.stack([a[0], a[1, list(p)]]), torch.stack([b[0], b[1][:, list(p)]]))
             for p in permutations(range(5))]  # fmt: skip
    torch.testing.assert_close(distance(near_in, near_out), min(tried))
    assert torch.equal(near_in[1], a[1][orders[1]]) and torch.equal(near_out[1], b[1][:, orders[1]])
    assert distance(near_in, near_out) <= distance(a, b)


def test_a_shuffled_copy_is_found_out_and_the_function_stays(net, x):
    moe = net.blocks[0].moe
    before = net(x)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    a, b = moe.w_in.detach(), moe.w_out.detach()
    near_in, near_out, _ = m.align(torch.stack([a[0], a[0][order]]), torch.stack([b[0], b[0][:, order]]))
    assert torch.equal(near_in[0], near_in[1]) and torch.equal(near_out[0], near_out[1])
    m.put(moe, *m.align(a, b)[:2], moe.slot)
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-6)
    assert not torch.equal(moe.w_in, a)


def test_a_gate_goes_along():
    up, gate, down = rand(3, 6, 4), rand(3, 6, 4, seed=1), rand(3, 4, 6, seed=2)
    joint, near_down, orders = m.align(torch.cat([up, gate], -1), down)
    tokens = rand(9, 4, seed=3)
    for e in range(3):
        one = (tokens @ up[e].T * (tokens @ gate[e].T).sigmoid()) @ down[e].T
        a, g = joint[e].chunk(2, -1)
        torch.testing.assert_close((tokens @ a.T * (tokens @ g.T).sigmoid()) @ near_down[e].T, one)
        assert sorted(orders[e].tolist()) == list(range(6))


# groups


def test_usage_and_similarity_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 3], [5, 0, 0], [1, 0, 0]])
    assert m.usage(logits).tolist() == [0.75, 0, 0.25]
    likeness = m.similarity(torch.tensor([[1.0, 0], [0, 2], [-3, 0], [1, 1]]))
    assert likeness[0, :3].tolist() == pytest.approx([1, 0.5, 0]) and likeness[0, 3] == pytest.approx(0.5 + 0.5**1.5)


def test_groups_are_dealt_over_layers_by_usage_and_each_keeps_one():
    usages = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])
    assert [m.shares_of(usages, k) for k in (1, 1.5, 2, 2.5, 3)] == [[1, 1], [1, 2], [2, 2], [2, 3], [3, 3]]
    one_layer_does_it_all = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    assert m.shares_of(one_layer_does_it_all, 2) == [1, 3]
    even = torch.full((3, 4), 0.25)
    assert sum(m.shares_of(even, 2)) == 6


def test_the_rest_joins_its_likest_dominant_expert():
    f = torch.tensor([0.1, 0.5, 0.3, 0.05, 0.05])
    likeness = torch.eye(5)
    likeness[0, 2] = likeness[3, 1] = likeness[4, 2] = 0.9
    likeness[0, 4] = 0.99  # not dominant
    assert m.group(f, likeness, 2).tolist() == [1, 0, 1, 0, 1]
    assert m.group(f, likeness, 5).tolist() == [2, 0, 1, 3, 4]
    assert m.group(f, likeness, 1).tolist() == [0] * 5


# merging


def test_merged_weights_are_means_by_usage():
    w, labels = rand(4, 3, 2), torch.tensor([0, 1, 0, 1])
    found = m.merge(w, labels, torch.tensor([3.0, 1, 1, 0]))
    torch.testing.assert_close(found[0], 0.75 * w[0] + 0.25 * w[2])
    torch.testing.assert_close(found[1], w[1])
    idle = m.merge(w, labels, torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(idle[1], (w[1] + w[3]) / 2)


def test_all_of_eight_or_equal_experts_leave_the_network_as_it_was(net, x):
    before, state = net(x), deepcopy(net.state_dict())
    torch.testing.assert_close(m.m_smoe(net, x, 8)(x), before, rtol=0, atol=1e-5)
    for block in net.blocks:
        block.moe.w_in.data[:] = block.moe.w_in.data[:1].clone()
        block.moe.w_out.data[:] = block.moe.w_out.data[:1].clone()
    same = net(x)
    one = m.m_smoe(net, x, 1)
    torch.testing.assert_close(one(x), same, rtol=0, atol=1e-5)
    assert recipe.expert_parameters(one) == 2 * 4096
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items() if "w_" not in k)


@pytest.mark.parametrize("base", m.BASES)
@pytest.mark.parametrize("weighting", list(m.WEIGHTINGS))
def test_every_way_to_merge_keeps_the_router_and_counts_parameters_once(net, x, base, weighting):
    state = deepcopy(net.state_dict())
    small = m.m_smoe(net, x, 2, base=base, weighting=weighting)
    assert recipe.expert_parameters(small) == 4 * 4096
    assert all(len(b.moe.slot) == 8 and b.moe.router.weight.shape == (8, 32) for b in small.blocks)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert small(x).isfinite().all()


def test_reversed_usage_gives_the_least_used_the_most():
    assert m.WEIGHTINGS["reversed"](torch.tensor([0.5, 0.1, 0.4])).tolist() == pytest.approx([0.1, 0.5, 0.4])


# recovery


def test_a_step_of_recovery_is_adamw_on_classes_and_softened_teacher(net, x):
    y, teacher = torch.arange(40) % 10, rand(40, 10)
    twin = deepcopy(net)
    m.recover(net, x, y, teacher, steps=1, lr=0.16, batch=40)
    logits = twin(x)
    p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
    (F.cross_entropy(logits, y) + 0.2 * (p * (p / q).log()).sum(1).mean()).backward()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        step = theirs.grad / (theirs.grad.abs() + 1e-6)  # the first step of Adam
        torch.testing.assert_close(mine, theirs * (1 - 0.01 * 0.01) - 0.01 * step, rtol=0, atol=2e-4)


# compression


def test_stable_ranks():
    flat = torch.outer(rand(5), rand(7, seed=1))
    assert m.stable_rank(torch.stack([torch.eye(6), 3 * torch.eye(6)])).tolist() == pytest.approx([6, 6])
    assert m.stable_rank(flat).item() == pytest.approx(1)
    assert m.stable_rank(torch.diag(torch.tensor([2.0, 1.0]))).item() == pytest.approx(1.25)


def test_u_v_plus_s_is_w_and_u_v_alone_the_best_of_its_rank(net, x):
    taken = recipe.factor(net, 4)
    torch.testing.assert_close(taken(x), net(x), rtol=0, atol=1e-5)
    W = net.blocks[0].moe.w_in.detach()
    low = recipe.factor(net, 4, rows=False).blocks[0].moe.w_in.detach()
    left = torch.linalg.svdvals(W)[:, 4:].square().sum()
    torch.testing.assert_close((W - low).square().sum(), left, rtol=1e-4, atol=0)
    assert recipe.expert_parameters(recipe.factor(net, 4, rows=False)) == 2 * 2 * 8 * 4 * (64 + 32)
    assert recipe.expert_parameters(taken) == 2 * 2 * 8 * 4 * (64 + 32) + 65_536


def test_the_share_of_s_falls_along_a_cubic_to_its_end(net, x):
    taken = recipe.factor(m.m_smoe(net, x, 2), 4)
    pruner = recipe.RowPruner(taken, 60, final=0.25)
    assert [pruner.remaining(s) for s in (1, 10)] == [1, 1] and pruner.remaining(20) == 0.25
    assert pruner.remaining(15) == pytest.approx(0.25 + 0.75 * 0.5**3)
    y = torch.arange(40) % 10
    m.recover(taken, x, y, net(x).detach(), steps=60, lr=1e-3, batch=40, after=pruner)
    kept = recipe.expert_parameters(taken) - 4 * 2 * 4 * (64 + 32)
    assert 0.25 * 16_384 <= kept <= 0.25 * 16_384 + 2 * 64
    rows = torch.cat([S.any(-1).flatten() for S in pruner.S])
    assert 0 < rows.sum() < len(rows)


def test_rows_worth_least_go_first():
    taken = recipe.factor(models.build("tiny-moe", seed=0, stored=(1, 1)), 2)
    pruner = recipe.RowPruner(taken, 60, final=0.5)
    worth = [rand(*S.shape[:2], seed=i).abs() for i, S in enumerate(pruner.S)]
    for S in pruner.S:
        S.data.fill_(1.0)
    for step in range(1, 61):
        for S, w in zip(pruner.S, worth, strict=True):
            S.grad = w[..., None].expand_as(S).clone()
        pruner(step)
    kept = torch.cat([w[S.any(-1)] for S, w in zip(pruner.S, worth, strict=True)])
    gone = torch.cat([w[~S.any(-1)] for S, w in zip(pruner.S, worth, strict=True)])
    assert kept.min() > gone.max()


# bad input


def test_what_makes_no_sense_is_refused_and_changes_nothing(net, x):
    state = deepcopy(net.state_dict())
    a, b = rand(3, 6, 4), rand(3, 4, 6)
    for bad in ((a[0], b), (a, b[:2]), (a, b.mT), (a * float("nan"), b)):
        with pytest.raises(ValueError, match="experts"):
            m.align(*bad)
    with pytest.raises(ValueError, match="reference"):
        m.align(a, b, 3)
    for bad in (torch.zeros(0, 3), rand(3), rand(3, 2) / 0):
        with pytest.raises(ValueError, match="logits"):
            m.usage(bad)
    with pytest.raises(ValueError, match="vectors"):
        m.similarity(rand(3) / 0)
    for average in (0, 0.5, 9, 2.3):
        with pytest.raises(ValueError, match="on average"):
            m.m_smoe(net, x, average)
    with pytest.raises(ValueError, match="groups"):
        m.m_smoe(net, x, 0, adaptive=False)
    with pytest.raises(ValueError, match="not 2.5"):
        m.m_smoe(net, x, 2.5, adaptive=False)
    with pytest.raises(ValueError, match="base"):
        m.m_smoe(net, x, 2, base="taste")
    with pytest.raises(KeyError):
        m.m_smoe(net, x, 2, weighting="taste")
    for labels, f in (([0, 0, 2], [1.0, 1, 1]), ([0, 1], [1.0, 1]), ([0, 1, 0], [1.0, -1, 0])):
        with pytest.raises(ValueError, match="labels"):
            m.merge(a, torch.tensor(labels), torch.tensor(f))
    for rank in (-1, 33):
        with pytest.raises(ValueError, match="rank"):
            recipe.factor(net, rank)
    with pytest.raises(ValueError, match="factor"):
        recipe.RowPruner(net, 100)
    with pytest.raises(ValueError, match="steps"):
        recipe.RowPruner(recipe.factor(net, 2), 50)
    y = torch.zeros(40, dtype=torch.long)
    for bad in ({"steps": 0}, {"lr": 0.0}, {"batch": 41}):
        with pytest.raises(ValueError, match="rows or more"):
            m.recover(net, x, y, rand(40, 10), **{"batch": 40, **bad})
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())


# what is stored


def test_the_stored_network_is_the_one_measured():
    net = models.build("tiny-moe", seed=0)
    net.load_state_dict(papers.tensors(SLUG, "net"))
    layers = papers.results(SLUG, "layers").query("seed == 0")
    routed = m.routes(net, recipe.calibration())
    assert layers["most"].to_numpy() == pytest.approx([m.usage(z).max().item() for z in routed], abs=2e-3)
    full = papers.results(SLUG, "after").query("seed == 0 and arm == 'full'")["before"].item()
    assert recipe.accuracy(net) == pytest.approx(full, abs=0.004)


def test_every_arm_is_stored_for_every_network_and_counts_what_it_stores():
    after, before = papers.results(SLUG, "after"), papers.results(SLUG, "before")
    assert after.groupby("arm")["seed"].nunique().eq(5).all()
    assert set(after["arm"]) == {*recipe.RECOVERED, *recipe.SQUEEZED}
    assert before.groupby(["arm", "k"])["seed"].nunique().eq(5).all()
    assert not after.duplicated(["seed", "arm", "k", "draw"]).any()
    sizes = before.groupby("k")["parameters"].unique()
    assert {k: list(np.atleast_1d(v)) for k, v in sizes.items()} == {1: [8192], 2: [16_384], 4: [32_768]}
    squeezed = after[after["arm"].isin(recipe.SQUEEZED)].set_index("arm")["parameters"]
    assert squeezed.max() / squeezed.min() < 1.05  # of equal size
    assert set(squeezed.index) == set(recipe.SQUEEZED)


def test_random_labels_leave_no_group_empty():
    for seed in range(30):
        labels = recipe.random_labels(8, 3, torch.Generator().manual_seed(seed))
        assert sorted(labels.unique().tolist()) == [0, 1, 2] and len(labels) == 8
