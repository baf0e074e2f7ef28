"""The method cells of the fire-together-wire-together notebook, used without the notebook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import models, papers, recipes, sparsity, training
from nbkit.errors import NotFinite

SLUG = "fire-together-wire-together"
ftwt = papers.method(SLUG)
recipe = recipes.load("papers/fire-together-wire-together/recipe.py")


@pytest.fixture
def net():
    model = models.build("small-cnn", seed=0, widths=(5, 6, 7), pool=(1,), batch_norm=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2, generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture
def x():
    return torch.rand(8, 1, 12, 12, generator=torch.Generator().manual_seed(1))


Y = torch.arange(8)


def same(model, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def random_masks(model, n: int = 1) -> list:
    dealt = torch.Generator().manual_seed(2)
    masks = [(torch.rand(n, h.linear.out_features, generator=dealt) > 0.4).float() for h in model.heads.values()]
    for mask in masks:
        mask[:, 0] = 1
    return masks


# which filters fire


@pytest.mark.parametrize(
    ("a", "r", "expected"),
    [
        ((5, 3, 1, 1), 0.8, [0, 1]),
        ((5, 3, 1, 1), 0.79, [0]),
        ((5, 0, 2, 0), 1, [0, 2]),
        ((5, 0, 2, 0), 0.3, [0]),  # the strongest stays though its share is above r
        ((0, 0, 0, 0), 0.5, [0, 1, 2, 3]),
        ((0, 0, 0, 0), 1, [0, 1, 2, 3]),
        ((1, 3, 1, 5), 0.8, [1, 3]),
    ],
)
def test_the_shares_say_who_stays(a, r, expected):
    assert ftwt.kept(torch.tensor([a]).float(), r)[0].nonzero()[:, 0].tolist() == expected


def test_it_is_what_a_plain_loop_over_sorted_shares_keeps():
    a = torch.rand(40, 9, generator=torch.Generator().manual_seed(0)) ** 3
    for r in (0.2, 0.5, 0.75, 0.9, 0.99):
        for row, found in zip(a, ftwt.kept(a, r), strict=True):
            total, stays = 0.0, set()
            for i in row.argsort(descending=True).tolist():
                total += (row[i] / row.sum()).item()
                if total - r <= 1e-5 or not stays:
                    stays.add(i)
            assert set(found.nonzero()[:, 0].tolist()) == stays


def test_more_mass_keeps_more_filters_and_size_does_not_matter():
    a = torch.rand(30, 16, generator=torch.Generator().manual_seed(0))
    few, many = ftwt.kept(a, 0.5), ftwt.kept(a, 0.8)
    assert (many | ~few).all() and many.sum() > few.sum()
    assert torch.equal(ftwt.kept(7 * a, 0.5), few)


# the network with heads


@pytest.mark.parametrize("softmax", [True, False])
def test_heads_that_always_fire_are_the_dense_network_bit_for_bit(net, x, softmax):
    model = ftwt.Wired(net, 0.5, softmax=softmax)
    for head in model.heads.values():
        nn.init.zeros_(head.linear.weight)
        nn.init.constant_(head.linear.bias, 10)
    with torch.no_grad():
        assert torch.equal(ftwt.watch(model, x)[0], net(x))
        assert torch.equal(ftwt.watch(model, x, "all")[0], net(x))


def test_fixed_masks_are_the_network_cut_smaller_and_cost_what_it_costs(net, x):
    model = ftwt.Wired(net, 0.5)
    masks = random_masks(model)
    logits, fired = ftwt.watch(model, x, masks)
    keep = {name: mask[0].bool() for name, mask in zip(model.heads, masks, strict=True)}
    small = sparsity.structured(net, keep, example=x)
    with torch.no_grad():
        torch.testing.assert_close(logits, small(x))
    expected = sparsity.flops(small, x)["macs"].sum()
    assert ftwt.multiply_adds(model, fired, heads=False).tolist() == [expected] * len(x)


def test_a_dense_image_costs_what_the_kit_counts_and_heads_cost_their_weights(net, x):
    model = ftwt.Wired(net, 0.5)
    fired = ftwt.watch(model, x, "all")[1]
    dense = ftwt.multiply_adds(model, fired, heads=False)[0].item()
    assert dense == sparsity.flops(net, x)["macs"].sum()
    assert ftwt.multiply_adds(model, fired)[0].item() - dense == 1 * 5 + 5 * 6 + 6 * 7


def test_the_mean_cost_is_of_products_not_a_product_of_means(net, x):
    model = ftwt.Wired(net, 0.5)
    masks = random_masks(model, len(x))
    fired = ftwt.watch(model, x, masks)[1]
    one_by_one = [
        ftwt.multiply_adds(model, ftwt.watch(model, x[i : i + 1], [m[i] for m in masks])[1]) for i in range(len(x))
    ]
    torch.testing.assert_close(ftwt.multiply_adds(model, fired), torch.cat(one_by_one))


def test_responses_are_taken_before_the_mask_and_the_next_layer_sees_it(net, x):
    model = ftwt.Wired(net, 0.5)
    masks = [torch.ones(5), torch.ones(6), torch.ones(7)]
    masks[1][2] = 0
    dense, masked = ftwt.watch(model, x, "all")[1], ftwt.watch(model, x, masks)[1]
    assert torch.equal(dense[1].a, masked[1].a) and masked[1].a[:, 2].any()
    assert not torch.equal(dense[2].a, masked[2].a) and not torch.equal(dense[2].p, masked[2].p)
    assert torch.equal(dense[1].p, masked[1].p)  # a head does not see what its own layer gives


def test_true_masks_are_those_of_the_masked_network(net, x):
    model = ftwt.Wired(net, 0.6)
    for f in ftwt.watch(model, x, "truth")[1]:
        assert torch.equal(f.b.bool(), ftwt.kept(f.a, 0.6)) and f.b.sum(1).min() >= 1


# what is trained by what


@pytest.mark.parametrize("joint", [False, True])
def test_the_mask_loss_reaches_the_backbone_in_joint_mode_only(net, x, joint):
    model = ftwt.Wired(net, 0.5, joint=joint)
    ftwt.mask_loss(ftwt.trace(model, x)[1], 0.5).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.net.parameters()) == joint
    assert all(p.grad is not None and p.grad.any() for p in model.heads["conv2"].parameters())


@pytest.mark.parametrize(("joint", "masks"), [(False, "heads"), (True, "heads"), (False, "gates")])
def test_the_task_reaches_the_heads_only_straight_through(net, x, joint, masks, monkeypatch):
    monkeypatch.setitem(ftwt.SOURCES, "gates", recipe.straight)
    model = ftwt.Wired(net, 0.5, bias=0, joint=joint)
    logits, fired = ftwt.trace(model, x, masks)
    F.cross_entropy(logits, Y).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.heads.parameters()) == (masks == "gates")
    assert set(torch.cat([f.b.flatten() for f in fired]).tolist()) == {0, 1}


def test_the_mask_loss_is_summed_over_filters_and_averaged_over_images_and_layers(net, x):
    model = ftwt.Wired(net, 0.5)
    fired = ftwt.watch(model, x)[1]
    plain = 0.0
    for f in fired:
        s, truth = f.p.sigmoid(), ftwt.kept(f.a, 0.5).float()
        plain += -(truth * s.log() + (1 - truth) * (1 - s).log()).sum().item() / len(x) / len(fired)
    assert ftwt.mask_loss(fired, 0.5).item() == pytest.approx(plain, rel=1e-4)


def test_heads_rest_in_the_second_half_but_for_their_momentum(net, x):
    seen = []

    def extra(fired, done):
        seen.append(done)
        return 0.0

    model = ftwt.fine_tune(ftwt.Wired(net, 0.5), x, Y, steps=4, lr=0.01, batch=4, extra=extra)
    assert seen == [0, 0.25, 0.5, 0.75]
    assert same(model.heads, ftwt.Wired(net, 0.5).heads.state_dict())


def test_training_is_the_same_twice_and_leaves_the_given_network_alone(net, x):
    before = training.state(net)
    one, two, other = (
        ftwt.fine_tune(ftwt.Wired(net, 0.5), x, Y, steps=3, lr=0.01, batch=4, seed=s) for s in (0, 0, 1)
    )
    assert same(one, two.state_dict()) and not same(one, other.state_dict()) and same(net, before)


# rivals


def test_static_masks_are_the_smallest_that_cost_enough(net, x):
    model = ftwt.Wired(net, 0.5)
    fired = ftwt.watch(model, x, "all")[1]
    scores = [torch.rand(f.a.shape[1], generator=torch.Generator().manual_seed(3)) for f in fired]
    costs = []
    for goal in (1e4, 2e4, 2.8e4):
        masks = recipe.static(ftwt, model, scores, fired, goal)
        costs.append(ftwt.multiply_adds(model, ftwt.watch(model, x, masks)[1], heads=False)[0].item())
        assert costs[-1] >= goal
        for mask, score in zip(masks, scores, strict=True):
            assert score[mask[0] > 0].min() >= score[mask[0] == 0].max() if (mask == 0).any() else True
    assert costs == sorted(costs)
    with pytest.raises(ValueError, match="even the whole"):
        recipe.static(ftwt, model, scores, fired, 1e9)


def test_shuffled_masks_have_as_many_ones_an_image_and_a_layer(net):
    masks = random_masks(ftwt.Wired(net, 0.5), 8)
    dealt = recipe.shuffled(masks, torch.Generator().manual_seed(0))
    for mask, other in zip(masks, dealt, strict=True):
        assert torch.equal(mask.sum(1), other.sum(1)) and not torch.equal(mask, other)


def test_balanced_accuracy_by_hand():
    truth = torch.tensor([[1, 1, 1, 0]])
    assert recipe.balanced(torch.tensor([[1, 1, 0, 0]]), truth) == pytest.approx((2 / 3 + 1) / 2)
    assert recipe.balanced(torch.ones(1, 4), truth) == 0.5


# bad input


def test_bad_input_is_refused_and_changes_nothing(net, x):
    model = ftwt.Wired(net, 0.5)
    before, fired = training.state(model), ftwt.watch(model, x)[1]
    cases = [
        (lambda: ftwt.kept(torch.rand(2, 3), 0.0), ValueError, "r 0.0"),
        (lambda: ftwt.kept(torch.rand(2, 3), 1.1), ValueError, "r 1.1"),
        (lambda: ftwt.kept(torch.rand(3), 0.5), ValueError, "N, C"),
        (lambda: ftwt.kept(torch.rand(3, 0), 0.5), ValueError, "N, C"),
        (lambda: ftwt.kept(-torch.rand(2, 3), 0.5), ValueError, ">= 0"),
        (lambda: ftwt.kept(torch.tensor([[1.0, torch.nan]]), 0.5), ValueError, "finite"),
        (lambda: ftwt.Wired(net, 1.5), ValueError, "r 1.5"),
        (lambda: ftwt.Wired(nn.Sequential(nn.Linear(2, 2)), 0.5), ValueError, "flat"),
        (lambda: ftwt.Wired(nn.Sequential(nn.Conv2d(1, 2, 3)), 0.5), ValueError, "flat"),
        (lambda: ftwt.Wired(models.build("tiny-vit", seed=0), 0.5), ValueError, "flat"),
        (lambda: ftwt.Wired(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.ReLU()), 0.5), ValueError, "grouped"),
        (lambda: ftwt.watch(model, x, "head"), ValueError, "masks must"),
        (lambda: ftwt.watch(model, x, [torch.ones(5)]), ValueError, "masks must"),
        (lambda: ftwt.watch(model, x, [torch.ones(4)] * 3), ValueError, "a mask a layer"),
        (lambda: ftwt.multiply_adds(model, fired, [torch.ones(8, 4)] * 3), ValueError, "one a layer"),
        (lambda: ftwt.multiply_adds(model, fired, [torch.ones(5)]), ValueError, "one a layer"),
        (lambda: ftwt.watch(model, x[:0]), ValueError, "empty"),
        (lambda: ftwt.fine_tune(model, x * torch.nan, Y, steps=1, lr=0.1), NotFinite, "NaN"),
        (lambda: ftwt.fine_tune(model, x, Y[:3], steps=1, lr=0.1), ValueError, "as many"),
        (lambda: ftwt.fine_tune(model, x, Y + 9, steps=1, lr=0.1), ValueError, "classes"),
        (lambda: ftwt.fine_tune(model, x, Y, steps=0, lr=0.1), ValueError, "above 0"),
        (lambda: ftwt.fine_tune(model, x, Y, steps=1, lr=-1), ValueError, "above 0"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert same(model, before) and not any(p.grad is not None for p in model.parameters())


# tables


def test_every_cell_of_the_tables_is_there_and_rivals_have_the_budget_they_should():
    results = papers.results(SLUG)
    cost = results.pivot_table("cost", ["r", "seed"], "arm")
    assert len(cost) == 9 and not cost[["plain", "softmax", *recipe.RIVALS]].isna().any().any()
    heads = 1808 / 1919552
    assert (cost["plain"] - heads - cost["random"]).abs().max() < 2e-4  # the same numbers of filters
    for rival in ("magnitude", "response"):
        assert (cost[rival] - cost["plain"]).between(0, 0.02).all()
    assert (cost["once"] - cost["plain"]).abs().max() < 0.04  # whole filters, the mean of the plain heads' numbers
    assert len(papers.results(SLUG, "heads")) == 4 * (9 + 9 + 3 + 3)


def test_the_stored_network_has_the_accuracy_and_cost_of_its_row():
    tensors = papers.tensors(SLUG, "nets")
    model = ftwt.Wired(models.load("small-cnn", variant="thin", seed=0), 0.75)
    prefix = "decoupled-0.75/"
    model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    x, y = recipe.data()["test"]
    logits, fired = ftwt.watch(model, x)
    row = papers.results(SLUG).query("seed == 0 and r == 0.75 and arm == 'plain'").iloc[0]
    assert (logits.argmax(1) == y).float().mean().item() == pytest.approx(row["accuracy"], abs=0.002)
    assert ftwt.multiply_adds(model, fired).mean().item() / 1919552 == pytest.approx(row["cost"], abs=0.002)
