"""MAP-Elites: the archive beside pyribs and brute force, searches, measures, the retina, and what is stored."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
from ribs.archives import GridArchive

from nbkit import papers, recipes

method = papers.method("map-elites")
recipe = recipes.load("papers/map-elites/recipe.py")
GRID = ((4, 5), (0, -1), (2, 1))


def solutions(n, seed=0, ties=False):
    """Genomes, performances, features; some features outside the grid."""
    rng = np.random.default_rng(seed)
    performance = rng.integers(0, 4, n) / 4 if ties else rng.random(n)
    return rng.random((n, 3)), performance, rng.uniform((-0.2, -1.2), (2.2, 1.2), (n, 2))


def bits(seed=0):
    """Six bits, performances by lot, the ones in each half as features."""
    value = np.random.default_rng(seed).random(64)
    return method.Domain(
        lambda n, rng: rng.integers(0, 2, (n, 6)),
        lambda x, rng: x ^ (rng.random(x.shape) < 0.2),
        lambda x: (value[x @ 2 ** np.arange(6)], x.reshape(-1, 2, 3).sum(2)),
        (0, 0),
        (4, 4),
    )


# the archive


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 200, 1000])
def test_the_archive_is_that_of_pyribs(ties, batch):
    genomes, performance, features = solutions(1000, ties=ties)
    ours = method.Archive(*GRID)
    theirs = GridArchive(solution_dim=3, dims=GRID[0], ranges=list(zip(*GRID[1:], strict=True)), epsilon=0)
    for k in range(0, 1000, batch):
        part = slice(k, k + batch)
        entered = ours.insert(performance[part], features[part])
        status = theirs.add(genomes[part], performance[part], features[part])["status"]
        assert set(entered) <= set(np.flatnonzero(status))  # pyribs also marks what a better one of its batch replaced
    found = theirs.data(["index", "objective", "solution"], return_type="dict")
    order = np.argsort(found["index"])
    filled = np.flatnonzero(ours.elites >= 0)
    assert found["index"][order].tolist() == filled.tolist()
    assert found["objective"][order].tolist() == ours.performance[filled].tolist()
    np.testing.assert_array_equal(found["solution"][order], genomes[ours.elites[filled]])
    assert theirs.stats.coverage == pytest.approx(len(filled) / 20)
    assert theirs.stats.qd_score == pytest.approx(ours.performance[filled].sum())
    assert theirs.stats.obj_max == ours.performance.max()


def test_a_batch_enters_as_if_one_by_one():
    _, performance, features = solutions(500, ties=True)
    whole, single = method.Archive(*GRID), method.Archive(*GRID)
    whole.insert(performance, features)
    for i in range(500):
        single.insert(performance[i : i + 1], features[i : i + 1])
    np.testing.assert_array_equal(whole.performance, single.performance)
    np.testing.assert_array_equal(whole.elites, single.elites)


def test_without_ties_the_order_does_not_matter():
    _, performance, features = solutions(300)
    order = np.random.default_rng(1).permutation(300)
    one, other = method.Archive(*GRID), method.Archive(*GRID)
    one.insert(performance, features)
    other.insert(performance[order], features[order])
    np.testing.assert_array_equal(one.performance, other.performance)
    assert np.array_equal(order[other.elites[other.elites >= 0]], one.elites[one.elites >= 0])


def test_no_cell_ever_gets_worse():
    archive, before = method.Archive(*GRID), np.full(20, -np.inf)
    for seed in range(20):
        archive.insert(*solutions(30, seed)[1:])
        assert (archive.performance >= before).all()
        before = archive.performance.copy()


def test_cells_by_hand_and_what_lies_outside_goes_to_the_border():
    ends = [[0, -1], [0.499, -0.601], [0.5, -0.6], [2, 1], [-9, 9], [np.inf, 0]]
    assert method.cells(ends, *GRID).tolist() == [0, 0, 6, 19, 4, 17]


# the search


@pytest.mark.parametrize("seed", range(3))
def test_the_map_becomes_the_best_of_every_cell(seed):
    domain = bits(seed)
    every = np.array(list(itertools.product((0, 1), repeat=6)))
    performance, features = domain.evaluate(every)
    truth = [performance[(features == [a, b]).all(1)].max() for a in range(4) for b in range(4)]
    run = method.search(domain, method.MapElites(domain, (4, 4)), 3000, seed, first=20, batch=20)
    assert method.chart(run, domain, (4, 4)).performance.tolist() == truth


def test_on_one_cell_it_is_a_hill_climber():
    domain = bits()
    run = method.search(domain, method.MapElites(domain, (1, 1)), 200, 0, first=10, batch=10)
    for k in range(10, 200, 10):
        assert (run.parents[k : k + 10] == run.performance[:k].argmax()).all()


def test_parents_are_drawn_evenly_among_the_elites_whatever_they_score():
    domain = bits()
    choose = method.MapElites(domain, (4, 4))
    run = method.search(domain, choose, 400, 0, first=20, batch=20)
    drawn = choose(run, 16_000, np.random.default_rng(1))
    elites = method.chart(run, domain, (4, 4)).elites
    share = np.array([(drawn == elite).mean() for elite in elites[elites >= 0]])
    assert share.sum() == pytest.approx(1) and np.abs(share - share.mean()).max() < 5 * (share.mean() / 16_000) ** 0.5


def test_every_search_starts_alike_and_evaluates_as_many():
    domain = recipe.planar()
    runs = {}
    for arm in recipe.ARMS:
        first = 1000 if arm == "random" else 400
        choose = recipe.chooser(arm, method, domain, (10, 10), 1000)
        runs[arm] = method.search(domain, choose, 1000, 3, first=first)
    for arm, run in runs.items():
        assert len(run.performance) == 1000 and (run.parents[:400] == -1).all()
        assert (run.parents[400:] >= 0).all() or arm == "random"
        assert (run.parents < np.arange(1000)).all()
        if arm != "random":
            np.testing.assert_array_equal(run.genomes[:400], runs["MAP-Elites"].genomes[:400])
        np.testing.assert_array_equal(run.performance, domain.evaluate(run.genomes)[0])


def test_a_longer_search_begins_with_the_shorter_one():
    domain = recipe.planar()
    short, long = (method.search(domain, method.MapElites(domain, (9, 9)), n, 0, first=200) for n in (500, 900))
    np.testing.assert_array_equal(short.genomes[:400], long.genomes[:400])


def test_refinement_begins_on_a_map_a_quarter_as_fine():
    domain = recipe.planar()
    choose = recipe.chooser("refined", method, domain, (8, 8), 800)
    run = method.search(domain, choose, 800, 0, first=200)
    for done, shape in ((200, (2, 2)), (400, (8, 8))):
        elites = method.chart(run, domain, shape, done).elites
        assert set(run.parents[done : done + 200]) <= set(elites[elites >= 0])


# measures


def test_measures_by_hand():
    four = method.metrics(np.array([[0.5, -np.inf, 0.9, -np.inf], [0.25, 0.8, -np.inf, -np.inf]]))
    assert four["coverage"] == pytest.approx([2 / 3, 2 / 3]) and four["precision"] == pytest.approx([1, 0.75])
    assert four["reliability"] == pytest.approx([2 / 3, 0.5]) and four["best"] == pytest.approx([1, 0.8 / 0.9])


def test_the_best_map_scores_one_and_reliability_is_precision_times_coverage():
    rng = np.random.default_rng(0)
    maps = np.where(rng.random((5, 40)) < 0.6, rng.random((5, 40)), -np.inf)
    assert all(v == 1 for v in method.metrics(maps.max(0)).values())
    four = method.metrics(maps)
    np.testing.assert_allclose(four["reliability"], four["precision"] * four["coverage"])
    worse = method.metrics(maps, np.append(maps, np.ones((1, 40)), 0).max(0))
    assert all((worse[k] <= four[k] + 1e-12).all() for k in four)


# rivals


def test_of_equals_the_younger_survives():
    choose = recipe.Evolution(2)
    performance = np.array([0.5, 0.7, 0.2])
    run = method.Run(np.zeros((3, 1)), performance, np.zeros((3, 2)), np.full(3, -1))
    choose(run, 1, np.random.default_rng(0))
    assert sorted(choose.alive) == [0, 1]
    run = method.Run(np.zeros((4, 1)), np.append(performance, 0.5), np.zeros((4, 2)), np.full(4, -1))
    choose(run, 1, np.random.default_rng(0))
    assert sorted(choose.alive) == [1, 3]


def test_fronts_are_those_of_a_loop():
    value = np.random.default_rng(0).integers(0, 6, (60, 2))
    left, expected = set(range(60)), np.zeros(60, int)
    for k in itertools.count():
        now = {i for i in left if not any((value[j] >= value[i]).all() and (value[j] > value[i]).any() for j in left)}
        expected[list(now)] = k
        left -= now
        if not left:
            break
    np.testing.assert_array_equal(recipe.fronts(value), expected)


def test_crowding_by_hand():
    room = recipe.crowding(np.array([[0, 4], [1, 3], [3, 1], [4, 0], [9, 9]]), np.array([0, 0, 0, 0, 1]))
    assert room.tolist() == [np.inf, 1.5, 1.5, np.inf, np.inf]


# the retina


def by_hand():
    half = np.array([[1, 2], [1, -2], [1, 2], [1, -2]])
    first = np.zeros((8, 8))
    first[:4, :2], first[4:, 4:6] = half, half[::-1]
    rest = [np.kron(np.eye(2), [[1, 0], [1, 0], [0, 0], [0, 0]]), np.kron(np.eye(2), [[1], [0]]), np.ones((2, 1))]
    biases = [-1, -2, 0, 0, -1, -2, 0, 0, 1, 0, 1, 0, 0, 0, -1]
    return np.concatenate([*map(np.ravel, [first, *rest]), biases])[None].astype(np.int8)


def test_a_network_by_hand_is_perfect_and_one_that_says_no_scores_three_quarters():
    performance, features = recipe.see(by_hand())
    assert performance == 1
    silent = np.zeros((1, recipe.GENES), np.int8)
    silent[0, -1] = -1
    assert recipe.see(silent)[0] == 0.75 and recipe.see(0 * silent)[0] == 0  # an output of 0 is never right
    # sideways, squared: from the pixels of a half 14 and 6; to "or" from -3.5 and -2.5 to -2, from 0.5 and 1.5 to 1
    sideways = 2 * (14 + 6) + (2.25 + 0.25) + (0.25 + 0.25) + (1 + 0) + (1 + 1)
    assert features[0, 0] == 24 + sideways


def test_outputs_are_those_of_the_smooth_network_pattern_by_pattern():
    genomes = recipe.wire(5, np.random.default_rng(0))
    found = recipe.answers(genomes)
    for i in range(5):
        for s in range(0, 256, 5):
            h = np.array([1.0 if s >> k & 1 else -1.0 for k in range(8)])
            for weights, biases in recipe.layers(genomes[i : i + 1].astype(float)):
                h = np.tanh(20 * (h @ weights[0] + biases[0]))
            assert found[i, s] == h[0]


def test_an_object_is_three_pixels_or_only_the_outer_column_and_the_halves_are_mirrored():
    x, right = recipe.task()
    left = [x[s, :4] for s in range(256) if s >> 4 == 15 and right[s] > 0]
    for half in left:
        assert half.sum() >= 2 or (half[1] == half[3] == -1 and half.max() == 1)
    assert len(left) == 8 and (right > 0).sum() == 64
    for s in range(256):
        mirrored = int("".join(reversed(f"{s:08b}")), 2)
        assert right[s] == right[mirrored]


@pytest.mark.parametrize("seed", range(3))
def test_modularity_is_that_of_networkx_for_the_split_found(seed):
    link = recipe.links(recipe.wire(20, np.random.default_rng(seed)))
    q, sides = recipe.modularity(link)
    for i in range(20):
        graph = nx.from_numpy_array(link[i], create_using=nx.DiGraph)
        parts = [part for part in (set(np.flatnonzero(sides[i] == s)) for s in (-1, 1)) if part]
        if graph.number_of_edges():
            assert q[i] == pytest.approx(max(nx.community.modularity(graph, parts, weight=None), 0), abs=1e-9)


def test_two_cliques_that_nothing_joins_have_modularity_one_half_and_no_graph_none():
    link = np.zeros((2, 8, 8))
    link[0, :4, :4] = link[0, 4:, 4:] = 1 - np.eye(4)
    q, sides = recipe.modularity(link)
    assert q.tolist() == [0.5, 0] and len(set(sides[0, :4])) == len(set(sides[0, 4:])) == 1


def test_remembered_graphs_give_the_same():
    remembering, rng = recipe.Remembering(), np.random.default_rng(0)
    genomes = recipe.wire(40, rng)
    for _ in range(3):
        for one, other in zip(remembering(genomes), recipe.see(genomes), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)
        genomes = recipe.rewire(genomes, rng)


def test_mutation_leaves_parents_alone_and_keeps_to_the_alphabet():
    rng = np.random.default_rng(0)
    genomes = recipe.wire(4000, rng)
    before = genomes.copy()
    child = recipe.rewire(genomes, rng)
    np.testing.assert_array_equal(genomes, before)
    assert np.abs(child).max() == 2 and child.dtype == np.int8
    there, now = before[:, : recipe.WEIGHTS] != 0, child[:, : recipe.WEIGHTS] != 0
    came, went = (now & ~there).sum(1), (there & ~now).sum(1)
    assert came.max() == went.max() == 1
    some = there.any(1) & ~there.all(1)
    assert came[some].mean() == pytest.approx(0.2, abs=0.03) and went[some].mean() == pytest.approx(0.2, abs=0.03)
    w, v = before[:, : recipe.WEIGHTS], child[:, : recipe.WEIGHTS]
    stepped = there & now & (w != v)
    level = lambda x: x + 2 - (x > 0)  # noqa: E731
    assert (np.abs(level(v.astype(int)) - level(w.astype(int)))[stepped] == 1).all()
    shares = there.mean(1)
    assert np.histogram(shares, 4, (0, 1))[0] == pytest.approx(1000, abs=150)


def test_the_arm_reaches_where_trigonometry_says():
    quarter = np.array([[0.5, 0.75], [0.75, 0.75]])  # angles 0, 90 and 90, 90 degrees
    np.testing.assert_allclose(recipe.joints(quarter)[:, -1], [[0.5, 0.5], [-0.5, 0.5]], atol=1e-12)
    performance, _ = recipe.bend(quarter)
    assert performance == pytest.approx([0.75, 1])


# bad input


def test_grids_that_are_none_are_refused():
    bad = [((0, 5), (0, 0), (1, 1)), ((4,), (0, 0), (1, 1)), ((4, 4), (0, 1), (1, 1)), ((4, 4), (0, 0), (1, np.nan))]
    bad.append(((4, 4), (0, 0), (1, np.inf)))
    for shape, low, high in bad:
        with pytest.raises(ValueError):
            method.Archive(shape, low, high)


def test_what_cannot_be_entered_is_refused_and_changes_nothing():
    archive = method.Archive(*GRID)
    archive.insert(*solutions(50)[1:])
    before = archive.performance.copy(), archive.elites.copy(), archive.seen
    good, features = solutions(3)[1:]
    cases = [(good, features[:2]), (good * np.nan, features), (good, features * np.nan), (good, features[:, :1])]
    for performance, b in cases:
        with pytest.raises(ValueError):
            archive.insert(performance, b)
    assert np.array_equal(archive.performance, before[0]) and np.array_equal(archive.elites, before[1])
    assert archive.seen == before[2]


def test_a_map_serves_one_search():
    domain = bits()
    choose = method.MapElites(domain, (4, 4))
    method.search(domain, choose, 100, 0, first=20, batch=20)
    with pytest.raises(ValueError, match="another search"):
        method.search(domain, choose, 100, 1, first=20, batch=20)


def test_counts_and_maps_that_make_no_sense_are_refused():
    domain = bits()
    for evaluations, first, batch in ((100, 200, 20), (100, 30, 20), (100, 20, 0), (100, 0, 20)):
        with pytest.raises(ValueError, match="batch"):
            method.search(domain, method.MapElites(domain, (4, 4)), evaluations, 0, first=first, batch=batch)
    none, nan = np.full((1, 3), -np.inf), np.array([[np.nan, 1]])
    for maps, best in ((-np.eye(2), None), (none, None), (np.ones(3), np.zeros(3)), (nan, None), (np.zeros(3), None)):
        with pytest.raises(ValueError):
            method.metrics(maps, best)
    for bad in (np.zeros((2, 120)), np.full((1, recipe.GENES), 3), np.zeros(recipe.GENES)):
        with pytest.raises(ValueError, match="genomes"):
            recipe.layers(bad)
    for many, step in ((1, 0.1), (5, 0)):
        with pytest.raises(ValueError):
            recipe.planar(many, step)
    with pytest.raises(ValueError):
        recipe.joints(np.full((1, 3), 1.5))


# what is stored


def test_every_run_is_stored_and_its_map_gives_its_row():
    table = papers.results("map-elites", "retina").set_index(["arm", "seed", "evaluations"]).sort_index()
    assert not table.index.duplicated().any()
    stored = papers.tensors("map-elites", "maps")
    best = recipe.share(stored["M*"].numpy())
    for arm in recipe.ARMS:
        for seed in range(4):
            found = recipe.measured(method, recipe.share(stored[arm][seed].numpy()), best)
            row = table.loc[(arm, seed, recipe.COMMON)]
            assert all(row[name] == pytest.approx(value, abs=2e-6) for name, value in found.items())
            assert row["highest"] == stored[arm][seed].max() / 256
    for arm, seeds in recipe.LONG.items():
        for seed in range(seeds):
            assert table.loc[(arm, seed)].index.tolist() == list(recipe.BUDGETS)


def test_the_stored_elites_are_in_their_cells():
    stored = papers.tensors("map-elites", "maps")
    counts = stored["MAP-Elites"][0].numpy()
    filled = np.flatnonzero(counts >= 0)
    performance, features = recipe.see(stored["genomes"].numpy()[filled])
    domain = recipe.eye()
    np.testing.assert_array_equal(method.cells(features, recipe.GRID, domain.low, domain.high), filled)
    np.testing.assert_array_equal(256 * performance, counts[filled])


def test_each_way_leads_from_a_random_network_to_the_best_of_its_run():
    ways = papers.results("map-elites", "ways")
    table = papers.results("map-elites", "retina").query("evaluations == @recipe.COMMON").set_index(["arm", "seed"])
    for key, way in ways.groupby(["arm", "seed"]):
        assert way["evaluation"].is_monotonic_increasing and way["evaluation"].iloc[0] < 2000
        assert way["performance"].iloc[-1] == pytest.approx(table.loc[key, "highest"], abs=1e-6)


def test_the_arm_has_every_search_with_the_step_its_pilots_chose():
    arms, steps = papers.results("map-elites", "arm"), papers.results("map-elites", "steps")
    assert (arms.groupby(["arm", "chosen"]).size() == recipe.ARM_SEEDS).all()
    mean = steps.groupby(["arm", "step"])[["reliability", "best"]].mean()
    for (arm, why), part in arms.groupby(["arm", "chosen"]):
        assert part["step"].nunique() == 1 and part["step"].iloc[0] == mean.loc[arm, why].idxmax()
