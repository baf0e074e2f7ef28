"""What callers hand over: what axis 0 is, half precision, long integers, layers by what they do, wide tables."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nbkit import attribution, faithfulness, forward, hooks, importance, neurons, shapley
from nbkit import sparsity as S
from nbkit.errors import NotFinite

# ---- axis 0 is the examples, or it is said


class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 4)

    def forward(self, x, prototypes):
        return torch.tanh(self.encode(x)) @ prototypes.T


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.place, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, x, mask, places):
        x = x + self.place(places)
        return self.head((torch.softmax(x @ x.transpose(1, 2) + mask, -1) @ x).mean(1))


def attending_inputs(n: int):
    mask = torch.full((1, 4, 4), -torch.inf).triu(1)
    return {"x": torch.randn(n, 4, 8), "mask": mask, "places": torch.arange(4)[None]}


@pytest.mark.parametrize("rows", [5, 2])  # unlike the examples in number, and as many
def test_a_tensor_that_all_examples_share_is_refused_by_name(rows):
    inputs = {"x": torch.randn(2, 6), "prototypes": torch.randn(rows, 4)}
    with pytest.raises(ValueError, match="prototypes"):
        attribution.saliency(Prototypes(), inputs, 0, wrt="x")


def test_a_square_mask_that_has_as_many_rows_as_there_are_examples_is_refused():
    inputs = attending_inputs(4) | {"mask": torch.full((4, 4), -torch.inf).triu(1)}
    with pytest.raises(ValueError, match="does not hold an example a row"):
        neurons.gradient(Attending(), inputs, 0, layer="head")


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients", "smooth_grad"])
def test_tensors_of_length_one_serve_all_examples(method):
    torch.manual_seed(0)
    model, inputs = Attending(), attending_inputs(3)
    full = {k: v.expand(3, *v.shape[1:]) for k, v in inputs.items()}
    found, wanted = (getattr(attribution, method)(model, each, 0, wrt="x") for each in (inputs, full))
    torch.testing.assert_close(found, wanted)


def test_minus_infinity_is_a_mask_beside_other_inputs_and_an_error_elsewhere():
    forward.check_inputs(attending_inputs(2))
    for bad in (torch.nan, torch.inf):
        inputs = attending_inputs(2)
        inputs["mask"][0, 0, 0] = bad
        with pytest.raises(NotFinite, match="mask"):
            forward.check_inputs(inputs)
    with pytest.raises(NotFinite):
        forward.check_inputs({"x": torch.tensor([[1.0, -torch.inf]])})
    with pytest.raises(NotFinite):
        forward.check_inputs(torch.tensor([[0.0, -torch.inf]]))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.read, self.head = nn.LSTM(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x):
        steps, _ = self.recurrent(x.transpose(0, 1))
        return self.head(torch.relu(self.read(steps))[-1])


@pytest.mark.parametrize("layer", ["read", "recurrent"])
@pytest.mark.parametrize("steps", [6, 4])
def test_a_layer_whose_axis_0_is_time_is_refused_also_where_there_are_as_many_examples(layer, steps):
    model, x = TimeFirst(), torch.randn(4, steps, 5)
    for method in (neurons.activation, neurons.gradient, neurons.conductance, neurons.ablation_effect):
        with pytest.raises(ValueError, match="axis 0 must count examples"):
            method(model, x, 0, layer=layer)


class Prompted(nn.Module):
    """A layer that runs on rows of a parameter, as many as there may be examples."""

    def __init__(self):
        super().__init__()
        self.prompt, self.mix, self.head = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x @ self.mix(self.prompt))


def test_work_without_a_batch_axis_counts_whole_for_any_number_of_examples():
    for n in (1, 4, 8):
        assert S.flops(Prompted(), torch.randn(n, 4))["macs"]["mix"] == 4 * 5 * 6
    with pytest.raises(ValueError, match="axis 0 must count examples"):
        neurons.activation(Prompted(), torch.randn(4, 4), layer="mix")


# ---- edits reach all that a layer hands on


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("depth", [1, 2])
def test_an_edit_of_a_recurrent_layer_reaches_its_last_hidden_state(kind, batch_first, directions, depth):
    torch.manual_seed(0)
    layer = kind(5, 7, depth, batch_first=batch_first, bidirectional=directions == 2)
    model, x = nn.Sequential(layer), torch.randn(4, 6, 5) if batch_first else torch.randn(6, 4, 5)
    with hooks.edit(model, {"0": hooks.scale([2], 3.0)}):
        _, state = model(x)
    _, plain = model(x)
    state, plain = (s[0] if isinstance(s, tuple) else s for s in (state, plain))
    expected = plain.clone()
    expected[-directions, :, 2] *= 3  # unit 2 of the output is the forward direction's in the last layer
    torch.testing.assert_close(state, expected)


# ---- sums in float32 or better


def trained():
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x @ torch.randn(16, 4)).argmax(1)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net, x, y


@pytest.mark.parametrize("criterion", [S.taylor, S.snip, S.logit_sensitivity])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_a_half_precision_model_are_those_of_its_weights_in_float32(criterion, dtype):
    net, x, y = trained()
    half = net.to(dtype)
    found, wanted = criterion(half, x.to(dtype), y), criterion(copy.deepcopy(half).float(), x.to(dtype).float(), y)
    for name, score in found.items():
        assert score.dtype == torch.float32
        assert (score == 0).float().mean() <= (wanted[name] == 0).float().mean() + 0.01
        torch.testing.assert_close(score, wanted[name], rtol=0.1, atol=0.02 * float(wanted[name].max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_half_precision_models_pass_through_every_check(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype).eval()
    x = torch.randn(4, 6).to(dtype)
    found = attribution.layer_relevance(net, x, 0)
    wanted = attribution.layer_relevance(copy.deepcopy(net).float(), x.float(), 0)
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.05)
    assert faithfulness.rank_correlation(found, found).tolist() == [1.0] * 4
    assert faithfulness.randomization_check(net, x, attribution.saliency, 0) is not None
    assert forward.scores(net(x), 0).dtype == torch.float32
    assert importance.permutation(net, x, torch.tensor([0, 1, 2, 0])).values.shape == (6, 5)


BASE = 1_700_000_000_000_000_000


@pytest.mark.parametrize("kind", [pd.DataFrame, np.asarray, torch.as_tensor])
def test_integers_that_float64_would_round_reach_the_model_as_they_are(kind):
    rows = np.stack([BASE + 100 * np.arange(30), np.arange(30)], 1)

    def call(table):
        values = table.to_numpy() if hasattr(table, "to_numpy") else np.asarray(table)
        assert values.dtype == np.int64
        return (values[:, 0] - BASE) / 100 + values[:, 1]

    found = shapley.explain(call, kind(rows[:5]), kind(rows[10:]))
    np.testing.assert_allclose(found.prediction, call(rows[:5]), atol=1e-9)
    small = np.stack([np.arange(30), np.arange(30)], 1)
    np.testing.assert_allclose(found.values, small[:5] - small[10:].mean(0), atol=1e-9)


# ---- layers by what they do


class Transposed(nn.Module):
    """A linear layer of no known class, its weight [inputs, outputs], as GPT-2 has."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Scores(nn.Module):
    """A module with a matrix that multiplies nothing it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x + self.weight[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.rest = nn.Embedding(11, 4), Transposed(4, 4), Scores()
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.rest(self.mix(self.embed(ids))).mean(1))


def test_linear_is_what_multiplies_and_a_tied_embedding_stays_whole():
    model, ids = Tied(), torch.randint(0, 11, (3, 5))
    assert list(S.prunable(model)) == ["mix.weight"]
    assert list(S.prunable(model, layers="head")) == ["head.weight"]
    table = S.flops(model, ids)
    assert table["macs"].to_dict() == {"mix": 5 * 16, "head": 44}
    S.magnitude_mask(model, 0.5).apply(model)
    assert (model.mix.weight == 0).sum() == 8 and (model.embed.weight != 0).all()


def test_what_a_mask_does_not_cover_is_said_where_it_is_most():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.head = nn.LSTM(4, 30), nn.Linear(30, 2)

    with pytest.warns(UserWarning, match="only 1% of the model's matrices; not covered: recurrent.weight_hh_l0"):
        assert list(S.prunable(Recurrent())) == ["head.weight"]


def test_a_weight_that_two_layers_share_works_twice_in_the_report():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    report = S.sparsity_report(model, torch.randn(2, 4))
    assert report["macs"].tolist() == [32, 32] and report["weights"].tolist() == [16, 16]


class Spelled(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.relu, self.a, self.b = relu, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.relu(self.a(x)))


@pytest.mark.parametrize("relu", [
    F.relu, lambda z: z.clamp(min=0), lambda z: torch.maximum(z, torch.tensor(0.0)), lambda z: F.threshold(z, 0, 0),
])  # fmt: skip
def test_a_relu_is_known_by_what_it_does(relu):
    torch.manual_seed(0)
    plain, x = Spelled(torch.relu), torch.randn(4, 6)
    other = Spelled(relu)
    other.load_state_dict(plain.state_dict())
    for method in (attribution.guided_backprop, attribution.layer_relevance):
        torch.testing.assert_close(method(other, x, 0), method(plain, x, 0))


@pytest.mark.parametrize("relu", [lambda z: torch.where(z > 0, z, 0), lambda z: z * (z > 0)])
def test_a_relu_without_a_guided_rule_is_not_passed_over(relu):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Spelled(relu))
    with pytest.raises(TypeError, match="a ReLU spelled as"):
        attribution.guided_backprop(model, torch.randn(2, 6), 0)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(checkpoint(self.a, x, use_reentrant=self.reentrant))


def test_activation_checkpointing_is_right_or_said():
    x = torch.randn(4, 6)
    model = Checkpointed(False)
    plain = nn.Sequential(model.a, model.b)
    torch.testing.assert_close(attribution.saliency(model, x, 0), attribution.saliency(plain, x, 0))
    for method, one in ((attribution.layer_relevance, model), (attribution.saliency, Checkpointed(True))):
        with pytest.raises(TypeError, match="activation checkpointing"):
            method(one, x, 0)


# ---- memory in numbers, tables of any kind


def test_wide_tables_are_mixed_a_bounded_number_of_values_at_a_time():
    rng = np.random.default_rng(0)
    X, w = rng.normal(size=(6, 3000)), rng.normal(size=3000)
    tracemalloc.start()
    found = shapley.explain(lambda rows: rows @ w, X[:1], X[1:], n_samples=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found.values[0], w * (X[0] - X[1:].mean(0)), atol=1e-9)
    assert peak < 400e6  # 4 * 16,384 rows of 3,000 numbers would be 1.6 GB


def test_sparse_tables():
    from sklearn.linear_model import LogisticRegression

    X = scipy.sparse.random(60, 5, 0.5, format="csr", random_state=0)
    y = (X.toarray().sum(1) > 1.2).astype(int)
    model, dense = LogisticRegression().fit(X, y), X.toarray()
    found, wanted = shapley.explain(model, X[:3], X[3:]), shapley.explain(model, dense[:3], dense[3:])
    np.testing.assert_allclose(found.values, wanted.values)
    found, wanted = importance.permutation(model, X, y), importance.permutation(model, dense, y)
    np.testing.assert_allclose(found.values, wanted.values)


def test_several_targets_or_labels_are_asked_for():
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    X = np.random.default_rng(0).normal(size=(40, 4))
    two = RandomForestRegressor(5, random_state=0).fit(X, X[:, :2])
    with pytest.raises(ValueError, match="predicts 2 numbers; name the one"):
        shapley.explain(two, X[:2], X)
    labels = RandomForestClassifier(5, random_state=0).fit(X, (X[:, :2] > 0).astype(int))
    with pytest.raises(ValueError, match="several labels a row"):
        shapley.explain(labels, X[:2], X)
    with pytest.warns(FutureWarning, match="target="):
        old = shapley.explain(two, X[:2], X, output=1)
    np.testing.assert_array_equal(old.values, shapley.explain(two, X[:2], X, target=1).values)


def test_a_model_that_writes_into_its_table_explains_itself_rightly():
    X = np.random.default_rng(0).normal(size=(20, 4))

    def polite(table):
        return table["a"] * table["b"] + table["c"]

    def rude(table):
        result = polite(table).to_numpy().copy()
        table.loc[:, "a"] = 1e6
        return result

    table = pd.DataFrame(X, columns=list("abcd"))
    for method in ("exact", "permutation"):
        found, wanted = (shapley.explain(f, table[:3], table[5:], method=method) for f in (rude, polite))
        np.testing.assert_allclose(found.values, wanted.values)
        np.testing.assert_allclose(found.prediction, polite(table[:3]))
