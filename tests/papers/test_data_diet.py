"""Data diet: the scores against hand-computed values and plain loops, the choice of rows, the noise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nbkit import models, papers, recipes, training
from nbkit.errors import NotFinite

diet = papers.method("data-diet")


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 28, 28, generator=g), torch.randint(10, (12,), generator=g)


# --- EL2N and GraNd


def test_el2n_of_uniform_and_of_certain_predictions():
    y = torch.tensor([0, 3, 9])
    torch.testing.assert_close(diet.el2n(torch.zeros(3, 10), y), torch.full((3,), math.sqrt(0.9)))
    sure = 100 * F.one_hot(torch.tensor([0, 4, 9]), 10).float()
    torch.testing.assert_close(diet.el2n(sure, y), torch.tensor([0.0, math.sqrt(2), 0.0]))


def test_el2n_by_hand():
    """p = (1/2, 1/4, 1/4), the label is class 1: (1/2, -3/4, 1/4), of length sqrt(14) / 4."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    torch.testing.assert_close(diet.el2n(logits, torch.tensor([1])), torch.tensor([math.sqrt(14) / 4]))


def test_the_error_is_the_gradient_of_the_loss_in_the_logits():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.arange(7) % 5
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    torch.testing.assert_close(diet.errors(logits.detach(), y), gradient)


@pytest.mark.parametrize("bias", [True, False])
def test_grand_of_a_linear_classifier_is_el2n_times_the_length_of_the_input(bias):
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(20, 6, generator=g), torch.randint(4, (20,), generator=g)
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4, bias=bias)
    expected = diet.el2n(model(x).detach(), y) * (x.square().sum(1) + bias).sqrt()
    torch.testing.assert_close(diet.grand(model, x, y), expected)


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-conv"])
def test_three_ways_to_grand_agree(name, batch):
    model = models.build(name, seed=0)
    plain = diet.grand(model, *batch)
    torch.testing.assert_close(plain, training.gradient_norms(model, *batch, chunk=5))
    recipe = recipes.load("papers/data-diet/recipe.py")
    if name == recipe.MLP:
        torch.testing.assert_close(plain, recipe.by_layers(model, *batch))


def test_grand_leaves_the_model_as_it_was(batch):
    model = models.build("lenet-conv", seed=0).train()
    before = training.state(model)
    diet.grand(model, *batch)
    assert model.training and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(training.state(model), before)


def test_grand_is_of_one_example_and_not_of_the_batch(batch):
    model, (x, y) = models.build("lenet-conv", seed=0), batch
    torch.testing.assert_close(diet.grand(model, x, y)[3:4], diet.grand(model, x[3:4], y[3:4]))


# --- training


