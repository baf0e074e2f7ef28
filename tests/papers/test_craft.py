"""The method cells of the CRAFT notebook, used without the notebook."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import nn

from nbkit import concepts, hooks, papers
from nbkit.errors import NotFinite

craft = papers.method("craft")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3),
    ).eval()  # fmt: skip


x = torch.rand(20, 1, 8, 8, generator=generator(1))


def cut(layer: str = "1", r: int = 4):
    """The network cut behind a layer: the head on codes, the codes [20, r, 8, 8], the bank."""
    model = net()
    g, h = model[: int(layer) + 1], model[int(layer) + 1 :]
    bank = craft.fit_bank(g, craft.extract_crops(x, 5, to=8)[0], r)
    return concepts.head_on_codes(h, bank), bank.encode(craft.latent(g, x)), bank


def test_a_linear_head_has_the_shares_of_its_squared_terms_and_an_idle_concept_exactly_none():
    b = torch.tensor([3, -1, 2, 0.5, 0]).double()
    found = craft.total_sobol(lambda m: m @ b, 5, 256, scramble=False)
    torch.testing.assert_close(found, b**2 / (b**2).sum(), atol=0.02, rtol=0)
    assert found[4] == 0
    quick = craft.total_sobol(lambda m: m @ b, 5, 64, seed=3)
    assert torch.equal(quick, concepts.total_sobol(lambda m: m @ b, 5, n=64, seed=3)) and quick[4] == 0


def test_the_index_is_the_share_that_is_left_when_all_other_masks_are_known():
    found = craft.total_sobol(lambda m: m[:, 0] * m[:, 1], 2, 256, scramble=False)
    torch.testing.assert_close(found, torch.full((2,), 4 / 7).double(), atol=0.03, rtol=0)  # lost would be 3 / 7


def test_the_unscrambled_design_shrinks_many_equal_indices():
    plain = craft.total_sobol(lambda m: m.sum(1), 20, 32, scramble=False)
    scrambled = craft.total_sobol(lambda m: m.sum(1), 20, 64)
    assert plain.max() < 0.02 < 0.03 < scrambled.min() and scrambled.max() < 0.08


def test_the_public_formula_gives_the_same_indices():
    # Jansen as the public code writes it: rows A, then B, then the blocks C, variance over A alone
    from scipy.stats import qmc

    def score(m):
        return m[:, 0] * m[:, 1] + (3 * m[:, 2]).sin()

    both = torch.tensor(qmc.Halton(6, scramble=False).random(32))
    A, B = both[:, :3], both[:, 3:]
    C = A.repeat(3, 1, 1)
    for k in range(3):
        C[k, :, k] = B[:, k]
    y, z = score(A), torch.stack([score(c) for c in C])
    expected = ((y - z) ** 2).sum(1) / (2 * 32 * ((y - y.mean()) ** 2).sum() / 31)
    torch.testing.assert_close(craft.total_sobol(score, 3, 32, scramble=False), expected, rtol=1e-12, atol=0)


def test_a_constant_score_has_no_indices():
    assert craft.total_sobol(lambda m: torch.ones(len(m)), 3, 8).isnan().all()


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_the_codes_is_that_of_finite_differences(seed):
    W = torch.rand(4, 9, generator=generator(seed)).double()
    a = torch.rand(9, generator=generator(seed + 10)).double()
    step = 1e-5 * torch.eye(9).double()
    differences = (concepts.nnls(a + step, W) - concepts.nnls(a - step, W)).T / 2e-5
    S = concepts.nnls(a[None], W)[0] > 0
    torch.testing.assert_close(differences[S], torch.linalg.inv(W[S] @ W[S].T) @ W[S], atol=1e-4, rtol=0)
    assert not differences[~S].any()
    rows = torch.stack([a, 2 * a])
    jacobian = torch.autograd.functional.jacobian(lambda r: craft.differentiable_nnls(r, W).sum(0), rows)
    torch.testing.assert_close(jacobian[:, 0], differences, atol=1e-4, rtol=0)
    torch.testing.assert_close(jacobian[:, 1], differences, atol=1e-4, rtol=0)


def test_separable_concepts_are_found_up_to_order_and_scale():
    W0 = torch.cat([torch.eye(3), torch.rand(3, 5, generator=generator())], 1)
    A = torch.rand(200, 3, generator=generator(1)).square() @ W0
    found = craft.fit_bank(nn.Identity(), A, 3, init="nndsvda")
    cosine = found.dictionary @ nn.functional.normalize(W0).T
    assert sorted(cosine.argmax(1).tolist()) == [0, 1, 2] and cosine.amax(1).min() > 0.99
    assert found.error < 0.02


def test_crops_are_the_patches_at_their_corners():
    images = torch.arange(2 * 100.0).view(2, 1, 10, 10)
    crops, source = craft.extract_crops(images, 4)  # stride int(0.8 * 4) = 3: corners 0, 3, 6
    assert crops.shape == (18, 1, 4, 4) and source.tolist() == [0] * 9 + [1] * 9
    corners = [(row, column) for row in (0, 3, 6) for column in (0, 3, 6)] * 2
    for crop, i, (row, column) in zip(crops, source, corners, strict=True):
        assert torch.equal(crop, images[i, :, row : row + 4, column : column + 4])
    assert craft.extract_crops(images, 4, to=8)[0].shape == (18, 1, 8, 8)


@pytest.mark.parametrize("layer", ["1", "3"])
def test_the_rules_of_importance_are_those_of_the_package(layer):
    logits, U, bank = cut(layer)
    head = net()[int(layer) + 1 :]
    found = craft.importances(logits, U[:5], 2, n=16, seed=5)

    def package(method: str) -> torch.Tensor:
        return concepts.concept_importance(head, U[:5], bank, 2, method=method, n=16, seed=5)

    for rule, method in (("Sobol", "sobol"), ("TCAV", "tcav"), ("|gradient x code|", "gradient"),
                         ("ablation", "ablation")):  # fmt: skip
        torch.testing.assert_close(found[rule].double(), package(method), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found["code"], U[:5].mean((0, 2, 3)))
    torch.testing.assert_close(found["TCAV x code"], found["TCAV"] * found["code"])
    torch.testing.assert_close(found["Sobol with a sign"].abs(), found["Sobol"])
    leaf = U[:5].clone().requires_grad_()
    logits(leaf)[:, 2].sum().backward()
    torch.testing.assert_close(found["gradient x code"], (leaf.grad * U[:5]).sum((2, 3)).mean(0))
    one = craft.importances(logits, U[:1], 2, n=16, seed=5)
    by_hand = craft.total_sobol(lambda m: logits(U[:1] * m.float()[..., None, None])[:, 2].detach(), 4, 16, seed=5)
    torch.testing.assert_close(by_hand, one["Sobol"], atol=1e-4, rtol=1e-3)


def test_in_a_linear_head_the_rules_with_a_sign_are_the_terms_and_those_without_lose_it():
    head, U = nn.Linear(3, 1, bias=False), torch.tensor([[1.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    head.weight = nn.Parameter(torch.tensor([[3.0, -2.0, 0.0]]))
    found = craft.importances(head, U, 0, n=256)
    terms = torch.tensor([6.0, -4.0, 0.0])
    for rule in ("gradient x code", "ablation"):
        torch.testing.assert_close(found[rule].float(), terms)
    assert found["|gradient x code|"].tolist() == [6, 4, 0] and found["TCAV"].tolist() == [1, 0, 0]
    assert found["Sobol"][1] > 0.2 and found["Sobol with a sign"][1] == -found["Sobol"][1]


def test_orders_follow_the_importance_and_only_ties_differ():
    found = craft.orders(torch.tensor([0.2, 1.0, 1.0, 0.1]), 30)
    assert {tuple(o) for o in found.tolist()} == {(1, 2, 0, 3), (2, 1, 0, 3)}


def test_deleting_and_inserting_concepts_of_a_linear_head_by_hand():
    U, head = torch.tensor([[1.0, 1.0, 1.0]]), nn.Linear(3, 1, bias=False)
    head.weight = nn.Parameter(torch.tensor([[3.0, 2.0, -1.0]]))
    deletion, insertion = craft.concept_curves(head, U, torch.tensor([[0, 1, 2], [2, 0, 1]]), 0)
    assert deletion.tolist() == [[4, 1, -1, 0], [4, 5, 2, 0]]
    assert insertion.tolist() == [[0, 3, 5, 4], [0, -1, 2, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_for_a_linear_score_no_order_beats_that_of_the_signed_terms(seed):
    terms, ones = torch.randn(1, 5, generator=generator(seed)), torch.ones(1, 5)
    head = nn.Linear(5, 1, bias=False)
    head.weight = nn.Parameter(terms)
    every = torch.tensor(list(permutations(range(5))))
    deletion, insertion = craft.concept_curves(head, ones, every, 0).sum(2)
    signed = craft.orders(craft.importances(head, ones, 0, n=8)["gradient x code"], 1)
    down, up = craft.concept_curves(head, ones, signed, 0).sum(2)
    torch.testing.assert_close(down[0], deletion.min())
    torch.testing.assert_close(up[0], insertion.max())


def test_a_concept_is_taken_apart_on_the_crops_that_hold_most_of_it():
    u = torch.arange(40.0)
    crops = torch.rand(40, 1, 8, 8, generator=generator())
    rows, sub = craft.sub_concepts(net()[:2], crops, u, 2, top=0.25)
    assert sorted(rows.tolist()) == list(range(30, 40)) and sub.codes.shape == (10, 2)
    assert torch.equal(sub.dictionary, craft.fit_bank(net()[:2], crops[rows], 2).dictionary)


def test_concept_codes_add_up_presence_and_gradient_times_activation_gives_it_back():
    model = net()
    bank = craft.fit_bank(model[:2], craft.extract_crops(x, 5, to=8)[0], 3)
    presence = bank.encode(craft.latent(model[:2], x[:4]))
    code = model[:2].append(craft.Codes(bank.dictionary))
    assert len(model) == 8, "the network is left alone"
    with hooks.record(code, "1", detach=False) as acts:
        u = code(x[:4])
    torch.testing.assert_close(u, presence.sum((2, 3)), atol=1e-5, rtol=1e-4)
    A = acts["1"]
    for k in range(3):
        (slope,) = torch.autograd.grad(u[:, k].sum(), A, retain_graph=True)
        torch.testing.assert_close((slope * A).sum(1), presence[:, k], atol=1e-4, rtol=1e-3)


def test_bad_input_raises_and_changes_nothing():
    model = net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for call, error, words in (
        (lambda: craft.extract_crops(x, 9), ValueError, "no patch of 9"),
        (lambda: craft.extract_crops(x, 4, overlap=1.0), ValueError, "overlap"),
        (lambda: craft.extract_crops(x, 0), ValueError, "no patch of 0"),
        (lambda: craft.extract_crops(x[:0], 4), ValueError, "is empty"),
        (lambda: craft.extract_crops(x[0], 4), ValueError, "no patch"),
        (lambda: craft.latent(model[:1], x), ValueError, "CRAFT needs values >= 0"),
        (lambda: craft.latent(model[:2], x * float("nan")), NotFinite, "NaN"),
        (lambda: craft.latent(model[:2], x[:0]), ValueError, "is empty"),
        (lambda: craft.fit_bank(model[:2], x, 0), ValueError, "k must be"),
        (lambda: craft.fit_bank(model[:2], x, 7), ValueError, "k must be"),
        (lambda: craft.total_sobol(lambda m: m[:, 0], 0), ValueError, "r >= 1"),
        (lambda: craft.total_sobol(lambda m: m[:, 0], 2, 1), ValueError, "n >= 2"),
        (lambda: craft.concept_curves(model, x, torch.tensor([[1]]), 0), ValueError, "each row of orders"),
        (lambda: craft.concept_curves(model, x, torch.zeros(1, 2).long(), 0), ValueError, "each row of orders"),
        (lambda: craft.sub_concepts(model[:2], x, torch.arange(20.0), 9), ValueError, "k must be"),
        (lambda: craft.importances(model, x * float("nan"), 0), NotFinite, "NaN"),
        (lambda: craft.importances(model, x, 3), IndexError, "classes 0 to 2"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_explaining_leaves_mode_parameters_and_gradients_alone():
    logits, U, _ = cut("1", 3)
    logits.train()
    craft.importances(logits, U[:4], 1, n=4)
    craft.concept_curves(logits, U[:4], torch.tensor([[0, 1, 2]]), 1)
    assert logits.training and not U.requires_grad
    assert all(p.grad is None for p in logits.parameters())
