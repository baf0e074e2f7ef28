"""Structurally Prune Anything: what hangs together, what it is worth, the repair, and the files its recipe stored."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import datasets, models, papers, recipes, sparsity

spa = papers.method("structurally-prune-anything")
recipe = recipes.load("papers/structurally-prune-anything/recipe.py")
X = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


class Grow(nn.Sequential):
    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class Knot(nn.Module):
    """Maps laid side by side, to which a third map is added."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.grow, self.mix = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 10, 1)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(7)
        self.fc1, self.fc2 = nn.Linear(160, 12), nn.Linear(12, 3)

    def forward(self, x):
        a = self.relu(self.bn(self.stem(x)))
        b = torch.cat([a, torch.relu(self.grow(a))], 1)
        b = b + self.mix(b)
        return self.fc2(self.relu(self.fc1(torch.flatten(self.pool(b), 1))))


def toy():
    torch.manual_seed(0)
    grow = Grow(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU())
    tail = [nn.Conv2d(5, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), grow, *tail).eval()


NETS = {
    "resnet-small": lambda: models.load("resnet-small", seed=0),
    "mobilenet-small": lambda: models.load("mobilenet-small", seed=0),
    "toy": toy,
    "knot": lambda: Knot().eval(),
}


@pytest.fixture(scope="module")
def net():
    return models.load("resnet-small", seed=0)


@pytest.fixture(scope="module")
def groups(net):
    return spa.coupled(net, X)


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def indices(group, k):
    return {port: set(mask[k].nonzero().flatten().tolist()) for port, mask in group.items() if mask[k].any()}


# what hangs together


def test_by_hand_concatenation_shifts_and_flatten_makes_blocks():
    found = spa.coupled(toy(), X)
    assert list(found) == ["0", "2.0", "3"]
    assert indices(found["0"], 1) == {
        ("0", "out"): {1}, ("1", "out"): {1}, ("2.0", "in"): {1}, ("3", "in"): {1},
    }  # fmt: skip
    assert indices(found["2.0"], 1) == {("2.0", "out"): {1}, ("3", "in"): {4}}
    assert indices(found["3"], 1) == {("3", "out"): {1}, ("6", "in"): {4, 5, 6, 7}}


def test_both_branches_of_a_residual_sum_are_one_group(groups):
    assert {("stem", "out"), ("stage1.0.conv2", "out"), ("stage2.0.shortcut.conv", "in")} <= groups["stem"].keys()
    assert {("stage2.0.conv2", "out"), ("stage2.0.shortcut.conv", "out")} <= groups["stage2.0.conv2"].keys()
    assert "head" not in groups  # its channels are the classes


@pytest.mark.parametrize("name", NETS)
def test_the_coupled_channels_are_torch_prunings_one_by_one(name):
    model = NETS[name]()
    graph = recipe.dependencies(model, X)
    for g, group in spa.coupled(model, X).items():
        for k in range(len(group[g, "out"])):
            ours = indices(group, k)
            assert ours == recipe.theirs(model, graph, g, sorted(ours[g, "out"])), (g, k)


@pytest.mark.parametrize("name", NETS)
def test_every_channel_is_in_one_coupled_channel_or_at_an_end(name):
    model = NETS[name]()
    found = spa.coupled(model, X)
    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            rows = sum(group[layer, "out"].sum(0) for group in found.values() if (layer, "out") in group)
            assert (rows == 1).all(), layer


def test_an_operator_without_a_rule_is_named():
    with pytest.raises(TypeError, match="no rule for 'Tanh', the operator '_1'"):
        spa.coupled(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()), X)
    with pytest.raises(TypeError, match="Conv2d, grouped"):
        spa.coupled(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=2)), X)


def test_what_cannot_be_traced_says_where():
    with pytest.raises(RuntimeError, match="'len' is not supported"):
        spa.coupled(models.load("tiny-vit", seed=0), X)


# importance and choice


def test_agg_and_norm_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, -2], [3, 4]])
    model[2].weight.data = torch.tensor([[5.0, -6]])
    found = spa.coupled(model, torch.ones(1, 2))
    size = sparsity.magnitude(model)
    assert spa.raw(found, size)["0"].tolist() == [8, 13]
    assert spa.raw(found, size, "max")["0"].tolist() == [5, 6]
    assert spa.normalised(spa.raw(found, size))["0"].tolist() == pytest.approx([8 / 10.5, 13 / 10.5])


def test_group_l1_is_torch_prunings(net, groups):
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(net, example_inputs=X)
    score = tp.importance.GroupMagnitudeImportance(
        p=1, normalizer=None, group_reduction="sum", target_types=[nn.Conv2d, nn.Linear]
    )
    ours = spa.raw(groups, sparsity.magnitude(net))
    for g in groups:
        layer = net.get_submodule(g)
        theirs = score(graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=list(range(len(layer.weight)))))
        torch.testing.assert_close(ours[g], theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["resnet-small", "mobilenet-small", "toy"])
@pytest.mark.parametrize("target", [0.8, 0.5])
def test_cut_is_zeroed_and_meets_the_target_by_at_most_one_coupled_channel(name, target):
    model = NETS[name]()
    found = spa.coupled(model, X)
    keep = spa.choose(found, spa.raw(found, sparsity.random(model, 1)), model, X, target)
    small, silent = spa.cut(model, found, keep, X), copy.deepcopy(model)
    for g, group in found.items():
        for (layer, side), mask in group.items():
            gone = mask[~keep[g]].any(0)
            for parameter in silent.get_submodule(layer).parameters():
                if side == "out":
                    parameter.data[gone] = 0
                elif parameter.ndim > 1:
                    parameter.data[:, gone] = 0
    torch.testing.assert_close(small(X), silent(X), atol=1e-5, rtol=1e-5)
    macs = [sparsity.flops(m, X)["macs"].sum() for m in (small, model)]
    assert target - (0.15 if name == "toy" else 0.04) <= macs[0] / macs[1] <= target


