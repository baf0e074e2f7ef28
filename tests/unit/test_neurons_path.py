"""Joint attribution and the neuron path search: hand-computed values, and the resumed search against the plain one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbkit import hooks, neurons
from nbkit.errors import LayerDidNotRun, LayerNotFound, NotFinite
from nbkit.neurons import _passes, _replay


class Gates(nn.Module):
    """One identity layer an input number, so that the number is the layer's single unit."""

    def __init__(self, count, combine):
        super().__init__()
        self.units = nn.ModuleList(nn.Identity() for _ in range(count))
        self.combine = combine

    def forward(self, x):
        return self.combine([unit(x[:, [i]]).squeeze(1) for i, unit in enumerate(self.units)])


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class TinyViT(nn.Module):
    def __init__(self, depth=3, width=8, hidden=12, tokens=4, classes=3, features=5, skip=False):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)
        self.skip = skip

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        first = None
        for block in self.blocks:
            x = block(self.dropout(x))
            first = x if first is None else first
        return self.head((x + first if self.skip else x)[:, 0])


def tiny_vit(device, seed=0, **options):
    torch.manual_seed(seed)
    model = TinyViT(**options)
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.5
    model.head.weight.data *= 0.2  # probabilities away from 0 and 1
    x = torch.randn(3, 4, 5)
    return model.to(device), x.to(device)


ACTS = "blocks.*.act"


# --- the score by hand


