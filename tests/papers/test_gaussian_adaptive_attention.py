"""Gaussian adaptive attention: the gates against the public formulas, their exact values, and the stored tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nbkit import models, papers, recipes, training
from nbkit.errors import LayerNotFound

gaa = papers.method("gaussian-adaptive-attention")
recipe = recipes.load("papers/gaussian-adaptive-attention/recipe.py")
torch.set_num_threads(1)


@pytest.fixture
def x():
    return torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def filled(variant, heads, K=1, layers=7, width=16):
    """A gate in float64 with offsets and scales of its own."""
    gate = gaa.GaussianGate(variant, layers, width, heads, K).double()
    generator = torch.Generator().manual_seed(heads + 10 * K)
    with torch.no_grad():
        gate.delta.copy_(0.2 * torch.randn(gate.delta.shape, generator=generator))
        gate.c.copy_(torch.randn(gate.c.shape, generator=generator).exp() + 0.5)
    return gate


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# exact values


def test_two_values_a_head_give_exp_of_minus_a_quarter():
    g = gaa.gate_p(torch.tensor([[[-1.0], [1.0]]]), torch.zeros(1), torch.full((1,), 2.0))
    assert g.flatten().tolist() == pytest.approx([math.exp(-0.25)] * 2, abs=1e-5)


def test_a_constant_column_passes_unchanged():
    flat = torch.full((3, 6, 64), 1.5)
    torch.testing.assert_close(gaa.GaussianGate()(flat), flat)


def test_with_no_offset_the_mean_log_of_gate_p_is_minus_one_over_2c(x):
    c = torch.rand(16).double() + 0.5
    g = gaa.gate_p(1e3 * x, torch.zeros(16), c)
    torch.testing.assert_close(g.log().mean(1), (-0.5 / c).expand(5, 16))


def test_gate_p_stays_above_exp_of_minus_n_minus_1_over_2c(x):
    lone = torch.zeros(1, 7, 1)
    lone[0, 3] = 100
    g = gaa.gate_p(lone, torch.zeros(1), torch.full((1,), 2.0))
    assert g[0, 3].item() == pytest.approx(math.exp(-6 / 4), abs=1e-6)
    assert gaa.gate_p(x, torch.zeros(16), torch.full((16,), 2.0)).min() >= math.exp(-6 / 4)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_gate_l_sums_to_1_in_every_head_and_is_1_over_n_for_a_wide_gaussian(x, heads):
    gate = filled("L", heads)
    for part in gate.gates(x).split(gate.sizes, 1):
        torch.testing.assert_close(part.sum(1), torch.ones(5, 16).double())
    wide = gaa.gate_l(x, torch.zeros(1), torch.full((1,), 1e4, dtype=torch.float64), eps=1e-30)
    torch.testing.assert_close(wide, torch.full_like(x, 1 / 7), atol=1e-7, rtol=0)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_K_gaussians_are_one(x, K):
    gate = filled("L", 1, K)
    one = gaa.combine_gaussians(gate.delta[0], gate.c[0])
    torch.testing.assert_close(gaa.gate_l(x, gate.delta[0], gate.c[0], 1e-300), gaa.gate_l(x, *one, 1e-300))


# the public formulas


def public_p(x, delta, c):
    """The experiments' scripts, DAAM, one head and one time step."""
    mean, squares = x.mean(dim=1, keepdim=True), (x**2).mean(dim=1, keepdim=True)
    var = abs(squares - mean**2) + 1e-8
    return torch.exp(-(((x - (mean + delta)) / torch.sqrt(var + 1e-5)) ** 2 / (2 * c)))


