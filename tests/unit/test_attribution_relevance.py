"""Relevance propagation: conservation, the rules by hand, BatchNorm folding, agreement with captum."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nbkit.attribution import input_x_gradient, layer_relevance
from nbkit.errors import LayerDidNotRun, LayerNotFound

RULES = ("epsilon", "gamma", "zplus")


class Residual(nn.Module):
    """Conv-BN-ReLU6, a residual block added in place, pooling and a head; the functions are partly not modules."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.act1, self.pool = nn.ReLU6(inplace=True), nn.MaxPool2d(2)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.act2, self.drop, self.fc = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 4, bias=False)
        for norm in (self.norm1, self.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.pool(self.act1(self.norm1(self.conv1(x))))
        out = self.norm2(self.conv2(x))
        out += x
        out = F.avg_pool2d(self.act2(out), 2)
        return self.fc(self.drop(torch.flatten(out.mean(-1).mean(-1), 1)))


def plain_net(seed: int = 0, bias: bool = True) -> nn.Module:
    """Modules that captum has rules for, with nothing between them."""

    class Plain(nn.Sequential):
        def forward(self, x):
            for module in self:
                x = module(x.flatten(1) if isinstance(module, nn.Linear) else x)
            return x

    torch.manual_seed(seed)
    return Plain(
        nn.Conv2d(2, 6, 3, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5), nn.Linear(8, 4, bias=bias),
    ).eval()  # fmt: skip


def pictures(seed: int = 0, n: int = 3) -> torch.Tensor:
    return torch.rand(n, 2, 10, 10, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        ("epsilon", lambda: EpsilonRule(1e-6)),
        ("gamma", lambda: GammaRule(0.25, set_bias_to_zero=True)),
        ("zplus", lambda: Alpha1_Beta0_Rule(set_bias_to_zero=True)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_captum(rule, theirs, seed):
    # in float64: a denominator near zero makes relevances of 285 of scores below 1, and float32 loses three digits
    net, x = plain_net(seed).double(), pictures(seed).double()
    target = torch.tensor([0, 3, 1])
    exact = rule == "epsilon"
    ours = layer_relevance(net, x, target, rule=rule, bias=exact, epsilon=1e-6 if exact else 1e-9)
    for module in net:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.rule = theirs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = LRP(net).attribute(x, target=target)
    # the two place their stabilisers a little differently
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), target=st.integers(0, 3), rule=st.sampled_from(["epsilon", "gamma"]))
def test_relevance_is_conserved_through_residual_blocks(seed, target, rule):
    """With biases left out, every layer that all paths cross holds the whole score, and so do the inputs."""
    net = Residual(seed).double().eval()
    x = torch.rand(2, 2, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    hidden = net.pool(net.act1(net.norm1(net.conv1(x)))).detach()
    # a unit all of whose inputs are zero lives on its bias, and has nobody to hand its relevance to
    assume(F.max_pool2d(hidden.sum(1), 3, 1, 1).min() > 0)
    score = net(x)[:, target].detach()
    kwargs = {"rule": rule, "bias": False, "epsilon": 1e-12}
    relevance = layer_relevance(net, x, target, layer=["conv1", "norm1", "act1", "pool", "act2", "drop"], **kwargs)
    relevance["inputs"] = layer_relevance(net, x, target, **kwargs)
    for name, values in relevance.items():
        total = values.flatten(1).sum(1)
        torch.testing.assert_close(total, score, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n} {m}")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(RULES))
def test_a_network_without_biases_conserves_exactly(seed, rule):
    net, x = plain_net(seed, bias=False).double(), pictures(seed).double()
    with torch.no_grad():
        net[0].weight.abs_()  # every neuron then has a positive contribution
        net[3].weight.abs_()
        net[7].weight.abs_()
    score = net(x)[:, 2].detach()
    for layer in ("0", "3", "5", None):
        relevance = layer_relevance(net, x, 2, layer=layer, rule=rule, epsilon=1e-12)
        torch.testing.assert_close(relevance.flatten(1).sum(1), score, rtol=1e-6, atol=1e-10)


def test_zplus_by_hand():
    """a = (1, 2): weights (3, -1) give (1, 0) of the relevance, weights (1, 1) give (1/3, 2/3)."""
    net, x = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -1.0], [1.0, 1.0]]))
    for target, share in ((0, [1, 0]), (1, [1 / 3, 2 / 3])):
        score = net(x)[0, target].item()
        for rule in ("zplus", "z-plus", {"Linear": "z_plus"}):
            assert (layer_relevance(net, x, target, rule=rule)[0] / score).tolist() == pytest.approx(share, abs=1e-5)