def test_training_takes_the_steps_of_torchs_own_optimizer(batch):
    """Five steps over ten examples, four at a time: the last two of each pass are left out; the rate drops thrice."""
    x, y = batch[0][:10], batch[1][:10]
    ours = diet.train(models.build("lenet-300-100", seed=1), x, y, steps=5, batch=4, seed=3)
    model, g = models.build("lenet-300-100", seed=1), torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    orders = [torch.randperm(10, generator=g) for _ in range(3)]
    rows = [order[i : i + 4] for order in orders for i in (0, 4)][:5]
    for part, rate in zip(rows, [0.1, 0.1, 0.02, 0.004, 0.0008], strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    torch.testing.assert_close(training.state(ours), training.state(model))


def test_scores_of_an_untrained_and_of_a_trained_network(batch):
    x, y = batch
    found = diet.early_scores("lenet-300-100", x, y, runs=[4, 5], epochs=(0, 2), batch=6)
    assert found.shape == (2, 2, 12)
    fresh = models.build("lenet-300-100", seed=5)
    torch.testing.assert_close(found[1, 0], diet.el2n(fresh(x).detach(), y))
    diet.train(fresh, x, y, steps=4, of=16, batch=6, seed=5)  # no drop of the rate so early
    torch.testing.assert_close(found[1, 1], diet.el2n(fresh(x).detach(), y))


def test_forgetting_counts_falls_from_right_to_wrong():
    seen = recipes.load("papers/data-diet/recipe.py").Forgetting(3)
    for first, second in [(True, False), (False, False), (True, True), (False, False)]:
        seen.visit((torch.tensor([0, 1]), torch.tensor([first, second])))
    assert seen.score().tolist() == [2, 1, math.inf]
    assert seen.score(never=9).tolist() == [2, 1, 9]


# --- the choice


def test_keep_takes_a_window_of_the_highest():
    score = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert diet.keep(score, 2).tolist() == [0, 2]
    assert diet.keep(score, 2, skip=1).tolist() == [2, 4]
    assert diet.keep(torch.tensor([1.0, math.inf, 0.0]), 1).tolist() == [1]


def test_ties_are_drawn():
    score = torch.cat([torch.ones(4), torch.zeros(96)])
    kept = [diet.keep(score, 52, seed=seed) for seed in range(200)]
    assert all(set(range(4)) <= set(rows.tolist()) for rows in kept)
    often = torch.stack([torch.bincount(rows, minlength=100) for rows in kept]).float().mean(0)[4:]
    assert 0.3 < often.min() and often.max() < 0.7  # half of the tied ones, five deviations wide


def test_the_recipes_mixed_choices():
    recipe = recipes.load("papers/data-diet/recipe.py")
    score, y = torch.arange(100.0), torch.arange(100) % 10
    rows = recipe.and_random(diet.keep, score, y, 20, seed=0).tolist()
    assert len(set(rows)) == 20 and set(range(82, 100)) <= set(rows) and min(rows) < 80
    assert recipe.within_classes(diet.keep, score, y, 20, seed=0).tolist() == list(range(80, 100))


def test_permuted_labels_keep_the_counts_and_change_nine_in_ten():
    y = torch.arange(10).repeat(1000)
    noisy, changed = diet.permute_labels(y, 0.2, seed=0)
    assert torch.equal(noisy.bincount(), y.bincount()) and torch.equal(changed, noisy != y)
    assert abs(changed.float().mean() - 0.2 * 0.9) < 0.01
    assert not diet.permute_labels(y, 0.0, seed=0)[1].any()


# --- bad input


@pytest.mark.parametrize(
    ("logits", "y", "error", "said"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, "0 to 2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), ValueError, "0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0]), ValueError, r"\[2, 3\]"),
        (torch.zeros(2, 3), torch.zeros(2), ValueError, "float32"),
        (torch.zeros(0, 3), torch.tensor([], dtype=torch.long), ValueError, r"\[0, 3\]"),
        (torch.tensor([[math.nan, 0.0]]), torch.tensor([0]), NotFinite, "NaN"),
    ],
)
def test_errors_refuses(logits, y, error, said):
    with pytest.raises(error, match=said):
        diet.el2n(logits, y)


@pytest.mark.parametrize("given", [{"n": 0}, {"n": 6}, {"n": 3, "skip": 3}, {"n": 1, "skip": -1}])
def test_keep_refuses_a_window_that_does_not_fit(given):
    with pytest.raises(ValueError, match="skip"):
        diet.keep(torch.arange(5.0), **given)


def test_keep_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        diet.keep(torch.tensor([1.0, math.nan]), 1)


def test_training_refuses_fewer_examples_than_a_batch_and_leaves_the_model_alone(batch):
    model = models.build("lenet-300-100", seed=0)
    before = training.state(model)
    for given in ({"steps": 3}, {"steps": 0, "batch": 4}, {"steps": 5, "of": 4, "batch": 4}):
        with pytest.raises(ValueError, match="steps"):
            diet.train(model, *batch, **given)
    torch.testing.assert_close(training.state(model), before)


def test_a_rate_that_is_too_large_is_said(batch):
    with pytest.raises(NotFinite, match="lr"):
        diet.train(models.build("lenet-300-100", seed=0), *batch, steps=30, batch=4, lr=1e6)


@pytest.mark.parametrize("given", [{"runs": []}, {"epochs": ()}, {"epochs": (2, 1)}, {"epochs": (-1,)}])
def test_scoring_refuses_no_run_and_unsorted_epochs(given, batch):
    with pytest.raises(ValueError, match="runs"):
        diet.early_scores("lenet-300-100", *batch, batch=4, **given)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_noise_refuses_no_share(share):
    with pytest.raises(ValueError, match="share"):
        diet.permute_labels(torch.arange(5), share, seed=0)


def test_grand_refuses_labels_out_of_range(batch):
    late = torch.cat([batch[1][:-1], torch.tensor([10])])  # said before any gradient is taken
    for labels in (batch[1] + 10, late):
        with pytest.raises(ValueError, match="0 to 9"):
            diet.grand(models.build("lenet-conv", seed=0), batch[0], labels)


def test_grand_refuses_fewer_labels_than_inputs(batch):
    with pytest.raises(ValueError, match=r"\[12, 10\], \[11\]"):
        diet.grand(models.build("lenet-conv", seed=0), batch[0], batch[1][:-1])
