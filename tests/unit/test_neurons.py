"""Neuron attributions: hand-computed values, axioms, and agreement with captum and with loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbkit import hooks, neurons
from nbkit.errors import LayerDidNotRun, LayerNotFound, NotFinite


def mlp(device, seed=0, widths=(4, 9, 7, 3), act=nn.Tanh):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).to(device), torch.randn(5, widths[0]).to(device)


def conv(device, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    return model.to(device), torch.randn(3, 2, 6, 6).to(device)


class Tokens(nn.Module):
    """A transformer block with a class token."""

    def __init__(self, width=6, hidden=10):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.head = nn.Linear(width, 3)
        self.embeddings = 0

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return self.head(x[:, 0])


def tokens(device, seed=0):
    torch.manual_seed(seed)
    return Tokens().to(device), torch.randn(3, 5, 4).to(device)


MODELS = {
    "mlp": (mlp, ["0", "1", "3"], None),
    "conv": (conv, ["0", "1", "3", "6"], None),
    "tokens": (tokens, ["embed", "fc1", "act", "fc2"], 0),
}
CASES = [(name, layer) for name, (_, layers, _) in MODELS.items() for layer in layers]


# --- activation, gradient, their product


def test_by_hand(device):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).to(device)
    model[0].weight.data = torch.tensor([[1.0, 2.0], [1.0, -1.0]], device=device)
    model[0].bias.data.zero_()
    model[2].weight.data = torch.tensor([[3.0, 5.0]], device=device)
    model[2].bias.data.fill_(0.5)
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0]], device=device)
    assert neurons.activation(model, x, layer="1").tolist() == [[5, 0], [4, 1]]
    assert neurons.gradient(model, x, 0, layer="1").tolist() == [[3, 5], [3, 5]]
    assert neurons.gradient_x_activation(model, x, 0, layer="1").tolist() == [[15, 0], [12, 5]]
    assert neurons.ablation_effect(model, x, 0, layer="1").tolist() == [[-15, 0], [-12, -5]]
    assert neurons.ablation_effect(model, x, 0, layer="1", value=1.0).tolist() == [[-12, 5], [-9, 0]]
    grads = neurons.input_gradients(model, x, layer="1")
    assert grads.tolist() == [[[1, 2], [0, 0]], [[1, 2], [1, -1]]]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_agrees_with_captum(device, name, layer):
    captum = pytest.importorskip("captum.attr")
    model, x = MODELS[name][0](device)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # captum keeps references
    module = hooks.get_layer(model, layer)
    target = torch.arange(len(x), device=device) % 3

    def by_position(values):  # [N, C, H, W] or [N, T, F] to [N, P, K]
        if values.ndim == 2:
            return values[:, None].cpu()
        return (values.flatten(2).transpose(1, 2) if values.ndim == 4 else values).detach().cpu()

    theirs = captum.LayerGradientXActivation(model, module).attribute(x, target=target)
    mine = neurons.gradient_x_activation(model, x, target, layer=layer, reduce=None)
    torch.testing.assert_close(mine, by_position(theirs), rtol=1e-4, atol=1e-6)
    summed = neurons.gradient_x_activation(model, x, target, layer=layer)
    torch.testing.assert_close(summed, by_position(theirs).sum(1), rtol=1e-4, atol=1e-6)

    theirs = captum.LayerActivation(model, module).attribute(x)
    theirs = by_position(theirs.detach())
    torch.testing.assert_close(neurons.activation(model, x, layer=layer, reduce=None), theirs)
    torch.testing.assert_close(neurons.activation(model, x, layer=layer, reduce="max"), theirs.amax(1))


@pytest.mark.parametrize(("name", "layer"), [("mlp", "1"), ("conv", "0"), ("tokens", "act")])
def test_conductance_agrees_with_captum(device, name, layer):
    """captum takes the gradient at the left of each interval, so it needs more steps for the same integral."""
    captum = pytest.importorskip("captum.attr")
    model, x = MODELS[name][0](device)
    model.eval()
    for i, module in model.named_children():  # a smooth model: no kink for one rule to hit and the other to miss
        if isinstance(module, nn.ReLU):
            model[int(i)] = nn.GELU()
    base = torch.randn_like(x) * 0.1
    theirs = captum.LayerConductance(model, hooks.get_layer(model, layer)).attribute(
        x, base, target=1, n_steps=1500, internal_batch_size=500
    )
    theirs = theirs.flatten(2).sum(2) if theirs.ndim == 4 else theirs.sum(1) if theirs.ndim == 3 else theirs
    mine = neurons.conductance(model, x, 1, layer=layer, baseline=base, steps=200)
    torch.testing.assert_close(mine, theirs.detach().cpu().to(mine.dtype), rtol=1e-2, atol=2e-4)


@given(seed=st.integers(0, 1000), steps=st.integers(40, 60), batch=st.integers(5, 100))
@settings(max_examples=8, deadline=None)
def test_conductance_is_complete(device, seed, steps, batch):
    """All neurons of a layer that everything passes sum to F(x) - F(baseline)."""
    model, x = mlp(device, seed)
    target = torch.arange(len(x), device=device) % 3
    base = torch.full_like(x, 0.1)
    with torch.no_grad():
        gap = (model(x) - model(base)).gather(1, target[:, None]).squeeze(1).cpu()
    for layer in ("0", "1", "3"):
        found = neurons.conductance(model, x, target, layer=layer, baseline=0.1, steps=steps, batch=batch)
        torch.testing.assert_close(found.sum(1), gap, rtol=1e-3, atol=1e-3)


def test_conductance_does_not_depend_on_the_batch(device):
    model, x = conv(device)
    whole = neurons.conductance(model, x, 1, layer="0", steps=7, batch=1000)
    for batch in (1, 2, 3, 5, 8):
        torch.testing.assert_close(
            neurons.conductance(model, x, 1, layer="0", steps=7, batch=batch), whole, rtol=1e-4, atol=1e-6
        )


def test_conductance_takes_the_class_predicted_for_the_input(device):
    model, x = mlp(device)
    classes = model(x).argmax(1)
    torch.testing.assert_close(
        neurons.conductance(model, x, layer="1"), neurons.conductance(model, x, classes, layer="1")
    )


@pytest.mark.parametrize("positions", [None, 0, [1, 3], slice(2, None)])
def test_positions_and_reductions(device, positions):
    model, x = tokens(device)
    model.eval()
    with hooks.record(model, "act") as acts:
        model(x)
    index = slice(None) if positions is None else [0] if positions == 0 else positions
    chosen = acts["act"][:, index]
    for how, value in {"mean": chosen.mean(1), "sum": chosen.sum(1), "max": chosen.amax(1), None: chosen}.items():
        found = neurons.activation(model, x, layer="act", positions=positions, reduce=how, batch=2)
        torch.testing.assert_close(found, value)


# --- ablation


@pytest.mark.parametrize(("name", "layer"), CASES)
@pytest.mark.parametrize("batch", [1, 3, 16, 64])
def test_ablation_equals_one_edit_at_a_time(device, name, layer, batch):
    make, _, positions = MODELS[name]
    model, x = make(device)
    model.eval()
    target = torch.arange(len(x), device=device) % 3
    found = neurons.ablation_effect(model, x, target, layer=layer, value=0.3, positions=positions, batch=batch)
    with torch.no_grad():
        clean = model(x).gather(1, target[:, None])
        columns = []
        for neuron in range(found.shape[1]):
            with hooks.edit(model, {layer: hooks.clamp([neuron], 0.3, positions=positions)}):
                columns.append(model(x).gather(1, target[:, None]) - clean)
    torch.testing.assert_close(found, torch.cat(columns, 1).cpu(), rtol=1e-4, atol=1e-5)


def test_ablation_of_some_neurons_each_to_its_own_value(device):
    model, x = conv(device)
    chosen, values = [4, 0, 2], torch.tensor([0.5, -1.0, 2.0])
    found = neurons.ablation_effect(model, x, 2, layer="3", neurons=chosen, value=values)
    for column, (neuron, value) in enumerate(zip(chosen, values.tolist(), strict=True)):
        every = neurons.ablation_effect(model, x, 2, layer="3", value=value)
        torch.testing.assert_close(found[:, column], every[:, neuron], rtol=1e-4, atol=1e-6)
    mask = torch.tensor([True, False, True, False, False])
    assert neurons.ablation_effect(model, x, 2, layer="3", neurons=mask).shape == (3, 2)


def test_ablation_runs_what_comes_before_once_an_input(device):
    model, x = mlp(device)
    calls = []
    model[0].forward = lambda v, first=model[0].forward: calls.append(len(v)) or first(v)
    neurons.ablation_effect(model, x[:3], 0, layer="3", batch=2)
    # 7 neurons in 4 batches: the look at the layer; for each input the clean score and the recording; and once, beside
    # the first recording, that of running copies
    assert calls == [1, 1, 1, 2, 1, 1, 1, 1]
    assert "forward" in model[0].__dict__


class Between(nn.Module):
    """What stands between its layers writes in place, or has as many rows as there are inputs and is none of them."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.inplace = inplace
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.places = nn.Embedding(1, 5)

    def forward(self, x):
        h = self.first(x)
        if self.inplace:
            return self.head(torch.relu(self.second(h.mul_(2))))
        return self.head(torch.relu(self.second(h) + self.places(torch.zeros(1, dtype=torch.long, device=x.device))))