def public_l(x, delta, c):
    """The package 0.1.5 without padding; Gaussians by torch.distributions."""
    mean, sd = x.mean(1, keepdim=True), (x.var(1, keepdim=True) + 1e-8).sqrt()
    m = 1
    for d, s in zip(delta, c, strict=True):
        m = m * torch.distributions.Normal(0, s).log_prob((x - mean - d) / sd).exp()
    return m / m.sum(1, keepdim=True).clamp(min=1e-8)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_variant_p_is_the_public_formula_head_by_head(x, heads):
    gate, chunk, x = filled("P", heads, layers=6), 6 // heads, x[:, :6]
    parts = [public_p(x[:, chunk * h : chunk * (h + 1)], gate.delta[h], gate.c[h]) for h in range(heads)]
    torch.testing.assert_close(gate(x), x * torch.cat(parts, 1))


@pytest.mark.parametrize(("heads", "cuts"), [(1, [7]), (2, [3, 4]), (3, [2, 2, 3])])
@pytest.mark.parametrize("K", [1, 3])
def test_variant_l_is_the_public_formula_and_the_last_head_takes_the_remainder(x, heads, cuts, K):
    gate = filled("L", heads, K)
    assert gate.sizes == cuts
    parts = [public_l(part, d, c) for part, d, c in zip(x.split(cuts, 1), gate.delta, gate.c, strict=True)]
    torch.testing.assert_close(gate(x), x + x * torch.cat(parts, 1))


# the rivals


def test_published_attention_mixes_images_and_batch_first_does_not():
    x = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1))
    for across, mixes in (("batch", True), ("layers", False)):
        mha = gaa.MHA(across=across).eval()
        apart = (mha(x)[:1] - mha(x[:1])).abs().max()
        assert (apart > 0.01) == mixes


def test_attention_is_torchs_and_residual_adds_the_input():
    x = torch.randn(4, 6, 64)
    plain, added = gaa.MHA(), gaa.MHA(residual=True)
    added.load_state_dict(plain.state_dict())
    torch.testing.assert_close(added(x), x + plain(x))
    weights = nn.functional.multi_head_attention_forward
    xt, mha = x.transpose(0, 1), plain.mha
    out, _ = weights(xt, xt, xt, 64, 8, mha.in_proj_weight, mha.in_proj_bias, None, None, False, 0.0,
                     mha.out_proj.weight, mha.out_proj.bias)  # fmt: skip
    torch.testing.assert_close(plain(x), out.transpose(0, 1))


def test_layer_weights_start_as_the_identity_and_gates_have_2HD_parameters():
    x = torch.randn(4, 6, 64)
    torch.testing.assert_close(gaa.LayerWeights()(x), x)
    for heads in (1, 2, 3):
        assert sum(p.numel() for p in gaa.GaussianGate(heads=heads).parameters()) == 2 * heads * 64
    assert sum(p.numel() for p in gaa.MHA().parameters()) == 4 * 64**2 + 4 * 64


def test_every_arm_starts_with_the_same_head_and_leaves_the_global_state_alone(monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *args, **kwargs: None)
    x, state = torch.randn(20, 6, 64), torch.random.get_rng_state()
    heads = [gaa.train(arm, x, torch.zeros(20).long(), lr=0.01, seed=3)[1].state_dict() for arm in gaa.ARMS]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, heads[0][name]) for head in heads for name, value in head.items())


def test_an_untrained_gate_stays_at_its_start_and_a_trained_one_moves():
    x, y = torch.randn(100, 6, 64), torch.arange(100) % 10
    for arm, moves in (("1 head, untrained", False), ("gate, 1 head", True)):
        gate = gaa.train(arm, x, y, lr=0.01, seed=0, epochs=1)[0]
        assert bool((gate.c != 2).any()) == moves and bool((gate.delta != 0).any()) == moves


def test_features_are_the_mean_tokens_of_the_layers():
    model, images = models.load("tiny-vit", seed=0), torch.rand(2, 1, 28, 28)
    before, kept = training.state(model), []
    model.blocks[2].register_forward_hook(lambda module, inputs, output: kept.append(output.mean(1)))
    x = gaa.features(model, images)
    assert x.shape == (2, 6, 64) and torch.equal(x[:, 2], kept[0]) and same(model, before)