def test_the_least_important_go_and_one_of_each_group_stays(net, groups):
    importance = {g: torch.arange(len(group[g, "out"])).double() for g, group in groups.items()}
    keep = spa.choose(groups, importance, net, X, 0.2)
    assert all(stay.any() and stay.tolist() == sorted(stay.tolist()) for stay in keep.values())
    assert all(stay.all() for stay in spa.choose(groups, importance, net, X, 1.0).values())


@pytest.mark.parametrize("target", [0, -0.1, float("nan")])
def test_a_target_out_of_reach_is_refused(net, groups, target):
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="is the least that can be left"):
        spa.choose(groups, spa.raw(groups, sparsity.magnitude(net)), net, X, target)
    assert same(net, state)


def test_a_group_that_would_vanish_is_refused(net, groups):
    keep = {"stem": torch.zeros(12, dtype=torch.bool)}
    with pytest.raises(ValueError, match="no channel of 'stem' would be left"):
        spa.cut(net, groups, keep, X)


# the repair


@pytest.mark.parametrize("seed", range(3))
def test_the_update_is_the_least_squares_refit_and_the_error_what_it_misses(seed):
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(5, 12, generator=generator).double(), torch.randn(12, 40, generator=generator).double()
    s = torch.rand(12, generator=generator) < 0.4
    h_inv = (x @ x.T).inverse()
    refit = w @ x @ x[~s].T @ (x[~s] @ x[~s].T).inverse()
    new = spa.obs_update(w, h_inv, s)
    torch.testing.assert_close(new[:, ~s], refit)
    assert (new[:, s] == 0).all()
    torch.testing.assert_close(spa.obs_error(w, h_inv, s), ((w @ x - refit @ x[~s]) ** 2).sum())


def test_with_h_the_identity_nothing_is_compensated_and_the_score_is_the_squared_size():
    w, s = torch.randn(4, 9).double(), torch.arange(9) % 3 == 0
    eye = torch.eye(9).double()
    torch.testing.assert_close(spa.obs_error(w, eye, s), (w[:, s] ** 2).sum())
    torch.testing.assert_close(spa.obs_update(w, eye, s), w.masked_fill(s, 0))


@pytest.mark.parametrize("name", ["stage2.0.conv1", "stage2.0.shortcut.conv", "head"])
def test_the_hessian_is_that_of_the_layers_outputs(net, name):
    """W H W^T sums the squares of the layer's outputs, whatever its stride and padding."""
    from nbkit import hooks

    layer = net.get_submodule(name)
    with hooks.record(net, name) as seen, torch.no_grad():
        net(X)
    out = seen[name].movedim(1, 0).flatten(1).double()
    out = out if layer.bias is None else out - layer.bias.detach().double()[:, None]
    w = layer.weight.detach().flatten(1).double()
    torch.testing.assert_close(w @ spa.hessian(net, name, X, damping=0) @ w.T, out @ out.T, rtol=1e-3, atol=1e-3)


def test_the_repaired_layers_come_closer_to_the_outputs_of_the_whole_net(net, groups):
    x = datasets.load("fashion-mnist").x_train[:64]
    keep = spa.choose(groups, spa.normalised(spa.obs(net, groups, x)), net, X, 0.7)
    with torch.no_grad():
        repaired = spa.cut(spa.compensated(net, groups, keep, x), groups, keep, X)(x)
        plain, whole = spa.cut(net, groups, keep, X)(x), net(x)
    assert (repaired - whole).square().sum() < 0.3 * (plain - whole).square().sum()


def test_the_model_is_left_as_it_was_in_training_mode_too(groups):
    model = models.load("resnet-small", seed=0).train()
    state = copy.deepcopy(model.state_dict())
    spa.obspa(model, groups, torch.rand(4, 1, 28, 28), 0.7)
    assert same(model, state) and model.training and model.bn0.training


def test_an_empty_or_blank_calibration_set_is_refused(net, groups):
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="no examples|empty|at least one"):
        spa.obs(net, groups, X[:0])
    blank = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="singular"):
        spa.obs(blank, spa.coupled(blank, torch.ones(1, 4)), torch.zeros(5, 4))
    assert same(net, state)


# what is stored


def test_the_stored_groups_are_all_torch_prunings():
    table = papers.results("structurally-prune-anything", "groups")
    assert (table["ccs"] == table["same"]).all()


def test_the_arms_of_a_network_have_equal_multiply_adds():
    table = papers.results("structurally-prune-anything", "accuracy")
    assert (table["macs"] <= table["target"] + 1e-4).all()
    assert (table["target"] - table["macs"]).max() < 0.035
    counts = table.query("bn != 'own images'").groupby(["model", "seed", "target", "bn"]).size()
    assert set(counts) == {len(recipe.PLAIN) + len(recipe.UPDATED)}


def test_the_recipe_measures_what_is_stored():
    table = papers.results("structurally-prune-anything", "knobs").query("seed == 1")
    rows = table.query("criterion == 'L1' and agg == 'sum' and norm == 'mean' and not update")
    model, data = models.load("resnet-small", seed=1), recipe.method_and_data()[1]
    found = spa.coupled(model, X)
    small = recipe.pruned(spa, model, found, spa.raw(found, sparsity.magnitude(model)), 0.5)
    from nbkit import training

    right = training.accuracy(small, data.x_test[:1000], data.y_test[:1000], batch=100)
    np.testing.assert_allclose(right, rows["accuracy"].item(), atol=0.005)
