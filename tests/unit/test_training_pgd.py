"""Attacks: the maximum where it is known, the ball they stay in, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import training
from nbkit.errors import NotFinite
from tests.unit.test_training import make, same, weights


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(n_in=6, n_out=2):
    model = nn.Linear(n_in, n_out)
    with torch.no_grad():
        model.weight.copy_(rand(n_out, n_in, seed=3) - 0.5)
    return model


X = 0.3 + 0.4 * rand(20, 6)
Y = torch.arange(20) % 2
WIDE = {"bounds": (-9.0, 9.0)}


@pytest.mark.parametrize("start", [None, 0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_a_linear_model_it_finds_the_corner_or_the_direction_that_is_worst(norm, start, device):
    model = linear().to(device)
    start = None if start is None else generator(start)
    settings = {"eps": 0.2, "steps": 80, "step": 0.05, "norm": norm, "generator": start, **WIDE}
    attacked = training.pgd(model, X.to(device), Y.to(device), **settings)
    w = model.weight.detach().cpu()
    against = torch.where(Y == 0, 1.0, -1.0)[:, None] * (w[1] - w[0])
    worst = against.sign() if norm == "linf" else against / against.norm(dim=1, keepdim=True)
    assert torch.allclose(attacked.cpu(), X + 0.2 * worst, atol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_stays_in_the_ball_and_in_bounds_and_raises_the_loss(norm):
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    x = rand(20, 6, seed=5)
    x[0] = 0.0
    attacked = training.pgd(model, x, Y, eps=0.15, steps=7, norm=norm, generator=generator())
    far = (attacked - x).abs().amax(1) if norm == "linf" else (attacked - x).norm(dim=1)
    assert far.max() <= 0.15 + 1e-6 and far.max() > 0.1
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert F.cross_entropy(model(attacked), Y) > F.cross_entropy(model(x), Y)


def test_one_step_without_a_start_is_the_fast_gradient_sign_method():
    model = make()
    x = torch.full((4, 3), 0.5, requires_grad=True)
    y = torch.arange(4) % 2
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.eval()(x), y, reduction="sum"), x)
    attacked = training.pgd(model, x, y, eps=0.1, steps=1)
    assert torch.allclose(attacked, x + 0.1 * gradient.sign())
    assert not attacked.requires_grad


def test_weights_gradients_statistics_and_mode_stay_and_batches_do_not_matter():
    model = make(dropout=0.5).train()
    x, y = rand(32, 3), torch.arange(32) % 2
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = weights(model)
    whole = training.pgd(model, x, y, eps=0.1, steps=3)
    parts = training.pgd(model, x, y, eps=0.1, steps=3, batch=5)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert same(before, weights(model)) and model.training and model[1].training
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[0].bias.grad is None
    assert all(p.requires_grad for p in model.parameters())


def test_of_several_tries_each_example_keeps_the_worst():
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    model[0].weight.data *= 8  # a bumpy loss, so that the start matters
    settings = {"eps": 0.3, "steps": 2}
    one, other = generator(), generator()
    tries = [training.pgd(model, X, Y, generator=one, **settings) for _ in range(3)]
    best = training.pgd(model, X, Y, generator=other, restarts=3, **settings)
    losses = torch.stack([F.cross_entropy(model(t), Y, reduction="none") for t in tries])
    assert torch.equal(F.cross_entropy(model(best), Y, reduction="none"), losses.amax(0))
    assert (losses.argmax(0) > 0).any()


def test_a_loss_of_ones_own_and_an_input_without_gradient():
    model = linear()
    towards_0 = training.pgd(model, X, Y, eps=0.2, steps=5, loss=lambda out, y: out[:, 0], **WIDE)
    assert torch.allclose(towards_0, X + 0.2 * model.weight[0].detach().sign(), atol=1e-6)
    for norm in ("linf", "l2"):
        flat = training.pgd(model, X, Y, eps=0.2, steps=5, norm=norm, loss=lambda out, y: 0 * out[:, 0])
        assert torch.equal(flat, X)
    assert torch.equal(training.pgd(model, X, Y, eps=0, steps=5), X)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"eps": -0.1}, ValueError, "eps"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"steps": 0}, ValueError, "steps"),
        ({"norm": "l1"}, ValueError, "'linf' or 'l2'"),
        ({"step": -1.0}, ValueError, "step"),
        ({"restarts": 2}, ValueError, "generator"),
        ({"bounds": (0.5, 1.0)}, ValueError, "outside of the bounds"),
        ({"x": X.long()}, TypeError, "floating"),
        ({"x": X * float("nan")}, NotFinite, "NaN"),
        ({"y": Y[:3]}, ValueError, "20 inputs but 3 targets"),
        ({"y": Y + 1}, IndexError, "classes 0 to 1"),
        ({"loss": F.cross_entropy}, ValueError, "one number an example"),
    ],
)
def test_what_is_no_attack(changes, error, match):
    model = linear()
    before = weights(model)
    given = {"x": X, "y": Y, "eps": 0.1, "steps": 2} | changes
    with pytest.raises(error, match=match):
        training.pgd(model, given.pop("x"), given.pop("y"), **given)
    assert same(before, weights(model))


def test_training_with_an_adversary_that_does_nothing_is_training():
    plain, attacked = make(dropout=0.3), make(dropout=0.3)
    x, y = rand(64, 3), torch.arange(64) % 2
    noise = {"augment": lambda x, g: x + 0.1 * torch.randn(x.shape, generator=g)}
    seen = []

    def adversary(model, x, y, generator):
        seen.append((len(x), model.training))
        torch.rand(3, generator=generator)
        return x

    training.fit(plain, (x, y), epochs=2, batch=16, **noise)
    training.fit(attacked, (x, y), epochs=2, batch=16, adversary=adversary, **noise)
    assert same(weights(plain), weights(attacked))
    assert seen == [(16, True)] * 8


def test_training_against_attacks_withstands_them():
    y = torch.arange(400) % 2
    sign = (2.0 * y - 1)[:, None]
    strong = 0.3 * sign + 0.12 * torch.randn(400, 1, generator=generator())
    weak = (0.08 * sign).expand(-1, 31)  # many clues that a change of 0.1 turns round
    x = torch.cat([strong, weak], 1)

    def attack(model, x, y, generator):
        return training.pgd(model, x, y, eps=0.1, steps=3, generator=generator, **WIDE)

    right = {}
    for name, adversary in {"plain": None, "robust": attack}.items():
        model = nn.Linear(32, 2)
        nn.init.zeros_(model.weight)
        training.fit(model, (x, y), steps=300, lr=0.05, adversary=adversary)
        right[name] = training.accuracy(model, attack(model, x, y, generator(1)), y)
    assert right["robust"] > 0.9 > 0.3 > right["plain"]