# the importance factor


def test_importance_is_0_to_1_over_the_whole_matrix():
    gate = torch.tensor([[[0.2, 0.4], [0.6, 1.0]], [[0.4, 0.4], [0.6, 1.0]]])
    factor, share = gaa.importance_factor(gate)
    torch.testing.assert_close(factor, torch.tensor([[0.0, 1 / 7], [3 / 7, 1.0]]))
    torch.testing.assert_close(share, torch.tensor([1 / 14, 5 / 7]))


# bad input


@pytest.mark.parametrize(
    "settings",
    [{"variant": "Q"}, {"heads": 0}, {"heads": 4}, {"heads": 6}, {"variant": "L", "heads": 4}, {"K": 0}, {"K": 2},
     {"variant": "L", "K": 0}, {"layers": 7, "heads": 2}],
)  # fmt: skip
def test_bad_settings_of_a_gate_are_refused(settings):
    with pytest.raises(ValueError, match="heads|variant is"):
        gaa.GaussianGate(**settings)


def test_bad_features_are_refused_and_the_gate_is_unchanged():
    gate = gaa.GaussianGate()
    before, x = training.state(gate), torch.randn(2, 6, 64)
    for bad in (x[:, :5], x[..., :9], x[0], x / 0):
        with pytest.raises(ValueError, match="must be finite"):
            gate(bad)
    assert same(gate, before)


def test_bad_input_of_the_other_functions_is_refused():
    model, images = models.load("tiny-vit", seed=0), torch.rand(2, 1, 28, 28)
    with pytest.raises(LayerNotFound):
        gaa.features(model, images, ["blocks.9"])
    with pytest.raises(ValueError, match="tokens"):
        gaa.features(model, images, ["head"])
    with pytest.raises(ValueError, match="across"):
        gaa.MHA(across="time")
    with pytest.raises(ValueError, match="square"):
        gaa.layer_head(width=60)
    with pytest.raises(KeyError):
        gaa.train("no such arm", torch.randn(4, 6, 64), torch.zeros(4).long(), lr=0.01, seed=0)
    with pytest.raises(ValueError, match="everywhere"):
        gaa.importance_factor(torch.ones(2, 6, 64))
    with pytest.raises(ValueError, match="B, N, d"):
        gaa.importance_factor(torch.ones(6, 64))
    with pytest.raises(ValueError, match="finite"):
        gaa.importance_factor(torch.full((2, 6, 64), math.nan))
    x = torch.randn(2, 6, 64)
    for variant in ("P", "L"):
        gate = gaa.GaussianGate(variant)
        nn.init.zeros_(gate.c)
        with pytest.raises(ValueError, match="c > 0"):
            gate(x)
    for bad in (x[:, :1], x[:, :5], x[0]):
        with pytest.raises(RuntimeError, match="expand"):
            gaa.LayerWeights()(bad)
    for delta, c in ((torch.zeros(2), torch.ones(3)), (torch.zeros(0), torch.zeros(0)), (torch.zeros(1),) * 2):
        with pytest.raises(ValueError, match="K"):
            gaa.combine_gaussians(delta, c)


# what is stored


def test_every_arm_has_six_runs_of_its_chosen_rate_and_an_equal_grid():
    table = papers.results("gaussian-adaptive-attention")
    usual = table[table["epochs"] == recipe.EPOCHS]
    assert set(usual["arm"]) == set(gaa.ARMS)
    for _, rows in usual.groupby("arm"):
        assert len(rows[rows["chosen"]]) == 6 and len(rows[rows["run"] == 0]) == 3 * len(gaa.CHOICES)
        grid = rows[rows["run"] == 0]
        assert recipe.chosen(grid) == rows.loc[rows["chosen"], "lr"].iloc[0]


def test_the_sets_of_a_backbone_share_no_image():
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[: 2 * (recipe.TRAIN + recipe.VAL)]
    assert len(order.unique()) == 3000
