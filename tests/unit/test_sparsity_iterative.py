"""Iterative magnitude pruning: counts by hand, nested masks, every round from the same values, nothing leaks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit import sparsity, training


def ten():
    layer = nn.Linear(10, 1, bias=False)
    layer.weight.data = torch.arange(1.0, 11)[None]
    return nn.Sequential(layer)


def nothing(model, masks):
    return "done"


def test_ten_weights_fall_to_eight_six_and_five():
    found = sparsity.iterative_magnitude(ten(), nothing, rounds=3)
    assert [r.masks["0.weight"].sum().item() for r in found] == [10, 8, 6, 5]
    assert found[-1].masks["0.weight"][0].tolist() == [False] * 5 + [True] * 5
    assert [r.result for r in found] == ["done"] * 4


def test_a_global_scope_ranks_all_layers_together():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2, 3, 4]])
    model[1].weight.data = torch.tensor([[5.0], [6], [7], [8]])
    last = sparsity.iterative_magnitude(model, nothing, rounds=1, rate=0.25, scope="global")[-1].masks
    assert last["0.weight"].tolist() == [[False, False, True, True]] and last["1.weight"].all()


def test_every_round_begins_at_the_masked_start_and_masks_are_nested():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    before, later = training.state(model), {k: v + 1 for k, v in training.state(model).items()}
    x, y = torch.randn(32, 6), torch.randint(3, (32,))

    def train(model, masks):
        for name, value in model.state_dict().items():
            expected = torch.where(masks[name], later[name], 0) if name in masks else later[name]
            assert torch.equal(value, expected)
        return training.fit(model, (x, y), steps=5, lr=0.1, batch=32, post_step=masks.post_step, seed=0)

    found = sparsity.iterative_magnitude(model, train, rounds=3, rate=0.5, rewind_to=later)
    assert all((a.masks & b.masks) == b.masks for a, b in zip(found, found[1:], strict=False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_settings_are_refused_before_any_training():
    def never(model, masks):
        raise AssertionError("trained")

    for settings, message in (
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rounds": 1, "rate": 1.0}, "rate"),
        ({"rounds": 40, "rate": 0.6}, "would leave no weight"),
        ({"rounds": 1, "scope": "both"}, "scope"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsity.iterative_magnitude(ten(), never, **settings)


def test_a_training_that_moves_pruned_weights_is_noticed():
    def careless(model, masks):
        model[0].weight.data += 1

    with pytest.raises(ValueError, match="moved pruned weights"):
        sparsity.iterative_magnitude(ten(), careless, rounds=2)
