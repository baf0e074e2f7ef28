"""Cutting channels out: the smaller model computes what the zeroed model computes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import models
from nbkit import sparsity as S
from nbkit.errors import LayerNotFound
from nbkit.sparsity import _groups, _structured


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
    smaller = S.structured(model, fraction, example=x)
    with torch.no_grad():
        expected = zeroed_by_hand(make, model, fraction)(x)
        torch.testing.assert_close(copy.deepcopy(smaller).eval()(x), expected)
    assert smaller.training == model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    old, new = (sum(w.numel() for w in S.prunable(m).values()) for m in (model, smaller))
    assert new == old if fraction == 0 else new < old
    if fraction == 0:
        assert torch.equal(smaller.eval()(x), model.eval()(x))


def test_an_example_on_which_the_smaller_model_differs_raises(device, monkeypatch):
    model, x = case(mlp, device)
    cut = _structured._cut

    def cut_badly(gone):
        cut(gone)
        with torch.no_grad():
            gone[0][0].members[0].module.bias += 0.1

    monkeypatch.setattr(_structured, "_cut", cut_badly)
    with pytest.raises(TypeError, match="the channels of '0' cannot simply be cut: the smaller model differs"):
        S.structured(model, 0.5, example=x)


def test_given_channels_equal_zeroing_them_by_hand(device):
    model, x = case(LeNet, device)
    keep = {
        "conv1": torch.tensor([1, 0, 1, 1, 0, 1]).bool(),
        "conv2": torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).bool(),
        "block.0": torch.arange(10) != 4,
    }
    smaller = S.structured(model, keep, example=x).eval()
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
    model, x = case(mlp, "cpu")
    smaller = S.structured(
        model, 0.5, example=x, scores={"0.weight": torch.arange(9.0), "5.weight": torch.zeros(2)}
    )
    assert torch.equal(smaller[0].weight, model[0].weight[4:])  # round(4.5) = 4 are removed
    assert smaller[3].weight.shape == (6, 5) and smaller[5].weight.shape == (2, 6)
    by_norm = S.structured(model, 1 / 3, example=x)
    gone = model[0].weight.abs().sum(1).argsort()[:3]
    kept = [i for i in range(9) if i not in gone]
    assert torch.equal(by_norm[0].bias, model[0].bias[kept])
    assert S.structured(model, 0.99, example=x, min_keep=3)[3].out_features == 3
    scores = S.logit_sensitivity(model.eval(), torch.randn(6, 7), per="unit")
    assert S.structured(model, 0.5, example=x, scores=scores)[0].out_features == 5


def test_frozen_weights_stay_frozen_and_the_smaller_model_trains():
    model, x = case(LeNet, "cpu")
    model.conv1.weight.requires_grad_(False)
    smaller = S.structured(model, 0.5, example=x)
    smaller(x).sum().backward()
    assert not smaller.conv1.weight.requires_grad and smaller.conv2.weight.grad is not None
    assert not model.conv1.weight.requires_grad and model.conv2.weight.grad is None


class Block(nn.Module):
    """Two layers whose outputs are added, and a third that shares nothing with them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """Maps laid side by side: the reader's columns of the second come after those of the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 5, 3)
        self.norm, self.read, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.read(self.norm(torch.cat([self.a(x), self.b(x)], 1))).flatten(1))


class Flattened(Joined):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8 * 4, 2)

    def forward(self, x):
        return self.head(self.norm(torch.cat([self.a(x), self.b(x)], 1)).flatten(1))


def test_layers_that_are_added_lose_the_same_channels():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 1, 7, 7)
    smaller = S.structured(model, {"outer": torch.tensor([1, 1, 0, 1, 1, 1]), "stem": torch.arange(6) > 0}, example=x)
    for layer in (smaller.stem, smaller.outer):
        assert layer.out_channels == 4
    kept = [1, 3, 4, 5]
    assert torch.equal(smaller.stem.weight, model.stem.weight[kept])
    assert torch.equal(smaller.head.weight, model.head.weight[:, kept])
    assert torch.equal(smaller.inner.weight, model.inner.weight[:, kept]) and smaller.inner.out_channels == 4
    half = S.structured(model, 0.5, example=x)  # by |w| summed over stem and outer
    size = sum(w.abs().flatten(1).sum(1) for w in (model.stem.weight, model.outer.weight))
    assert torch.equal(half.stem.weight, model.stem.weight[size.argsort()[3:].sort().values])
    assert half.inner.weight.shape == (2, 3, 3, 3)


def test_maps_laid_side_by_side_keep_their_columns_apart():
    torch.manual_seed(0)
    model, x = Joined(), torch.randn(3, 1, 4, 4)
    smaller = S.structured(model, {"b": torch.tensor([1, 0, 1, 1, 1]), "a": torch.tensor([1, 1, 0])}, example=x)
    kept = [0, 1, 3, 5, 6, 7]
    assert torch.equal(smaller.read.weight, model.read.weight[:, kept]) and smaller.norm.num_features == 6
    smaller = S.structured(Flattened(), {"b": torch.tensor([1, 0, 1, 1, 1])}, example=x)
    assert smaller.head.in_features == 7 * 4


@pytest.mark.parametrize("name, layers", [("resnet-small", 7), ("mobilenet-small", 8)])
def test_groups_and_the_cut_model_are_those_of_torch_pruning(name, layers):
    import torch_pruning

    model, x = models.load(name, seed=0), torch.randn(2, 1, 28, 28)
    smaller = S.structured(model, 0.5, example=x)
    other = copy.deepcopy(model)
    pruner = torch_pruning.pruner.MagnitudePruner(
        other, x, pruning_ratio=0.5, ignored_layers=[other.head],
        importance=torch_pruning.importance.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None),
    )  # fmt: skip
    names = {module: path for path, module in other.named_modules()}
    targets = [[dep.target.module for dep, _ in group] for group in pruner.DG.get_all_groups()]
    theirs = {frozenset(names[module] for module in group if module in names) for group in targets}
    ours = _groups.groups(model, x)
    assert {frozenset(m.name for m in group.members) for group in ours} == theirs and len(ours) == layers
    pruner.step()
    assert {n: p.shape for n, p in smaller.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}


def test_an_input_of_several_tensors_and_a_layer_that_runs_twice():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x, y):
            return self.out(self.b(self.b(self.a(x + y))))

    pair = Pair()
    for bias in (pair.a.bias, pair.b.bias):
        nn.init.zeros_(bias)
    inputs = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}
    smaller = S.structured(pair, 0.5, example=inputs)
    assert smaller.b.weight.shape == (3, 3) and smaller.a.out_features == 3 and smaller(**inputs).shape == (3, 2)


def test_a_transposed_convolution_is_cut_along_its_own_axes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    smaller = S.structured(model, 0.5, example=torch.randn(2, 1, 8, 8))
    size = model[2].weight.abs().transpose(0, 1).flatten(1).sum(1)
    assert torch.equal(smaller[4].weight, model[4].weight[:, size.argsort()[3:].sort().values])
    assert smaller[2].weight.shape == (2, 3, 3, 3)


def test_the_layers_of_a_transformer_that_can_be_cut():
    model, x = models.load("tiny-vit", seed=0), torch.randn(2, 1, 28, 28)
    with pytest.raises(TypeError, match="which no layer holds; give masks, or scores"):
        S.structured(model, 0.5, example=x)
    inner = {n: w.abs() for n, w in S.prunable(model).items() if n.endswith("mlp.fc1.weight")}
    smaller = S.structured(model, 0.5, example=x, scores=inner)
    assert smaller.blocks[0].mlp.fc1.out_features == model.blocks[0].mlp.fc1.out_features // 2
    with pytest.raises(TypeError, match="'blocks.0.attn.qkv' are shared out"):
        S.structured(model, {"blocks.0.attn.qkv": torch.arange(192) > 0}, example=x)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        raise RuntimeError("no such example")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.b(self.a(x) * self.gain)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        first, second = self.a(x).chunk(2, dim=1)
        return self.b(first * second)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("model, match", [
    (Untraceable(), "cannot be followed: no such example"), (Scaled(), "'gain', which no layer holds"),
    (Halves(), "parts of a split"), (tied(), "2.weight is also the weight of '0'"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)), "computes its weight"),
    (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), "'0' cannot simply be cut"),
    (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "of '2' cannot"),
    (nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(1, 2), nn.Linear(4, 2)), "'0' cannot simply be cut"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_the_reason(model, match):
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(TypeError, match=match):
        S.structured(model, 0.5, example=torch.randn(3, 4) * 5)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_bad_channels():
    model, x = case(mlp, "cpu")
    for channels, error, match in [
        ({"5": torch.tensor([True, False])}, ValueError, "'5' are the model's output"),
        ({"0": torch.zeros(9)}, ValueError, "at least one"), ({"0": torch.ones(8)}, ValueError, "9 channels"),
        ({"0": torch.full((9,), 0.5)}, ValueError, "binary"), ({"9": torch.ones(9)}, LayerNotFound, "'9'"),
        (1.0, ValueError, "channels must lie"), ("half", TypeError, "fraction or a mapping"),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            S.structured(model, channels, example=x)
    with pytest.raises(ValueError, match="min_keep"):
        S.structured(model, 0.5, example=x, min_keep=0)
    with pytest.raises(ValueError, match="scores have shape"):
        S.structured(model, 0.5, example=x, scores={"0.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="no prunable"):
        S.structured(nn.Sequential(nn.ReLU()), 0.5, example=x)
    depthwise_first = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1))
    maps = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="model's inputs"):
        S.structured(depthwise_first, {"0": torch.tensor([1, 1, 0, 1])}, example=maps)
    assert S.structured(depthwise_first, 0.5, example=maps)[0].out_channels == 4
