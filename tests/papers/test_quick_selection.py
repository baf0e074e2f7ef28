"""The method cells of the QuickSelection notebook, used without the notebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbkit import papers, recipes
from nbkit.errors import NotFinite

method = papers.method("quick-selection")
recipe = recipes.load("papers/quick-selection/recipe.py")
KINDS = [method.SparseLinear, method.MaskedLinear]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(layer) -> torch.Tensor:
    """W [n_out, n_in] of a layer."""
    W = layer.weight.new_zeros(layer.n_out * layer.n_in)
    W[layer.place] = layer.weight
    return W.view(layer.n_out, layer.n_in)


def from_matrix(kind, W: torch.Tensor):
    """A layer with a link where W [n_out, n_in] is not 0."""
    place = W.flatten().nonzero().flatten()
    return kind(W.shape[1], W.shape[0], place, W.flatten()[place])


@pytest.mark.parametrize("kind", KINDS)
def test_strength_by_hand_with_ties_to_the_lowest_index_and_zeros_last(kind):
    score = method.strength(from_matrix(kind, torch.tensor([[0.0, -2, 1], [3, 0, 0], [0, 0, 0]]).T))
    assert score.tolist() == [3, 3, 0] and method.select(score, 3).tolist() == [0, 1, 2]
    assert method.select(torch.tensor([1.0, 5, 5, 2]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_step_keeps_the_number_of_links_and_removes_the_weakest_of_each_sign(kind):
    layer = method.random_layer(kind, 12, 9, 2.0, draw(1, 12), generator())
    layer.velocity.normal_()
    before = {p: (w, v) for p, w, v in zip(layer.place.tolist(), layer.weight.tolist(), layer.velocity.tolist(),
                                           strict=True)}  # fmt: skip
    keep = method.survivors(layer.weight, 0.3)
    removed, stayed = layer.weight[~keep], layer.weight[keep]
    for sign in (1, -1):
        gone, left = removed[sign * removed > 0].abs(), stayed[sign * stayed > 0].abs()
        assert len(gone) == int(0.3 * (len(gone) + len(left))) and gone.max() <= left.min()
    kept = set(layer.place[keep].tolist())
    method.evolve(layer, 0.3, generator(1))
    place = layer.place.tolist()
    assert len(place) == len(before) == len(set(place))
    assert kept <= set(place) and min(place) >= 0 and max(place) < 12 * 9
    for p, w, v in zip(place, layer.weight.tolist(), layer.velocity.tolist(), strict=True):
        assert (w, v) == before[p] if p in kept else v == 0


def test_new_links_fall_on_every_free_place_equally_often():
    counts = torch.zeros(10)
    for seed in range(400):
        layer = method.SparseLinear(5, 2, torch.arange(4), torch.tensor([1.0, 2, 3, -1]))
        method.evolve(layer, 0.34, generator(seed))
        counts[layer.place] += 1
    assert (counts[1:4] == 400).all()  # only the weakest positive weight goes, and its place is free again
    assert counts.sum() == 1600 and counts[[0, 4, 5, 6, 7, 8, 9]].min() > 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("links", [1, 7, 30])
def test_the_three_products_are_those_of_autograd_at_the_links(kind, links):
    n_in, n_out = 6, 5
    layer = kind(n_in, n_out, torch.randperm(n_in * n_out, generator=generator())[:links], draw(links))
    layer.bias += draw(n_out, seed=4)
    dense = matrix(layer).requires_grad_()
    x, delta = draw(4, n_in, seed=1).requires_grad_(), draw(4, n_out, seed=2)
    expected = x @ dense.T + layer.bias
    torch.testing.assert_close(layer.forward(x.detach()), expected.detach())
    (expected * delta).sum().backward()
    torch.testing.assert_close(layer.back(delta), x.grad)
    torch.testing.assert_close(layer.gradient(x.detach(), delta), dense.grad.view(-1)[layer.place])


def test_a_few_links_give_float32_gradients_within_1e6_of_autograd(device):
    place = torch.randperm(40 * 30, generator=generator())[:200].to(device)
    sparse = method.SparseLinear(40, 30, place, draw(200).float().to(device))
    weight = matrix(sparse).requires_grad_()
    x = draw(16, 40, seed=3).float().to(device)
    out = x @ weight.T
    out.square().mean().backward()
    found = sparse.gradient(x, 2 * sparse.forward(x) / out.numel())
    torch.testing.assert_close(found, weight.grad.view(-1)[sparse.place], rtol=1e-6, atol=1e-6)


def by_the_public_formula(layers, X, noisy, g, *, tanh, masked, lr=0.01, momentum=0.9, decay=1e-5, batch=10):
    """An epoch in NumPy as the public code writes it, dense; ``masked`` sends the error through the mask as well."""
    W = [matrix(layer).T.numpy().copy() for layer in layers]
    there = [w != 0 for w in W]
    b, dW, db = [np.zeros(w.shape[1]) for w in W], [0.0, 0.0], [0.0, 0.0]
    X, noisy = X.numpy(), noisy.numpy()
    for rows in torch.randperm(len(X), generator=g).split(batch):
        x = noisy[rows.numpy()]
        hidden = 1 / (1 + np.exp(-(x @ W[0] + b[0])))
        mask = (torch.rand(hidden.shape, generator=g) >= 0.2).numpy()
        a = mask * hidden
        out = a @ W[1] + b[1]
        out = np.tanh(out) if tanh else out
        delta = out - X[rows.numpy()]
        delta = delta * (1 - np.tanh(out) ** 2) if tanh else delta  # of the output, not of what went into it
        back = (delta @ W[1].T) * hidden * (1 - hidden) * (mask if masked else 1)
        for i, (inputs, error) in enumerate(((x, back), (a, delta))):
            dW[i] = momentum * dW[i] - lr * there[i] * (inputs.T @ error) / len(x)
            db[i] = momentum * db[i] - lr * error.mean(0)
            W[i] = W[i] + dW[i] - decay * W[i]
            b[i] = b[i] + db[i] - decay * b[i]
    return W, b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tanh", [False, True])
def test_an_epoch_is_the_public_codes(kind, tanh):
    X, noisy = draw(60, 20), draw(60, 20, seed=1)
    layers = [method.random_layer(kind, a, b, 3.0, X, generator(7)) for a, b in ((20, 15), (15, 20))]
    W, b = by_the_public_formula(layers, X, noisy, generator(5), tanh=tanh, masked=False)
    method.one_epoch(layers, X, noisy, generator(5), tanh=tanh, batch=10)
    for layer, w, bias in zip(layers, W, b, strict=True):
        np.testing.assert_allclose(matrix(layer).T.numpy(), w, rtol=0, atol=1e-14)
        np.testing.assert_allclose(layer.bias.numpy(), bias, rtol=0, atol=1e-14)


def test_exact_sends_the_error_through_the_mask_and_only_then():
    X, noisy = draw(60, 20), draw(60, 20, seed=1)
    for exact in (False, True):
        layers = [method.random_layer(KINDS[0], a, b, 3.0, X, generator(7)) for a, b in ((20, 15), (15, 20))]
        W = {masked: by_the_public_formula(layers, X, noisy, generator(5), tanh=False, masked=masked)[0]
             for masked in (False, True)}  # fmt: skip
        method.one_epoch(layers, X, noisy, generator(5), exact=exact, batch=10)
        np.testing.assert_allclose(matrix(layers[0]).T.numpy(), W[exact][0], rtol=0, atol=1e-14)
        assert abs(matrix(layers[0]).T.numpy() - W[not exact][0]).max() > 1e-5


@pytest.mark.parametrize("tanh", [False, True])
def test_exact_is_autograd_also_with_a_tanh(tanh):
    X, noisy, lr = draw(10, 8), draw(10, 8, seed=1), 0.1
    layers = [method.random_layer(KINDS[0], a, b, 2.0, X, generator(3)) for a, b in ((8, 6), (6, 8))]
    W = [matrix(layer).requires_grad_() for layer in layers]
    g = generator(5)
    rows = torch.randperm(10, generator=g)
    mask = torch.rand(10, 6, generator=g) >= 0.5
    out = (torch.sigmoid(noisy[rows] @ W[0].T) * mask) @ W[1].T
    out = torch.tanh(out) if tanh else out
    (0.5 * (out - X[rows]).square().sum(1).mean()).backward()
    method.one_epoch(layers, X, noisy, generator(5), exact=True, tanh=tanh, dropout=0.5, lr=lr, decay=0.0)
    for layer, w in zip(layers, W, strict=True):
        expected = (w - lr * w.grad).detach().view(-1)[layer.place]
        torch.testing.assert_close(layer.weight, expected)


def test_without_dropout_and_tanh_both_backward_passes_are_one():
    X, options = draw(40, 10), {"h": 8, "eps": 2.0, "batch": 10, "epochs": 3, "dropout": 0.0}
    scores = [method.quick_selection(X, exact=exact, **options)[1] for exact in (False, True)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("exact", [False, True])
def test_links_alone_and_a_dense_matrix_learn_the_same_also_across_set_steps(exact):
    X = draw(70, 20)
    options = {"h": 15, "eps": 3.0, "epochs": 4, "batch": 16, "seed": 5, "exact": exact}
    (sparse, a), (masked, b) = (method.quick_selection(X, kind=kind, **options) for kind in KINDS)
    torch.testing.assert_close(a, b)
    for one, two in zip(sparse, masked, strict=True):
        assert torch.equal(one.place, two.place)
        torch.testing.assert_close(one.weight, two.weight)
        torch.testing.assert_close(one.bias, two.bias)
        two.forward(torch.zeros(1, two.n_in).double())
        assert torch.equal(two.W, matrix(two))
    assert a.shape == (5, 20) and not torch.equal(a[1], a[4])


def test_with_all_links_zeta_0_and_the_exact_gradient_it_is_an_ordinary_denoising_autoencoder():
    X, h = draw(30, 8), 6
    layers, _ = method.quick_selection(X, h=h, eps=99, zeta=0, epochs=2, batch=10, noise=0.3, seed=2, exact=True)
    start, _ = method.quick_selection(X, h=h, eps=99, zeta=0, epochs=0, noise=0.3, seed=2)
    dense = [torch.nn.Linear(8, h).double(), torch.nn.Linear(h, 8).double()]
    parameters = [p for layer in dense for p in (layer.weight, layer.bias)]
    with torch.no_grad():
        for layer, ours in zip(dense, start, strict=True):
            layer.weight.copy_(matrix(ours))
            layer.bias.zero_()
    g = generator(2)
    for _ in range(2):  # what drawing the layers took
        torch.randn(48, generator=g)
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
        torch.testing.assert_close(matrix(ours), theirs.weight.detach())
        torch.testing.assert_close(ours.bias, theirs.bias.detach())


def test_row_ten_of_a_longer_run_is_the_shorter_run_and_static_links_stay():
    X = draw(40, 10)
    options = {"h": 8, "eps": 2.0, "batch": 10}
    _, long = method.quick_selection(X, epochs=4, **options)
    _, short = method.quick_selection(X, epochs=2, **options)
    assert torch.equal(long[:3], short)
    layers, _ = method.quick_selection(X, epochs=3, zeta=0, **options)
    first = method.random_layer(method.SparseLinear, 10, 8, 2.0, X, generator())
    assert torch.equal(layers[0].place, first.place)


def test_every_says_how_many_epochs_lie_between_set_steps(monkeypatch):
    X, options, steps = draw(40, 10), {"h": 8, "eps": 2.0, "batch": 10, "epochs": 6}, []
    evolve, epoch = method.evolve, method.one_epoch
    monkeypatch.setattr(method, "evolve", lambda *a: steps.append("SET") or evolve(*a))
    monkeypatch.setattr(method, "one_epoch", lambda *a, **o: steps.append("epoch") or epoch(*a, **o))
    method.quick_selection(X, every=3, **options)
    assert steps == ["epoch"] * 3 + ["SET"] * 2 + ["epoch"] * 3  # both layers, and none after the last epoch


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
    assert torch.equal(scores[0, 2], scores[3, 2]) and (scores[0] != scores[3]).sum() == 5


def test_nothing_of_d_times_h_is_allocated_by_the_links_and_the_dense_matrix_does():
    X, d, h = torch.randn(64, 900, generator=generator()), 900, 800
    options = {"h": h, "eps": 2.0, "epochs": 2, "batch": 32}
    peaks = {}
    for kind in KINDS:
        peaks[kind], largest = recipe.allocated(lambda kind=kind: method.quick_selection(X, kind=kind, **options))
        # one byte a place is what the smallest mask takes
        assert largest < d * h if kind is method.SparseLinear else largest == 4 * d * h
    assert peaks[method.SparseLinear] < 0.5 * peaks[method.MaskedLinear]


def test_allocated_counts_bytes():
    peak, largest = recipe.allocated(lambda: torch.zeros(1000) + torch.zeros(1000))
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
        lambda: method.quick_selection(X, noise=-1),
        lambda: method.quick_selection(X, every=0),
        lambda: method.quick_selection(X, h=0),
        lambda: method.quick_selection(X[0]),
        lambda: method.quick_selection(X[:0]),
        lambda: method.select(X[0], 0),
        lambda: method.select(X[0], 6),
        lambda: method.select(X, 2),
        lambda: method.SparseLinear(2, 2, torch.tensor([1, 1]), torch.ones(2)),
        lambda: method.SparseLinear(2, 2, torch.tensor([0, 4]), torch.ones(2)),
        lambda: method.MaskedLinear(2, 2, torch.tensor([0, 1]), torch.ones(3)),
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_refuses_a_rewiring_is_left_as_it_was(kind):
    layer = kind(3, 2, torch.tensor([0, 5]), torch.tensor([1.0, 2]))
    with pytest.raises(ValueError, match="different places"):
        layer.rewire(torch.tensor([1, 1]), torch.ones(2), torch.ones(2))
    assert layer.place.tolist() == [0, 5] and layer.weight.tolist() == [1, 2]
    assert layer.forward(torch.ones(1, 3)).tolist() == [[1, 2]]


# --- the recipe: the other selectors, the evaluation, the tables


def test_laplacian_score_is_the_graph_laplacian_over_the_weighted_variance():
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


def test_clusters_are_matched_to_classes_whatever_their_numbers():
    y = torch.tensor([2, 2, 0, 0, 1, 1]).repeat(5)
    X = 10.0 * torch.nn.functional.one_hot(y, 3) + 0.01 * draw(30, 3)
    assert recipe.clustering(torch.arange(3), X.float(), y) > 0.8  # restarts may merge two groups, hence not 1
    assert recipe.clustering(torch.arange(3), X.float()[:, [0, 0, 0]], y) < 0.9


def test_the_rivals_find_the_columns_that_repeat_each_other():
    torch.manual_seed(0)
    X = torch.randn(300, 12)
    X[:, :4] = 2 * X[:, :1] + 0.1 * torch.randn(300, 4)  # four copies of one column, and of larger spread
    found = {
        "aefs": method.select(recipe.aefs(X, 0, lr=1e-2, alpha=0.3, h=8, epochs=30), 4).tolist(),
        "mcfs": method.select(recipe.mcfs(X, 4, 2), 2).tolist(),
        "concrete": recipe.concrete(X, 1, 0, lr=0.03, h=16, epochs=30),
    }
    assert sorted(found["aefs"]) == [0, 1, 2, 3] and set(found["mcfs"]) & {0, 1, 2, 3} and found["concrete"][0] < 4


def test_the_public_codes_other_rules_by_hand():
    W = torch.tensor([[1.0, 5], [0, 2], [4, 0], [0.5, 0.5]])  # [hidden units, inputs]: sums 6, 2, 4, 1
    back = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, 1]])  # [outputs, hidden units]
    found = recipe.other_rules(method, [from_matrix(KINDS[0], W), from_matrix(KINDS[0], back)])
    assert found["links"].tolist() == [3, 3] and found["output links"].tolist() == [4, 2]
    assert found["strength, weakest cut"].tolist() == [5, 7.5]  # of six positive weights one goes, the first of 0.5
    assert found["output strength"].tolist() == [10, 2]
    assert found["strength, strong half"].tolist() == [5, 5]
    assert found["output strength, strong half"].tolist() == [4, 0]


def test_the_first_twenty_madelon_like_columns_hold_all_there_is_and_rows_are_split_once():
    X, X_test, y, y_test = recipe.madelon_like(0)
    assert X.shape == (2000, 500) and X_test.shape == (600, 500) and set(y.tolist()) == set(y_test.tolist()) == {0, 1}
    correlation = np.abs(np.corrcoef(X.numpy().T) - np.eye(500))
    assert correlation[:20].max(1).min() > 0.3 and correlation[20:].max() < 0.15
    assert not (X[:, None, :3] == X_test[None, :, :3]).all(2).any()


def test_the_stored_trajectory_stays_beside_the_public_codes_and_leaves_it_with_the_mask():
    ours, public = (papers.results("quick-selection", name) for name in ("settings", "public"))
    ours = ours[(ours["zeta"] > 0) & (ours["every"] == 1) & (ours["epoch"] <= 100)]
    well = ours.groupby(["setting", "epoch"])["well"].mean()
    public = public.groupby(["setting", "epoch"])["well"].mean()
    for setting, within in (("public backward", 0.05), ("dropout 0", 0.1)):
        both = well[setting].to_frame("ours").join(public[setting].rename("public"), how="inner")
        assert len(both) >= 9 and (both["ours"] / both["public"] - 1).abs().max() < within
    assert (well["masked backward"] / public["public backward"]).loc[5:].max() < 0.9


def test_three_seeds_of_links_that_stay_are_stored_and_bring_up_no_rare_pixel():
    static = papers.results("quick-selection", "settings").query("zeta == 0 and epoch == 50")
    assert (static.groupby("setting")["seed"].nunique() == 3).all() and static["setting"].nunique() == 3
    assert static["few"].max() == 0


def test_the_stored_strengths_are_those_of_the_table():
    kept = papers.tensors("quick-selection", "strength")
    table = papers.results("quick-selection", "settings").query("seed == 10 and every == 1")
    assert kept["epochs"].tolist() == list(recipe.MOMENTS)
    well = recipe.Pixels(method).inked > 0.2
    for (setting, zeta), rows in table.groupby(["setting", "zeta"]):
        strength = kept[setting if zeta else f"{setting}, links stay"].float()
        stored = rows[rows["epoch"] <= 100].set_index("epoch")["well"]
        for epoch, row in zip(recipe.MOMENTS, strength, strict=False):
            assert row[well].mean().item() == pytest.approx(stored[epoch], rel=1e-3)
