"""Concepts: dictionaries that are recovered, exact encodings, and importances with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as scipy_nnls
from torch import nn

from nbkit import concepts as C
from nbkit.errors import NotFinite, NotFittedError


def rand(*shape, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def separable(n: int = 300, k: int = 4, neurons: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a unique factorization: every concept has a neuron of its own and pure examples."""
    dictionary = torch.cat([torch.eye(k), rand(k, neurons - k, seed=1) * (rand(k, neurons - k, seed=2) < 0.5)], 1)
    codes = rand(n, k, seed=3) * (rand(n, k, seed=4) < 0.4)
    codes[: 5 * k] = torch.eye(k).repeat(5, 1)
    return codes @ dictionary, torch.nn.functional.normalize(dictionary, dim=1)


def test_nmf_recovers_a_separable_dictionary_up_to_order_and_scale(device):
    activations, truth = separable()
    bank = C.factorize(activations.to(device), 4, tol=1e-8, max_iter=5000)
    match = bank.dictionary @ truth.T
    assert sorted(match.argmax(1).tolist()) == [0, 1, 2, 3]
    assert match.amax(1).min() > 0.999
    assert bank.error < 0.01
    assert (bank.codes >= 0).all() and (bank.dictionary >= 0).all()


def test_pca_finds_the_subspace_and_reconstructs_exactly(device):
    plane = rand(2, 9, seed=1)
    activations = torch.randn(50, 2, generator=torch.Generator().manual_seed(2)) @ plane + 3
    bank = C.factorize(activations.to(device), 2, "pca")
    torch.testing.assert_close(bank.dictionary @ bank.dictionary.T, torch.eye(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(bank.decode(bank.codes), activations, rtol=1e-4, atol=1e-4)
    assert bank.error < 1e-5
    new = rand(3, 2, seed=5) @ plane + 3
    torch.testing.assert_close(bank.decode(bank.encode(new)), new, rtol=1e-4, atol=1e-4)


def test_kmeans_gives_every_activation_its_nearest_center():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = 0.1 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    activations = centers.repeat_interleave(20, 0) + noise
    bank = C.factorize(activations, 3, "kmeans")
    assert (bank.codes.sum(1) == 1).all() and set(bank.codes.unique().tolist()) == {0.0, 1.0}
    assert bank.codes.sum(0).tolist() == [20, 20, 20]
    assert torch.cdist(bank.decode(bank.codes), activations).diagonal().max() < 1


def test_sae_is_sparse_and_reconstructs_sparse_sums_of_more_concepts_than_neurons(device):
    concepts = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    codes = rand(2000, 12, seed=1) * (rand(2000, 12, seed=2) < 0.1)
    bank = C.factorize((codes @ concepts).to(device), 12, "sae", penalty=0.02, steps=600)
    assert (bank.codes >= 0).all() and (bank.codes > 0).float().mean() < 0.5
    assert bank.error < 0.35
    torch.testing.assert_close(bank.dictionary.norm(dim=1), torch.ones(12))
    dense = C.factorize((codes @ concepts).to(device), 12, "sae", penalty=0.0, steps=600)
    assert (bank.codes > 0).float().mean() < (dense.codes > 0).float().mean(), "the penalty makes it sparse"


def test_shifting_all_activations_leaves_the_codes_of_an_sae_and_doubling_doubles_them(device):
    activations = rand(200, 6)
    bank = C.factorize(activations.to(device), 4, "sae", steps=100)
    shifted = C.factorize(activations.to(device) + 8, 4, "sae", steps=100)
    torch.testing.assert_close(shifted.codes, bank.codes, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(shifted.offset, bank.offset + 8, atol=1e-3, rtol=1e-3)
    assert (bank.codes > 0).any(1).float().mean() > 0.5, "codes of 0 would agree whatever happened"
    doubled = C.factorize(2 * activations.to(device), 4, "sae", steps=100)
    torch.testing.assert_close(doubled.codes, 2 * bank.codes, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["nmf", "pca", "kmeans", "sae"])
def test_encoding_the_activations_gives_the_codes_and_the_seed_decides_everything(method, device):
    activations, options = rand(40, 6).to(device), {"steps": 20} if method == "sae" else {}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    bank = C.factorize(activations, 3, method, seed=7, **options)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(bank.encode(activations), bank.codes)
    again = C.factorize(activations, 3, method, seed=7, **options)
    assert torch.equal(again.codes, bank.codes) and torch.equal(again.dictionary, bank.dictionary)
    away = activations.cpu() - bank.decode(bank.codes)
    assert bank.error == pytest.approx((away.norm() / activations.cpu().norm()).item(), rel=1e-4)
    assert bank.codes.device.type == bank.dictionary.device.type == "cpu"
    assert f"k={bank.k}" in repr(bank) and "<table>" in bank._repr_html_()


@pytest.mark.parametrize("method", ["nmf", "pca", "kmeans"])
def test_maps_and_tokens_are_factorized_location_by_location(method):
    maps = rand(5, 6, 3, 4)
    rows = C.factorize(maps.permute(0, 2, 3, 1).reshape(-1, 6), 3, method)
    bank = C.factorize(maps, 3, method)
    assert bank.codes.shape == (5, 3, 3, 4)
    assert torch.equal(bank.codes.permute(0, 2, 3, 1).reshape(-1, 3), rows.codes)
    decoded = bank.decode(bank.codes)
    assert decoded.shape == maps.shape
    assert torch.equal(decoded.permute(0, 2, 3, 1).reshape(-1, 6), rows.decode(rows.codes))
    tokens = C.factorize(maps.flatten(2).transpose(1, 2), 3, method)
    assert torch.equal(tokens.codes.reshape(-1, 3), rows.codes)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000), st.sampled_from(["plain", "twins", "zeros"]))
def test_nnls_is_the_minimum_scipy_finds(k, neurons, seed, kind):
    rng = np.random.default_rng(seed)
    a, w = rng.normal(size=(6, neurons)), rng.normal(size=(k, neurons)) + 0.5
    if kind == "twins":
        w[-1] = w[0]
    elif kind == "zeros":
        w[0], a[0] = 0, 0
    found = C.nnls(torch.from_numpy(a), torch.from_numpy(w)).numpy()
    assert (found >= 0).all()
    for row, codes in zip(a, found, strict=True):
        best, residual = scipy_nnls(w.T, row)
        assert np.linalg.norm(row - codes @ w) == pytest.approx(residual, abs=1e-7 * (1 + np.linalg.norm(row)))
        if kind == "plain" and k <= neurons and np.linalg.cond(w) < 1e3:
            np.testing.assert_allclose(codes, best, atol=1e-7)


def test_nnls_takes_no_rows_and_checks_shapes():
    a, w = rand(50, 8), rand(4, 8, seed=1)
    assert C.nnls(rand(0, 8), w).shape == (0, 4)
    with pytest.raises(ValueError, match="same P"):
        C.nnls(a, w[:, :7])
    with pytest.raises(NotFinite):
        C.nnls(a * torch.nan, w)


B = torch.tensor([3.0, -1.0, 2.0, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_sobol_of_a_linear_score_is_the_share_of_the_square(seed):
    found = C.total_sobol(lambda m: m @ B, 5, n=256, seed=seed)
    torch.testing.assert_close(found, B**2 / (B**2).sum(), rtol=0, atol=0.02)
    assert found[4] == 0, "a factor without influence has exactly 0"


def test_sobol_without_scrambling_gives_the_measured_numbers():
    found = C.total_sobol(lambda m: m @ B, 5, n=256, scramble=False)
    assert found.tolist() == pytest.approx([0.626, 0.070, 0.281, 0.018, 0], abs=6e-4)
    product = C.total_sobol(lambda m: m[:, 0] * m[:, 1], 2, n=256, scramble=False)
    assert product.tolist() == pytest.approx([0.581, 0.563], abs=6e-4)


def test_sobol_of_a_product_is_four_sevenths():
    assert C.total_sobol(lambda m: m[:, 0] * m[:, 1], 2, n=1024).tolist() == pytest.approx([4 / 7, 4 / 7], abs=0.03)
    assert C.total_sobol(lambda m: m[:, 0] * 0 + 5.0, 2).isnan().all()
    for wrong in ({"k": 0}, {"n": 1}, {"n": 8.0}):
        with pytest.raises(ValueError):
            C.total_sobol(lambda m: m[:, 0], **({"k": 2} | wrong))
    with pytest.raises(ValueError, match="one a mask"):
        C.total_sobol(lambda m: m, 2)


def test_the_total_index_is_what_is_left_when_the_others_are_known_not_what_is_lost_when_it_is():
    # by brute force on a grid: the product of two factors, of which the first also acts alone
    def score(m):
        return m[:, 0] * m[:, 1] + m[:, 0]

    middle = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    grid = score(torch.cartesian_prod(middle, middle)).reshape(200, 200)  # [first, second]
    left = torch.stack([grid.var(0, correction=0).mean(), grid.var(1, correction=0).mean()]) / grid.var(correction=0)
    lost = torch.stack([grid.mean(1).var(correction=0), grid.mean(0).var(correction=0)]) / grid.var(correction=0)
    found = C.total_sobol(score, 2, n=1024)
    torch.testing.assert_close(found, left, rtol=0, atol=0.02)
    assert (left - lost > 0.025).all(), "the two would not tell apart"
    assert ((found - left).abs() < (found - lost).abs()).all()


def linear_case(device):
    """Codes [6, 5], identity dictionary and a head whose class 1 is linear in the concepts with weights B."""
    codes = rand(6, 5, seed=8).to(device)
    head = nn.Linear(5, 3).to(device)
    with torch.no_grad():
        head.weight[1] = B.float()
    return head, codes, torch.eye(5)


def test_importance_in_a_linear_head_is_known_for_every_method(device):
    head, codes, dictionary = linear_case(device)
    uses = (codes.cpu() * B).double()

    def importance(method: str, **options) -> torch.Tensor:
        return C.concept_importance(head, codes, dictionary, 1, method=method, **options)

    sobol = importance("sobol", n=256, per_example=True)
    for found, use in zip(sobol, uses, strict=True):
        reference = C.total_sobol(lambda m, use=use: m @ use, 5, n=256)
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)
    assert (sobol[:, 4] == 0).all()
    assert torch.equal(importance("sobol", n=256), sobol.mean(0))
    ones = C.concept_importance(head, torch.ones_like(codes[:1]), dictionary, 1, n=256)
    torch.testing.assert_close(ones, B**2 / (B**2).sum(), rtol=0, atol=0.02)
    torch.testing.assert_close(importance("gradient"), uses.abs().mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(importance("ablation"), uses.mean(0), rtol=1e-4, atol=1e-5)
    assert importance("tcav").tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("method", ["sobol", "gradient", "tcav", "ablation"])
def test_importance_does_not_depend_on_the_batch_and_leaves_the_head_alone(method, device):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).to(device)
    head[4].weight.requires_grad_(False)
    codes, dictionary = rand(5, 3, 3, 3).to(device), rand(3, 6, seed=1)
    state = {n: v.clone() for n, v in head.state_dict().items()}
    found = C.concept_importance(head, codes, dictionary, method=method, n=8)
    small = C.concept_importance(head, codes, dictionary, method=method, n=8, batch=3)
    torch.testing.assert_close(found, small, rtol=1e-3, atol=1e-5)
    assert found.shape == (3,) and head.training and not codes.requires_grad
    assert all(torch.equal(v, state[n]) for n, v in head.state_dict().items())
    assert all(p.grad is None for p in head.parameters())
    predicted = head.eval()(torch.einsum("nkhw,kp->nphw", codes, dictionary.to(device))).argmax(1)
    again = C.concept_importance(head, codes, dictionary, predicted, method=method, n=8)
    assert torch.equal(again, found), "None means the predicted class"


def test_gradients_are_taken_in_inference_mode_too(device):
    head, codes, dictionary = linear_case(device)
    expected = C.concept_importance(head, codes, dictionary, 1, method="gradient")
    activations = rand(40, 6)
    bank = C.factorize(activations, 3, "sae", steps=5)
    with torch.inference_mode():
        again = C.concept_importance(head, codes + 0, dictionary + 0, 1, method="gradient")
        assert torch.equal(again, expected)
        assert torch.equal(C.factorize(activations + 0, 3, "sae", steps=5).codes, bank.codes)


def test_a_mask_multiplies_a_concept_at_every_location():
    # y = (sum over places of activation 0) * (of activation 1): the product case, whatever the size of the map
    def head(maps):
        return maps.sum((2, 3)).prod(1, keepdim=True)

    found = C.concept_importance(head, rand(2, 2, 3, 3, seed=1), torch.eye(2), 0, n=1024)
    assert found.tolist() == pytest.approx([4 / 7, 4 / 7], abs=0.03)


def test_an_offset_belongs_to_the_decoded_activations():
    activations = rand(30, 6)
    bank = C.factorize(activations, 2, "pca")
    seen = []

    def head(a):
        seen.append(a)
        return a[:, :1]

    C.concept_importance(head, bank.codes, bank, 0, method="gradient")
    torch.testing.assert_close(seen[0], bank.decode(bank.codes))


def test_constant_examples_are_left_out_and_counted():
    head, codes, dictionary = linear_case("cpu")
    with_zeros = torch.cat([codes, torch.zeros(2, 5)])
    with pytest.warns(RuntimeWarning, match="2 of 8 examples") as caught:
        found = C.concept_importance(head, with_zeros, dictionary, 1)
    assert caught[0].filename == __file__, "the warning points at the call"
    assert torch.equal(found, C.concept_importance(head, codes, dictionary, 1))
    with pytest.raises(ValueError, match="same for every mask"):
        C.concept_importance(head, torch.zeros(2, 5), dictionary, 1)


@pytest.mark.parametrize("change, error, match", [
    ({"activations": rand(9, 5) - 0.5}, ValueError, "nmf needs activations >= 0"),
    ({"activations": rand(9, 5) * torch.nan}, NotFinite, "45 NaN"), ({"activations": rand(0, 5)}, ValueError, "empty"),
    ({"activations": torch.zeros(9, 5)}, ValueError, "all activations are 0"),
    ({"activations": [[1.0]]}, TypeError, "tensor"), ({"activations": rand(9)}, ValueError, "at least"),
    ({"k": 0}, ValueError, "between 1 and 5"), ({"k": 6}, ValueError, "between 1 and 5"),
    ({"k": 10, "method": "kmeans"}, ValueError, "between 1 and 9"), ({"k": 6, "method": "pca"}, ValueError, "k must"),
    ({"k": 0, "method": "sae"}, ValueError, "at least 1"), ({"k": 2.0}, TypeError, "int"),
    ({"method": "ica"}, ValueError, "'nmf'"), ({"method": "sae", "steps": 0}, ValueError, "steps"),
    ({"method": "sae", "penalty": -1.0}, ValueError, "penalty"),
])  # fmt: skip
def test_what_cannot_be_factorized(change, error, match):
    arguments = {"activations": rand(9, 5), "k": 2, "method": "nmf"} | change
    with pytest.raises(error, match=match):
        C.factorize(arguments.pop("activations"), arguments.pop("k"), arguments.pop("method"), **arguments)


def test_bad_codes_and_new_activations():
    bank = C.factorize(rand(20, 6), 3, max_iter=5000)
    head = nn.Linear(6, 2)
    with pytest.raises(ValueError, match="6 neurons, the activations 5"):
        bank.encode(rand(4, 5))
    with pytest.raises(ValueError, match=">= 0"):
        bank.encode(-rand(4, 6))
    with pytest.raises(ValueError, match="3 concepts"):
        bank.decode(rand(4, 2))
    with pytest.raises(NotFittedError, match="factorize"):
        C.concept_importance(head, None, None)
    with pytest.raises(NotFittedError):
        C.Factorization(rand(2, 3), rand(3, 6), 0.1, "sae").encode(rand(2, 6))
    for arguments, error, match in [
        ({"codes": rand(4, 2)}, ValueError, "same number of concepts"), ({"codes": rand(0, 3)}, ValueError, "empty"),
        ({"codes": rand(4, 3) * torch.nan}, NotFinite, "codes"), ({"target": 2}, IndexError, "classes 0 to 1"),
        ({"method": "shap"}, ValueError, "'sobol'"), ({"n": 1}, ValueError, "2 design rows"),
        ({"batch": 0}, ValueError, "batch must be"),
    ]:  # fmt: skip
        full = {"codes": bank.codes, "target": 0} | arguments
        with pytest.raises(error, match=match):
            C.concept_importance(head, full.pop("codes"), bank.dictionary, full.pop("target"), **full)


HEADS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
    "linear alone, no bias": (lambda: nn.Linear(6, 3, bias=False), (6,)),
    "relu first": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 3)), (6,)),
    "convolution that pads": (lambda: nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Flatten()), (6, 4, 4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten()), (6, 5, 5)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=2, padding=1), nn.Flatten()), (6, 4, 4)),
    "mean first": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), (6, 4, 4)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Flatten()), (7, 6)),
    "no layer": (lambda: nn.Sequential(), (6,)),
}


