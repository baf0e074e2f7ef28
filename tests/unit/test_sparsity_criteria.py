"""Criteria: each score against its definition, computed another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbkit import sparsity as S
from nbkit.errors import NotFinite


def net(device="cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 4)
    ).to(device)  # fmt: skip


def data(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 1, 6, 6, generator=generator)
    return x.to(device), torch.randint(0, 4, (10,), generator=generator).to(device)


def saliency(model, loss) -> dict[str, torch.Tensor]:
    """``w * dL/dw`` in evaluation mode."""
    model = model.eval()
    weights = [model[0].weight, model[5].weight]
    found = torch.autograd.grad(loss(model), weights)
    model.train()
    pairs = zip(["0.weight", "5.weight"], weights, found, strict=True)
    return {name: (w * g).detach().cpu() for name, w, g in pairs}


def close(found: dict, expected: dict) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_magnitude_and_lamp_by_hand():
    layer = nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-2.0, 3.0, 1.0]]))
    assert S.magnitude(layer)["weight"].tolist() == [[2, 3, 1]]
    assert S.lamp(layer)["weight"][0].tolist() == pytest.approx([4 / 13, 1.0, 1 / 14])
    with torch.no_grad():
        layer.weight.zero_()
    assert S.lamp(layer)["weight"].tolist() == [[0, 0, 0]]


def test_lamp_keeps_the_order_of_magnitudes_and_the_best_of_every_layer(device):
    model = net(device)
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    scores = S.lamp(model)
    for name, weight in S.prunable(model).items():
        order = weight.detach().abs().flatten().cpu().argsort(stable=True)
        assert (scores[name].flatten()[order].diff() >= 0).all()
        assert scores[name].max() == 1
    assert min(S.mask_from_scores(scores, 0.98).kept().values()) > 0


def test_random_depends_on_its_seed_alone(device):
    close(S.random(net(device), seed=3), S.random(net("cpu"), seed=3))
    assert not torch.equal(S.random(net(), seed=3)["0.weight"], S.random(net(), seed=4)["0.weight"])
    model = net()
    state = torch.get_rng_state()
    S.random(model, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch", [3, 128])
def test_snip_is_weight_times_gradient_of_the_mean_loss(batch, device):
    model, (x, y) = net(device), data(device)
    found = S.snip(model, x, y, batch=batch)
    expected = {n: s.abs() for n, s in saliency(model, lambda m: F.cross_entropy(m(x), y)).items()}
    total = sum(s.sum() for s in expected.values())
    close(found, {n: s / total for n, s in expected.items()})
    assert sum(s.sum().item() for s in found.values()) == pytest.approx(1)


def test_taylor_averages_squares_over_mini_batches(device):
    model, (x, y) = net(device), data(device)
    parts = [saliency(model, lambda m, i=i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1])) for i in range(10)]
    close(S.taylor(model, x, y, batch=1), {n: sum(p[n] ** 2 for p in parts) / 10 for n in parts[0]})
    whole = saliency(model, lambda m: F.cross_entropy(m(x), y))
    close(S.taylor(model, x, y, batch=10), {n: s**2 for n, s in whole.items()})
    uneven = [saliency(model, lambda m, r=r: F.cross_entropy(m(x[r]), y[r])) for r in (slice(0, 8), slice(8, 10))]
    close(S.taylor(model, x, y, batch=8), {n: 0.8 * uneven[0][n] ** 2 + 0.2 * uneven[1][n] ** 2 for n in whole})


def test_a_target_may_be_the_prediction_a_callable_or_go_to_a_loss(device):
    model, (x, y) = net(device), data(device)
    predicted = model.eval()(x).argmax(1)
    model.train()
    close(S.snip(model, x), S.snip(model, x, predicted))
    close(
        S.taylor(model, x, lambda out: out[:, 2], batch=4),
        S.taylor(model, x, y, batch=4, loss=lambda out, _: out[:, 2].mean()),
    )
    close(S.snip(model, x, y, batch=4), S.snip(model, x, y, batch=4, loss=F.cross_entropy))


def test_logit_sensitivity_of_a_linear_model_is_weight_times_input(device):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3).to(device), torch.randn(7, 5).to(device)
    expected = torch.zeros(3, 5)
    expected[1] = (layer.weight[1].detach() * x).abs().mean(0).cpu()
    close(S.logit_sensitivity(layer, x, 1), {"weight": expected})
    units = torch.zeros(3)
    units[1] = layer(x)[:, 1].detach().abs().mean().cpu()
    close(S.logit_sensitivity(layer, x, 1, per="unit"), {"weight": units})


def test_logit_sensitivity_through_the_weights_of_a_unit_sums_to_the_unit_in_a_relu_network(device):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 3)
    ).to(device)
    x = torch.randn(1, 1, 6, 6, device=device)
    y = model(x)[0, 1]
    for i in (0, 2):
        signed = (model[i].weight * torch.autograd.grad(y, model[i].weight, retain_graph=True)[0]).flatten(1).sum(1)
        unit = S.logit_sensitivity(model, x, 1, per="unit")[f"{i}.weight"]
        torch.testing.assert_close(unit, signed.abs().detach().cpu(), rtol=1e-4, atol=1e-6)
    # and LRP-0 conserves: what enters the last layer's inputs is the logit without its bias
    last = model[4].weight * torch.autograd.grad(y, model[4].weight, retain_graph=True)[0]
    torch.testing.assert_close(last.sum(), y - model[4].bias[1], rtol=1e-4, atol=1e-6)


def test_unit_sensitivity_does_not_depend_on_the_batch_and_reads_tokens_on_the_last_axis(device):
    torch.manual_seed(0)
    model, (x, _) = net(device), data(device)
    close(S.logit_sensitivity(model, x, per="unit", batch=3), S.logit_sensitivity(model, x, per="unit"))
    tokens = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).to(device)
    found = S.logit_sensitivity(tokens, torch.randn(2, 7, 4, device=device), lambda out: out[:, 0, 0], per="unit")
    assert found["0.weight"].shape == (6,) and (found["2.weight"] > 0).tolist() == [True] + [False] * 4


@pytest.mark.parametrize("criterion", [S.snip, S.taylor, S.logit_sensitivity])
def test_criteria_leave_the_model_as_it_was(criterion, device):
    model, (x, y) = net(device), data(device)
    model[1].eval()
    model[5].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)

    def look():
        modes, grads = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        return modes, grads, {n: v.clone() for n, v in model.state_dict().items()}

    modes, grads, state = look()
    assert (criterion(model, x, y)["5.weight"] > 0).any(), "frozen weights are scored too"
    with pytest.raises(IndexError):
        criterion(model, x, 9)
    with pytest.raises(NotFinite):
        criterion(model, x * torch.nan, y)
    now = look()
    assert (now[0], now[1]) == (modes, grads)
    assert all(torch.equal(now[2][n], state[n]) for n in state)
    assert (model[0].weight.grad == 1).all() and model[5].weight.grad is None
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("criterion", [S.snip, S.taylor, S.logit_sensitivity])
def test_criteria_differentiate_in_inference_mode_and_let_a_model_work_in_place(criterion, device):
    class Rescaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model, (x, y) = net(device), data(device)
    expected = criterion(model, 2 * x, y)
    with torch.inference_mode():
        close(criterion(Rescaled(*model), x + 0, y + 0), expected)
    before = x.clone()
    close(criterion(Rescaled(*model), x, y), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unit_sensitivity_of_the_output_projection_of_attention_is_that_of_its_weights(batch_first):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=batch_first)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            return self.attention(x, x, x)[0].sum(1 if batch_first else 0)

    model, x = Attending(), torch.randn(3, 5, 8)
    found, weight = S.logit_sensitivity(model, x, 2, per="unit"), model.attention.out_proj.weight
    each = [torch.autograd.grad(model(row[None])[0, 2], weight)[0] for row in x]
    expected = sum((weight * g).sum(1).abs() for g in each) / 3
    close(found, {"attention.out_proj.weight": expected.detach()})
    assert found["attention.out_proj.weight"][2] > 0


def test_bad_arguments():
    model, (x, y) = net(), data()
    with pytest.raises(ValueError, match="batch"):
        S.snip(model, x, y, batch=0)
    with pytest.raises(ValueError, match="9 values for 10"):
        S.snip(model, x, y[:9])
    for criterion in (S.snip, S.taylor):
        with pytest.raises(ValueError, match="the model has one output: pass loss="):
            criterion(nn.Linear(3, 1), torch.ones(2, 3))
    with pytest.raises(ValueError, match="one number"):
        S.snip(model, x, y, loss=lambda out, y: out.sum(1))
    with pytest.raises(ValueError, match="'weight' or 'unit'"):
        S.logit_sensitivity(model, x, per="filter")


def test_inputs_may_be_a_dict_and_unused_layers_score_zero():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.idle = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(2, 2)

        def forward(self, left, right):
            return {"logits": self.a(left) + self.b(right)}

    torch.manual_seed(0)
    inputs = {"left": torch.randn(5, 3), "right": torch.randn(5, 2)}
    for criterion in (S.snip, S.taylor, S.logit_sensitivity):
        scores = criterion(Two(), inputs, 1, batch=2)
        assert scores["a.weight"][1].gt(0).all() and not scores["idle.weight"].any()
    assert not S.logit_sensitivity(Two(), inputs, 1, per="unit")["idle.weight"].any()
