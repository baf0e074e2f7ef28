"""The method cells of the graph-instance-selection notebook, and its recipe's rivals."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from nbkit import papers, recipes

method = papers.method("graph-instance-selection")
recipe = recipes.load("papers/graph-instance-selection/recipe.py")


def rng(seed=0):
    return np.random.default_rng(seed)


def random_graph(n=30, p=0.2, seed=0):
    upper = np.triu(rng(seed).random((n, n)) < p, 1)
    return scipy.sparse.csr_matrix((upper | upper.T).astype(float))


def blobs(n=240, d=5, classes=3, seed=0):
    y = np.arange(n) % classes
    return rng(seed).normal(size=(n, d)) + 4 * np.eye(classes, d)[y], y


def test_every_row_is_in_one_batch_and_every_batch_has_the_shares_of_the_classes():
    y = np.repeat([0, 1, 2], [300, 150, 50])
    batches = method.stratified_batches(y, 100, rng())
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert [np.bincount(y[rows]).tolist() for rows in batches] == [[60, 30, 10]] * 5


def test_nearest_is_the_sorted_row_of_distances_below_the_quantile():
    X = rng().normal(size=(25, 3))
    near = method.nearest(X, 4, 0.3)
    distance = np.linalg.norm(X[:, None] - X, axis=2)
    limit = np.quantile(distance[~np.eye(25, dtype=bool)], 0.3)
    for i in range(25):
        expected = [j for j in np.argsort(distance[i]) if j != i][:4]
        assert set(np.flatnonzero(near[i])) == {j for j in expected if distance[i, j] <= limit}
    assert 0 < near.sum() < 100


def test_a_batch_graph_joins_only_rows_of_its_batch_and_is_symmetric():
    X, y = blobs()
    graphs = method.batch_graphs(X, y, size=60, k=5, q=1.0, rounds=2)
    assert len(graphs) == 8 and all(graph.shape == (60, 60) for _, graph in graphs)
    for rows, graph in graphs:
        near = method.nearest(X[rows], 5)
        np.testing.assert_array_equal(graph.toarray() > 0, near | near.T)


def test_two_rows_share_a_bit_as_often_as_their_angle_says():
    corner = np.array([[1.0, 0], [1, 0], [-1, 0], [0.5, 0.75**0.5]])
    bits = method.hash_codes(corner, 20_000, rng())
    assert (bits[0] == bits[1]).all() and (bits[0] != bits[2]).all()
    assert (bits[0] == bits[3]).mean() == pytest.approx(2 / 3, abs=0.015)


def test_buckets_keep_their_bits_together_and_large_ones_are_split():
    X = rng().normal(size=(1000, 6))
    number = method.buckets(X, 3, rng(1), largest=40)
    bits = method.hash_codes(X, 3, rng(1))
    for b in np.unique(number):
        assert (bits[number == b] == bits[number == b][0]).all()
    assert np.bincount(number).max() <= 40
    assert len(np.unique(method.buckets(X, 3, rng(1), largest=1000))) == 8


@pytest.mark.parametrize("least", [0.0, 0.5, 0.7])
def test_a_hash_graph_is_the_plain_sum_over_families(least):
    X, bits, weights, n = rng().normal(size=(120, 6)), (3, 2), (0.6, 0.4), 120
    found = method.hash_graph(X, bits, weights, k=4, least=least, share=0.5, seed=3)[0][1].toarray()
    same_rng, total = rng(3), np.zeros((n, n))
    for count, weight in zip(bits, weights, strict=True):
        columns = same_rng.permutation(6)[:3]
        number = method.buckets(X[:, columns], count, same_rng)
        total += weight * (number[:, None] == number)
    np.fill_diagonal(total, 0)
    expected = np.zeros((n, n))
    for i in range(n):
        some = sorted(np.flatnonzero(total[i]), key=lambda j: (-total[i, j], np.linalg.norm(X[i] - X[j])))
        for j in some[:4]:
            expected[i, j] = total[i, j] if total[i, j] >= least else 0
    np.testing.assert_allclose(found, np.maximum(expected, expected.T))
    assert found.any()


def test_the_layer_is_a_loop_over_nodes_and_its_gradient_too():
    graph, n = random_graph(), 30
    torch.manual_seed(0)
    layer, x = method.GraphAttention(5, 3, 4).double(), torch.randn(30, 5).double()
    out, alpha = layer(x, method.edge_list(graph)[0])
    z, rows = layer.project(x).view(n, 4, 3), []
    for i in range(n):
        near = [*graph[i].indices, i]
        score = [(z[j] * layer.source).sum(1) + (z[i] * layer.target).sum(1) for j in near]
        weight = F.leaky_relu(torch.stack(score), 0.2).softmax(0)
        rows.append(sum(w[:, None] * z[j] for w, j in zip(weight, near, strict=True)).flatten())
    expected = torch.stack(rows)
    torch.testing.assert_close(out, expected)
    for one, other in zip(
        torch.autograd.grad(out.square().sum(), layer.parameters(), retain_graph=True),
        torch.autograd.grad(expected.square().sum(), layer.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    total = torch.zeros(n, 4).double().index_add(0, method.edge_list(graph)[0][1], alpha)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_shuffled_nodes_have_shuffled_scores():
    X, y = blobs()
    graph = method.hash_graph(X, seed=1)[0][1]
    model = method.train_gat(X, y, [(np.arange(240), graph)], steps=20)
    order = rng(5).permutation(240)
    moved = [(np.arange(240), graph[order][:, order].tocsr())]
    before = method.node_scores(model, X, y, [(np.arange(240), graph)])
    after = method.node_scores(model, X[order], y[order], moved)
    for name in before:
        np.testing.assert_allclose(after[name], before[name].to_numpy()[order], atol=1e-6)


def test_what_a_star_pays_with_equal_attention():
    star = np.zeros((6, 6))
    star[0, 1:] = star[1:, 0] = 1
    X, y = rng().normal(size=(6, 2)), np.array([0, 1, 0, 1, 0, 1])
    model = method.GAT([method.GraphAttention(2, 16, 4), method.GraphAttention(64, 2, 1)])
    found = method.node_scores(model, X, y, [(np.arange(6), scipy.sparse.csr_matrix(star))])
    np.testing.assert_allclose(found["equal attention"], [2.5] + 5 * [1 / 6])
    np.testing.assert_allclose(found["equal attention per neighbour"], [0.5] + 5 * [1 / 6])
    np.testing.assert_array_equal(found["neighbours"], [5, 1, 1, 1, 1, 1])


def test_attention_is_the_weighted_column_sum_over_heads_and_layers_by_dense_matrices():
    X, y = blobs(40)
    graph = random_graph(40).toarray() * (0.5 + np.add.outer(np.arange(40), np.arange(40)) / 80)
    parts = [(np.arange(40), scipy.sparse.csr_matrix(graph))]
    model = method.train_gat(X, y, parts, steps=10)
    near, h, sums = (graph > 0) | np.eye(40, dtype=bool), torch.tensor(X, dtype=torch.float32), []
    with torch.no_grad():
        for layer in model:
            z = layer.project(h).view(40, *layer.source.shape)
            source, target = (z * layer.source).sum(2), (z * layer.target).sum(2)
            score = F.leaky_relu(target[:, None] + source[None], 0.2)  # [i, j, heads]
            alpha = score.masked_fill(~torch.tensor(near)[:, :, None], -torch.inf).softmax(1)
            sums.append((alpha.mean(2).numpy() * graph).sum(0))
            h = F.elu(torch.einsum("ijk,jkd->ikd", alpha, z).flatten(1))
    found = method.node_scores(model, X, y, parts)
    assert np.abs(sums[0] - sums[1]).max() > 0.01
    np.testing.assert_allclose(found["attention"], np.mean(sums, 0), rtol=1e-4)
    several = (graph > 0).sum(1)
    np.testing.assert_allclose(found["attention per neighbour"], np.mean(sums, 0) / several, rtol=1e-4)


def test_masked_edges_are_left_out_and_rows_that_do_not_teach_give_no_label():
    X, y = blobs(60)
    rows, n = np.arange(60), 60
    same = [(rows, random_graph(n))]
    alone = method.train_gat(X, y, [(rows, scipy.sparse.csr_matrix((n, n)))], steps=5, masked=0.0)
    masked = method.train_gat(X, y, same, steps=5, masked=1.0)
    full = method.train_gat(X, y, same, steps=5, masked=0.0)
    torch.testing.assert_close(list(masked.parameters()), list(alone.parameters()))
    assert (masked[0].project.weight - full[0].project.weight).abs().max() > 1e-3
    silent = (torch.rand(n, generator=torch.Generator().manual_seed(0)) >= 0.5).numpy()
    other = np.where(silent, (y + 1) % 3, y)
    one, two = (method.train_gat(X, labels, same, steps=5, teach=0.5) for labels in (y, other))
    assert silent.any() and all(map(torch.equal, one.parameters(), two.parameters()))


def test_confidence_and_boundary_are_those_of_the_logits_and_a_row_without_neighbours_gets_nothing():
    X, y = blobs(60)
    graph = random_graph(60, 0.1).tolil()
    graph[7] = 0
    graph[:, 7] = 0
    graph = graph.tocsr()
    model = method.train_gat(X, y, [(np.arange(60), graph)], steps=30)
    found = method.node_scores(model, X, y, [(np.arange(60), graph)])
    with torch.no_grad():
        p = model(torch.tensor(X, dtype=torch.float32), method.edge_list(graph)[0])[0].softmax(1).double().numpy()
    others = [max(row[k] for k in range(3) if k != label) for row, label in zip(p, y, strict=True)]
    own = p[np.arange(60), y]
    np.testing.assert_allclose(found["confidence"], own)
    np.testing.assert_allclose(found["boundary"], -np.abs(own - others))
    assert found["attention"][7] == found["attention per neighbour"][7] == found["neighbours"][7] == 0


def test_the_network_learns_what_can_be_told_and_does_not_touch_the_global_generator():
    X, y = blobs()
    state = torch.get_rng_state()
    graphs = method.batch_graphs(X, y, size=80, k=5)
    model = method.train_gat(X, y, graphs, steps=100)
    again = method.train_gat(X, y, graphs, steps=100)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert method.node_scores(model, X, y, graphs)["confidence"].mean() > 0.9


def test_selection_keeps_shares_of_classes_the_highest_first_and_ties_by_lot():
    y = np.repeat([0, 1, 2], [100, 40, 1])
    score = np.arange(141.0)
    rows = method.select(score, y, 0.1, rng())
    assert rows.tolist() == [*range(90, 100), *range(136, 140), 140]
    assert method.select(score, y, 1.0, rng()).tolist() == list(range(141))
    drawn = [method.select(np.zeros(141), y, 0.1, rng(seed)) for seed in range(300)]
    counts = np.bincount(np.concatenate(drawn), minlength=141)
    assert counts[:100].min() > 10 and counts[140] == 300


@pytest.mark.parametrize(
    "call",
    [
        lambda: method.select(np.zeros(3), np.zeros(4), 0.1, rng()),
        lambda: method.select(np.array([0, np.nan]), np.zeros(2), 0.1, rng()),
        lambda: method.select(np.zeros(3), np.zeros(3), 0.0, rng()),
        lambda: method.nearest(np.zeros((5, 2)), 5),
        lambda: method.nearest(np.full((5, 2), np.nan), 2),
        lambda: method.nearest(np.zeros((5, 2)), 2, 0.0),
        lambda: method.hash_codes(np.zeros(5), 2, rng()),
        lambda: method.stratified_batches(np.arange(10), 5, rng()),
        lambda: method.batch_graphs(np.zeros((9, 2)), np.zeros(8), k=2),
        lambda: method.hash_graph(np.ones((9, 2)), k=0),
        lambda: method.hash_graph(np.ones((9, 2)), bits=(0,)),
        lambda: method.hash_graph(np.ones((9, 2)), share=0.0),
        lambda: method.hash_graph(np.full((9, 2), np.nan)),
        lambda: method.train_gat(np.full((9, 2), np.nan), np.zeros(9, int), []),
        lambda: method.train_gat(np.ones((9, 2)), np.zeros(8, int), []),
    ],
)
def test_bad_input_is_named(call):
    with pytest.raises(ValueError):
        call()


def test_condensed_rows_classify_every_row_and_herding_meets_the_mean():
    X, y = blobs(150)
    rows = recipe.condensed(X, y, rng())
    nearest = np.linalg.norm(X[:, None] - X[rows], axis=2).argmin(1)
    assert (y[rows][nearest] == y).all() and len(np.unique(rows)) == len(rows) < 150
    herded = recipe.herded(X, 15)
    apart = np.linalg.norm(X[herded].mean(0) - X.mean(0))
    lots = [np.linalg.norm(X[rng(s).choice(150, 15, replace=False)].mean(0) - X.mean(0)) for s in range(50)]
    assert len(set(herded)) == 15 and apart < min(lots)


@pytest.mark.parametrize("name", recipe.NAMES)
def test_no_row_is_in_both_parts_and_no_night_either(name):
    X, X_test, y, y_test = recipe.prepare(name, seed=0)
    assert len(X) == len(y) <= 4500 and len(X_test) == len(y_test)
    if name != "sleep-stages":
        assert not {row.tobytes() for row in X} & {row.tobytes() for row in X_test}
        np.testing.assert_allclose(X.mean(0), 0, atol=1e-6)


def test_sleep_stages_mostly_go_on_and_edited_rows_do_so_nearly_always():
    """The text's reason why edited rows beat the full table there, and why K-means does harm."""
    X, X_test, y, y_test = recipe.prepare("sleep-stages", seed=0)
    before, before_test = X[:, 3:].argmax(1), X_test[:, 3:].argmax(1)
    usual = np.array([np.bincount(y[before == stage], minlength=7).argmax() for stage in range(7)])
    assert (usual[before_test] == y_test).mean() == pytest.approx(0.93, abs=0.005)
    near = NearestNeighbors(n_neighbors=4).fit(X).kneighbors(X, return_distance=False)[:, 1:]
    edited = ((y[near] == y[:, None]).sum(1) >= 2).astype(float)
    rows = method.select(edited, y, 0.04, rng())
    spread = recipe.by_class(lambda part, m: recipe.spread_out(part, m, 0), X, y, 0.04)
    go_on = before == y
    assert go_on.mean() == pytest.approx(0.93, abs=0.01)
    assert go_on[rows].mean() > 0.985 and go_on[spread].mean() < 0.78


def test_the_shipped_table_says_what_the_text_says_of_its_judges():
    table = papers.results("graph-instance-selection", "selections").fillna({"builder": "no graph"})
    plain = table[table["builder"] == "no graph"].pivot_table("gain", ["data", "seed"], "score")
    assert all(recipe.sure(plain["edited"]).values())
    assert recipe.sure(plain["k-means"]) == {
        "fashion-mnist": True, "optdigits": True, "sleep-stages": False, "spambase": False,
    }  # fmt: skip
    exact = {}
    for judge in ("neighbour", "forest"):
        found = table.pivot_table(judge, ["data", "seed"], ["score", "builder"])
        exact[judge] = found["attention", "all pairs"] - found["random", "no graph"]
    assert recipe.sure(exact["neighbour"])["optdigits"] and recipe.sure(exact["neighbour"])["spambase"]
    assert exact["neighbour"].groupby("data").mean().round(3)[["optdigits", "spambase"]].tolist() == [0.029, 0.024]
    assert exact["forest"].groupby("data").mean().round(3)["optdigits"] == -0.016