@pytest.mark.parametrize("method", ["nmf", "pca"])
@pytest.mark.parametrize("name", HEADS)
def test_the_head_on_codes_is_the_head_after_decoding(name, method, device):
    build, shape = HEADS[name]
    torch.manual_seed(0)
    head, activations = build().to(device).eval(), rand(9, *shape).to(device)
    bank = C.factorize(activations, 3, method)
    state = {n: v.clone() for n, v in head.state_dict().items()}
    on_codes = C.head_on_codes(head, bank)
    codes = bank.codes.to(device)
    torch.testing.assert_close(on_codes(codes), head(bank.decode(codes)), rtol=1e-4, atol=1e-5)
    given = C.head_on_codes(head, bank.dictionary, bank.offset)
    assert torch.equal(given(codes), on_codes(codes)), "a factorization brings its offset along"
    assert all(torch.equal(v, state[n]) for n, v in head.state_dict().items())
    assert not on_codes.training and not any(m.training for m in on_codes.modules())


def test_the_dictionary_goes_into_the_first_layer_and_the_rest_is_shared():
    head = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()).train()
    on_codes = C.head_on_codes(head, rand(3, 6))
    assert on_codes[0].weight.shape == (4, 3, 3, 3) and on_codes[0].in_channels == 3 and head[0].in_channels == 6
    assert on_codes[1] is head[1] and on_codes[2] is head[2] and on_codes.training and head[2].training
    logits = C.head_on_codes(nn.Linear(6, 2), rand(3, 6))
    importance = C.concept_importance(logits, rand(4, 3), torch.eye(3), 0, method="ablation")
    direct = C.concept_importance(nn.Linear(6, 2), rand(4, 3), rand(3, 6), 0, method="ablation")
    assert importance.shape == direct.shape == (3,)


@pytest.mark.parametrize("head, dictionary, offset, error, match", [
    (nn.Linear(6, 2), rand(3, 5), None, ValueError, "5 neurons, the head's first layer takes 6"),
    (nn.Linear(6, 2), rand(6), None, ValueError, "dictionary must be"),
    (nn.Linear(6, 2), rand(3, 6), rand(5), ValueError, "offset"),
    (nn.Linear(6, 2), rand(3, 6) * torch.nan, None, NotFinite, "dictionary"),
    (nn.Linear(6, 2), [[1.0]], None, TypeError, "dictionary"),
    (lambda a: a, rand(3, 6), None, TypeError, "decode the codes before it"),
])  # fmt: skip
def test_what_is_no_head_on_codes(head, dictionary, offset, error, match):
    with pytest.raises(error, match=match):
        C.head_on_codes(head, dictionary, offset)
