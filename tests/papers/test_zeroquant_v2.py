"""ZeroQuant-V2: its grids, GPTQ against a brute-force reference, what LoRC leaves, bits counted, the stored tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import hooks, papers, recipes, training
from nbkit.errors import LayerNotFound, NotFinite

zq = papers.method("zeroquant-v2")
recipe = recipes.load("papers/zeroquant-v2/recipe.py")
SLUG = "zeroquant-v2"


def matrix(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(inputs, seed=0):
    """H of inputs that move together."""
    x = matrix(4 * inputs, inputs, seed=seed) @ matrix(inputs, inputs, seed=seed + 1)
    return 2 / len(x) * x.T @ x


class Net(nn.Module):
    """Two numbered blocks, and a head that must stay."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


# the grid


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_an_error_is_at_most_half_a_step_and_a_group_has_2_to_the_bits_values(bits, shift):
    x = matrix(20, 64) + shift
    s, z = zq.grid(x, bits)
    rounded = zq.snap(x, s, z, bits)
    assert ((x - rounded).abs() <= s / 2 * (1 + 1e-9)).all()
    assert max(len(row.unique()) for row in rounded) <= 2**bits


@pytest.mark.parametrize("bits", [2, 4])
def test_a_row_on_the_grid_and_a_constant_row_come_back_exactly(bits):
    on_grid = 0.25 * torch.arange(2**bits).double()[torch.randperm(2**bits, generator=torch.Generator())] - 0.5
    assert torch.equal(zq.rtn(on_grid[None], bits)[0], on_grid)
    for constant in (0.0, 0.3, -7.0):
        for symmetric in (False, True):
            row = torch.full((1, 8), constant)
            torch.testing.assert_close(zq.rtn(row, bits, symmetric=symmetric), row, rtol=1e-6, atol=0)


def test_symmetric_grids_keep_0_and_mirror_what_they_are_given():
    x = torch.cat([torch.zeros(5, 1).double(), matrix(5, 31)], 1)
    rounded = zq.rtn(x, 3, symmetric=True)
    assert (rounded[:, 0] == 0).all() and torch.equal(zq.rtn(-x, 3, symmetric=True), -rounded)
    assert max(len(row.unique()) for row in rounded) <= 7


def test_blocks_run_along_the_inputs_and_one_block_is_a_row():
    W = matrix(4, 12)
    by_hand = torch.cat([zq.rtn(W[:, k : k + 3].contiguous(), 3) for k in range(0, 12, 3)], 1)
    assert torch.equal(zq.rtn(W, 3, block=3), by_hand)
    assert torch.equal(zq.rtn(W, 3, block=12), zq.rtn(W, 3))


def test_an_activation_gets_a_grid_a_token_while_the_model_runs():
    net, x = Net(), torch.randn(5, 6)
    with hooks.edit(net, {"head": zq.per_token(4)}), hooks.record(net, "head", at="input") as seen:
        net(x)
    with hooks.record(net, "head", at="input") as plain:
        net(x)
    torch.testing.assert_close(seen["head"], zq.rtn(plain["head"], 4))


# GPTQ


@pytest.mark.parametrize("block", [None, 8])
def test_gptq_without_correlations_is_rounding_to_nearest(block):
    W = matrix(10, 24)
    assert torch.equal(zq.gptq(W, 3 * torch.eye(24).double(), 3, block=block), zq.rtn(W, 3, block=block))


def obs(W, H, bits):
    """Optimal brain quantization: after every input the inverse of what is left of H is made anew."""
    s, z = zq.grid(W, bits)
    W, done = W.clone(), torch.empty_like(W)
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        done[:, j] = zq.snap(W[:, j], s[:, 0], z[:, 0], bits)
        W[:, j:] -= torch.outer((W[:, j] - done[:, j]) / inverse[0, 0], inverse[0])
    return done


@pytest.mark.parametrize("seed", range(3))
def test_gptq_is_the_step_by_step_update_with_fresh_inverses(seed):
    W, H = matrix(6, 16, seed=seed), correlated(16, seed=seed)
    damped = H + 0.01 * H.diag().mean() * torch.eye(16).double()
    torch.testing.assert_close(zq.gptq(W, H, 3), obs(W, damped, 3), rtol=1e-9, atol=1e-9)


def test_gptq_leaves_less_of_the_output_and_more_of_the_weights():
    W, H = matrix(32, 48), correlated(48)
    left = {name: W - q for name, q in {"rtn": zq.rtn(W, 3), "gptq": zq.gptq(W, H, 3)}.items()}
    output = {name: torch.trace(e @ H @ e.T) for name, e in left.items()}
    assert output["gptq"] < 0.7 * output["rtn"] and left["gptq"].norm() > left["rtn"].norm()


