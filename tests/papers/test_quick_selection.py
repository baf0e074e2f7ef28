"""The method cells of the QuickSelection notebook, used without the notebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import papers
from nbkit.errors import NotFinite

method = papers.method("quick-selection")
KINDS = [method.SparseLinear, method.MaskedLinear]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_matrix(kind, W: torch.Tensor) -> nn.Module:
    """A layer with a link where W [n_in, n_out] is not 0."""
    place = W.T.flatten().nonzero().flatten()
    return kind(*W.shape, place, W.T.flatten()[place])


@pytest.mark.parametrize("kind", KINDS)
def test_strength_by_hand_with_ties_to_the_lowest_index_and_zeros_last(kind):
    W = torch.tensor([[0.0, -2, 1], [3, 0, 0], [0, 0, 0]])
    layers = [from_matrix(kind, W), from_matrix(kind, torch.tensor([[1.0, 0, -4], [0, 0, 2], [0, 0, 0]]))]
    scores = method.strengths(layers, zeta=0.5)
    assert scores["strength"].tolist() == [3, 3, 0]
    assert scores["weakest cut"].tolist() == [2, 3, 0]  # of the positive weights 1 and 3 the smaller goes
    assert scores["degree"].tolist() == [2, 1, 0] and scores["output"].tolist() == [1, 0, 6]
    assert method.select(scores["strength"], 3).tolist() == [0, 1, 2]
    assert method.select(torch.tensor([1.0, 5, 5, 2]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_step_keeps_the_number_of_links_and_removes_the_weakest_of_each_sign(kind):
    layer = method.random_layer(kind, 12, 9, 2.0, draw(1, 12), generator())
    (layer.velocity if kind is method.SparseLinear else layer.velocity.view(-1)[layer.links()[0]]).normal_()
    before = {place: (weight, v) for place, weight, v in zip(*(t.tolist() for t in layer.links()), strict=True)}
    keep = method.survivors(layer.links()[1], 0.3)
    removed, stayed = layer.links()[1][~keep], layer.links()[1][keep]
    for sign in (1, -1):
        gone, left = removed[sign * removed > 0].abs(), stayed[sign * stayed > 0].abs()
        assert len(gone) == int(0.3 * (len(gone) + len(left))) and gone.max() <= left.min()
    kept = set(layer.links()[0][keep].tolist())
    method.evolve(layer, 0.3, generator(1))
    place, weight, velocity = layer.links()
    assert len(place) == len(before) == len(set(place.tolist()))
    assert kept <= set(place.tolist()) and 0 <= place.min() and place.max() < 12 * 9
    for p, w, v in zip(place.tolist(), weight.tolist(), velocity.tolist(), strict=True):
        assert (w, v) == before[p] if p in kept else v == 0


def test_free_places_are_different_free_and_reach_all_of_them():
    taken = torch.tensor([0, 3, 4, 9])
    assert sorted(method.free_places(taken, 6, 10, generator()).tolist()) == [1, 2, 5, 6, 7, 8]
    counts = torch.zeros(10)
    for seed in range(300):
        counts[method.free_places(taken, 2, 10, generator(seed))] += 1
    assert (counts[taken] == 0).all() and counts.sum() == 600 and counts[counts > 0].min() > 70


@pytest.mark.parametrize("links", [1, 7, 30])
def test_forward_and_gradients_are_those_of_the_dense_matrix_at_the_links(links):
    n_in, n_out = 6, 5
    place = torch.randperm(n_in * n_out, generator=generator())[:links]
    sparse = method.SparseLinear(n_in, n_out, place, draw(links))
    dense = torch.zeros(n_out, n_in, dtype=torch.double)
    dense.view(-1)[place] = draw(links)
    dense.requires_grad_()
    x, y = draw(4, n_in, seed=1).requires_grad_(), draw(4, n_in, seed=1).requires_grad_()
    out, expected = sparse(x), y @ dense.T
    torch.testing.assert_close(out, expected)
    (out * draw(4, n_out, seed=2)).sum().backward()
    (expected * draw(4, n_out, seed=2)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(sparse.weight.grad, dense.grad.view(-1)[sparse.place], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(sparse.bias.grad, draw(4, n_out, seed=2).sum(0))


def test_a_few_links_give_float32_gradients_within_1e6_of_autograd(device):
    place = torch.randperm(40 * 30, generator=generator())[:200].to(device)
    sparse, weight = method.SparseLinear(40, 30, place, draw(200).float().to(device)), torch.zeros(30, 40)
    weight = weight.to(device)
    weight.view(-1)[place] = draw(200).float().to(device)
    weight.requires_grad_()
    x = draw(16, 40, seed=3).float().to(device)
    sparse(x).square().mean().backward()
    (x @ weight.T).square().mean().backward()
    torch.testing.assert_close(sparse.weight.grad, weight.grad.view(-1)[sparse.place], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fresh", [False, True])
def test_training_with_links_alone_equals_training_with_a_mask_also_across_set_steps(fresh):
    X, options = draw(70, 20), {"h": 15, "eps": 3.0, "epochs": 4, "batch": 16, "seed": 5, "fresh": fresh}
    (sparse, a), (masked, b) = (method.quick_selection(X, kind=kind, **options) for kind in KINDS)
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    for one, two in zip(sparse, masked, strict=True):
        assert torch.equal(one.place, two.links()[0])
        torch.testing.assert_close(one.links()[1], two.links()[1])
        torch.testing.assert_close(one.bias, two.bias)
        assert not two.weight[~two.mask].any() and not two.velocity[~two.mask].any()
    assert a["strength"].shape == (5, 20) and not torch.equal(a["strength"][1], a["strength"][4])


def test_with_all_links_and_zeta_0_it_is_an_ordinary_denoising_autoencoder():
    X, h = draw(30, 8), 6
    layers, _ = method.quick_selection(X, h=h, eps=99, zeta=0, epochs=2, batch=10, noise=0.3, seed=2)
    g = generator(2)
    dense = [nn.Linear(8, h), nn.Linear(h, 8)]
    parameters = [p for layer in dense for p in (layer.weight, layer.bias)]
    with torch.no_grad():
        for layer in dense:
            layer.double().weight.copy_(torch.randn(8 * h, generator=g).double().view_as(layer.weight) / 10)
            layer.bias.zero_()
    noisy = X + 0.3 * torch.randn(X.shape, generator=g).double()
    # weight decay here is not multiplied by the learning rate, so torch's own would be decay / lr without momentum
    opt = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    for _ in range(2):
        for rows in torch.randperm(30, generator=g).split(10):
            keep = torch.rand(10, h, generator=g) >= 0.2
            out = dense[1](torch.sigmoid(dense[0](noisy[rows])) * keep)
            opt.zero_grad()
            (0.5 * (out - X[rows]).square().sum(1).mean()).backward()
            with torch.no_grad():
                for p in parameters:
                    p.mul_(1 - 1e-5)
            opt.step()
    for ours, theirs in zip(layers, dense, strict=True):
        assert len(ours.place) == 8 * h
        torch.testing.assert_close(ours.weight.view_as(theirs.weight), theirs.weight)
        torch.testing.assert_close(ours.bias, theirs.bias)


def test_row_ten_of_a_longer_run_is_the_shorter_run_and_static_links_stay():
    X = draw(40, 10)
    options = {"h": 8, "eps": 2.0, "batch": 10}
    _, long = method.quick_selection(X, epochs=4, **options)
    layers, short = method.quick_selection(X, epochs=2, **options)
    assert torch.equal(long["strength"][:3], short["strength"])
    layers, scores = method.quick_selection(X, epochs=3, zeta=0, **options)
    first = method.random_layer(method.SparseLinear, 10, 8, 2.0, X, generator())
    assert torch.equal(layers[0].place, first.place) and torch.equal(scores["degree"][0], scores["degree"][3])


def test_number_of_links_and_their_weights():
    layer = method.random_layer(method.SparseLinear, 784, 1000, 13.0, torch.zeros(1, 784), generator())
    drawn, full = 13 * 1784, 784 * 1000
    expected = full * (1 - (1 - 1 / full) ** drawn)  # draws that hit a taken place are merged
    assert abs(len(layer.place) - expected) < 100 and len(layer.place) < drawn
    assert layer.weight.std().item() == pytest.approx(0.1, rel=0.02) and not layer.bias.any()


def test_an_input_that_never_changes_gets_no_gradient_and_keeps_its_strength_without_set():
    X = draw(50, 6)
    X[:, 2] = 0
    _, scores = method.quick_selection(X, h=20, eps=2.0, zeta=0, noise=0.0, epochs=3, batch=10, decay=0.0)
    assert torch.equal(scores["strength"][0, 2], scores["strength"][3, 2])
    assert (scores["strength"][0] != scores["strength"][3]).sum() == 5


def test_nothing_of_d_times_h_is_allocated_by_the_links_and_the_mask_does():
    X, d, h = torch.randn(64, 900, generator=generator()), 900, 800
    options = {"h": h, "eps": 2.0, "epochs": 2, "batch": 32}
    peaks = {}
    for kind in KINDS:
        peaks[kind], largest = method.allocated(lambda kind=kind: method.quick_selection(X, kind=kind, **options))
        # one byte a place is what the smallest mask takes
        assert largest < d * h if kind is method.SparseLinear else largest == 4 * d * h
    assert peaks[method.SparseLinear] < 0.2 * peaks[method.MaskedLinear]


def test_allocated_counts_bytes():
    peak, largest = method.allocated(lambda: torch.zeros(1000) + torch.zeros(1000))
    assert largest == 4000 and 8000 <= peak <= 12100


def test_standardising_uses_the_training_rows_and_leaves_constants_alone():
    train, test = torch.tensor([[1.0, 5], [3, 5]]), torch.tensor([[2.0, 6]])
    a, b = method.standardised(train, test)
    assert a.tolist() == [[-1, 0], [1, 0]] and b.tolist() == [[0, 1]]


def test_bad_input_raises():
    X = draw(20, 5)
    for call in (
        lambda: method.quick_selection(X, eps=0),
        lambda: method.quick_selection(X, zeta=1.0),
        lambda: method.quick_selection(X, zeta=-0.1),
        lambda: method.quick_selection(X, epochs=-1),
        lambda: method.quick_selection(X, h=0),
        lambda: method.quick_selection(X[0]),
        lambda: method.quick_selection(X[:0]),
        lambda: method.select(X[0], 0),
        lambda: method.select(X[0], 6),
        lambda: method.free_places(torch.arange(4), 2, 5, generator()),
        lambda: method.SparseLinear(2, 2, torch.tensor([1, 1]), torch.ones(2)),
        lambda: method.SparseLinear(2, 2, torch.tensor([0, 4]), torch.ones(2)),
    ):
        with pytest.raises(ValueError):
            call()
    for call in (
        lambda: method.quick_selection(X / 0),
        lambda: method.select(torch.tensor([1.0, float("nan")]), 1),
        lambda: method.quick_selection(1e30 * X.float(), h=5, epochs=1),
    ):
        with pytest.raises(NotFinite):
            call()


def test_a_layer_that_refuses_a_rewiring_is_left_as_it_was():
    layer = method.SparseLinear(3, 2, torch.tensor([0, 5]), torch.tensor([1.0, 2]))
    with pytest.raises(ValueError, match="different places"):
        layer.rewire(torch.tensor([1, 1]), torch.ones(2), torch.ones(2))
    assert layer.place.tolist() == [0, 5] and layer.weight.tolist() == [1, 2]


RECIPE = "papers/quick-selection/recipe.py"  # which holds the other selectors and the evaluation


def test_laplacian_score_is_the_graph_laplacian_over_the_weighted_variance(recipe):
    X = draw(30, 4)
    X[:, 3] = 0
    distance = torch.cdist(X, X)
    near = torch.zeros(30, 30).scatter(1, distance.argsort(1)[:, 1:6], 1) > 0
    near = near | near.T
    W = torch.where(near, torch.exp(-(distance**2) / distance[near].square().mean()), 0.0)
    D = torch.diag(W.sum(1))
    for r in range(3):
        f = X[:, r] - (X[:, r] @ D.sum(1)) / D.sum()
        expected = (f @ (D - W) @ f) / (f @ D @ f)
        assert recipe.laplacian(X)[r].item() == pytest.approx(-expected.item(), rel=1e-6)
    assert recipe.laplacian(X)[3] < recipe.laplacian(X)[:3].min() - 1  # a constant comes last


def test_clusters_are_matched_to_classes_whatever_their_numbers(recipe):
    y = torch.tensor([2, 2, 0, 0, 1, 1]).repeat(5)
    X = 10.0 * torch.nn.functional.one_hot(y, 3) + 0.01 * draw(30, 3)
    assert recipe.clustering(torch.arange(3), X.float(), y) > 0.8  # restarts may merge two groups, hence not 1
    assert recipe.clustering(torch.arange(3), X.float()[:, [0, 0, 0]], y) < 0.9


def test_the_first_twenty_madelon_like_columns_hold_all_there_is_and_rows_are_split_once(recipe):
    X, X_test, y, y_test = recipe.madelon_like(0)
    assert X.shape == (2000, 500) and X_test.shape == (600, 500) and set(y.tolist()) == set(y_test.tolist()) == {0, 1}
    correlation = np.abs(np.corrcoef(X.numpy().T) - np.eye(500))
    assert correlation[:20].max(1).min() > 0.3 and correlation[20:].max() < 0.15
    assert not (X[:, None, :3] == X_test[None, :, :3]).all(2).any()
