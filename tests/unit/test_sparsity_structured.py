"""Cutting channels out: the smaller model computes what the zeroed model computes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import sparsity as S
from nbkit.errors import LayerNotFound
from nbkit.sparsity import _structured


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Linear(8 * 2 * 3, 10), nn.PReLU(10), nn.Dropout())
        self.out = nn.Linear(10, 4)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.gelu(self.norm(self.conv2(x)))
        return self.out(self.block(x.view(x.size(0), -1))).log_softmax(1)


def mobile() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.Hardswish()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5), nn.Softmax(1),
    )  # fmt: skip


def signal() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.LeakyReLU(), nn.AvgPool1d(2), nn.Conv1d(6, 5, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.SiLU(), nn.Linear(9, 6), nn.ELU(), nn.Linear(6, 2))


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(F.avg_pool2d(self.b(F.relu(self.a(x))), 2).mean(dim=(2, 3)))


CASES = {LeNet: (1, 10, 12), Averaged: (2, 6, 6), mobile: (3, 9, 9), signal: (2, 12), mlp: (7,)}
# each layer that loses channels, and what follows with as many: normalisations and depthwise convolutions
LAYERS = {
    LeNet: {"conv1": [], "conv2": ["norm"], "block.0": []}, Averaged: {"a": [], "b": []},
    mobile: {"0": ["1", "3", "4"], "6.0": []}, signal: {"0": [], "3": []}, mlp: {"0": ["1"], "3": []},
}  # fmt: skip


def case(make, device):
    torch.manual_seed(0)
    model = make()
    for module in model.modules():  # statistics as after some training
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.to(device), torch.randn(4, *CASES[make], device=device)


@torch.no_grad()
def zeroed_by_hand(make, model, fraction):
    """A copy without the channels of least sum of |w|: filter, bias and normalisation of each set to 0."""
    zeroed = copy.deepcopy(model).eval()
    for first, followers in LAYERS[make].items():
        modules = [zeroed.get_submodule(name) for name in [first, *followers]]
        filters = [m.weight for m in modules if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
        size = sum(w.abs().flatten(1).sum(1) for w in filters)
        gone = size.argsort(stable=True)[: min(round(fraction * len(size)), len(size) - 1)]
        for values in (getattr(m, name, None) for m in modules for name in ("weight", "bias", "running_mean")):
            if values is not None:
                values[gone] = 0
    return zeroed


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.99])
def test_the_smaller_model_agrees_with_the_zeroed_one(make, fraction, device):
    model, x = case(make, device)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    smaller = S.structured(model, fraction)
    with torch.no_grad():
        expected = zeroed_by_hand(make, model, fraction)(x)
        torch.testing.assert_close(copy.deepcopy(smaller).eval()(x), expected)
    S.structured(model, fraction, example=x)  # compares them too, and finds no difference
    assert smaller.training == model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    old, new = (sum(w.numel() for w in S.prunable(m).values()) for m in (model, smaller))
    assert new == old if fraction == 0 else new < old
    if fraction == 0:
        assert torch.equal(smaller.eval()(x), model.eval()(x))


def test_an_example_on_which_the_smaller_model_differs_raises(device, monkeypatch):
    model, x = case(mlp, device)
    cut = _structured._cut

    def cut_badly(group, index, modules):
        cut(group, index, modules)
        with torch.no_grad():
            modules[group.members[0].module].bias += 0.1

    monkeypatch.setattr(_structured, "_cut", cut_badly)
    with pytest.raises(RuntimeError, match="differs from the zeroed one"):
        S.structured(model, 0.5, example=x)


def test_given_channels_equal_zeroing_them_by_hand(device):
    model, x = case(LeNet, device)
    keep = {
        "conv1": torch.tensor([1, 0, 1, 1, 0, 1]).bool(),
        "conv2": torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).bool(),
        "block.0": torch.arange(10) != 4,
    }
    smaller = S.structured(model, keep).eval()
    zeroed = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, parts in {"conv1": ["conv1"], "conv2": ["conv2", "norm"], "block.0": ["block.0"]}.items():
            for module in map(zeroed.get_submodule, parts):
                module.weight[~keep[name]] = 0
                module.bias[~keep[name]] = 0
        zeroed.norm.running_mean[~keep["conv2"]] = 0
        torch.testing.assert_close(smaller(x), zeroed(x))
    assert smaller.conv2.weight.shape == (5, 4, 3, 3) and smaller.norm.num_features == 5
    assert smaller.block[0].weight.shape == (9, 5 * 6) and smaller.block[1].weight.shape == (9,)
    assert smaller.out.in_features == 9
    assert repr(smaller.conv2) == "Conv2d(4, 5, kernel_size=(3, 3), stride=(1, 1))"


def test_a_depthwise_layer_goes_with_the_layer_before_it(device):
    model, x = case(mobile, device)
    keep = {"0": torch.arange(8) > 1, "3": torch.arange(8) < 6}
    smaller = S.structured(model, keep, example=x)
    assert smaller[0].out_channels == smaller[3].groups == smaller[3].in_channels == 4
    assert smaller[3].weight.shape == (4, 1, 3, 3) and smaller[6][0].in_channels == 4


def test_the_lowest_scores_go_and_the_output_stays():
    model = mlp()
    smaller = S.structured(model, 0.5, scores={"0.weight": torch.arange(9.0), "5.weight": torch.zeros(2)})
    assert torch.equal(smaller[0].weight, model[0].weight[4:])  # round(4.5) = 4 are removed
    assert smaller[3].weight.shape == (6, 5) and smaller[5].weight.shape == (2, 6)
    by_norm = S.structured(model, 1 / 3)
    gone = model[0].weight.abs().sum(1).argsort()[:3]
    kept = [i for i in range(9) if i not in gone]
    assert torch.equal(by_norm[0].bias, model[0].bias[kept])
    assert S.structured(model, 0.99, min_keep=3)[3].out_features == 3
    scores = S.relevance(model.eval(), torch.randn(6, 7), per="unit")
    assert S.structured(model, 0.5, scores=scores)[0].out_features == 5


def test_frozen_weights_stay_frozen_and_the_smaller_model_trains():
    model, x = case(LeNet, "cpu")
    model.conv1.weight.requires_grad_(False)
    smaller = S.structured(model, 0.5)
    smaller(x).sum().backward()
    assert not smaller.conv1.weight.requires_grad and smaller.conv2.weight.grad is not None


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x)
        return x + self.b(x)


class Twice(Residual):
    def forward(self, x):
        return self.b(self.a(self.a(x)))


class Branching(Residual):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


class TwoInputs(Residual):
    def forward(self, x, y):
        return self.b(self.a(x + y))


class Scaled(Residual):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.b(self.a(x) * self.gain)


@pytest.mark.parametrize("model, match", [
    (Residual(), "reads a, b, not only b"), (Twice(), "'a' runs twice"), (Branching(), "tracing Branching failed"),
    (TwoInputs(), "more than one input"), (Scaled(), "'gain'"),
    (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), r"1 \(Sigmoid\) between '0' and '2'"),
    (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "LayerNorm"),
    (nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(1, 2), nn.Linear(4, 2)), "Hardtanh"),
    (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), "grouped"),
    (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)), "transposed"),
    (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(4, 4)), "no flatten"),
    (nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 4)), "reads 12 inputs from 4"),
    (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4)), "BatchNorm1d"),
])  # fmt: skip
def test_what_is_no_plain_chain_is_refused_with_the_reason(model, match):
    with pytest.raises(TypeError, match=match):
        S.structured(model, 0.5)


def test_bad_channels():
    model, x = case(mlp, "cpu")
    for channels, error, match in [
        ({"5": torch.tensor([True, False])}, ValueError, "'5' are the model's output"),
        ({"0": torch.zeros(9)}, ValueError, "at least one"), ({"0": torch.ones(8)}, ValueError, "9 channels"),
        ({"0": torch.full((9,), 0.5)}, ValueError, "binary"), ({"9": torch.ones(9)}, LayerNotFound, "'9'"),
        (1.0, ValueError, "channels must lie"), ("half", TypeError, "fraction or a mapping"),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            S.structured(model, channels)
    with pytest.raises(ValueError, match="min_keep"):
        S.structured(model, 0.5, min_keep=0)
    with pytest.raises(ValueError, match="scores have shape"):
        S.structured(model, 0.5, scores={"0.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="no prunable"):
        S.structured(nn.Sequential(nn.ReLU()), 0.5)
    depthwise_first = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match="model's inputs"):
        S.structured(depthwise_first, {"0": torch.tensor([1, 1, 0, 1])})
    assert S.structured(depthwise_first, 0.5)[0].out_channels == 4