def test_gptq_takes_a_dead_input_for_nothing_and_changes_neither_argument():
    W, H = matrix(6, 8), correlated(8)
    H[3], H[:, 3] = 0, 0
    before = (W.clone(), H.clone())
    found = zq.gptq(W, H, 4)
    assert found.isfinite().all() and torch.equal(W, before[0]) and torch.equal(H, before[1])


def test_hessians_count_the_tokens_of_the_mask_alone():
    net, x = Net(), torch.randn(3, 4, 6)
    keep = torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]])
    found = zq.hessians(net, ["layers.0"], {"x": x}, keep)["layers.0"]
    torch.testing.assert_close(found, 2 / 7 * x[keep].T @ x[keep])
    with pytest.raises(LayerNotFound):
        zq.hessians(net, ["layers.9"], {"x": x}, keep)


# LoRC


def test_what_lorc_leaves_is_the_sum_of_the_other_squares_and_nothing_at_full_rank():
    W = matrix(12, 20)
    E = W - zq.rtn(W, 3)
    singular = torch.linalg.svdvals(E)
    lefts = []
    for rank in range(13):
        U, V = zq.lorc(E, rank, factor_bits=32)
        assert U.shape == (12, rank) and V.shape == (rank, 20)
        lefts.append((E - U @ V).square().sum().item())
        assert lefts[-1] == pytest.approx(singular[rank:].square().sum().item(), rel=1e-5, abs=1e-9)
    assert (np.diff(lefts) < 0).all()
    torch.testing.assert_close(zq.compress(W, 3, rank=12, factor_bits=32), W, rtol=0, atol=1e-5)
    assert torch.equal(zq.compress(W, 3), zq.rtn(W, 3))


def test_both_factors_carry_half_of_each_singular_value():
    E = matrix(8, 5)
    U, V = zq.lorc(E, 3, factor_bits=32)
    torch.testing.assert_close(U.norm(dim=0), V.norm(dim=1), rtol=1e-5, atol=0)


def test_lorc_beats_every_random_correction_of_its_rank_and_short_factors_lose_little():
    E = matrix(40, 30, dtype=torch.float32)
    left = lambda U, V: (E - U @ V).norm().item()  # noqa: E731
    exact = left(*zq.lorc(E, 8, factor_bits=32))
    for seed in range(10):
        U, V = recipe.on_random_directions(E, 8, seed)
        assert U.shape == (40, 8) and exact < left(U, V) < E.norm().item()
    assert left(*zq.lorc(E, 8)) == pytest.approx(exact, rel=1e-4)
    assert left(*zq.lorc(E, 8, factor_bits=8)) == pytest.approx(exact, rel=1e-2)


def test_gptq_and_lorc_are_put_together_in_this_order():
    W, H = matrix(6, 8), correlated(8)
    Wh = zq.gptq(W, H, 3, block=4)
    U, V = zq.lorc(W - Wh, 2, factor_bits=32)
    torch.testing.assert_close(zq.compress(W, 3, H=H, block=4, rank=2, factor_bits=32), Wh + U @ V)


# what is stored


def test_bits_a_weight_are_all_bits_over_all_weights():
    assert zq.bits_a_weight((384, 384), 3) == pytest.approx(3 + 32 / 384)
    assert zq.bits_a_weight((384, 384), 3, block=64, symmetric=True) == 3.25
    assert zq.bits_a_weight((384, 384), 3, block=64, rank=8) == pytest.approx(3.5 + 8 * 16 * 768 / 384**2)
    eight = zq.bits_a_weight((384, 1536), 2, block=32, rank=8, factor_bits=8)
    assert eight == pytest.approx(2 + 1 + 8 * (8 * 1920 + 32) / (384 * 1536))


def test_only_layers_in_numbered_blocks_are_quantized_and_the_model_comes_back():
    net = Net()
    assert zq.linears(net) == ["layers.0", "layers.1"]
    before, x = training.state(net), torch.randn(3, 6)
    with pytest.raises(RuntimeError, match="mine"), zq.holding(net, {"layers.0": torch.zeros(6, 6)}):
        assert torch.equal(net.layers[0](x), net.layers[0].bias.expand(3, 6))
        raise RuntimeError("mine")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# bad input


def test_bad_matrices_and_settings_are_refused():
    W = torch.randn(4, 6)
    for bits in (1, 17, 2.5):
        with pytest.raises(ValueError, match="bits"):
            zq.rtn(W, bits)
    for block in (0, 4, 7):
        with pytest.raises(ValueError, match="blocks"):
            zq.rtn(W, 3, block=block)
    with pytest.raises(ValueError, match="outputs, inputs"):
        zq.rtn(torch.randn(6), 3)
    for bad in (float("nan"), float("inf")):
        broken = W.clone()
        broken[0, 0] = bad
        for refuse in (lambda m: zq.rtn(m, 3), lambda m: zq.gptq(m, torch.eye(6), 3)):
            with pytest.raises(NotFinite):
                refuse(broken)
        with pytest.raises(ValueError, match="finite"):
            zq.lorc(broken, 1)
    for H in (torch.eye(5), torch.full((6, 6), float("nan"))):
        with pytest.raises(ValueError, match="H must be"):
            zq.gptq(W, H, 3)
    for rank in (-1, 5, 1.5):
        with pytest.raises(ValueError, match="rank"):
            zq.lorc(W, rank)
    with pytest.raises(ValueError, match="factor_bits"):
        zq.lorc(W, 2, factor_bits=4)