@pytest.mark.parametrize("inplace", [True, False])
def test_ablation_copes_with_what_stands_between_the_layers(device, inplace):
    torch.manual_seed(0)
    model, x = Between(inplace).to(device), torch.randn(3, 4, device=device)
    found = neurons.ablation_effect(model, x, 0, layer="second", batch=2)
    for j in range(5):
        with torch.no_grad(), hooks.edit(model, {"second": hooks.zero(j)}):
            edited = model(x)[:, 0]
        with torch.no_grad():
            torch.testing.assert_close(found[:, j], (edited - model(x)[:, 0]).cpu(), rtol=1e-4, atol=1e-5)


def test_ablation_of_a_layer_nothing_reads_is_zero(device):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 6)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    model = Idle().to(device)
    x = torch.randn(2, 4, device=device)
    assert neurons.ablation_effect(model, x, layer="idle").abs().max() < 1e-6
    with pytest.raises(ValueError, match="does not depend on layer 'idle'"):
        neurons.gradient(model, x, layer="idle")


def test_first_order_estimate_is_exact_where_the_score_is_linear_in_the_layer(device):
    model, x = mlp(device)
    ablated = neurons.ablation_effect(model, x, 1, layer="3")
    estimate = neurons.gradient_x_activation(model, x, 1, layer="3")
    torch.testing.assert_close(ablated, -estimate, rtol=1e-4, atol=1e-6)


