"""The gradient of every example by itself: what it is by hand, that both ways agree, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import models, training
from nbkit.errors import NotFinite
from tests.unit.test_training import same, weights


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


X = rand(7, 6)
Y = torch.tensor([0, 1, 2, 2, 1, 0, 1])


class Branching(nn.Module):
    """A branch that depends on the data: no vmap."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 3)
        self.two = nn.Linear(6, 3)

    def forward(self, x):
        return self.one(x) if x.sum() > 3 else self.two(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(2, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x.reshape(len(x), 3, 2))[0][:, -1])


def conv():
    layers = nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *layers)


def plain(model, x, y, loss=F.cross_entropy):
    """Backward on one example after another."""
    model.eval()
    rows = []
    for i in range(len(y)):
        model.zero_grad()
        loss(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def made(kind):
    torch.manual_seed(0)
    return {"linear": lambda: nn.Linear(6, 3), "conv": conv, "branch": Branching, "gru": Recurrent}[kind]()


@pytest.mark.parametrize("kind", ["linear", "conv", "branch", "gru"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_it_is_the_backward_pass_of_every_example_alone(kind, chunk):
    expected = plain(made(kind), X, Y)
    model = made(kind)
    found = training.example_gradients(model, X, Y, chunk=chunk)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
    norms = torch.cat([g.flatten(1) for g in expected.values()], 1).norm(dim=1)
    torch.testing.assert_close(training.gradient_norms(model, X, Y, chunk=chunk), norms, atol=1e-6, rtol=1e-5)


def test_of_a_linear_softmax_model_it_is_error_times_input():
    model = made("linear")
    error = model(X).softmax(1) - F.one_hot(Y, 3)
    found = training.example_gradients(model, X, Y)
    torch.testing.assert_close(found["weight"], torch.einsum("nc,nd->ncd", error, X))
    torch.testing.assert_close(found["bias"], error)
    length = error.norm(dim=1) * (X.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(training.gradient_norms(model, X, Y), length)


def test_their_mean_is_the_gradient_of_the_batch():
    model = conv().eval()
    batch = torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()))
    found = training.example_gradients(model, X, Y)
    for mine, whole in zip(found.values(), batch, strict=True):
        torch.testing.assert_close(mine.mean(0), whole, atol=1e-6, rtol=1e-5)


def test_chosen_parameters_also_where_they_are_frozen_or_tied():
    model = models.load("tiny-llama")
    ids = torch.arange(24).reshape(3, 8) + 40
    names = ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
    model.requires_grad_(False)
    found = training.example_gradients(model, ids[:, :-1], ids[:, 1:], parameters=names)
    model.requires_grad_(True)
    for i in range(3):
        loss = F.cross_entropy(model(ids[i : i + 1, :-1]).logits[0], ids[i, 1:])
        q = model.model.layers[0].self_attn.q_proj.weight
        tied = model.model.embed_tokens.weight
        for name, expected in zip(names, torch.autograd.grad(loss, [q, tied]), strict=True):
            torch.testing.assert_close(found[name][i], expected, atol=1e-6, rtol=1e-4)


def test_a_loss_of_your_own():
    model = nn.Linear(6, 1)
    target = rand(7, 1, seed=4)
    expected = 2 * (model(X) - target) * X
    found = training.example_gradients(model, X, target, loss=F.mse_loss, parameters=["weight"])
    torch.testing.assert_close(found["weight"][:, 0], expected.detach())


@pytest.mark.parametrize("kind", ["conv", "gru"])
def test_the_model_comes_back_as_it_was(kind):
    model = made(kind).train()
    before = weights(model)
    with torch.inference_mode():
        training.gradient_norms(model, X, Y)
    assert same(before, weights(model))
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"parameters": ["wieght"]}, ValueError, "no parameter 'wieght'"),
        ({"parameters": []}, ValueError, "no parameter to take"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"y": Y + 1}, IndexError, "labels run from 1 to 3"),
        ({"y": Y[:3]}, ValueError, "7 inputs but 3 targets"),
        ({"loss": lambda out, y: out - 1}, ValueError, "one number"),
        ({"loss": lambda out, y: out.sum() / 0}, NotFinite, "not finite for example 0"),
    ],
)
def test_bad_input_is_named(settings, error, words):
    model = made("linear")
    given = {"y": Y, **settings}
    with pytest.raises(error, match=words):
        training.example_gradients(model, X, given.pop("y"), **given)
    assert not any(p.grad is not None for p in model.parameters())


class Scorer(nn.Module):
    """How like each row is to some prototypes [C, 4]."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 4)

    def forward(self, x, prototypes, scale):
        return scale * torch.tanh(self.encode(x)) @ prototypes.T


@pytest.mark.parametrize("count", [2, 5])
def test_a_tensor_that_all_examples_share_is_refused(count):
    inputs = {"x": X[:2], "prototypes": rand(count, 4), "scale": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="prototypes"):
        training.example_gradients(Scorer(), inputs, torch.tensor([0, 1]))


class Scaled(nn.Linear):
    def forward(self, x, scale):
        return scale * super().forward(x)


def test_a_dict_of_examples_and_a_tensor_of_length_one():
    torch.manual_seed(0)
    model = Scaled(6, 3)
    one = training.example_gradients(model, {"x": X, "scale": torch.tensor([[2.0]])}, Y)
    each = training.example_gradients(model, {"x": X, "scale": torch.full((7, 1), 2.0)}, Y)
    for i in range(7):
        loss = F.cross_entropy(model(X[i : i + 1], 2.0), Y[i : i + 1])
        (expected,) = torch.autograd.grad(loss, [model.weight])
        torch.testing.assert_close(one["weight"][i], expected)
        torch.testing.assert_close(each["weight"][i], expected)