def test_a_wrong_name_or_shape_changes_no_layer():
    net = Net()
    before = training.state(net)
    with pytest.raises(LayerNotFound), zq.holding(net, {"layers.0": torch.zeros(6, 6), "layers.7": torch.zeros(6, 6)}):
        pass
    with (
        pytest.raises(ValueError, match=r"layers\.1"),
        zq.holding(net, {"layers.0": torch.zeros(6, 6), "layers.1": torch.zeros(5, 6)}),
    ):
        pass
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# the tables


def test_every_arm_is_stored_at_three_widths_with_its_draws():
    table = papers.results(SLUG, "quality").query("bits < 8")
    assert not table.duplicated(["model", "base", "bits", "block", "correction", "rank", "factor_bits", "draw"]).any()
    for name in ("MiniLM", "DINOv2"):
        rtn = table[(table["model"] == name) & (table["base"] == "RTN")]
        assert (rtn.query("correction == 'none'").groupby("bits")["block"].nunique() == 4).all()
        random = rtn.query("correction == 'random' and block == 0")
        assert (random.groupby("bits")["draw"].nunique() == recipe.DRAWS).all() and random["bits"].nunique() == 3
    gptq = table.query("base == 'GPTQ'")
    assert (gptq.groupby(["bits", "block", "correction"])["draw"].nunique() == recipe.DRAWS).all()


def test_the_sizes_are_those_of_the_method():
    table = papers.results(SLUG, "quality").query("model == 'MiniLM' and bits == 3 and base == 'RTN'")
    shapes = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
    total = sum(o * i for o, i in shapes)
    for row in table.itertuples():
        how = {"block": row.block or None, "rank": row.rank, "factor_bits": row.factor_bits}
        stored = sum(o * i * zq.bits_a_weight((o, i), 3, **how) for o, i in shapes)
        assert row.size == pytest.approx(stored / total, abs=1e-4)


def test_what_is_removed_is_counted_from_the_same_base_per_row():
    table = papers.results(SLUG, "quality").query("bits < 8")
    for (_, base, _), part in table.groupby(["model", "base", "bits"]):
        alone = part[part["what"] == "row"].set_index("draw")["loss"]
        before = part["draw"].map(alone) if base == "GPTQ" else alone[0]
        assert (part["removed"] - (1 - part["loss"] / before)).abs().max() < 2e-5


def test_a_share_of_singular_values_grows_with_the_rank_and_that_of_shuffled_errors_is_lower_on_average():
    table = papers.results(SLUG, "matrices")
    assert len(table) == 2 * (36 + 72)
    for label in ("LoRC", "shuffled"):
        assert (table[f"{label} 4"] < table[f"{label} 8"]).all() and (table[f"{label} 8"] < table[f"{label} 32"]).all()
    assert table["LoRC 8"].mean() > table["shuffled 8"].mean()


def test_the_pairs_are_those_of_the_means():
    pairs, means = papers.results(SLUG, "pairs"), papers.results(SLUG, "mixes")
    assert pairs.groupby(["model", "kind"], sort=False).size().tolist() == [50, 50, 40, 40, 16, 16]
    for name in ("MiniLM", "DINOv2"):
        for column, (w, a) in {"W8": (8, 16), "A8": (16, 8)}.items():
            kept = means[(means["model"] == name) & (means["weights"] == w) & (means["activations"] == a)]
            part = pairs[(pairs["model"] == name) & (pairs["kind"] == "asymmetric")][column]
            assert part.mean() == pytest.approx(kept[kept["kind"] == "asymmetric"]["damage"].item(), rel=1e-3)


def test_what_the_notes_and_chances_of_the_claims_say():
    table = papers.results(SLUG, "quality").query("bits < 8")
    assert len(table) == 126 and (table["loss"] >= 0.001).all()
    assert len(table.query("bits == 4 and correction != 'LoRC'")) == 29
    rtn = table.query("base == 'RTN' and bits < 4").pivot_table("loss", ["model", "bits"], "what")
    assert (rtn["row + LoRC 32"] > rtn["64"]).all() and len(rtn) == 4
    after = papers.results(SLUG, "quality").query("model == 'MiniLM' and what == 'row + LoRC 8' and base == 'RTN'")
    before = papers.results(SLUG, "quality").query("model == 'MiniLM' and what == 'row' and base == 'RTN' and bits < 8")
    fall = before.set_index("bits")["loss"] - after.set_index("bits")["loss"]
    assert fall.round(3).to_dict() == {4: 0.006, 3: 0.023, 2: 0.097}
