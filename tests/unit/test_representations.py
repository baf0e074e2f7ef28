"""Dissimilarity matrices and alignment: axioms, values by hand, agreement with rsatoolbox and with plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from nbkit.errors import NotFinite, UnknownName
from nbkit.representations import alignment, rdm

SEEDS = st.integers(0, 10_000)


def some(seed: int, n: int = 9, features: int = 5) -> torch.Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("metric", ["correlation", "cosine", "euclidean"])
@given(seed=SEEDS)
def test_rdm_is_scipys(metric, seed):
    x = some(seed)
    assert np.allclose(rdm(x, metric).numpy(), pdist(x.numpy(), metric), atol=1e-12)


def test_rdm_is_rsatoolboxs():
    import rsatoolbox

    x = some(3, n=12, features=20)
    for metric, ours in {
        "correlation": rdm(x),
        "euclidean": rdm(x, "euclidean") ** 2 / 20,
    }.items():  # theirs: squared
        theirs = rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(x.numpy()), method=metric).dissimilarities[0]
        assert np.allclose(ours.numpy(), theirs, atol=1e-12)


def test_rdm_flattens_what_follows_the_examples_and_leaves_them_alone():
    x = some(0, features=12)
    before = x.clone()
    assert torch.equal(rdm(x.view(9, 3, 2, 2)), rdm(x))
    assert torch.equal(x, before)


def test_rdm_of_opposite_rows_is_2_and_of_scaled_rows_0():
    x = torch.tensor([[1.0, 2.0, 4.0], [-1.0, -2.0, -4.0], [10.0, 20.0, 40.0]])
    assert torch.allclose(rdm(x), torch.tensor([2.0, 0.0, 2.0], dtype=torch.float64), atol=1e-7)
    assert torch.allclose(rdm(x.double() * 1e-200), rdm(x), atol=1e-12)


@pytest.mark.parametrize(
    "x, metric, error, says",
    [
        (torch.ones(3, 4), "correlation", ValueError, "constant row"),
        (torch.zeros(3, 4), "cosine", ValueError, "zero row"),
        (torch.full((2, 2), math.nan), "euclidean", NotFinite, "NaN"),
        (torch.ones(1, 4), "euclidean", ValueError, "n >= 2"),
        (torch.ones(4), "euclidean", ValueError, "n >= 2"),
        (torch.ones(3, 0), "euclidean", ValueError, "features"),
        (torch.ones(3, 4), "correlatoin", UnknownName, "correlation"),
    ],
)
def test_what_has_no_rdm_is_named(x, metric, error, says):
    with pytest.raises(error, match=says):
        rdm(x, metric)


def test_a_constant_row_of_tenths_is_seen_in_spite_of_rounding():
    x = torch.full((3, 7), 0.1)
    x[0] = torch.arange(7) / 10
    with pytest.raises(ValueError, match=r"2 of 3, first \[1, 2\]"):
        rdm(x)


def loops(k1, k2):
    """Song et al.'s unbiased HSIC as the sum over distinct indices that it estimates."""
    n, total = len(k1), 0.0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k1[i, j] * (k2[i, j] + k2[q, r] - 2 * k2[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


@given(seed=SEEDS)
def test_the_unbiased_alignment_is_the_sum_over_distinct_indices(seed):
    k1, k2 = (x @ x.T for x in (some(seed, n=6), some(seed + 1, n=6)))
    by_hand = loops(k1, k2) / math.sqrt(loops(k1, k1) * loops(k2, k2))
    assert alignment(k1, k2, debiased=True) == pytest.approx(float(by_hand), abs=1e-9)


@given(seed=SEEDS)
def test_cka_is_the_alignment_of_features(seed):
    """Linear CKA over features: |Y'X|^2 / (|X'X| |Y'Y|) of the centred representations."""
    x, y = some(seed), some(seed + 1, features=3)
    a, b = x - x.mean(0), y - y.mean(0)
    by_features = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert alignment(x @ x.T, y @ y.T) == pytest.approx(float(by_features), abs=1e-12)


@given(seed=SEEDS, debiased=st.booleans())
def test_rotation_scale_and_offset_of_the_features_change_nothing(seed, debiased):
    x, y = some(seed), some(seed + 1)
    turned = 3 * x @ torch.linalg.qr(some(seed + 2, n=5))[0] + 7
    same = alignment(x @ x.T, y @ y.T, debiased=debiased)
    assert alignment(turned @ turned.T, y @ y.T, debiased=debiased) == pytest.approx(same, abs=1e-9)
    assert alignment(turned @ turned.T, x @ x.T, debiased=debiased) == pytest.approx(1, abs=1e-9)


def test_an_offset_drives_the_alignment_that_is_not_centred_towards_1():
    x, y = some(0), some(1)
    far = [(z + 100) @ (z + 100).T for z in (x, y)]
    assert alignment(*far, centre=False) > 0.999
    assert alignment(*far) == pytest.approx(alignment(x @ x.T, y @ y.T), abs=1e-6)


def test_without_centring_it_is_the_cosine_of_the_matrices():
    k1, k2 = torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert alignment(k1, k2, centre=False) == pytest.approx(2 / (math.sqrt(2) * 2))


def test_independent_representations_of_many_features_look_alike_unless_debiased():
    pairs = [[some(2 * seed + k, n=10, features=200) for k in (0, 1)] for seed in range(40)]
    plain, fair = (
        [alignment(x @ x.T, y @ y.T, debiased=debiased) for x, y in pairs] for debiased in (False, True)
    )
    assert min(plain) > 0.8
    assert abs(np.mean(fair)) < 4 * np.std(fair) / math.sqrt(40)


@pytest.mark.parametrize(
    "k1, k2, options, error, says",
    [
        (torch.eye(4), torch.eye(3), {}, ValueError, "different examples: 4 and 3"),
        (torch.ones(4, 3), torch.eye(4), {}, ValueError, r"\[4, 3\]"),
        (torch.eye(3), torch.eye(3), {"debiased": True}, ValueError, "n >= 4"),
        (torch.eye(4), torch.eye(4), {"debiased": True, "centre": False}, ValueError, "centre=True"),
        (torch.full((4, 4), math.inf), torch.eye(4), {}, NotFinite, "infinity"),
        (torch.zeros(4, 4), torch.eye(4), {"centre": False}, ValueError, "zero"),
        (torch.full((4, 4), 0.1), torch.eye(4), {}, ValueError, "alike"),
        (torch.full((4, 4), 0.1), torch.eye(4) + 0.1, {"debiased": True}, ValueError, "alike"),
        (torch.ones(4, 4).triu(), torch.eye(4), {}, ValueError, "symmetric"),
    ],
)
def test_what_has_no_alignment_is_named(k1, k2, options, error, says):
    with pytest.raises(error, match=says):
        alignment(k1, k2, **options)