@given(st.integers(2, 40), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_linear_score_is_product_of_sums_for_any_steps(steps, seed):
    a, w = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    model = Gates(4, lambda units: sum(c * u for c, u in zip(a, units, strict=True)))
    found = neurons.joint_attribution(
        model, w[None], torch.zeros(4, dtype=int), lambda out: out, layers="units.*", steps=steps
    )
    torch.testing.assert_close(found, (w.sum() * a.sum())[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 20, 200])
def test_product_of_two_units(device, steps):
    model = Gates(2, lambda units: units[0] * units[1]).to(device)
    w = torch.tensor([[1.3, 0.7]], device=device)
    found = neurons.joint_attribution(
        model, w, torch.tensor([0, 0]), lambda out: out, layers=["units.0", "units.1"], steps=steps
    )
    assert found.item() == pytest.approx((1.3 + 0.7) ** 2 * (steps - 1) / (2 * steps), rel=1e-5)
    if steps == 20:
        assert found.item() == pytest.approx(1.9, rel=1e-5)


def test_one_unit_is_complete_as_steps_grow(device):
    model, x = tiny_vit(device)
    layer, unit = "blocks.1.act", 4
    target = torch.tensor([0, 1, 2], device=device)
    model.eval()

    def probability():
        return model(x).softmax(-1).gather(1, target[:, None]).squeeze(1).detach()

    with hooks.edit(model, {layer: hooks.zero([unit], positions=0)}):
        without = probability()
    gap = (probability() - without).cpu()
    # the row of the unit is overwritten with clean values, so only the unit itself moves
    fine, coarse = (
        neurons.joint_attribution(model, x, torch.tensor([unit]), target, layers=[layer], steps=m) for m in (500, 10)
    )
    assert gap.abs().min() > 1e-3
    assert ((fine - gap).abs() < 1e-2 * gap.abs() + 1e-6).all()
    assert (fine - gap).abs().sum() < (coarse - gap).abs().sum()


def plain_search(model, x, labels, layers, steps):
    """The search for one input [1, ...], written from the paper with nothing but hooks."""
    model.eval()
    with hooks.record(model, layers, to=None) as acts:
        model(x)
    clean = [acts[layer][:, 0] for layer in layers]
    alphas = [k / steps for k in range(steps)]

    def slopes(rows_of):
        grads = []
        for alpha in alphas:
            rows = [r.clone().requires_grad_() for r in rows_of(alpha)]
            edits = {layer: hooks.replace(r, positions=0) for layer, r in zip(layers, rows, strict=False)}
            with hooks.edit(model, edits):
                p = model(x).softmax(-1)[0, labels]
            grads.append(torch.autograd.grad(p, rows))
        return [sum(g) for g in zip(*grads, strict=True)]

    def path_rows(path, alpha):
        rows = [c.clone() for c in clean[: len(path)]]
        for row, unit in zip(rows, path, strict=True):
            row[0, unit] *= alpha
        return rows

    path, scores = [], []
    for layer in range(len(layers)):
        *before, own = slopes(lambda a, layer=layer: [*path_rows(path, a), a * clean[layer]])
        w = sum(c[0, i] for c, i in zip(clean, path, strict=False))
        s = sum(g[0, i] for g, i in zip(before, path, strict=True))
        score = (clean[layer][0] + w) / steps * (own[0] + s)
        path.append(score.argmax().item())
        scores.append(score.max().item())
    w = sum(c[0, i] for c, i in zip(clean, path, strict=True))
    s = sum(g[0, i] for g, i in zip(slopes(lambda a: path_rows(path, a)), path, strict=True))
    return path, scores, (w / steps * s).item()


@pytest.mark.parametrize("reuse", [True, False])
def test_search_is_the_papers_step_by_step(device, reuse):
    model, x = tiny_vit(device)
    labels = torch.tensor([2, 0, 1], device=device)
    found = neurons.neuron_path(model, x, labels, layers=ACTS, steps=6, reuse=reuse)
    for i in range(len(x)):
        path, scores, joint = plain_search(model, x[i : i + 1], labels[i].item(), list(found.layers), 6)
        assert found.path[i].tolist() == path
        assert found.scores[i].tolist() == pytest.approx(scores, rel=1e-4, abs=1e-7)
        assert found.joint[i].item() == pytest.approx(joint, rel=1e-4, abs=1e-7)


def test_final_score_of_every_path_and_greedy_below_the_best(device):
    model, x = tiny_vit(device, seed=3, depth=2, hidden=4)
    x = x[:1]
    found = neurons.neuron_path(model, x, 1, layers=ACTS, steps=10)
    every = torch.tensor(list(itertools.product(range(4), repeat=2)))
    copies = x.expand(len(every), -1, -1)
    together = neurons.joint_attribution(model, copies, every, 1, layers=ACTS, steps=10)
    alone = [neurons.joint_attribution(model, x, path, 1, layers=ACTS, steps=10).item() for path in every]
    assert together.tolist() == pytest.approx(alone, rel=1e-4, abs=1e-7)
    mine = (every == found.path).all(1).nonzero().item()
    assert found.joint.item() == pytest.approx(alone[mine], rel=1e-4)
    assert found.joint.item() <= max(alone) + 1e-6


def test_single_layer_ranks_by_integrated_gradients_of_the_row(device):
    model, x = tiny_vit(device)
    layer, m = "blocks.1.act", 5
    found = neurons.neuron_path(model, x, 0, layers=[layer], steps=m, top_k=12)
    w = neurons.activation(model, x, layer=layer, positions=0)
    slope = 0
    for k in range(m):
        with hooks.edit(model, {layer: hooks.scale(None, k / m, positions=0)}):
            probability = lambda out: out.softmax(-1)[:, 0]  # noqa: E731
            slope = slope + neurons.gradient(model, x, probability, layer=layer, positions=0) / m
    # the gradient at the edited row: the hook of `gradient` sits behind the edit
    expected = (w * slope).sort(1, descending=True)
    torch.testing.assert_close(found.scores[:, 0], expected.values, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.path[:, 0], expected.indices)


# --- resumed == recomputed


@given(
    seed=st.integers(0, 10_000), depth=st.integers(1, 3), steps=st.integers(2, 5), top_k=st.integers(1, 3),
    positions=st.sampled_from([0, 2, None, [0, 3], slice(1, 4)]), skip=st.booleans(),
    max_bytes=st.sampled_from([1, 20_000, 2**29]),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_resumed_search_equals_the_plain_one(device, seed, depth, steps, top_k, positions, skip, max_bytes):
    model, x = tiny_vit(device, seed, depth=depth, skip=skip)
    model, x = model.double(), x[:2].double()
    options = {"steps": steps, "top_k": top_k, "positions": positions}
    fast = neurons.neuron_path(model, x, None, layers=ACTS, max_bytes=max_bytes, **options)
    plain = neurons.neuron_path(model, x, None, layers=ACTS, reuse=False, **options)
    scale = plain.scores.abs().max().item()
    assert torch.equal(fast.path, plain.path)
    torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-8, atol=1e-10 * scale)
    torch.testing.assert_close(fast.joint, plain.joint, rtol=1e-8, atol=1e-10 * scale)


def test_resumed_search_skips_the_blocks_before(device):
    model, x = tiny_vit(device, depth=4)
    counts = {}
    neurons.neuron_path(model, x, 0, layers=ACTS)  # a model is looked at once: is axis 0 of its layers examples?
    for reuse in (True, False):
        for block in model.blocks:
            block.calls = 0
        neurons.neuron_path(model, x, 0, layers=ACTS, reuse=reuse)
        counts[reuse] = [block.calls for block in model.blocks]
    # three looks at the clean input; then every block in every stage and for the joint score, or block b only in
    # stages 0 to b, in the forward-mode pass to its layer and in the one on from it
    assert counts[False] == [3 + 4 + 1] * 4
    assert counts[True] == [3 + 1 + 2, 3 + 2 + 2, 3 + 3 + 2, 3 + 4 + 2]


class Sequential2d(nn.Module):
    """A convolutional net: layers as maps, with in-place activations and a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


class LengthFirst(nn.Module):
    """Tokens on axis 0, examples on axis 1, inside the blocks; as many tokens as rows in one of the tests."""

    def __init__(self, width=6):
        super().__init__()
        self.mixing = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.units = nn.ModuleList(nn.GELU() for _ in range(3))
        self.wrap = nn.ModuleList(nn.Identity() for _ in range(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for mix, unit, wrap in zip(self.mixing, self.units, self.wrap, strict=True):
            x = x + wrap(unit(mix(x)).transpose(0, 1)).transpose(0, 1)
            x = x + x.mean(1, keepdim=True)
        return self.head(x[:, 0])


class Gated(nn.Module):
    """Blocks returning tuples and dicts, and a block that is called twice."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.shared = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.first, self.second = nn.GELU(), nn.SiLU()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.shared(self.embed(x))
        x = x + self.first(x)
        x, _ = self.lstm(x)
        x = self.shared(x)
        return {"logits": self.head((x + self.second(x))[:, 0])}


def other_models():
    torch.manual_seed(1)
    conv, mlp = Sequential2d(), nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True), 2, enable_nested_tensor=False
    )
    encoder = nn.Sequential(encoder, nn.Flatten(), nn.Linear(32, 3))
    return {
        "conv": (conv, torch.randn(3, 2, 4, 4), ["net.2", "net.4", "net.8"], None),
        "conv-outputs": (conv, torch.randn(3, 2, 4, 4), ["net.0", "net.3", "net.8"], None),
        "mlp": (mlp, torch.randn(3, 4), ["1", "3"], 0),
        "mlp-linear": (mlp, torch.randn(3, 4), ["0", "2"], 0),
        "encoder": (encoder, torch.randn(3, 4, 8), ["0.layers.0.activation", "0.layers.1.activation"], 0),
        "blocks": (encoder, torch.randn(3, 4, 8), ["0.layers.0", "0.layers.1"], 0),
        "nested": (encoder, torch.randn(3, 4, 8), ["0.layers.0.activation", "0.layers.0", "0.layers.1.norm2"], 0),
        "length-first": (LengthFirst(), torch.randn(2, 8, 6), "units.*", 0),
        "twice": (Gated(), torch.randn(3, 2, 4), ["first", "second"], 0),
    }


