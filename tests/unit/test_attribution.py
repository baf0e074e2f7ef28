"""Gradient attributions: their axioms, agreement with captum, and that the model is the same afterwards."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from captum.attr import (
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nbkit import attribution, datasets, models
from nbkit.errors import NotFinite

# every gradient method, called alike
METHODS = {
    "saliency": attribution.saliency,
    "input_x_gradient": attribution.input_x_gradient,
    "integrated_gradients": lambda *a, **k: attribution.integrated_gradients(*a, steps=8, **k),
    "smooth_grad": lambda *a, **k: attribution.smooth_grad(*a, samples=4, **k),
    "guided_backprop": attribution.guided_backprop,
    "layer_relevance": attribution.layer_relevance,
    "occlusion": lambda *a, **k: attribution.occlusion(*a, window=4, **k),
    "rise": lambda *a, **k: attribution.rise(*a, masks=20, grid=4, **k),
    "grad_cam": lambda *a, **k: attribution.grad_cam(*a, layer="4", relu=False, **k),
    "grad_cam_plus_plus": lambda *a, **k: attribution.grad_cam_plus_plus(*a, layer="4", relu=False, **k),
    "guided_grad_cam": lambda *a, **k: attribution.guided_grad_cam(*a, layer="4", **k),
}


def conv_net(seed: int = 0, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU6(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(8, 5),
    )  # fmt: skip
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def smooth_mlp(seed: int, features: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def pictures(device, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(device)


def agree(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((ours - theirs.detach().cpu()).abs().max() <= tolerance * theirs.abs().max())


@pytest.fixture(autouse=True)
def _quiet_captum():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="captum")
        yield


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("inplace", [False, True])
def test_agree_with_captum(device, seed, inplace):
    net, x = conv_net(seed, inplace).eval().to(device), pictures(device)
    target = torch.tensor([0, 4, 2], device=device)
    pairs = [
        (attribution.saliency(net, x, target), Saliency(net).attribute(x, target, abs=False)),
        (attribution.saliency(net, x, target, absolute=True), Saliency(net).attribute(x, target)),
        (attribution.input_x_gradient(net, x, target), InputXGradient(net).attribute(x, target)),
        (attribution.integrated_gradients(net, x, target), IntegratedGradients(net).attribute(x, target=target)),
        (
            attribution.integrated_gradients(net, x, target, steps=7, baseline=0.3, batch=5),
            IntegratedGradients(net).attribute(x, baselines=0.3, target=target, n_steps=7),
        ),
    ]
    for ours, theirs in pairs:
        assert ours.shape == x.shape and ours.device.type == "cpu" and agree(ours, theirs)


@pytest.mark.parametrize("seed", range(3))
def test_guided_backprop_agrees_with_captum_on_relu_modules(device, seed):
    net, x = conv_net(seed).eval().to(device), pictures(device)
    net[5] = nn.ReLU()
    assert agree(attribution.guided_backprop(net, x, 2), GuidedBackprop(net).attribute(x, 2))


class GuidedAtReLU6(GuidedBackprop):
    """captum's, which hooks ``nn.ReLU`` alone, taught ReLU6."""

    def _register_hooks(self, module):
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            self.backward_hooks.append(module.register_full_backward_hook(self._backward_hook))


@pytest.mark.parametrize("seed", range(3))
def test_guided_backprop_at_a_relu6_differs_from_captum_that_leaves_it_out(device, seed):
    net, x = conv_net(seed).eval().to(device), 5 * pictures(device)
    with torch.no_grad():
        net[4].weight.mul_(20)  # so that many values are cut off at 6
        assert 0.05 < (net[:6](x) == 6).float().mean() < 0.5
    ours = attribution.guided_backprop(net, x, 2)
    assert agree(ours, GuidedAtReLU6(net).attribute(x, 2))
    assert not agree(ours, GuidedBackprop(net).attribute(x, 2), 0.01)


@pytest.mark.models
def test_guided_backprop_on_efficientnet_lite0_is_captums_taught_relu6():
    """All its activations are ReLU6: captum's own guided backpropagation is its plain gradient there."""
    net = models.load("efficientnet-lite0").eval()
    x, target = models.transform("efficientnet-lite0")(datasets.load("imagenet-sample"))[13:14], 471  # a cannon
    assert agree(attribution.guided_backprop(net, x, target), GuidedAtReLU6(net).attribute(x, target))
    assert agree(attribution.saliency(net, x, target), GuidedBackprop(net).attribute(x, target))