def test_gamma_and_epsilon_by_hand():
    net, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -1.0]]))
        net.bias.fill_(1.0)
    # contributions 3 and -2, bias 1, z = 2
    wanted = {
        ("epsilon", True): [3, -2], ("epsilon", False): [2 * 3 / 1, 2 * -2 / 1],
        ("gamma", True): [2 * 3.75 / 3, 2 * -2 / 3], ("gamma", False): [2 * 3.75 / 1.75, 2 * -2 / 1.75],
        ("zplus", True): [2 * 3 / 4, 0], ("zplus", False): [2, 0],
    }  # fmt: skip
    for (rule, bias), expected in wanted.items():
        relevance = layer_relevance(net, x, 0, rule=rule, bias=bias, gamma=0.25, epsilon=1e-9)[0]
        assert relevance.tolist() == pytest.approx(expected, abs=1e-5), (rule, bias)


@pytest.mark.parametrize(("rule", "expected"), [("zplus", [0.5, 0]), ("gamma", [1.5, -0.8])])
def test_a_negative_bias_takes_no_share_of_what_is_positive(rule, expected):
    """Contributions 3 and -2, bias -1/2, z = 1/2: zplus divides by 3, gamma of 1/4 by 1/2 + 3/4."""
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -1.0]]))
        net.bias.fill_(-0.5)
    found = layer_relevance(net, torch.tensor([[1.0, 2.0]]), 0, rule=rule, gamma=0.25, epsilon=1e-9)[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_relevance_is_lost_at_a_unit_that_lives_on_its_bias(rule):
    """Units of 1 + 1/2 and 0 + 1/2 make a score of 2; the inputs get 3/2 of it, for nothing feeds the second."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.fill_(0.5)
        net[2].weight.fill_(1.0)
    x, asked = torch.tensor([[1.0, 0.0]]), {"rule": rule, "bias": False, "epsilon": 1e-9}
    assert layer_relevance(net, x, 0, layer="1", **asked)[0].tolist() == pytest.approx([1.5, 0.5])
    assert layer_relevance(net, x, 0, **asked)[0].tolist() == pytest.approx([1.5, 0])


def test_negative_inputs_contribute_through_negative_weights():
    net, x = nn.Linear(2, 1, bias=False), torch.tensor([[-1.0, 2.0]])
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-3.0, 1.0]]))
    assert layer_relevance(net, x, 0, rule="zplus")[0].tolist() == pytest.approx([3, 2], abs=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_folded(rule, bias):
    net, x = Residual(3).eval(), pictures(5)
    folded = copy.deepcopy(net)
    for conv, norm in (("conv1", "norm1"), ("conv2", "norm2")):
        merged = nn.utils.fuse_conv_bn_eval(getattr(folded, conv), getattr(folded, norm))
        setattr(folded, conv, merged)
        setattr(folded, norm, nn.Identity())
    kwargs = {"rule": rule, "bias": bias, "epsilon": 1e-4}
    ours, theirs = layer_relevance(net, x, 1, **kwargs), layer_relevance(folded, x, 1, **kwargs)
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()
    pair = layer_relevance(net, x, 1, layer=["conv1", "norm1", "conv2", "norm2"], **kwargs)
    torch.testing.assert_close(pair["conv1"], pair["norm1"])
    torch.testing.assert_close(pair["conv2"], pair["norm2"])
    assert (pair["conv1"] - layer_relevance(folded, x, 1, layer="conv1", **kwargs)).abs().max() <= 1e-3


def test_a_batch_norm_on_its_own_is_a_linear_layer_of_one_weight_a_channel():
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)).eval()
    net[1].running_mean.copy_(torch.tensor([1.0, 2, 3]))
    x = torch.rand(4, 3) + 0.5
    relevance = layer_relevance(net, x, lambda out: out[:, 1], bias=False)
    torch.testing.assert_close(relevance[:, 1], net(x)[:, 1].detach(), rtol=1e-4, atol=1e-5)
    assert (relevance[:, [0, 2]] == 0).all()


def test_without_biases_epsilon_is_input_times_gradient():
    net, x = plain_net(1, bias=False), pictures(1)
    torch.testing.assert_close(
        layer_relevance(net, x, 2, epsilon=1e-12), input_x_gradient(net, x, 2), rtol=1e-3, atol=1e-6
    )


def test_with_biases_epsilon_is_input_times_gradient_and_without_their_share_it_is_not():
    net, x = plain_net(1).double(), pictures(1).double()
    product = input_x_gradient(net, x, 2)
    torch.testing.assert_close(layer_relevance(net, x, 2, epsilon=1e-12), product)
    other = layer_relevance(net, x, 2, epsilon=1e-12, bias=False)
    assert (other - product).abs().max() > 0.1 * product.abs().max()


def test_relu6_passes_relevance_on_above_six():
    net = nn.Sequential(nn.ReLU6(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[1].weight.fill_(1.0)
    x = torch.tensor([[9.0, 3.0]])
    assert layer_relevance(net, x, 0)[0].tolist() == pytest.approx([6, 3], abs=1e-4)


def test_dead_and_opposed_units_get_nothing_from_zplus():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, 0, 1], [0, 1, 1]]))
        net[2].weight.copy_(torch.tensor([[2.0, 1, -1, 1]]))
    relevance = layer_relevance(net, torch.rand(5, 3) + 0.1, 0, layer="1", rule="zplus")
    assert (relevance[:, [1, 2]] == 0).all() and (relevance[:, [0, 3]] > 0).all()


def test_rules_may_differ_by_class_or_layer():
    net, x = plain_net(2), pictures(2)
    mixed = layer_relevance(net, x, 1, rule={"Conv2d": "zplus", "7": "epsilon"}, bias=False)
    default = layer_relevance(net, x, 1, rule={"Conv2d": "zplus"}, bias=False)
    by_name = layer_relevance(net, x, 1, rule={"0": "zplus", "3": "zplus"}, bias=False)
    assert torch.equal(mixed, default) and torch.equal(mixed, by_name)
    assert not torch.allclose(mixed, layer_relevance(net, x, 1, rule="zplus", bias=False))
    with pytest.raises(LayerNotFound, match="did you mean 'Conv2d'"):
        layer_relevance(net, x, 1, rule={"Conv2D": "zplus"})
    with pytest.raises(ValueError, match="rule must be"):
        layer_relevance(net, x, 1, rule="alpha2")
    with pytest.raises(ValueError, match="epsilon must be"):
        layer_relevance(net, x, 1, epsilon=-1.0)


def test_layers_come_back_as_asked_for():
    net, x = Residual().eval(), pictures()
    assert layer_relevance(net, x, 1).shape == x.shape
    assert layer_relevance(net, x, 1, layer="conv2").shape == (3, 6, 5, 5)
    assert set(layer_relevance(net, x, 1, layer=["conv1", "fc"])) == {"conv1", "fc"}
    assert set(layer_relevance(net, x, 1, layer="conv*", batch=2)) == {"conv1", "conv2"}
    score = net(x)[:, 1].detach()
    assert torch.equal(layer_relevance(net, x, 1, layer="fc")[:, 1], score)


class Gate(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        return self.how(self.fc(x))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (nn.GELU(), "gelu"), (nn.SiLU(), "silu"), (lambda x: x * torch.sigmoid(x), "sigmoid"),
        (lambda x: x * x, "product"), (lambda x: x.softmax(-1), "softmax"), (nn.LayerNorm(4), "layer_norm"),
        (lambda x: x @ x.T, "matmul"), (nn.BatchNorm1d(4, track_running_stats=False), "running statistics"),
    ],
)  # fmt: skip
def test_functions_without_a_rule_are_named(how, said):
    net = nn.Sequential(nn.Linear(4, 4), Gate(how))
    with pytest.raises(TypeError, match=f"{said}.*'1"):
        layer_relevance(net, torch.rand(3, 4), 0)
    # and nothing of it stays in force
    assert torch.equal(net[0](torch.ones(1, 4)), F.linear(torch.ones(1, 4), net[0].weight, net[0].bias))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_layer_that_runs_twice_or_not_at_all_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    with pytest.raises(ValueError, match="more than once"):
        layer_relevance(Twice(), torch.rand(2, 4), 0, layer="fc")
    with pytest.raises(LayerDidNotRun):
        layer_relevance(Twice(), torch.rand(2, 4), 0, layer="spare")
    assert layer_relevance(Twice(), torch.rand(2, 4), 0).shape == (2, 4)


def test_the_forward_is_unchanged():
    """Biases, BatchNorm, ReLU6 and all: relevance starts from the model's own score."""
    net, x = Residual(1).eval(), pictures(1)
    seen = []
    for rule in RULES:
        layer_relevance(net, x, lambda out: seen.append(out.detach()) or out[:, 0], rule=rule)
    for out in seen:
        torch.testing.assert_close(out, net(x).detach(), rtol=1e-6, atol=1e-6)