@pytest.mark.parametrize("name", list(other_models()))
@pytest.mark.filterwarnings("ignore:recomputing every step")
def test_resumed_equals_plain_on_other_architectures(device, name):
    model, x, layers, positions = other_models()[name]
    model, x = model.to(device), x.to(device)
    for steps in (4, 5):  # length-first: 2 inputs at 4 steps are as many rows as there are tokens
        fast, plain = (
            neurons.neuron_path(model, x, None, layers=layers, steps=steps, positions=positions, reuse=reuse)
            for reuse in (True, False)
        )
        assert torch.equal(fast.path, plain.path)
        torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fast.joint, plain.joint, rtol=1e-4, atol=1e-6)


def test_unclear_layout_is_noticed(device):
    model, x, layers, _ = other_models()["length-first"]
    model, x = model.to(device), x.to(device)
    seen = []
    meet = _passes.Resume._meet

    def watched(self, grad, tangent, rows):
        try:
            return meet(self, grad, tangent, rows)
        except _passes.UnclearLayout:
            seen.append(tuple(grad.shape))
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_passes.Resume, "_meet", watched)
        neurons.neuron_path(model, x, None, layers=layers, steps=4)
    assert seen == [(8, 8, 6)]


class NoForwardDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_recomputes_with_a_warning_where_there_is_no_forward_derivative(device):
    class Odd(nn.Module):
        def forward(self, x):
            return NoForwardDerivative.apply(x)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Odd(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).to(device)
    x = torch.randn(2, 4, device=device)
    with pytest.warns(UserWarning, match="recomputing every step"):
        found = neurons.neuron_path(model, x, 0, layers=["1", "4"])
    plain = neurons.neuron_path(model, x, 0, layers=["1", "4"], reuse=False)
    assert torch.equal(found.path, plain.path)
    torch.testing.assert_close(found.joint, plain.joint)


