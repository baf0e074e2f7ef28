"""Inputs, outputs and targets: one meaning for every method."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import forward
from nbkit.errors import NotFinite


def test_a_target_may_be_nothing_an_int_ints_or_a_callable():
    out = torch.tensor([[1.0, 5.0, 2.0], [7.0, 0.0, 3.0]])
    assert forward.scores(out, None).tolist() == [5, 7]
    assert forward.scores(out, 2).tolist() == forward.scores(out, np.int64(2)).tolist() == [2, 3]
    assert forward.scores(out, torch.tensor([0, 1])).tolist() == [1, 0]
    assert forward.scores(out, lambda o: o.sum(1)).tolist() == [8, 10]


def test_logits_are_found_in_what_models_return():
    t = torch.ones(2, 3)
    for output in (t, (t, "more"), {"features": t + 1, "logits": t}, SimpleNamespace(logits=t)):
        assert forward.first_tensor(output) is t
    with pytest.raises(TypeError, match="no tensor"):
        forward.first_tensor(("a", 1))


@pytest.mark.parametrize("target, error, match", [
    (3, IndexError, "classes 0 to 2"), (-1, IndexError, "classes 0 to 2"), (torch.tensor([0]), ValueError, r"\[2\]"),
    (torch.tensor([0, 5]), IndexError, "target 5 is out of range; the model has classes 0 to 2"),
    (0.5, TypeError, "target must be"), (torch.tensor([0.0, 1.0]), TypeError, "ints"),
    (lambda o: o, ValueError, r"\[N\]"), (True, TypeError, "target must be"),
])  # fmt: skip
def test_bad_targets(target, error, match):
    with pytest.raises(error, match=match):
        forward.scores(torch.zeros(2, 3), target)


def test_token_outputs_need_a_callable():
    with pytest.raises(ValueError, match="callable"):
        forward.scores(torch.zeros(2, 4, 3), 1)


@pytest.mark.parametrize("value, error, match", [
    (torch.zeros(0, 3), ValueError, "empty"), (torch.tensor([[float("nan"), 1.0]]), NotFinite, "1 NaN"),
    ([1.0], TypeError, "tensor"), ({"a": 1}, TypeError, "no tensor"),
    ({"a": torch.tensor([float("inf")])}, NotFinite, "a holds 1"),
    (torch.zeros(1, 2, device="meta"), ValueError, "inputs is on the device meta"),
])  # fmt: skip
def test_bad_inputs(value, error, match):
    with pytest.raises(error, match=match):
        forward.check_inputs(value)


def test_devices_must_agree():
    with pytest.raises(ValueError, match="meta"):
        forward.check_device(nn.Linear(2, 2), torch.zeros(1, 2, device="meta"))


def test_evaluating_gives_every_module_its_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    model.train()
    model[1].eval()
    with pytest.raises(RuntimeError), forward.evaluating(model):
        assert not model.training
        raise RuntimeError
    assert [m.training for m in model.modules()] == [True, True, False, False]


@pytest.mark.parametrize("needed", [True, False])
def test_parameters_ask_for_gradients_inside_and_are_as_they_were_afterwards(needed):
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    before = [p.requires_grad for p in net.parameters()]
    with pytest.raises(RuntimeError, match="inside"), forward.requiring_grad(net.parameters(), needed):
        assert {p.requires_grad for p in net.parameters()} == {needed}
        raise RuntimeError("inside")
    assert [p.requires_grad for p in net.parameters()] == before


def test_dict_inputs_are_sliced_and_counted():
    inputs = {"x": torch.arange(6).reshape(3, 2), "flag": True}
    assert forward.batch_size(inputs) == 3
    assert forward.take(inputs, slice(0, 2))["x"].shape == (2, 2)
    assert forward.take(inputs, slice(0, 2))["flag"] is True


class FirstInPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_works_in_place_cannot_reach_the_callers_inputs(wrapped):
    model, x = FirstInPlace(3, 2), torch.ones(4, 3)
    first = forward.call(model, {"x": x} if wrapped else x)
    assert torch.equal(forward.call(model, {"x": x} if wrapped else x), first) and (x == 1).all()


def test_a_method_that_differentiates_may_be_called_in_inference_mode():
    @forward.outside_inference_mode
    def slope(model, inputs):
        leaf = inputs["x"].detach().requires_grad_()
        return torch.autograd.grad(model(leaf).sum(), leaf)[0]

    model = nn.Linear(3, 2)
    with torch.inference_mode():
        found = slope(model, {"x": torch.ones(4, 3)})
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(found, model.weight.sum(0).expand(4, 3))
