"""Routing by attention and its rivals: loops, PyTorch's own attention, values by hand, and what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as Peer
from torch import nn

from nbkit import papers, recipes

brains = papers.method("brain-encoders")
recipe = recipes.load("papers/brain-encoders/recipe.py")
SEEDS = st.integers(0, 1000)


def small(seed=0, regions=3, dropout=0.0):
    torch.manual_seed(seed)
    owner = torch.arange(regions).repeat_interleave(2)
    net = brains.Encoder(owner, d=8, heads=2, hidden=12, grid=3, dropout=dropout).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return net, torch.randn(5, 9, 8, dtype=torch.float64)


# the encoder


@settings(max_examples=10)
@given(SEEDS)
def test_it_is_a_decoder_layer_made_of_pytorchs_attention(seed):
    net, x = small(seed)
    peer = nn.MultiheadAttention(8, 2, batch_first=True).double()
    peer.in_proj_weight, peer.in_proj_bias = net.project.weight, net.project.bias
    peer.out_proj = net.out
    start = (net.norms[0](torch.zeros_like(net.queries)) + net.queries).expand(5, -1, -1)
    z, weights = peer(start, x + net.positions, x, average_attn_weights=False)
    z = net.norms[2](z + net.down(net.up(net.norms[1](z)).relu()))
    expected = torch.stack([z[:, r] @ net.readout.weight[v] for v, r in enumerate(net.owner)], 1) + net.readout.bias
    torch.testing.assert_close(brains.predict(net, x), expected)
    torch.testing.assert_close(brains.attention(net, x), weights)


def test_positions_enter_keys_and_not_values():
    net, x = small()
    before = brains.attention(net, x)
    with torch.no_grad():
        net.project.weight[8:16] = 0  # W_K: keys no longer see anything
    assert torch.allclose(brains.attention(net, x), torch.full((), 1 / 9, dtype=torch.float64))
    shuffled = brains.predict(net, x[:, torch.randperm(9)])
    torch.testing.assert_close(shuffled, brains.predict(net, x))
    assert not torch.allclose(before, brains.attention(net, x))


@settings(max_examples=10)
@given(SEEDS)
def test_tokens_shuffled_with_their_positions_change_nothing(seed):
    net, x = small(seed)
    order = torch.randperm(9)
    moved = copy.deepcopy(net)
    moved.positions = net.positions[order]
    torch.testing.assert_close(brains.predict(moved, x[:, order]), brains.predict(net, x))
    assert (brains.predict(net, x[:, order.roll(1)]) - brains.predict(net, x)).abs().max() > 1e-6


def test_value_norms_are_the_lengths_of_what_is_added_up():
    net, x = small(3)
    a, v = brains.attention(net, x), brains.projected(net, x, 2)
    for n, r, token in ((0, 0, 0), (4, 2, 8), (2, 1, 5)):
        parts = [net.out.weight[:, 4 * h : 4 * h + 4] @ v[n, h, token] * a[n, h, r, token] for h in range(2)]
        assert torch.isclose(brains.value_norms(net, x)[n, r, token], sum(parts).norm())
        assert torch.isclose(brains.value_norms(net, x, [1])[n, r, token], parts[1].norm())


def test_positions_tell_every_cell_apart_and_rows_from_columns():
    p = brains.sine_positions(6, 64)
    assert torch.cdist(p, p).fill_diagonal_(9).min() > 0.5
    first = 2 * math.pi / (6 + 1e-6)
    assert torch.isclose(p[0, 0], torch.tensor(math.sin(first), dtype=torch.float64))
    torch.testing.assert_close(p[0, :32], p[5, :32])  # one row
    torch.testing.assert_close(p[0, 32:], p[30, 32:])  # one column


def test_dropout_is_off_at_evaluation():
    net, x = small(dropout=0.5)
    assert not torch.allclose(brains.predict(net.train(), x), brains.predict(net, x))
    torch.testing.assert_close(brains.predict(net.eval(), x), brains.predict(net, x))


# training and score


def test_a_step_is_adamw_on_gradients_of_joint_length_at_most_a_tenth():
    net, x = small()
    y = 10 * torch.randn(5, 6, dtype=torch.float64)
    other = copy.deepcopy(net)
    brains.update(net, brains.predict, x, y, torch.optim.SGD(net.parameters(), lr=1.0))
    F.mse_loss(brains.predict(other, x), y).backward()
    size = torch.cat([p.grad.flatten() for p in other.parameters()]).norm()
    assert size > 0.1
    for moved, was in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(moved, was - was.grad * 0.1 / (size + 1e-6))


def test_training_keeps_the_weights_that_are_best_on_validation():
    net, x = small()
    y = brains.predict(small(7)[0], x.repeat(8, 1, 1) + torch.randn(40, 9, 8).double()).detach()
    data = (torch.randn(40, 9, 8).double(), y, x.repeat(8, 1, 1), y)
    history = brains.train(net, brains.predict, data, 0.01, steps=60, every=10, wait=3)
    found = brains.score(brains.predict(net.eval(), data[2]), y).mean().item()
    assert found == pytest.approx(max(value for _, _, value in history))
    steps = [step for step, _, _ in history]
    assert steps[-1] == 60 or steps[-1] - max(history, key=lambda row: row[2])[0] == 30


def test_louder_positions_are_only_louder(monkeypatch):
    random = torch.Generator().manual_seed(0)
    kinds = torch.randint(-20, 10, (40, 36), generator=random).clamp(min=-1)
    splits = {name: {"tokens": torch.randn(40, 36, 64, generator=random), "kinds": kinds} for name in recipe.SPLITS}
    monkeypatch.setattr(recipe, "stimuli", lambda: splits)
    monkeypatch.setattr(brains, "train", lambda *data, **settings: [(1, 0.0, 0.0)])
    plain, loud = (recipe.made(name, 0, 40, 0.003, factor)[0] for name, factor in (("attention", 1), (recipe.LOUD, 16)))
    torch.testing.assert_close(loud.positions, 16 * plain.positions)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), loud.parameters(), strict=True))


def test_the_score_is_pearsons_r_squared_with_its_sign():
    y = torch.randn(50, 3)
    predicted = torch.stack([2 * y[:, 0] + 5, -y[:, 1], torch.full((50,), 0.3)], 1)
    torch.testing.assert_close(brains.score(predicted, y, 1.0), torch.tensor([1.0, -1.0, 0.0]).double())
    noisy = y + torch.randn(50, 3)
    r = np.corrcoef(noisy[:, 2], y[:, 2])[0, 1]
    assert brains.score(noisy, y, 0.5)[2].item() == pytest.approx(r**2 / 0.5, rel=1e-5)


@pytest.mark.parametrize("ceiling", [0, 1.2, -1])
def test_a_ceiling_that_is_none_is_refused(ceiling):
    with pytest.raises(ValueError, match=r"ceiling.*in \(0, 1\]"):
        brains.score(torch.randn(5, 2), torch.randn(5, 2), ceiling)


def test_bad_tokens_and_settings_are_refused_and_the_net_stays():
    net, x = small()
    before = copy.deepcopy(net.state_dict())
    for tokens in (x[:, :4], x[..., :4], x * math.nan, x[0]):
        with pytest.raises(ValueError, match="tokens"):
            brains.predict(net, tokens)
    with pytest.raises(ValueError, match="heads are 0 to 1"):
        brains.value_norms(net, x, [2])
    data = (x, torch.randn(5, 6).double()) * 2
    for bad in ({"lr": 0}, {"batch": 0}, {"steps": 5, "every": 10}, {"every": 0}):
        with pytest.raises(ValueError, match="above 0"):
            brains.train(net, brains.predict, data, **{"lr": 0.1, **bad})
    assert all(torch.equal(before[name], weight) for name, weight in net.state_dict().items())
    with pytest.raises(ValueError, match="0 heads"):
        brains.Encoder(torch.tensor([0]), heads=0)
    empty = torch.tensor([], dtype=torch.int64)
    for wrong in ([0, 1], torch.tensor([0.5]), torch.tensor([-1]), empty, torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="owner"):
            brains.Encoder(wrong)
    with pytest.raises(ValueError, match="multiple of 4"):
        brains.sine_positions(6, 6)


# rivals


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from([(30, 8), (8, 30)]), st.booleans())
def test_ridge_agrees_with_scikit_learn_in_both_spaces(seed, shape, equal):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random, dtype=torch.float64) * torch.arange(1.0, shape[1] + 1)
    y = torch.randn(shape[0], 3, generator=random, dtype=torch.float64)
    new = torch.randn(6, shape[1], generator=random, dtype=torch.float64)
    fit = recipe.Ridge(x, y, equal)
    size = x.std(0) if equal else x.std(0).square().mean().sqrt()
    peer = Peer(alpha=2.5).fit(((x - x.mean(0)) / size).numpy(), y.numpy())
    expected = torch.as_tensor(peer.predict(((new - x.mean(0)) / size).numpy()))
    torch.testing.assert_close(fit.predict(fit.basis(new), 2.5), expected)


def test_second_order_pooling_holds_every_product_once():
    tokens = torch.randn(2, 4, 3)
    found = recipe.pooled(tokens, "second order")
    assert found.shape == (2, 3 + 6)
    expected = [(tokens[1, :, i] * tokens[1, :, j]).mean() for i in range(3) for j in range(i, 3)]
    torch.testing.assert_close(found[1, 3:], torch.stack(expected))
    with pytest.raises(ValueError, match="how must be one of"):
        recipe.pooled(tokens, "sum")


def test_a_factorised_model_is_a_map_times_features():
    torch.manual_seed(0)
    owner = torch.tensor([0, 0, 1])
    net = recipe.Factorised(owner, d=4, cells=9)
    x = torch.randn(5, 9, 4)
    for v in range(3):
        where = net.map[owner[v]].softmax(0)
        by_hand = torch.einsum("nld,l,d->n", x, where, net.feature.weight[v]) + net.feature.bias[v]
        torch.testing.assert_close(net(x)[:, v], by_hand)


# simulated brains


def test_regions_take_what_the_rule_says():
    tokens = torch.randn(1, 36, 4)
    kinds = torch.full((1, 36), -1)
    kinds[0, [0, 17]] = 2  # row 0 column 0 (closeness 1), row 2 column 5 (closeness 0)
    kinds[0, 3] = 7
    centre = torch.ones(4)
    found = recipe.region_vectors(tokens, kinds, 2, [1, 4], centre)
    both = tokens[0, [0, 17]] - centre
    torch.testing.assert_close(found["category"][0], both.mean(0))
    torch.testing.assert_close(found["mix"][0], both[0] / 2)
    torch.testing.assert_close(found["place"][0], tokens[0, [10, 11, 16, 17]].mean(0))
    absent = recipe.region_vectors(tokens, kinds, 5, [0, 0], centre)
    assert found["presence"].eq(1).all() and absent["presence"].eq(0).all() and absent["category"].eq(0).all()


def test_the_noise_leaves_the_ceiling():
    one = recipe.brain(3)
    vectors = {name: torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1)) for name in recipe.REGIONS}
    signal, y = recipe.responses(vectors, one["weights"], 0)
    assert brains.score(signal, y).mean().item() == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="same on every canvas"):
        recipe.responses({name: torch.ones(9, 64) for name in recipe.REGIONS}, one["weights"], 0)


def test_canvases_hold_8_to_12_objects_and_kinds_name_them():
    labels = torch.arange(50) % 10
    tiles, cells, kinds = recipe.scenes(torch.rand(50, 1, 28, 28), labels, 200, seed=0)
    objects = (kinds >= 0).sum(1)
    assert (objects.min(), objects.max()) == (8, 12)
    assert torch.equal(kinds[kinds >= 0], labels[cells[kinds >= 0]]) and (cells[kinds < 0] >= 50).all()
    assert len(tiles) == 50 + recipe.EMPTY and 0 <= tiles.min() <= tiles.max() <= 1


@pytest.mark.parametrize("corner", [(5, 0), (-1, 2), (0, 5)])
def test_a_block_beyond_the_edge_is_refused(corner):
    with pytest.raises(ValueError, match="row and column of 0 to 4"):
        recipe.near(corner)


def test_principal_axes_are_those_of_the_covariance():
    x = torch.randn(200, 10, dtype=torch.float64) * torch.arange(1.0, 11)
    mean, axes = recipe.principal(x, d=4)
    projected = (x - mean) @ axes
    assert projected.square().sum(1).mean().item() == pytest.approx(4)
    cross = np.corrcoef(projected.T.numpy()) - np.eye(4)
    assert np.abs(cross).max() < 1e-9 and (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
    with pytest.raises(ValueError, match="finite"):
        recipe.principal(x * math.nan, d=4)


# what is measured on maps


def test_alike_is_the_mean_correlation_over_pairs():
    maps = torch.rand(6, 9)
    pairs = np.corrcoef(maps.numpy())[np.triu_indices(6, 1)]
    assert recipe.alike(maps) == pytest.approx(pairs.mean(), abs=1e-6)


# what is stored


def test_the_tables_are_whole():
    results = papers.results("brain-encoders")
    counts = results.groupby(["model", "canvases", "region"]).size()
    longer = [*recipe.LONG.values()]
    assert counts.drop(longer).eq(5).all() and counts[longer].eq(len(recipe.LONG_BRAINS)).all()
    assert set(results.query("model == 'attention'").canvases) == set(recipe.SIZES)
    assert results.score.between(-1.2, 1.2).all()
    rates = papers.results("brain-encoders", "rates")
    for _, one in rates.groupby("model"):
        best = one.loc[one.score.idxmax(), "rate"]
        assert one.rate.min() < best < one.rate.max()
