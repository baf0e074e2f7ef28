"""VFlowOpt: entropy, importance, stages, cells and fused tokens against loops by hand, the search, what is stored."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nbkit import models, papers, recipes, sparsity

flow = papers.method("vflowopt")
recipe = recipes.load("papers/vflowopt/recipe.py")


def graph(n=3, tokens=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, tokens, tokens, generator=g)).softmax(-1)


@pytest.fixture(scope="module")
def seen():
    """tiny-vit behind three blocks, on noise."""
    model = models.load("tiny-vit", seed=0).eval()
    x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    look = recipe.look(model, x, recipe.bytes_of(x), recipe.TINY)
    return torch.nn.Sequential(*model.blocks[3:], model.norm), look, model, x


# entropy


def test_entropies_that_are_known():
    flat = torch.full((1, 3, 14, 14), 77, dtype=torch.uint8)
    two = flat.clone()
    two[..., 7:] = 200
    levels = torch.arange(196, dtype=torch.uint8).view(1, 1, 14, 14).expand(1, 3, 14, 14)
    found = flow.patch_entropy(torch.cat([flat, two, levels], 3), 14)
    torch.testing.assert_close(found, torch.tensor([[0, 1, math.log2(196)]]), atol=1e-5, rtol=0)


def test_entropy_is_its_definition_patch_by_patch():
    images = torch.randint(0, 9, (2, 3, 8, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = flow.patch_entropy(images, 4).view(2, 2, 3)
    for n, row, column in itertools.product(range(2), range(2), range(3)):
        part = images[n, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
        _, counts = np.unique(np.round(part.mean(0)), return_counts=True)
        p = counts / 16
        assert found[n, row, column].item() == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-5)


# importance


def test_without_threshold_and_entropy_it_is_the_attention_received():
    A = graph()
    torch.testing.assert_close(flow.importance(A, torch.rand(3, 16), 0, 0), A.mean(1))


@pytest.mark.parametrize("t", [0.3, 1.0, 1.7])
def test_importance_is_its_definition_token_by_token(t):
    A, H, alpha = graph(), 7 * torch.rand(3, 16, generator=torch.Generator().manual_seed(2)), -0.4
    found = flow.importance(A, H, t, alpha)
    for n in range(3):
        received = [sum(A[n, i, j].item() for i in range(16)) for j in range(16)]
        K = [j for j in range(16) if received[j] > t * sum(received) / 16] or range(16)
        shares = [math.exp(h) for h in H[n].tolist()]
        for i in range(16):
            expected = sum(A[n, k, i].item() for k in K) / len(K) + alpha * shares[i] / sum(shares)
            assert found[n, i].item() == pytest.approx(expected, abs=1e-6)


def test_where_no_token_may_vote_all_do():
    A = graph()
    top = recipe.t_max(A)
    H = torch.zeros(3, 16)
    assert torch.equal(flow.importance(A, H, top + 1e-3, 0), flow.importance(A, H, 0, 0))
    assert not torch.equal(flow.importance(A, H, top - 1e-3, 0), flow.importance(A, H, 0, 0))


# stages


def test_the_third_share_makes_the_budget():
    for layers in ((3, 3, 3), (9, 9, 10)):
        for R1, R2 in ((0.3, 0.9), (0.35, 0.7)):
            R3 = flow.third(R1, R2, 0.25, layers)
            spent = R1 * layers[0] + R1 * R2 * layers[1] + R1 * R2 * R3 * layers[2]
            assert spent / sum(layers) == pytest.approx(0.25)


@pytest.mark.parametrize(("tokens", "Rbar"), [(64, 0.5), (64, 0.25), (64, 0.1), (49, 0.25), (49, 0.1)])
def test_all_schedules_cost_the_same_tokens(tokens, Rbar):
    side = math.isqrt(tokens)
    total = round(3 * tokens * Rbar)
    assert abs(total / 3 / tokens - Rbar) < 0.02
    even = recipe.flat(tokens, Rbar)
    assert sum(even) == total and even[0] >= even[1] >= even[2] >= even[0] - 1
    drawn = recipe.draw(np.random.default_rng(0), 50, recipe.box(Rbar, side, 2.0), Rbar, side)
    for s in map(flow.Strategy._make, drawn):
        counts = flow.stages(tokens, Rbar, s.R1, s.R2)
        assert sum(counts) == total and counts[0] >= counts[1] >= counts[2] >= 1
        assert int(flow.cells(side, s.a)[-1]) + 1 <= counts[0]
    low, high = recipe.box(Rbar, side, 2.0)
    assert (drawn >= low).all() and (drawn <= high).all()


# recycling


def test_four_tokens_by_hand():
    places, weights = flow.recycle(torch.tensor([[4.0, 3, 2, 1]]), 2, 2)
    assert places.tolist() == [[0, 1]]
    torch.testing.assert_close(weights[0], torch.tensor([[1, 0, 0, 0], [0, 1 / 2, 1 / 3, 1 / 6]]))


def test_a_cell_larger_than_the_grid_makes_one_token_the_weighted_mean():
    scores, states = torch.rand(4, 36), torch.randn(4, 36, 5)
    for keep in (1, 7, 20):
        places, weights = flow.recycle(scores, keep, 7.5)
        order = scores.argsort(descending=True)
        for n in range(4):
            gone = order[n, keep - 1 :]
            at = places[n].tolist().index(gone[0].item())
            mean = (scores[n, gone, None] * states[n, gone]).sum(0) / scores[n, gone].sum()
            torch.testing.assert_close((weights @ states)[n, at], mean)


@pytest.mark.parametrize("a", [1.0, 1.8, 2.4, 3.0, 4.0])
@pytest.mark.parametrize("keep", [9, 16, 25, 36])
def test_recycled_tokens_are_counted_and_nothing_is_lost(a, keep):
    side = 6
    scores = torch.rand(8, side * side, generator=torch.Generator().manual_seed(keep)) - 0.3  # some negative
    cell = flow.cells(side, a)
    count = len(cell.unique())
    if count > keep:
        with pytest.raises(ValueError, match="cells"):
            flow.recycle(scores, keep, a)
        return
    places, weights = flow.recycle(scores, keep, a)
    assert places.shape == (8, keep) and (places.diff(dim=1) > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, keep))
    assert (weights.sum(1) > 0).all()  # every token stands somewhere
    rank = scores.argsort(descending=True).argsort()
    for n in range(8):
        for place, row in zip(places[n].tolist(), weights[n], strict=True):
            members = row.nonzero().flatten()
            assert len(cell[members].unique()) == 1 and place in members
            assert rank[n, place] == rank[n, members].min()
            if len(members) > 1:
                w = scores[n, members].clamp(min=1e-9)
                torch.testing.assert_close(row[members], w / w.sum())


def test_keeping_all_fuses_nothing():
    places, weights = flow.recycle(torch.rand(2, 16), 16, 2.0)
    assert torch.equal(places, torch.arange(16).expand(2, 16)) and torch.equal(weights, torch.eye(16).expand(2, 16, 16))


# pruned passes


def test_nothing_pruned_is_the_whole_network_to_the_last_bit(seen):
    tail, look, model, x = seen
    scores = flow.importance(look.attention, look.entropy, 1, 0.5)
    output, places = flow.prune(tail, look.hidden, scores, (49, 49, 49))
    assert torch.equal(output, look.whole) and all(torch.equal(p[0], torch.arange(49)) for p in places)
    with torch.no_grad():
        assert torch.equal(model.head(output), model(x))


@pytest.mark.parametrize("a", [None, 3.0])
def test_a_pruned_pass_is_the_blocks_one_after_the_other(seen, a):
    tail, look, *_ = seen
    scores = flow.importance(look.attention, look.entropy, 0.8, 0.3)
    output, places = flow.prune(tail, look.hidden, scores, (20, 12, 5), a)
    with torch.no_grad():
        h = look.hidden
        for stage, block in enumerate(tail[:3]):
            if stage == 0:
                before = torch.arange(49).expand(5, 49)
                if a:
                    _, weights = flow.recycle(scores, 20, a)
                    full = torch.zeros(5, 49, h.shape[-1])
                    full.scatter_(1, places[0].unsqueeze(-1).expand(-1, -1, h.shape[-1]), weights @ h[:, 1:])
                    h = torch.cat([h[:, :1], full], 1)
            at = (before.unsqueeze(1) == places[stage].unsqueeze(2)).float().argmax(-1)
            patches = h[:, 1:].gather(1, at.unsqueeze(-1).expand(-1, -1, h.shape[-1]))
            h = block(torch.cat([h[:, :1], patches], 1))
            before = places[stage]
            if stage:
                lost = set(places[stage - 1][0].tolist()) - set(places[stage][0].tolist())
                assert scores[0, list(lost)].max() <= scores[0, places[stage][0]].min()
        torch.testing.assert_close(tail[3](h)[:, 0], output, rtol=1e-4, atol=1e-5)


def test_attention_among_patches_and_from_the_class_token(seen):
    _, look, model, x = seen
    kept = []
    handle = model.blocks[2].attn.weights.register_forward_hook(lambda *a: kept.append(a[2].mean(1)))
    with torch.no_grad():
        model(x)
    handle.remove()
    torch.testing.assert_close(look.from_class, kept[0][:, 0, 1:])
    torch.testing.assert_close(look.attention, F.normalize(kept[0][:, 1:, 1:], p=1, dim=-1))


# the search


def test_expected_improvement_is_the_mean_of_what_a_draw_gains():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(8, 5))
    y = np.sin(3 * x[:, 0]) + x[:, 1]
    at = rng.uniform(size=(4, 5))
    found = flow.expected_improvement(x, y, at)
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    kernel = ConstantKernel(1.0) * Matern(np.ones(5), (0.05, 20.0), nu=2.5)
    gp = GaussianProcessRegressor(kernel, alpha=1e-6, normalize_y=True).fit(x, y)
    mean, deviation = gp.predict(at, return_std=True)
    draws = mean + deviation * rng.standard_normal((200_000, 4))
    assert np.maximum(draws - y.max(), 0).mean(0) == pytest.approx(found, abs=5e-3)
    assert (flow.expected_improvement(x, y, x) < 1e-2).all()  # nothing is gained where one has been


def test_the_search_climbs_a_hill():
    limits = np.array([[0.0] * 5, [1.0] * 5])
    rng = np.random.default_rng(0)
    first = rng.uniform(size=(12, 5))

    def hill(s):
        return -float(((np.array(s) - 0.6) ** 2).sum())

    tried, y = flow.bayesian(hill, first, [hill(s) for s in first], lambda: rng.uniform(size=(500, 5)), limits, 30)
    assert tried.shape == (30, 5) and np.array_equal(tried[:12], first) and len(y) == 30
    assert max(y) > max(hill(s) for s in rng.uniform(size=(300, 5)))  # ten times as many by chance


def test_equal_tokens_are_nearly_equal_multiply_adds():
    cost = lambda counts: sparsity.transformer_macs(  # noqa: E731
        [1 + k for k in counts for _ in range(3)], width=384, hidden=1536
    ).sum()
    table = papers.results("vflowopt", "searches").query("model == 'DINOv2'")
    for row in table.itertuples():
        ratio = cost(flow.stages(64, row.budget, row.R1, row.R2)) / cost(recipe.flat(64, row.budget))
        assert ratio == pytest.approx(1, abs=0.01)


# rivals and arms


@pytest.mark.parametrize("arm", [*recipe.ARMS, *recipe.OTHERS])
def test_every_arm_runs_on_the_same_budget(seen, arm):
    tail, look, _, x = seen
    strategy = flow.Strategy(0.33, 0.8, 0.9, 0.2, 2.5)
    given = []
    hooks = [block.register_forward_hook(lambda m, args, out: given.append(out.shape[1] - 1)) for block in tail[:3]]
    output = recipe.output_of(
        arm, tail, look, strategy, 0.25, recipe.contrast(recipe.bytes_of(x), 4), torch.Generator(),
        {"random strategy": strategy, "random search": strategy},
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    assert output.shape == look.whole.shape
    assert sum(given) == 37 if arm != "pool" else 34 <= sum(given) <= 37


def test_chance_is_drawn_anew_for_every_image_and_arm(seen):
    _, look, *_ = seen
    g = torch.Generator().manual_seed(0)
    first, second = (recipe.ranking("random", look, None, None, g) for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_pooling_averages_rectangles():
    tail = torch.nn.Sequential(*[torch.nn.Identity() for _ in range(4)])
    hidden = torch.arange(17.0).view(1, 17, 1)
    caught = []
    tail[0].register_forward_hook(lambda m, args, out: caught.append(out))
    recipe.pooled(tail, hidden, (4, 4, 4))
    assert caught[0].flatten().tolist() == [0, 3.5, 5.5, 11.5, 13.5]


def test_crops_are_squares_of_the_right_picture():
    pictures = [np.full((40, 60, 3), 10 * i, np.uint8) for i in range(3)]
    cut = recipe.crops(pictures, 7, 0, side=16)
    assert cut.shape == (7, 3, 16, 16) and [int(c.float().mean()) for c in cut] == [0, 10, 20, 0, 10, 20, 0]


# bad input


def test_what_makes_no_sense_is_refused_and_changes_nothing(seen):
    tail, look, *_ = seen
    A = look.attention.clone()
    for bad in (A[0], A[:, :5], 2 * A, A.mT, A * float("nan")):
        with pytest.raises(ValueError, match="attention"):
            flow.importance(bad, look.entropy, 1, 0)
    for t in (-1, float("nan")):
        with pytest.raises(ValueError, match="attention"):
            flow.importance(A, look.entropy, t, 0)
    for entropy, alpha in ((look.entropy[:, :9], 0.0), (look.entropy, float("nan"))):
        with pytest.raises(ValueError, match="entropy"):
            flow.importance(A, entropy, 1, alpha)
    for image in (torch.rand(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8),
                  torch.zeros(1, 3, 8, 9, dtype=torch.uint8)):  # fmt: skip
        with pytest.raises(ValueError, match="bytes"):
            flow.patch_entropy(image, 4)
    for R1, R2, Rbar in ((0.0, 1, 0.2), (0.3, 1.1, 0.2), (0.3, 1, 0.0), (0.3, 1, 1.5), (float("nan"), 1, 0.2)):
        with pytest.raises(ValueError, match="Rbar"):
            flow.third(R1, R2, Rbar)
    for R1, R2 in ((0.375, 1.0), (0.25, 0.6)):  # nothing left, too much left
        with pytest.raises(ValueError, match="R3"):
            flow.stages(64, 0.25, R1, R2)
    for a in (0.5, 0.0, float("nan")):
        with pytest.raises(ValueError, match="cell"):
            flow.recycle(torch.rand(1, 16), 8, a)
    for scores, keep in ((torch.rand(1, 15), 8), (torch.rand(1, 16), 17), (torch.rand(1, 16), 3)):
        with pytest.raises(ValueError, match="kept"):
            flow.recycle(scores, keep, 2)
    scores = torch.rand(5, 49)
    for case in (((60, 5, 5), scores), ((5, 6, 5), scores), ((5, 5, 0), scores), ((5, 5, 5), scores[:, :48])):
        with pytest.raises(ValueError, match="stages"):
            flow.prune(tail, look.hidden, case[1], case[0])
    assert torch.equal(A, look.attention) and not any(m._forward_pre_hooks for m in tail.modules())


# what is stored


def test_every_search_has_thirty_evaluations_on_the_budget():
    table = papers.results("vflowopt", "searches")
    for (model, budget, _, _), rows in table.groupby(["model", "budget", "network", "seed"]):
        side = 8 if model == "DINOv2" else 7
        for name in ("Bayesian", "random"):
            own = rows[rows["search"].isin(["both", name])]
            assert len(own) in (recipe.CALLS, recipe.INITIAL) and own["call"].is_unique
        assert (rows["search"] == "both").sum() == recipe.INITIAL
        for row in rows.itertuples():
            assert sum(flow.stages(side * side, budget, row.R1, row.R2)) == round(3 * side * side * budget)
    assert table["f"].between(-1, 1).all()


def test_every_arm_is_stored_once():
    photos = papers.results("vflowopt", "photos")
    assert not photos.duplicated(["budget", "seed", "arm"]).any()
    for budget, seeds in recipe.SEEDS.items():
        own = photos[photos["budget"] == budget]
        for arm in recipe.ARMS:
            assert (own["arm"] == arm).sum() == (1 if arm in recipe.FIXED else seeds)
    garments = papers.results("vflowopt", "garments")
    assert len(garments) == len(recipe.GARMENT_BUDGETS) * recipe.NETWORKS * (1 + len(recipe.ARMS) + len(recipe.OTHERS))


def test_the_stored_bits_are_the_stored_accuracies():
    garments = papers.results("vflowopt", "garments")
    bits = np.unpackbits(papers.tensors("vflowopt", "right")["right"].numpy(), axis=1)[:, : recipe.TESTED]
    assert bits.mean(1) == pytest.approx(garments["accuracy"].to_numpy(), abs=1e-4)


def test_the_two_sets_of_photographs_are_apart():
    shown, searched = (recipe.photographs(name) for name in ("imagenet-sample", "photos"))
    assert len(shown) == 20 and len(searched) == 11
    small = [recipe.crops([p], 1, 0, side=8).flatten() for p in (*shown, *searched)]
    assert all(not torch.equal(a, b) for a in small[:20] for b in small[20:])
