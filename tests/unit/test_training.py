"""The training loop: what it computes, what it leaves alone, what it refuses."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import runtime, training
from nbkit.errors import NotFinite, UnknownName


def two_clusters(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return torch.randn(n, 3, generator=g) + 3.0 * y[:, None], y


X, Y = two_clusters()
Y_COLUMN = Y[:, None]


def make(seed=0, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2)
        )


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "optimizer", ["adam", "adamw", "sgd", functools.partial(torch.optim.RMSprop, alpha=0.9)]
)
def test_it_learns_a_separable_problem(optimizer, device):
    model = make().to(device)
    x, y = two_clusters()
    history = training.fit(model, (x, y), epochs=40, lr=0.01, batch=16, optimizer=optimizer)
    assert history.loss[-1] < history.loss[0] / 2
    assert training.accuracy(model, x, y) > 0.95


def test_one_full_batch_sgd_step_is_a_gradient_step(device):
    model, (x, y) = nn.Linear(3, 2).to(device), two_clusters()
    before = weights(model)
    F.cross_entropy(model(x.to(device)), y.to(device)).backward()
    expected = {k: before[k] - 0.5 * p.grad for k, p in model.named_parameters()}
    training.fit(model, (x, y), steps=1, lr=0.5, batch=len(y), optimizer="sgd")
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[k])


def test_the_seed_fixes_order_and_dropout_whatever_the_global_state(device):
    runs = []
    for noise, seed in [(1, 0), (2, 0), (1, 1)]:
        torch.manual_seed(noise)
        model = make(dropout=0.5).to(device)
        history = training.fit(model, two_clusters(), epochs=2, batch=16, seed=seed)
        runs.append((history.loss, weights(model)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_global_random_state_modes_and_gradients_are_left_alone():
    model = make(dropout=0.5).eval()
    model[1].train()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    training.fit(model, two_clusters(), steps=3, validation=two_clusters(seed=1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_every_example_is_seen_once_an_epoch():
    class Spy(nn.Linear):
        seen = []

        def forward(self, x):
            if self.training:
                Spy.seen += x[:, 0].tolist()
            return super().forward(x)

    x = torch.arange(10.0)[:, None]
    training.fit(Spy(1, 2), (x, torch.zeros(10, dtype=torch.long)), epochs=2, batch=4)
    first, second = Spy.seen[:10], Spy.seen[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_post_step_keeps_a_mask(device):
    model = make().to(device)
    mask = torch.ones_like(model[0].weight)
    mask[:, 0] = 0

    def keep(m):
        with torch.no_grad():
            m[0].weight *= mask

    training.fit(model, two_clusters(), steps=5, weight_decay=0.1, post_step=keep)
    assert (model[0].weight[:, 0] == 0).all() and (model[0].weight[:, 1:] != 0).all()


def test_history_counts_steps_and_evaluates_named_sets():
    sets = {"val": two_clusters(seed=1), "test": two_clusters(seed=2)}
    epochs = []
    history = training.fit(
        make(),
        two_clusters(),
        steps=7,
        batch=16,
        every=3,
        validation=sets,
        on_epoch=lambda e, h: epochs.append(e),
    )
    frame = history.frame
    assert list(frame.index) == list(range(1, 8)) and epochs == [1]
    assert list(frame["test_accuracy"].dropna().index) == [3, 6, 7]
    assert history.best() == min(history.evaluations, key=lambda e: e["val_loss"])
    assert history.best("test_accuracy")["test_accuracy"] == frame["test_accuracy"].max()
    assert "7 steps" in history._repr_html_()
    with pytest.raises(KeyError, match="val_loss"):
        history.best("val_los")


def test_the_last_evaluation_is_of_the_model_returned():
    model, val = make(), two_clusters(seed=1)
    history = training.fit(model, two_clusters(), epochs=3, batch=10, validation=val)
    mean, right = training.evaluate(model, *val)
    assert history.evaluations[-1] == {"step": 21, "val_loss": mean, "val_accuracy": right}


def test_accuracy_does_not_depend_on_the_batch(device):
    model, (x, y) = make().to(device), two_clusters()
    exact = (model.eval()(x.to(device)).argmax(1).cpu() == y).float().mean().item()
    model.train()
    for batch in (1, 7, 64, 1000):
        assert training.accuracy(model, x, y, batch=batch) == pytest.approx(exact)
    assert model.training


def test_regression_and_dict_inputs():
    class Named(nn.Linear):
        def forward(self, values):
            return {"logits": super().forward(values).squeeze(-1)}

    x = torch.linspace(-1, 1, 32)[:, None]
    model = Named(1, 1)
    history = training.fit(model, ({"values": x}, 3 * x[:, 0] + 1), epochs=200, lr=0.05, loss=F.mse_loss)
    assert history.loss[-1] < 1e-2
    assert model.weight.item() == pytest.approx(3, abs=0.2)


def test_a_single_example_left_over_joins_the_batch_before_it():
    sizes = []

    def loss(out, target):
        sizes.append(len(out))
        return F.cross_entropy(out, target)

    history = training.fit(make(), (X[:33], Y[:33]), epochs=2, batch=16, loss=loss)
    assert sizes == [16, 17, 16, 17] and len(history.loss) == 4
    assert len(training.fit(nn.Linear(3, 2), (X[:5], Y[:5]), epochs=2, batch=1).loss) == 10


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_autograd_is_off(mode):
    one, other = make(), make()
    expected = training.fit(one, (X, Y), steps=3, validation=(X, Y))
    with mode():
        found = training.fit(other, (X.clone(), Y.clone()), steps=3, validation=(X, Y))
    assert found.loss == expected.loss and same(weights(one), weights(other))


def test_x_and_y_may_be_given_one_after_the_other():
    assert training.fit(make(), X, Y, steps=3).loss == training.fit(make(), (X, Y), steps=3).loss


def test_auto_is_the_device_of_the_runtime():
    model = make()
    training.fit(model, (X, Y), steps=1, device="auto")
    assert next(model.parameters()).device.type == runtime.device("auto").type


def test_accuracy_counts_rows_of_any_number_of_axes():
    model = nn.Embedding.from_pretrained(torch.eye(4))
    tokens = torch.arange(24).reshape(6, 4) % 4
    assert training.accuracy(model, tokens, tokens) == 1
    assert training.accuracy(model, tokens, tokens.index_fill(1, torch.tensor([0]), 3)) == 0.75


@pytest.mark.parametrize("model", [nn.Identity(), nn.Flatten(0)], ids=["[N, 1]", "[N]"])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_single_logit_is_class_1_above_zero(model, shape):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), model)
    model[0].weight.data.fill_(1.0)
    x, y = torch.tensor([[-2.0], [0.5], [3.0]]), torch.tensor([0, 1, 0])
    assert training.accuracy(model, x, y.reshape(shape)) == pytest.approx(2 / 3)


def test_targets_that_are_no_classes_have_no_accuracy():
    def hinge(out, target):
        return F.relu(1 - out[:, 0] * target).mean()

    mean, right = training.evaluate(nn.Linear(3, 1), X, 2 * Y - 1, loss=hinge)
    assert mean > 0 and math.isnan(right)


@pytest.mark.parametrize(
    ("y", "settings", "error", "says"),
    [
        (Y_COLUMN, {}, ValueError, r"shape \(64, 1\) do not fit an output of shape \(64, 2\)"),
        (Y_COLUMN.expand(-1, 2), {}, ValueError, r"shape \(64, 2\) do not fit an output of shape \(64, 2\)"),
        (Y, {"batch": 0}, ValueError, "batch must be a whole number of at least 1, not 0"),
        (Y, {"batch": -1}, ValueError, "not -1"),
        (Y, {"batch": 16.0}, ValueError, "not 16.0"),
        (Y + 100, {}, IndexError, "labels run from 100 to 101; the model has classes 0 to 1"),
        (Y - 1, {}, IndexError, "from -1"),
    ],
)
@pytest.mark.parametrize("measure", [training.accuracy, training.evaluate])
def test_what_cannot_be_counted_is_named(measure, y, settings, error, says):
    with pytest.raises(error, match=says):
        measure(nn.Linear(3, 2), X, y, **settings)


def test_cosine_warms_up_and_ends_at_zero():
    factor = training.cosine(0.25)
    assert [factor(t) for t in (0.0, 0.125, 0.25)] == [0.0, 0.5, 1.0]
    assert factor(0.625) == pytest.approx(0.5) and factor(1.0) == pytest.approx(0.0)


def test_the_model_is_moved_to_the_device_asked_for(device):
    model, (x, y) = make(), two_clusters()
    training.fit(model, (x, y), steps=1, device=device)
    assert all(p.device.type == device.type for p in model.parameters()) and x.device.type == "cpu"


def test_schedule_scales_the_learning_rate():
    model, (x, y) = nn.Linear(3, 2), two_clusters()
    before = weights(model)
    training.fit(model, (x, y), steps=3, schedule=lambda done: 0.0)
    assert same(before, weights(model))


def test_a_diverging_run_stops_and_keeps_the_last_finite_weights(device):
    model, (x, y) = make().to(device), two_clusters()
    seen = []
    with pytest.raises(NotFinite, match=r"step \d+ of 50"):
        training.fit(
            model,
            (x, y),
            steps=50,
            lr=1e30,
            batch=16,
            optimizer="sgd",
            post_step=lambda m: seen.append(weights(m)),
        )
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    assert torch.isfinite(model.train()(x[:16].to(device))).all()


def test_a_nan_from_the_loss_names_the_step_and_takes_nothing_more():
    model, (x, y) = make(), two_clusters()
    calls, kept = [], []

    def loss(out, target):
        calls.append(1)
        return F.cross_entropy(out, target) * (float("nan") if len(calls) == 4 else 1)

    with pytest.raises(NotFinite, match="step 4 of 10"):
        training.fit(
            model, (x, y), steps=10, batch=16, loss=loss, post_step=lambda m: kept.append(weights(m))
        )
    # Step 4's loss came from the weights after step 3; the last finite loss, that of step 3, from those after step 2.
    assert len(kept) == 3
    assert torch.equal(model[0].weight, kept[1]["0.weight"])


def test_a_bad_last_update_is_taken_back():
    model, (x, y) = nn.Linear(3, 2), two_clusters()
    before = weights(model)

    def spoil(m):
        m.weight.data.fill_(float("inf"))

    with pytest.raises(NotFinite, match="last"):
        training.fit(model, (x, y), steps=1, post_step=spoil)
    assert same(before, weights(model))


@pytest.mark.parametrize(
    ("data", "settings", "error", "says"),
    [
        ((X[:0], Y[:0]), {"steps": 1}, ValueError, "empty"),
        ((X, Y[:-1]), {"steps": 1}, ValueError, "64 inputs but 63 targets"),
        ((X, Y + 1), {"steps": 1}, IndexError, "labels run from 1 to 2; the model has classes 0 to 1"),
        ((X, Y - 1), {"steps": 1}, IndexError, "from -1"),
        ((X.index_fill(0, torch.tensor([3]), float("nan")), Y), {"steps": 1}, NotFinite, "3 NaN"),
        (X, {"steps": 1}, TypeError, r"pair \(x, y\), not Tensor"),
        ((X.numpy(), Y.numpy()), {"steps": 1}, TypeError, "y must be a tensor, not ndarray"),
        ((X[:, :2], Y), {"steps": 1}, ValueError, "data: its first example does not fit"),
        ((X, Y_COLUMN), {"steps": 1}, ValueError, "data: its first example does not fit"),
        ((X, Y.int()), {"steps": 1}, ValueError, "data: its first example does not fit"),
        ((X, Y), {}, ValueError, "either epochs or steps"),
        ((X, Y), {"epochs": 1, "steps": 1}, ValueError, "either epochs or steps"),
        ((X, Y), {"epochs": 0}, ValueError, "epochs must be"),
        ((X, Y), {"epochs": float("nan")}, ValueError, "epochs must be"),
        ((X, Y), {"steps": 1, "batch": 0}, ValueError, "batch must be"),
        ((X, Y), {"steps": 1, "batch": 16.0}, ValueError, "batch must be"),
        ((X, Y), {"steps": 1, "device": "gpu"}, ValueError, "device 'gpu' is not available here"),
        ((X, Y), {"steps": 1, "every": 2.5}, ValueError, "every must be"),
        ((X, Y), {"steps": 1, "lr": -1.0}, ValueError, "lr must be"),
        ((X, Y), {"steps": 1, "lr": float("nan")}, ValueError, "lr must be"),
        ((X, Y), {"steps": 1, "optimizer": "adan"}, UnknownName, "did you mean 'adam'"),
        ((X, Y), {"steps": 1, "validation": (X, Y[:5])}, ValueError, "val: 64 inputs but 5 targets"),
        ((X, Y), {"steps": 1, "validation": (X, Y + 5)}, IndexError, "labels run from 5 to 6"),
        ((X, Y), {"steps": 1, "validation": {"test": (X[:, :2], Y)}}, ValueError, "test: its first example does not"),
    ],
)
def test_bad_input_is_named_and_nothing_changes(data, settings, error, says):
    model = make()
    before = weights(model)
    with pytest.raises(error, match=says):
        training.fit(model, data, **settings)
    assert same(before, weights(model)) and model.training


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        training.fit(make().requires_grad_(False), (X, Y), steps=1)