# --- input gradients


def loop_of_gradients(model, x, layer, select):
    """[N, K, ...] one backward pass a neuron."""
    x = x.clone().requires_grad_()
    with hooks.record(model, layer, detach=False) as acts:
        model(x)
    values = select(acts[layer])
    grads = [torch.autograd.grad(values[:, k].sum(), x, retain_graph=True)[0] for k in range(values.shape[1])]
    return torch.stack(grads, 1).cpu()


@pytest.mark.parametrize(
    ("name", "layer", "positions", "select"),
    [
        ("mlp", "0", 0, lambda v: v),
        ("mlp", "1", None, lambda v: v),
        ("mlp", "4", 0, lambda v: v),
        ("conv", "3", (2, 5), lambda v: v[:, :, 2, 5]),
        ("conv", "4", None, lambda v: v.flatten(2).sum(2)),
        ("conv", "1", 0, lambda v: v.flatten(2).sum(2)),
        ("tokens", "act", 0, lambda v: v[:, 0]),
        ("tokens", "act", 3, lambda v: v[:, 3]),
        ("tokens", "act", None, lambda v: v.sum(1)),
        ("tokens", "fc1", 0, lambda v: v[:, 0]),
        ("tokens", "fc2", 0, lambda v: v[:, 0]),
        ("tokens", "norm", 1, lambda v: v[:, 1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("max_bytes", [1, 20_000, 2**29])
def test_input_gradients_equal_a_loop(device, name, layer, positions, select, max_bytes):
    model, x = MODELS[name][0](device)
    model.eval()
    expected = loop_of_gradients(model, x, layer, select)
    found = neurons.input_gradients(model, x, layer=layer, positions=positions, max_bytes=max_bytes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    some = [2, 1]
    found = neurons.input_gradients(model, x, layer=layer, neurons=some, positions=positions)
    torch.testing.assert_close(found, expected[:, some], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_input_gradients_agree_with_captum(device):
    captum = pytest.importorskip("captum.attr")
    model, x = tokens(device)
    model.eval()
    found = neurons.input_gradients(model, x, layer="act")
    theirs = captum.NeuronGradient(model, model.act)
    for k in range(10):
        torch.testing.assert_close(found[:, k], theirs.attribute(x, (0, k)).detach().cpu(), rtol=1e-4, atol=1e-6)


def test_hidden_units_take_as_many_backward_passes_as_the_linear_has_inputs(device):
    model, x = tokens(device)  # 10 hidden units from 6 numbers
    rows = []
    model.embed.register_full_backward_hook(lambda _, __, grads: rows.append(grads[0].flatten(1).any(1).sum().item()))
    neurons.input_gradients(model, x[:1], layer="act")
    assert sum(rows) == 6
    rows.clear()
    neurons.input_gradients(model, x[:1], layer="act", neurons=[0, 1, 2])  # 3 units: their own gradients are fewer
    assert sum(rows) == 3


@pytest.mark.parametrize("act", [nn.Softmax(-1), nn.LayerNorm(10), nn.ReLU(inplace=True)])
def test_the_linear_shortcut_knows_elementwise_functions_from_others(device, act):
    model, x = tokens(device)
    model.act = act.to(device)
    model.eval()
    expected = loop_of_gradients(model, x, "act", lambda v: v[:, 0])
    torch.testing.assert_close(neurons.input_gradients(model, x, layer="act"), expected, rtol=1e-4, atol=1e-6)


def test_the_linear_shortcut_sees_an_edit_between(device):
    model, x = tokens(device)
    model.eval()
    for where in ("fc1", "act"):
        with hooks.edit(model, {where: hooks.scale([0, 4], 3.0)}):
            expected = loop_of_gradients(model, x, "act", lambda v: v[:, 0])
            torch.testing.assert_close(neurons.input_gradients(model, x, layer="act"), expected, rtol=1e-4, atol=1e-6)


def test_input_gradients_of_one_tensor_of_a_dict(device):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Tokens()

        def forward(self, x, keep):
            return self.body(x * keep[:, :, None])

    model, x = Named().to(device), torch.randn(2, 5, 4, device=device)
    keep = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], device=device)
    found = neurons.input_gradients(model, {"x": x, "keep": keep}, layer="body.act")
    assert found.shape == (2, 10, 5, 4)
    assert (found.abs().sum((1, 3)) == 0).tolist() == (keep == 0).tolist()
    two = {"x": x, "keep": keep.float()}
    with pytest.raises(ValueError, match="say which with wrt="):
        neurons.input_gradients(model, two, layer="body.act")
    assert torch.equal(neurons.input_gradients(model, two, layer="body.act", wrt="x"), found)
    both = neurons.conductance(model, two, 0, layer="body.act", wrt="x", steps=4)
    torch.testing.assert_close(both, neurons.conductance(model, {"x": x, "keep": keep}, 0, layer="body.act", steps=4))


# --- state and errors


def of_class(method, **defaults):
    return lambda model, x, target=0, **options: method(model, x, target, **{"layer": "act"} | defaults | options)


CALLS = {
    "activation": of_class(neurons.activation),
    "gradient": of_class(neurons.gradient),
    "gradient_x_activation": of_class(neurons.gradient_x_activation),
    "conductance": of_class(neurons.conductance, steps=3),
    "ablation_effect": of_class(neurons.ablation_effect),
    "input_gradients": lambda model, x, layer="act", **kw: neurons.input_gradients(model, x, layer=layer, **kw),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_model_comes_back_as_it_was(device, name):
    model, x = tokens(device)
    model.train()
    model.norm.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]

    def untouched():
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert all("forward" not in m.__dict__ for m in model.modules())
        assert all(p.grad is None for p in model.parameters())

    with torch.no_grad():
        found = CALLS[name](model, x)
    assert found.device.type == "cpu"
    assert not found.requires_grad
    untouched()
    model.head.forward = None  # an exception in the forward
    if name not in ("input_gradients",):  # that one stops before the head
        with pytest.raises(TypeError):
            CALLS[name](model, x)
    del model.head.forward
    untouched()


@pytest.mark.parametrize("name", list(CALLS))
def test_a_call_in_inference_mode_gives_the_same(device, name):
    model, x = tokens(device)
    expected = CALLS[name](model, x)
    with torch.inference_mode():
        for inputs in (x, x.clone()):  # the copy is an inference tensor, which autograd refuses
            torch.testing.assert_close(CALLS[name](model, inputs), expected)


@pytest.mark.parametrize("name", list(CALLS))
def test_bad_input(device, name):
    model, x = tokens(device)
    call = CALLS[name]
    with pytest.raises(NotFinite, match="NaN"):
        call(model, torch.full_like(x, float("nan")))
    with pytest.raises(ValueError, match="empty"):
        call(model, x[:0])
    with pytest.raises(LayerNotFound, match="'act'"):
        call(model, x, layer="acts")
    model.idle = nn.Linear(2, 2).to(device)
    with pytest.raises(LayerDidNotRun, match="idle"):
        call(model, x, layer="idle")
    with pytest.raises(IndexError, match="position 5 is out of range"):
        call(model, x, positions=5)
    if name not in ("activation", "input_gradients"):
        with pytest.raises(IndexError, match="target 3 is out of range; the model has classes 0 to 2"):
            call(model, x, target=3)
        with pytest.raises(ValueError, match="3 inputs"):
            call(model, x, target=torch.tensor([0, 1]))
    if name != "input_gradients":
        with pytest.raises(ValueError, match="batch must be an int of at least 1"):
            call(model, x, batch=0)


def test_bad_options(device):
    model, x = tokens(device)
    with pytest.raises(ValueError, match="'mean', 'sum', 'max'"):
        neurons.activation(model, x, layer="act", reduce="median")
    with pytest.raises(TypeError, match="one layer"):
        neurons.activation(model, x, layer=["act"])
    for steps in (0, 2.5, True):
        with pytest.raises(ValueError, match="steps must be an int of at least 1"):
            neurons.conductance(model, x, layer="act", steps=steps)
    with pytest.raises(ValueError, match="baseline of shape"):
        neurons.conductance(model, x, layer="act", baseline=torch.zeros(3, 7))
    with pytest.raises(IndexError, match="neuron 10 is out of range"):
        neurons.ablation_effect(model, x, layer="act", neurons=[10])
    with pytest.raises(IndexError, match="neuron 10 is out of range"):
        neurons.input_gradients(model, x, layer="act", neurons=[10])
    with pytest.raises(ValueError, match="one a chosen neuron"):
        neurons.ablation_effect(model, x, layer="act", value=torch.zeros(3))
    with pytest.raises(NotFinite):
        neurons.ablation_effect(model, x, layer="act", value=float("inf"))
    with pytest.raises(ValueError, match="no neuron"):
        neurons.ablation_effect(model, x, layer="act", neurons=[])
    with pytest.raises(ValueError, match="max_bytes"):
        neurons.input_gradients(model, x, layer="act", max_bytes=0)
    with pytest.raises(ValueError, match="no neuron"):
        neurons.input_gradients(model, x, layer="act", neurons=[])
    with pytest.raises(TypeError, match="must be floating"):
        neurons.input_gradients(nn.Sequential(nn.Embedding(4, 3)), torch.tensor([[0, 1]]), layer="0")
