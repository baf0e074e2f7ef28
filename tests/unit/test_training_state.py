"""Copies of a network's state, and BatchNorm's statistics measured afresh."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit import training
from nbkit.errors import NotFinite


def test_a_state_is_a_copy():
    model = nn.Linear(2, 1)
    before = training.state(model)
    model.weight.data += 1
    assert not torch.equal(before["weight"], model.weight)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()


def test_recalibrated_statistics_are_those_of_the_data():
    model, x = network(), torch.randn(40, 3)
    before = training.state(model)
    found = training.recalibrate(model, x, batch=20)
    h = model[0](x).detach()
    assert torch.allclose(found[1].running_mean, h.mean(0), atol=1e-6)
    halves = torch.stack([h[:20].var(0), h[20:].var(0)]).mean(0)
    assert torch.allclose(found[1].running_var, halves, atol=1e-6)
    assert found[1].momentum == 0.1 and not found.training
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(found.get_parameter(k), p) for k, p in model.named_parameters())


def test_there_must_be_statistics_and_data():
    with pytest.raises(ValueError, match="no BatchNorm"):
        training.recalibrate(nn.Linear(3, 1), torch.randn(4, 3))
    with pytest.raises(ValueError, match="no BatchNorm"):
        training.recalibrate(nn.BatchNorm1d(3, track_running_stats=False), torch.randn(4, 3))
    with pytest.raises(NotFinite):
        training.recalibrate(network(), torch.full((4, 3), torch.nan))
    with pytest.raises(ValueError, match="batch"):
        training.recalibrate(network(), torch.randn(4, 3), batch=0)
