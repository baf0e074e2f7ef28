"""The method cells of the holistic-concepts notebook, used without the notebook."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from torch import nn

from nbkit import concepts, papers
from nbkit.errors import NotFinite

method = papers.method("holistic-concepts")
EXACT = ("gradient x input", "integrated gradients", "occlusion", "SHAP")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int = 300, p: int = 12, seed: int = 0) -> torch.Tensor:
    """Non-negative rows with some structure."""
    parts = torch.rand(5, p, generator=generator(seed)).square()
    noise = 0.05 * torch.rand(n, p, generator=generator(2))
    return torch.rand(n, 5, generator=generator(seed + 1)).square() @ parts + noise


def after(k: int = 4):
    """A head that is not affine behind maps of 6 channels, its Gains, and the codes of 5 images."""
    torch.manual_seed(0)
    head = nn.Sequential(
        nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).eval()  # fmt: skip
    bank = concepts.factorize(torch.rand(20, 6, 4, 4, generator=generator(3)), k)
    return head, bank, method.Gains(concepts.head_on_codes(head, bank)), bank.codes[:5]


def order_area(scores: list[float]) -> float:
    return float(np.trapezoid(scores, dx=1 / (len(scores) - 1)))


def test_places_are_the_columns_of_the_maps_each_at_most_once():
    maps = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    found = method.places(maps, 8)
    expected = {tuple(maps[i, :, r, c].tolist()) for i in range(2) for r in range(2) for c in range(2)}
    assert {tuple(row) for row in found.tolist()} == expected
    assert method.places(maps, 5).shape == (5, 3)
    assert torch.equal(method.places(maps, 5, seed=1), method.places(maps, 5, seed=1))


def test_a_dictionary_is_found_in_any_order_and_pca_axes_with_either_sign():
    axes = torch.linalg.qr(torch.randn(9, 9, generator=generator())).Q[:4]
    turned = axes[[2, 0, 3, 1]] * torch.tensor([[1.0], [-2], [1], [-1]])
    matched, others = method.cosines(axes, turned, signed=False)
    assert matched == pytest.approx(1, abs=1e-6) and others == pytest.approx(0, abs=1e-6)
    assert method.cosines(axes, turned)[0] == pytest.approx(0.5, abs=1e-6)  # with a sign only two are found


@pytest.mark.parametrize("seed", range(3))
def test_the_pairing_is_the_best_of_all(seed):
    V, W = (torch.rand(4, 6, generator=generator(seed + s)) for s in (0, 10))
    cosine = nn.functional.normalize(V, dim=1) @ nn.functional.normalize(W, dim=1).T
    best = max(sum(cosine[i, j].item() for i, j in enumerate(p)) for p in permutations(range(4)))
    matched, others = method.cosines(V, W)
    assert matched == pytest.approx(best / 4, abs=1e-6)
    assert 4 * matched + 12 * others == pytest.approx(cosine.sum().item(), abs=1e-5)


def test_the_frechet_distance_is_the_formula_with_a_matrix_root():
    A, B = rows(), rows(seed=5)[:200] + 0.1
    S, T = (np.cov(x.double().numpy().T, bias=True) for x in (A, B))
    shift = ((A.double().mean(0) - B.double().mean(0)) ** 2).sum().item()
    expected = shift + np.trace(S + T - 2 * sqrtm(S @ T).real)
    assert method.frechet(A, B) == pytest.approx(expected, rel=1e-5)
    assert method.frechet(A, A) == pytest.approx(0, abs=1e-8)


def test_ood_is_the_distance_to_the_nearest_neighbours():
    A, B = rows(30), rows(80, seed=4)
    unit = nn.functional.normalize
    far = NearestNeighbors(n_neighbors=7).fit(unit(B)).kneighbors(unit(A))[0][:, -1]
    assert method.ood(A, B, nearest=7) == pytest.approx(far.mean(), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_on_the_rows_fitted_pca_has_the_least_error_and_fid_and_kmeans_is_a_restricted_nmf(seed):
    A = rows(seed=seed)
    found = {kind: method.quality(concepts.factorize(A, 4, **options), A, A) for kind, options in method.KINDS.items()}
    assert found["PCA"]["error"] <= found["NMF"]["error"] <= found["K-means"]["error"]
    assert found["PCA"]["sparsity"] <= found["NMF"]["sparsity"] <= found["K-means"]["sparsity"] == pytest.approx(0.75)
    residual = found["PCA"]["error"] ** 2 * A.square().sum() / (len(A) * A.var(0, correction=0).sum())
    assert found["PCA"]["FID"] == pytest.approx(residual.item(), rel=1e-3)
    assert found["PCA"]["FID"] <= min(found["NMF"]["FID"], found["K-means"]["FID"])


def test_kmeans_error_is_its_inertia_and_pca_of_full_rank_leaves_nothing():
    A = rows()
    error = method.quality(concepts.factorize(A, 4, **method.KINDS["K-means"]), A, A)["error"]
    inertia = KMeans(4, n_init=4, random_state=0).fit(A.double().numpy()).inertia_
    assert error**2 * A.square().sum().item() == pytest.approx(inertia, rel=1e-4)
    assert method.quality(concepts.factorize(A, 12, **method.KINDS["PCA"]), A, A)["error"] < 1e-5


def test_the_table_holds_every_subset_and_curves_read_from_it_are_those_of_the_network():
    head, bank, net, codes = after()
    table = method.score_table(net, codes, 1)
    for S in (0, 5, 15):
        keep = torch.tensor([float(S >> i & 1) for i in range(4)]).view(4, 1, 1)
        expected = head(bank.decode(codes * keep))[:, 1]
        torch.testing.assert_close(table[:, S], expected.detach(), atol=1e-5, rtol=1e-5)
    phi = torch.randn(5, 4, generator=generator())
    deletion, insertion = method.concept_curves(table, phi)
    for n, order in enumerate(phi.argsort(descending=True).tolist()):
        gone = [sum(1 << i for i in order[:step]) for step in range(5)]
        torch.testing.assert_close(deletion.scores[n], table[n, [15 - S for S in gone]])
        torch.testing.assert_close(insertion.scores[n], table[n, gone])


@pytest.mark.parametrize("k", [2, 4, 5])
def test_the_best_order_is_the_best_of_all_orders(k):
    table = torch.randn(3, 2**k, generator=generator(k))
    before = table.clone()
    for n, scores in enumerate(table):
        steps = [[sum(1 << i for i in order[:s]) for s in range(k + 1)] for order in permutations(range(k))]
        areas = [order_area(scores[S].tolist()) for S in steps]
        assert method.best_deletion(table)[n].item() == pytest.approx(min(areas), abs=1e-5)
        assert -method.best_deletion(-table)[n].item() == pytest.approx(max(areas), abs=1e-5)
    assert torch.equal(table, before)
    doubled = table.double()
    method.best_deletion(doubled)
    assert torch.equal(doubled, table.double())


@pytest.mark.parametrize("seed", range(3))
def test_behind_an_affine_head_four_rules_are_the_terms_and_theirs_is_the_best_order(seed):
    torch.manual_seed(seed)
    head, u = nn.Linear(5, 2), torch.rand(6, 5)
    net = method.Gains(head)
    table = method.score_table(net, u, 1)
    found = method.importances(net, u, 1, table, n=8)
    terms = (head.weight[1] * u).detach()
    for rule in EXACT:
        torch.testing.assert_close(found[rule], terms, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(method.mu_fidelity(table, found[rule]), torch.ones(6).double(), atol=1e-4, rtol=0)
    for rule in (*EXACT, "RISE"):
        deletion, insertion = method.concept_curves(table, found[rule])
        torch.testing.assert_close(deletion.auc, method.best_deletion(table), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(insertion.auc, -method.best_deletion(-table), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["saliency"], head.weight[1].detach().expand(6, 5))
    assert torch.equal(found["TCAV"], (found["saliency"] > 0).float())


def test_the_rules_are_those_of_the_package():
    head, bank, net, codes = after()
    table = method.score_table(net, codes, 2)
    found = method.importances(net, codes, 2, table, n=16, seed=3)

    def package(rule: str) -> torch.Tensor:
        options = {"method": rule, "n": 16, "seed": 3, "per_example": True}
        return concepts.concept_importance(head, codes, bank, 2, **options).float()

    for rule, name in (("occlusion", "ablation"), ("TCAV", "tcav"), ("Sobol", "sobol")):
        torch.testing.assert_close(found[rule], package(name), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found["gradient x input"].abs(), package("gradient"), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found["Sobol with a sign"].abs(), found["Sobol"])
    torch.testing.assert_close(found["SHAP"].sum(1), table[:, -1] - table[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["integrated gradients"].sum(1), table[:, -1] - table[:, 0], atol=2e-2, rtol=0)
    with_1 = [S for S in range(16) if S >> 1 & 1]
    torch.testing.assert_close(found["RISE"][:, 1], table[:, with_1].mean(1))


def test_shapley_values_are_the_mean_over_all_orders():
    table = torch.randn(2, 16, generator=generator(7))
    expected = torch.zeros(2, 4)
    for order in permutations(range(4)):
        for step, i in enumerate(order):
            before = sum(1 << j for j in order[:step])
            expected[:, i] += (table[:, before | 1 << i] - table[:, before]) / 24
    torch.testing.assert_close(method.exact_shapley(table), expected, atol=1e-5, rtol=1e-4)


def test_mu_fidelity_is_the_correlation_over_all_halves():
    table, phi = torch.randn(3, 32, generator=generator(1)), torch.randn(3, 5, generator=generator(2))
    halves = list(combinations(range(5), 2))
    for n in range(3):
        claimed = [phi[n, list(half)].sum().item() for half in halves]
        lost = [(table[n, 31] - table[n, 31 - sum(1 << i for i in half)]).item() for half in halves]
        assert method.mu_fidelity(table, phi)[n].item() == pytest.approx(np.corrcoef(claimed, lost)[0, 1], abs=1e-5)
    assert method.mu_fidelity(table, torch.ones(3, 5)).isnan().all()


def test_strategies_by_hand_and_a_concept_never_on_top_has_no_reliability():
    phi = torch.tensor([[3.0, 1, 0], [2, 1, 0], [0, 5, 1], [-1, -2, -3]])
    top, table = method.strategies(phi, torch.tensor([True, False, True, True]))
    assert top.tolist() == [0, 0, 1, 0]
    assert table["images"].tolist() == [3, 1, 0] and table["prevalence"].tolist() == [0.75, 0.25, 0]
    assert table["reliability"][:2].tolist() == pytest.approx([2 / 3, 1]) and np.isnan(table["reliability"][2])


def test_where_the_theorem_holds_the_stored_areas_are_the_best():
    stored = papers.results("holistic-concepts", "importance").query("layer == 'relu4' and scope == 'image'")
    areas = stored.pivot_table(["deletion", "insertion"], "rule", "seed")
    for rule in (*EXACT, "RISE"):
        assert np.allclose(areas.loc[rule], areas.loc["best order"], atol=2e-3)
    assert (areas["deletion"].loc["saliency"] > areas["deletion"].loc["best order"]).all()


def test_the_drawn_bank_leads_with_another_concept_in_the_other_half_and_signs_hold_32_images_a_bank():
    again = papers.results("holistic-concepts", "again").query("kind == 'NMF'")
    drawn = (again["seed"] == 0) & (again["label"] == 6)
    moved = (again["lead"] - again["lead again"]).abs()
    assert moved[drawn].item() > 0.35 and (moved[~drawn] < 0.09).all()
    signs = papers.results("holistic-concepts", "signs")
    assert len(signs) == 432 and (signs["better"] + signs["worse"] <= 32).all()


def test_bad_input_raises_and_changes_nothing():
    head, _, net, codes = after()
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    table = torch.zeros(5, 16)
    for call, error, words in (
        (lambda: method.places(torch.rand(4, 3)), ValueError, "places needs maps"),
        (lambda: method.places(torch.rand(4, 3, 2, 2), 0), ValueError, "n >= 1"),
        (lambda: method.places(torch.full((1, 2, 2, 2), float("nan"))), NotFinite, "NaN"),
        (lambda: method.cosines(torch.rand(3, 4), torch.rand(3, 5)), ValueError, "two dictionaries"),
        (lambda: method.cosines(torch.rand(1, 4), torch.rand(1, 4)), ValueError, "k >= 2"),
        (lambda: method.frechet(torch.rand(9, 4), torch.rand(9, 5)), RuntimeError, "shapes cannot be multiplied"),
        (lambda: method.ood(torch.rand(9, 4), torch.rand(5, 4)), RuntimeError, "out of range"),
        (lambda: method.frechet(torch.full((9, 4), float("nan")), torch.rand(9, 4)), NotFinite, "A holds"),
        (lambda: method.frechet(torch.rand(9, 4), torch.full((9, 4), float("inf"))), NotFinite, "B holds"),
        (lambda: method.ood(torch.full((9, 4), float("nan")), torch.rand(20, 4)), NotFinite, "NaN"),
        (lambda: method.best_deletion(torch.rand(2, 6)), ValueError, "is .N, 2"),
        (lambda: method.strategies(torch.full((4, 2), float("nan")), torch.ones(4)), NotFinite, "phi holds"),
        (lambda: concepts.factorize(torch.rand(9, 4), 5, **method.KINDS["NMF"]), ValueError, "k must be"),
        (lambda: concepts.factorize(torch.randn(9, 4), 2, **method.KINDS["NMF"]), ValueError, "nmf needs"),
        (lambda: method.score_table(net, torch.rand(2, 13, 4, 4), 0), ValueError, "12 at most"),
        (lambda: method.score_table(net, codes * float("inf"), 0), NotFinite, "infinite"),
        (lambda: method.importances(net, codes, 3, table), IndexError, "classes 0 to 2"),
        (lambda: method.concept_curves(table, torch.rand(5, 3)), ValueError, "is not of the table"),
        (lambda: method.concept_curves(table, torch.full((5, 4), float("nan"))), NotFinite, "NaN"),
        (lambda: method.strategies(torch.rand(4, 2), torch.ones(3)), ValueError, "same length"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    method.importances(net, codes, 1, method.score_table(net, codes, 1), n=4)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in head.parameters())