# --- shapes, state, errors


def test_shapes_and_table(device):
    model, x = tiny_vit(device)
    one, three = (neurons.neuron_path(model, x, 0, layers=ACTS, steps=3, top_k=k) for k in (1, 3))
    assert one.path.shape == one.scores.shape == one.activations.shape == (3, 3)
    assert three.path.shape == three.scores.shape == three.activations.shape == (3, 3, 3)
    assert one.joint.shape == three.joint.shape == (3,)
    assert (three.scores.diff(dim=2) <= 0).all()
    assert torch.equal(one.path[:, 0], three.path[:, 0, 0])  # the first layer does not know k
    assert one.path.device.type == "cpu"
    assert one._repr_html_().count("<td>") == 3 * 3 + 3
    assert "blocks.2.act" in three._repr_html_()
    clean = neurons.activation(model, x, layer="blocks.0.act", positions=0)
    torch.testing.assert_close(one.activations[:, 0], clean.gather(1, one.path[:, :1])[:, 0])
    for found in (one, three):
        joint = neurons.joint_attribution(model, x, found.path, 0, layers=ACTS, steps=3)
        torch.testing.assert_close(joint, found.joint, rtol=1e-4, atol=1e-7)
        assert torch.equal(neurons.joint_attribution(model, x, found, 0, steps=3), joint)  # it names its layers
    with pytest.raises(TypeError, match="layers="):
        neurons.joint_attribution(model, x, one.path, 0)


def test_a_search_in_inference_mode_finds_the_same(device):
    model, x = tiny_vit(device)
    outside = neurons.neuron_path(model, x, 0, layers=ACTS, steps=3)
    with torch.inference_mode():
        inside = neurons.neuron_path(model, x.clone(), 0, layers=ACTS, steps=3)
    assert torch.equal(inside.path, outside.path)
    torch.testing.assert_close(inside.joint, outside.joint)