def test_smooth_grad_agrees_with_captum_on_the_same_noise():
    net, x = conv_net().eval(), pictures("cpu")
    x = (x - x.amin((1, 2, 3), keepdim=True)) / (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    ours = attribution.smooth_grad(net, x, 1, samples=6, noise=0.2, seed=3)
    torch.manual_seed(3)
    tunnel = NoiseTunnel(Saliency(net))
    theirs = tunnel.attribute(x, nt_type="smoothgrad", nt_samples=6, stdevs=0.2, target=1, abs=False)
    assert agree(ours, theirs)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), start=st.floats(-2, 2), target=st.integers(0, 2))
def test_integrated_gradients_are_complete(seed, start, target):
    net = smooth_mlp(seed)
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    attributions = attribution.integrated_gradients(net, x, target, steps=64, baseline=start)
    change = (net(x) - net(torch.full_like(x, start)))[:, target]
    torch.testing.assert_close(attributions.sum(1), change.detach(), rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), feature=st.integers(0, 3))
def test_sensitivity(seed, feature):
    """A feature that alone changes the score gets all of the change; one the model ignores gets nothing."""
    net = smooth_mlp(seed)
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    start = x.clone()
    start[0, feature] += 1.5
    attributions = attribution.integrated_gradients(net, x, 0, steps=64, baseline=start)[0]
    change = (net(x) - net(start))[0, 0].item()
    assert attributions[feature].item() == pytest.approx(change, rel=1e-5, abs=1e-7)
    with torch.no_grad():
        net[0].weight[:, feature] = 0
    for name in ("saliency", "input_x_gradient", "integrated_gradients", "smooth_grad"):
        assert METHODS[name](net, x, 0)[0, feature] == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_implementation_invariance(seed):
    """Two networks that compute the same function get the same attributions."""
    net = smooth_mlp(seed)
    other = nn.Sequential(nn.Linear(4, 4, bias=False), copy.deepcopy(net[0]), nn.Tanh(), copy.deepcopy(net[2])).double()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    order = torch.randperm(8)
    with torch.no_grad():
        other[0].weight.copy_(turn)
        other[1].weight.copy_((net[0].weight @ turn.T)[order])
        other[1].bias.copy_(net[0].bias[order])
        other[3].weight.copy_(net[2].weight[:, order])
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for method in (attribution.saliency, METHODS["integrated_gradients"], METHODS["smooth_grad"]):
        torch.testing.assert_close(method(net, x, 1), method(other, x, 1), rtol=1e-9, atol=1e-11)


def test_a_linear_model_is_explained_by_its_weights():
    net = nn.Linear(6, 3)
    x = torch.randn(4, 6)
    weights = net.weight[1].detach().expand(4, 6)
    torch.testing.assert_close(attribution.saliency(net, x, 1), weights)
    torch.testing.assert_close(attribution.smooth_grad(net, x, 1, samples=3), weights)
    torch.testing.assert_close(attribution.integrated_gradients(net, x, 1, steps=1), weights * x)
    relevance = attribution.layer_relevance(net, x, 1, bias=False, epsilon=0)
    torch.testing.assert_close(relevance.sum(1), net(x)[:, 1].detach())


