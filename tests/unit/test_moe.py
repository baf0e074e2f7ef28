"""tiny-moe: every token goes to its likeliest expert alone, experts can share weights, balance is what it says."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from nbkit import hooks, models, training
from nbkit.models.zoo.moe import MoE, balance


@pytest.fixture
def model():
    return models.build("tiny-moe", seed=0).eval()


def test_size_shapes_and_names(model, device):
    model = model.to(device)
    x = torch.rand(3, 1, 28, 28, device=device)
    out, routing = model(x, routing=True)
    assert out.shape == (3, 10) and [r.shape for r in routing] == [(3, 16, 8)] * 2
    assert torch.equal(model(x), out)
    assert sum(p.numel() for p in model.parameters()) == 77_258
    assert sum(b.moe.w_in.numel() + b.moe.w_out.numel() for b in model.blocks) == 65_536
    with hooks.record(model, "blocks.1.moe.router") as seen:
        model(x)
    assert torch.equal(seen["blocks.1.moe.router"], routing[1])


def test_a_layer_is_each_tokens_own_expert_times_its_probability():
    torch.manual_seed(0)
    moe, x = MoE(6, 10, 4), torch.randn(3, 5, 6)
    probability = moe.router(x).softmax(-1)
    for n in range(3):
        for t in range(5):
            e = probability[n, t].argmax()
            by_hand = moe.w_out[e] @ (moe.w_in[e] @ x[n, t]).relu() * probability[n, t, e]
            torch.testing.assert_close(moe(x)[n, t], by_hand)


def test_gradients_reach_the_experts_that_got_a_token_and_no_others():
    moe, x = MoE(6, 10, 4), torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1
    with torch.no_grad():
        moe.router.weight[2, 0] = -100
    used = moe.router(x).argmax(-1).unique().tolist()
    moe(x).square().sum().backward()
    assert 2 not in used and moe.w_in.grad.flatten(1).any(1).nonzero().flatten().tolist() == used
    assert moe.router.weight.grad.any()  # through the probability


def test_experts_that_share_a_slot_are_one(model):
    x = torch.rand(4, 1, 28, 28)
    small = models.build("tiny-moe", seed=0, stored=(1, 3))
    assert [len(b.moe.w_in) for b in small.blocks] == [1, 3]
    assert [len(b.moe.slot) for b in small.blocks] == [8, 8]
    shared = deepcopy(model)
    for a, b in zip(shared.blocks, model.blocks, strict=True):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        a.moe.w_in.data, a.moe.w_out.data = b.moe.w_in.data[order], b.moe.w_out.data[order]
        a.moe.slot = order.argsort()
    torch.testing.assert_close(shared(x), model(x))  # another order of storage
    for block in model.blocks:
        block.moe.slot.zero_()
        block.moe.w_in.data[1:] = torch.nan
    assert model(x).isfinite().all()  # what nobody points to is not used


def test_balance_is_1_where_all_get_the_same_and_e_where_one_gets_all():
    even = 9 * torch.eye(4).repeat(5, 1)
    assert balance([even, even]).item() == pytest.approx(1)
    one = torch.tensor([50.0, 0, 0, 0]).expand(20, 4)
    assert balance([one]).item() == pytest.approx(4, abs=1e-5)
    assert balance([even, one]).item() == pytest.approx(2.5, abs=1e-5)
    with pytest.raises(ValueError, match="routing=True"):
        balance([])


def test_balance_has_a_gradient_that_evens_out():
    logits = torch.tensor([[1.0, 0, 0], [1.0, 0, 0.5], [2.0, 1, 0]], requires_grad=True)
    before = balance([logits])
    before.backward()
    assert (logits.grad[:, 0] > 0).all()
    assert balance([logits - 0.5 * logits.grad]) < before


def test_it_trains_and_can_be_stored(tmp_path):
    x = torch.rand(60, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % 3
    model = models.build("tiny-moe", seed=0, classes=3, experts=4, stored=(2, 4))
    history = training.fit(model, (x + y[:, None, None, None], y), steps=25, lr=3e-3, batch=30)
    assert history.loss[-1] < 0.5 * history.loss[0]
    config = {"classes": 3, "experts": 4, "stored": [2, 4]}
    models.save_checkpoint(tmp_path / "moe.safetensors", model, "tiny-moe", config)
    again, _ = models.load_checkpoint(tmp_path / "moe.safetensors")
    assert torch.equal(again(x), model.eval()(x))


def test_settings_that_make_no_sense():
    for wrong in ({"patch": 5}, {"heads": 5}, {"stored": (1,)}, {"stored": (0, 1)}, {"stored": (9, 1)}):
        with pytest.raises(ValueError):
            models.build("tiny-moe", seed=0, **wrong)
