"""The method cells of the CRAFT notebook, used without the notebook."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from nbkit import concepts, papers
from nbkit.errors import LayerNotFound, NotFinite

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


def test_a_linear_head_has_the_shares_of_its_squared_terms_and_an_idle_concept_exactly_none():
    b = torch.tensor([3, -1, 2, 0.5, 0]).double()
    found = craft.total_sobol(lambda m: m @ b, 5, 256, scramble=False)
    torch.testing.assert_close(found, b**2 / (b**2).sum(), atol=0.02, rtol=0)
    assert found[4] == 0
    quick = craft.total_sobol(lambda m: m @ b, 5, 64, seed=3)
    assert torch.equal(quick, concepts.total_sobol(lambda m: m @ b, 5, n=64, seed=3)) and quick[4] == 0


def test_a_product_of_two_masks_gives_four_sevenths_each():
    found = craft.total_sobol(lambda m: m[:, 0] * m[:, 1], 2, 256, scramble=False)
    torch.testing.assert_close(found, torch.full((2,), 4 / 7).double(), atol=0.03, rtol=0)


def test_the_unscrambled_design_shrinks_many_equal_indices():
    plain = craft.total_sobol(lambda m: m.sum(1), 20, 32, scramble=False)
    scrambled = craft.total_sobol(lambda m: m.sum(1), 20, 64)
    assert plain.max() < 0.02 < 0.03 < scrambled.min() and scrambled.max() < 0.08


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
    jacobian = torch.autograd.functional.jacobian(lambda r: craft.NNLS.apply(r, W).sum(0), rows)
    torch.testing.assert_close(jacobian[:, 0], differences, atol=1e-4, rtol=0)
    torch.testing.assert_close(jacobian[:, 1], differences, atol=1e-4, rtol=0)


def test_separable_concepts_are_found_up_to_order_and_scale():
    W0 = torch.cat([torch.eye(3), torch.rand(3, 5, generator=generator())], 1)
    A = torch.rand(200, 3, generator=generator(1)).square() @ W0
    found = craft.fit_bank(nn.Sequential(nn.Identity()), "0", A, 3, init="nndsvda")
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


@pytest.mark.parametrize("cut", ["1", "3"])
def test_the_head_on_codes_is_the_head_after_the_bank(cut):
    model, r = net(), 4
    bank = craft.fit_bank(model, cut, craft.extract_crops(x, 5, to=8)[0], r)
    head = model[int(cut) + 1 :]
    U = bank.encode(craft.latent(model, cut, x))
    before = deepcopy(head.state_dict())
    logits = craft.head_on_codes(head, bank.dictionary)
    torch.testing.assert_close(logits(U), head(bank.decode(U)), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_matrix_takes_the_bank_in_as_well():
    head, W, u = nn.Sequential(nn.Linear(8, 3)), torch.rand(4, 8), torch.rand(5, 4)
    torch.testing.assert_close(craft.head_on_codes(head, W)(u), head(u @ W))


def test_importances_agree_with_the_package_and_sobol_of_one_image_with_its_formula():
    model = net()
    bank = craft.fit_bank(model, "1", craft.extract_crops(x, 5, to=8)[0], 4)
    U, head = bank.encode(craft.latent(model, "1", x)), model[2:]
    logits = craft.head_on_codes(head, bank.dictionary)
    found = craft.importances(logits, U[:1], 2, n=16, seed=5)
    for how in ("sobol", "tcav", "gradient"):
        known = concepts.concept_importance(head, U[:1], bank, 2, method=how, n=16, seed=5)
        torch.testing.assert_close(found[how], known, atol=1e-4, rtol=1e-3)
    by_hand = craft.total_sobol(lambda m: logits(U[:1] * m.float()[..., None, None])[:, 2].detach(), 4, 16, seed=5)
    torch.testing.assert_close(by_hand, found["sobol"], atol=1e-4, rtol=1e-3)


def test_orders_follow_the_importance_and_only_ties_differ():
    found = craft.orders(torch.tensor([0.2, 1.0, 1.0, 0.1]), 30)
    assert {tuple(o) for o in found.tolist()} == {(1, 2, 0, 3), (2, 1, 0, 3)}


def test_deleting_and_inserting_concepts_of_a_linear_head_by_hand():
    U, head = torch.tensor([[1.0, 1.0, 1.0]]), nn.Linear(3, 1, bias=False)
    head.weight = nn.Parameter(torch.tensor([[3.0, 2.0, -1.0]]))
    deletion, insertion = craft.concept_curves(head, U, torch.tensor([[0, 1, 2], [2, 0, 1]]), 0)
    assert deletion.tolist() == [[4, 1, -1, 0], [4, 5, 2, 0]]
    assert insertion.tolist() == [[0, 3, 5, 4], [0, -1, 2, 4]]


def test_a_concept_is_taken_apart_on_the_crops_that_hold_most_of_it():
    u = torch.arange(40.0)
    crops = torch.rand(40, 1, 8, 8, generator=generator())
    rows, sub = craft.sub_concepts(net(), "1", crops, u, 2, top=0.25)
    assert sorted(rows.tolist()) == list(range(30, 40)) and sub.codes.shape == (10, 2)
    with pytest.raises(ValueError, match="top must"):
        craft.sub_concepts(net(), "1", crops, u, 2, top=0)


def test_concept_codes_are_the_mean_presence_and_gradient_times_activation_gives_it_back():
    from nbkit import hooks

    model = net()
    bank = craft.fit_bank(model, "1", craft.extract_crops(x, 5, to=8)[0], 3)
    presence = bank.encode(craft.latent(model, "1", x[:4]))
    code = craft.ConceptCode(model, "1", bank.dictionary)
    with hooks.record(code, "model.1", detach=False) as acts:
        u = code(x[:4])
    torch.testing.assert_close(u, presence.mean((2, 3)), atol=1e-5, rtol=1e-4)
    A = acts["model.1"]
    for k in range(3):
        (slope,) = torch.autograd.grad(u[:, k].sum(), A, retain_graph=True)
        torch.testing.assert_close((slope * A).sum(1) * 64, presence[:, k], atol=1e-4, rtol=1e-3)


def test_bad_input_raises_and_changes_nothing():
    model = net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for call, error, words in (
        (lambda: craft.extract_crops(x, 9), ValueError, "no patch of 9"),
        (lambda: craft.extract_crops(x, 4, overlap=1.0), ValueError, "overlap"),
        (lambda: craft.extract_crops(x[:0], 4), ValueError, "empty"),
        (lambda: craft.extract_crops(x[0], 4), ValueError, "no patch"),
        (lambda: craft.latent(model, "0", x), ValueError, "values >= 0"),
        (lambda: craft.latent(model, "9", x), LayerNotFound, "9"),
        (lambda: craft.latent(model, "1", x * float("nan")), NotFinite, "NaN"),
        (lambda: craft.fit_bank(model, "1", x, 0), ValueError, "k must be"),
        (lambda: craft.fit_bank(model, "1", x, 7), ValueError, "k must be"),
        (lambda: craft.total_sobol(lambda m: m[:, 0], 0), ValueError, "r >= 1"),
        (lambda: craft.total_sobol(lambda m: m[:, 0], 2, 1), ValueError, "n >= 2"),
        (lambda: craft.concept_curves(model, x, torch.tensor([[1]]), 0), ValueError, "each row of orders"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_class_is_drawn_from_what_the_model_calls_it_and_judged_on_labels():
    from types import SimpleNamespace

    data = SimpleNamespace(x_train=x, x_test=x + 1, y_test=torch.arange(20) % 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    called = model(x).argmax(1)
    c = int(called.mode().values)
    train, held = craft.draw_class(model, data, c, seed=0, n=2, held=3)
    assert train.shape == (2, 1, 8, 8) and (model(train).argmax(1) == c).all()
    assert len(held) == 3 and all((data.x_test[data.y_test == c] == image).flatten(1).all(1).any() for image in held)
    with pytest.raises(ValueError, match="no images of class 3"):
        craft.draw_class(model, data, 3, seed=0)