@pytest.mark.parametrize("name", METHODS)
def test_the_batch_does_not_change_the_result(device, name):
    net, x = conv_net().to(device), pictures(device)
    target = torch.tensor([0, 1, 2])
    whole = METHODS[name](net, x, target)
    for batch in (1, 2, 5):
        torch.testing.assert_close(METHODS[name](net, x, target, batch=batch), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_targets_may_be_given_in_every_way(device, name):
    net, x = conv_net().to(device).eval(), pictures(device)[:1]
    c = int(net(x).argmax())
    wanted = METHODS[name](net, x)
    for target in (c, torch.tensor([c]), torch.tensor(c), lambda out: out[:, c]):
        torch.testing.assert_close(METHODS[name](net, x, target), wanted)


def test_no_target_means_the_class_of_the_unaltered_example():
    # the path from the baseline crosses into another class, but the explained score is one and the same
    net = nn.Sequential(nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.tensor([[2.0]])
    assert attribution.integrated_gradients(net, x, steps=9, baseline=-3.0).item() == pytest.approx(5.0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_and_the_mode_of_autograd_are_left_alone(device, name, outer):
    net, x = conv_net(inplace=True).to(device).train(), pictures(device)
    net[4].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[2].register_forward_hook(lambda *_: None)
    state = copy.deepcopy(net.state_dict())
    with outer():
        inside = torch.is_grad_enabled()
        frozen = METHODS[name](net, x, 1)
        assert torch.is_grad_enabled() is inside
    assert not frozen.requires_grad and frozen.device.type == "cpu"
    assert all(m.training for m in net.modules())
    assert [p.requires_grad for p in net.parameters()] == [p is not net[4].weight for p in net.parameters()]
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for p in net.parameters() if p is not net[0].weight)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert [len(m._forward_hooks) for m in net] == [1 if i == 2 else 0 for i in range(len(net))]
    assert not any(m._forward_pre_hooks or m._backward_hooks for m in net.modules())
    torch.testing.assert_close(frozen, METHODS[name](net, x, 1))


@pytest.mark.parametrize("name", METHODS)
def test_an_exception_leaves_the_model_alone(name):
    class Breaks(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    net = conv_net().train()
    net.append(Breaks())
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="broken"):
        METHODS[name](net, pictures("cpu"), 1)
    assert torch.is_grad_enabled() and all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.relu(torch.tensor(-1.0)) == 0  # no rule is left in force


@pytest.mark.parametrize("name", METHODS)
def test_bad_inputs_are_refused(name):
    net, x = conv_net(), pictures("cpu")
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match="1 NaN"):
        METHODS[name](net, broken, 1)
    with pytest.raises(ValueError, match="empty"):
        METHODS[name](net, x[:0], 1)
    with pytest.raises(IndexError, match="classes 0 to 4"):
        METHODS[name](net, x, 5)
    with pytest.raises(ValueError, match="for 3 inputs"):
        METHODS[name](net, x, torch.tensor([1, 2]))
    with pytest.raises(TypeError):
        METHODS[name](net, x, 1.5)
    with pytest.raises(ValueError, match="batch"):
        METHODS[name](net, x, 1, batch=0)
    with pytest.raises(TypeError, match="tensor"):
        METHODS[name](net, x.numpy(), 1)


def test_bad_arguments_are_refused():
    net, x = conv_net(), pictures("cpu")
    with pytest.raises(ValueError, match="steps"):
        attribution.integrated_gradients(net, x, 1, steps=0)
    with pytest.raises(ValueError, match="baseline"):
        attribution.integrated_gradients(net, x, 1, baseline=torch.zeros(5))
    with pytest.raises(NotFinite, match="baseline"):
        attribution.integrated_gradients(net, x, 1, baseline=float("inf"))
    with pytest.raises(ValueError, match="samples"):
        attribution.smooth_grad(net, x, 1, samples=0)
    with pytest.raises(ValueError, match="noise"):
        attribution.smooth_grad(net, x, 1, noise=-0.1)
    with pytest.raises(TypeError, match="floating"):
        attribution.saliency(net, (x * 100).long(), 1)
    with pytest.raises(ValueError, match="does not depend"):
        attribution.saliency(net, x, lambda out: out.detach()[:, 0])


class Reader(nn.Module):
    """Takes keyword arguments and returns a dict, as transformers models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs_embeds, attention_mask=None, scale=1.0):
        hidden = torch.tanh(self.mix(inputs_embeds)) * attention_mask[..., None]
        return {"logits": self.head(hidden.sum(1)) * scale}


def test_a_dict_of_inputs_is_passed_as_keywords():
    net, x, mask = Reader(), torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"inputs_embeds": x, "attention_mask": mask, "scale": 2.0}
    ours = attribution.integrated_gradients(net, inputs, torch.tensor([0, 2]), batch=3)
    theirs = IntegratedGradients(lambda e, m: net(e, m, 2.0)["logits"]).attribute(
        x, target=torch.tensor([0, 2]), additional_forward_args=mask
    )
    assert ours.shape == x.shape and agree(ours, theirs)
    assert (ours[0, 3:] == 0).all()
    saliency = attribution.saliency(net, inputs, 1, wrt="inputs_embeds", batch=1)
    assert agree(saliency, Saliency(lambda e, m: net(e, m, 2.0)["logits"]).attribute(
        x, 1, abs=False, additional_forward_args=mask
    ))  # fmt: skip


def test_the_tensor_explained_must_be_clear():
    net, x, mask = Reader(), torch.randn(2, 5, 4), torch.ones(2, 5)
    with pytest.raises(ValueError, match="wrt"):
        attribution.saliency(net, {"inputs_embeds": x, "attention_mask": mask}, 0)
    with pytest.raises(KeyError, match="did you mean 'inputs_embeds'"):
        attribution.saliency(net, {"inputs_embeds": x, "attention_mask": mask}, 0, wrt="input_embeds")
    with pytest.raises(TypeError, match="inputs_embeds"):
        attribution.saliency(net, {"input_ids": mask.long()}, 0)
    with pytest.raises(ValueError, match="dict"):
        attribution.saliency(nn.Linear(4, 2), x, 0, wrt="inputs_embeds")


def test_guided_rule_at_a_relu_and_a_relu6():
    """Forward unchanged; back only positive gradients, and only where 0 < x (< 6)."""
    x = torch.tensor([[-1.0, 2.0, 7.0, 3.0]])
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0])

    def target(out):
        return (out * signs).sum(1)

    assert attribution.guided_backprop(nn.Sequential(nn.ReLU()), x, target).tolist() == [[0, 1, 1, 0]]
    assert attribution.guided_backprop(nn.Sequential(nn.ReLU6()), x, target).tolist() == [[0, 1, 0, 0]]
    seen = []
    net = nn.Sequential(nn.ReLU6())
    attribution.guided_backprop(net, x, lambda out: seen.append(out.detach().clone()) or target(out))
    assert torch.equal(seen[0], net(x))


@pytest.mark.parametrize(
    "call",
    [
        F.relu, torch.relu, lambda x: x.relu(), lambda x: x.clone().relu_(), lambda x: F.relu(x.clone(), inplace=True),
        lambda x: x.clamp(min=0), lambda x: torch.clamp_min(x, 0),
    ],
)  # fmt: skip
def test_guided_backprop_sees_functional_relus(call):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.second(call(self.first(x)))

    net, x = Functional(), torch.randn(4, 5)
    modules = nn.Sequential(net.first, nn.ReLU(), net.second)
    assert agree(attribution.guided_backprop(net, x, 1), GuidedBackprop(modules).attribute(x, 1))


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.LeakyReLU(), nn.ELU(), nn.Hardswish()])
def test_guided_backprop_refuses_networks_without_the_rule(activation):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), activation)
    with pytest.raises(TypeError, match=f"'3' \\({type(activation).__name__}\\)"):
        attribution.guided_backprop(net, torch.randn(2, 3), 0)
    with pytest.raises(TypeError, match="no ReLU"):
        attribution.guided_backprop(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3), 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_guided_backprop_refuses_what_it_cannot_see_into():
    scripted = nn.Sequential(nn.Linear(3, 3), torch.jit.trace(nn.ReLU(), torch.randn(1, 3)))
    with pytest.raises(TypeError, match="scripted"):
        attribution.guided_backprop(scripted, torch.randn(2, 3), 0)


def test_no_more_rows_run_together_than_asked_for():
    rows = []

    class Counts(nn.Module):
        def forward(self, x):
            rows.append(len(x))
            return x

    net = conv_net()
    net.insert(0, Counts())
    x = pictures("cpu")
    for name, method in METHODS.items():
        if "cam" not in name:
            rows.clear()
            method(net, x, 0, batch=2)
            assert max(rows) <= 2, name


class Convolves(nn.Module):
    """Convolutions with strides, groups and dilation; one read twice, one overwritten before its BatchNorm."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.twice = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.over, self.same = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding="same")
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, affine=i != 1) for i in range(4))
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.line, self.head = nn.Conv1d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu6(self.norms[0](self.first(x)))
        z = self.twice(x)
        x = self.norms[1](z) * torch.sigmoid(z)
        x = self.norms[2](self.over(x).tanh_()) + self.norms[3](self.same(x))
        return self.head(torch.relu(self.line(x.flatten(2))).mean(2))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_keep_less_are_the_same_gradients(device, monkeypatch, seed):
    monkeypatch.setattr(attribution._autograd, "_WORTH", 0)
    known, used = attribution._autograd._Known.apply, []
    monkeypatch.setattr(attribution._autograd._Known, "apply", lambda *a: used.append(1) or known(*a))
    for net in (Convolves(seed), Convolves(seed).double(), conv_net(seed), conv_net(seed, inplace=True)):
        net = net.eval().to(device)
        x = pictures(device).to(next(net.parameters()).dtype).requires_grad_()
        expected = torch.autograd.grad(net(x)[:, 1].sum(), x)[0].cpu()
        assert agree(attribution.saliency(net, x, 1), expected, 1e-5)
    assert used


def test_a_batch_norm_without_running_statistics_takes_those_of_the_batch():
    """On 2^19 numbers, from which on gradients keep less."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    net = net.eval().requires_grad_(False)
    x = torch.randn(4, 3, 210, 210).requires_grad_()
    assert x.numel() >= attribution._autograd._WORTH
    expected = torch.autograd.grad(net(x)[:, 1].sum(), x)[0]
    assert agree(attribution.saliency(net, x.detach(), 1), expected, 1e-5)


def test_smooth_grad_without_noise_is_saliency():
    net, x = conv_net(), pictures("cpu")
    still = attribution.smooth_grad(net, x, 1, noise=0.0, samples=3)
    torch.testing.assert_close(still, attribution.saliency(net, x, 1))
    assert not torch.equal(METHODS["smooth_grad"](net, x, 1, seed=0), METHODS["smooth_grad"](net, x, 1, seed=1))