def test_inputs_are_independent_of_their_batch(device):
    model, x = tiny_vit(device)
    labels = torch.tensor([0, 2, 1], device=device)
    together = neurons.neuron_path(model, x, labels, layers=ACTS, steps=5)
    for i in range(3):
        alone = neurons.neuron_path(model, x[i : i + 1], labels[i].item(), layers=ACTS, steps=5)
        assert torch.equal(alone.path[0], together.path[i])
        torch.testing.assert_close(alone.joint[0], together.joint[i], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fails", [False, True])
def test_model_comes_back_as_it_was(device, fails):
    model, x = tiny_vit(device)
    model.train()
    model.blocks[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    calls = iter(range(100))

    def target(out):
        if fails and next(calls) == 3:
            raise KeyError("stop")
        return out[:, 0]

    try:
        neurons.neuron_path(model, x, target, layers=ACTS, steps=2)
        assert not fails
    except KeyError:
        assert fails
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_a_search_inside_an_edit_sees_the_edit(device):
    model, x = tiny_vit(device)
    with hooks.edit(model, {"blocks.0.fc2": hooks.scale(None, 2.0), "blocks.1": hooks.scale(None, 0.5)}):
        fast, plain = (neurons.neuron_path(model, x, 0, layers=ACTS, steps=4, reuse=reuse) for reuse in (True, False))
    other = neurons.neuron_path(model, x, 0, layers=ACTS, steps=4)
    torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(fast.scores, other.scores)


def test_dict_inputs_and_probability_target(device):
    model, x = tiny_vit(device)
    by_tensor = neurons.neuron_path(model, x, 1, layers=ACTS, steps=3)
    by_dict = neurons.neuron_path(model, {"x": x}, lambda out: out.softmax(-1)[:, 1], layers=ACTS, steps=3)
    assert torch.equal(by_tensor.path, by_dict.path)
    torch.testing.assert_close(by_tensor.joint, by_dict.joint)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"target": 3}, IndexError, "target 3 is out of range"),
        ({"target": torch.tensor([0, 1])}, ValueError, "3 inputs"),
        ({"target": torch.zeros(3)}, TypeError, "ints"),
        ({"steps": 1}, ValueError, "at least 2, not 1"),
        ({"steps": 2.5}, ValueError, "not 2.5"),
        ({"top_k": 13}, ValueError, "has 12 units"),
        ({"top_k": 0}, ValueError, "at least 1"),
        ({"positions": 5}, IndexError, "position 5 is out of range"),
        ({"layers": ["blocks.0.akt"]}, LayerNotFound, "blocks.0.act"),
        ({"layers": ["blocks.1.act", "blocks.0.act"]}, ValueError, "blocks.0.act, blocks.1.act"),
        ({"max_bytes": 0}, ValueError, "max_bytes"),
    ],
)  # fmt: skip
def test_bad_arguments(device, change, error, text):
    model, x = tiny_vit(device)
    options = {"target": 0, "layers": ACTS, "steps": 3} | change
    target, layers = options.pop("target"), options.pop("layers")
    with pytest.raises(error, match=text):
        neurons.neuron_path(model, x, target, layers=layers, **options)
    assert all(not m._forward_hooks and "forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        ([0, 1], ValueError, r"\[3\]"),
        ([0, 1, 12], IndexError, "unit 12 is out of range"),
        ([0, -1, 3], IndexError, "unit -1"),
        ([0.0, 1.0, 2.0], TypeError, "ints"),
        ([[[0, 0], [1, 2], [1, 2]]] * 3, ValueError, "twice"),
    ],
)
def test_bad_paths(device, path, error, text):
    model, x = tiny_vit(device)
    with pytest.raises(error, match=text):
        neurons.joint_attribution(model, x, torch.tensor(path), 0, layers=ACTS)


def test_other_bad_input(device):
    model, x = tiny_vit(device)
    with pytest.raises(NotFinite):
        neurons.neuron_path(model, x * float("nan"), 0, layers=ACTS)
    with pytest.raises(ValueError, match="empty"):
        neurons.neuron_path(model, x[:0], 0, layers=ACTS)
    model.unused = nn.GELU()
    with pytest.raises(LayerDidNotRun, match="unused"):
        neurons.neuron_path(model, x, 0, layers=["blocks.0.act", "unused"])
    single = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).to(device)
    with pytest.raises(ValueError, match="one output"):
        neurons.neuron_path(single, torch.randn(2, 4, device=device), None, layers=["1"])
    conv, images, _, _ = other_models()["conv"]
    with pytest.raises(ValueError, match=r"\(row, column\)"):
        neurons.neuron_path(conv.to(device), images.to(device), 0, layers=["net.2"])


def test_units_cut_a_model_at_its_layers():
    model, _ = tiny_vit("cpu")
    names = {m: n for n, m in model.named_modules()}
    cut = [names[m] for m in _replay.units(model, [model.blocks[1].act, model.blocks[2].act])]
    assert "blocks.0" in cut
    assert "blocks.1.act" in cut
    assert "blocks.1.fc1" in cut
    assert "embed" in cut
    assert not {"", "blocks", "blocks.1", "blocks.0.act"}.intersection(cut)


def test_a_fault_of_the_model_is_raised_and_not_taken_for_a_missing_derivative(device):
    model, x = tiny_vit(device)
    clean = model.blocks[-1].forward
    calls = iter(range(100))

    def breaks(h):
        if next(calls) > 3:
            raise RuntimeError("out of memory on the device")
        return clean(h)

    model.blocks[-1].forward = breaks
    with pytest.raises(RuntimeError, match="out of memory"):
        neurons.neuron_path(model, x, 0, layers=ACTS, steps=3)
