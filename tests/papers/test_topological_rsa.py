"""Geo-topological matrices, paths and the telling of layers: values by hand, peers, and what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import squareform

from nbkit import models, papers, recipes

topo = papers.method("topological-rsa")
recipe = recipes.load("papers/topological-rsa/recipe.py")
SEEDS = st.integers(0, 10_000)


def some(seed, *shape):
    return np.random.default_rng(seed).random(shape or (3, 28))


# f


@given(SEEDS, st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_f_keeps_order_and_lies_between_0_and_1(seed, thresholds):
    d = some(seed)
    f = topo.geotopological(d, *thresholds)
    assert f.shape == d.shape and f.min() >= 0 and f.max() <= 1
    order = d[0].argsort()
    assert (np.diff(f[0][order]) >= 0).all()


@given(SEEDS)
def test_ranks_are_blind_to_increasing_maps_and_plain_values_to_scale(seed):
    d = some(seed)
    assert np.array_equal(topo.geotopological(np.exp(5 * d), 0.3, 0.6), topo.geotopological(d, 0.3, 0.6))
    plain = [topo.geotopological(x, 0.3, 0.6, ranked=False) for x in (d, 7 * d + 2)]
    assert np.allclose(*plain, atol=1e-12)


def test_thresholds_0_and_1_give_the_scaled_ranks():
    assert np.allclose(topo.geotopological([5.0, 1.0, 3.0, 3.0], 0, 1), [1, 0, 0.5, 0.5])


def test_equal_thresholds_cut_once():
    assert topo.geotopological([4.0, 1.0, 3.0, 2.0], 0.5, 0.5).tolist() == [1, 0, 1, 0]


def test_f_of_one_rdm_is_rsatoolboxs():
    import sys

    import rsatoolbox

    d = 10 + 10 * some(0, 28)  # in place, it sets what is above the quantile after the line was laid: far from [0, 1]
    transform = sys.modules["rsatoolbox.rdm.transform"].geotopological_transform
    theirs = transform(rsatoolbox.rdm.RDMs(d[None].copy()), 0.2, 0.7).get_vectors()[0]
    assert np.allclose(topo.geotopological(d, 0.2, 0.7, ranked=False), theirs, atol=1e-12)


@pytest.mark.parametrize("thresholds", [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_thresholds_that_are_none_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds"):
        topo.geotopological(some(0), *thresholds)


@pytest.mark.parametrize("d", [np.ones(6), np.array([0.1, np.nan, 0.3]), np.array([0.1, np.inf, 0.3])])
def test_an_rdm_without_differences_is_refused(d):
    with pytest.raises(ValueError, match="finite|equal"):
        topo.geotopological(d, 0.2, 0.8, ranked=False)


# paths


def test_paths_on_a_line_add_up():
    line = np.array([0.5, 1, 1, 0.5, 1, 0.5])  # 0-1, 0-2, 0-3, 1-2, 1-3, 2-3
    assert topo.geodesic(line).tolist() == [0.5, 1.0, 1.5, 0.5, 1.0, 0.5]


def test_an_edge_of_length_0_joins():
    assert topo.geodesic([0.0, 1.0, 0.3]).tolist() == [0.0, 0.3, 0.3]


def test_what_no_path_joins_is_as_far_as_the_longest_path():
    apart = squareform(np.array([0.2, 1, 1, 1, 1, 0.6]))
    assert topo.geodesic(squareform(apart)).tolist() == [0.2, 0.6, 0.6, 0.6, 0.6, 0.6]
    assert topo.geodesic(np.ones(3)).tolist() == [1, 1, 1]


@given(SEEDS)
def test_paths_are_those_of_floyd_and_warshall(seed):
    f = topo.geotopological(some(seed, 2, 45), 0.1, 0.6)
    for one, found in zip(f, topo.geodesic(f), strict=True):
        paths = squareform(np.where(one < 1, one, np.inf))
        for k in range(len(paths)):
            paths = np.minimum(paths, paths[:, k, None] + paths[None, k])
        paths[np.isinf(paths)] = paths[np.isfinite(paths)].max()
        assert np.allclose(squareform(found), paths)


@pytest.mark.parametrize("d", [[0.1, 1.2, 0.3], [-0.1, 0.2, 0.3], [0.1, float("nan"), 0.3]])
def test_paths_need_dissimilarities_between_0_and_1(d):
    with pytest.raises(ValueError, match="geotopological"):
        topo.geodesic(d)


# telling


def test_what_differs_by_label_alone_is_told_and_noise_is_not():
    labels = np.tile(some(0, 1, 4, 50), (5, 1, 1))
    assert (topo.identify(labels + 0.01 * some(1, 5, 4, 50)) == np.arange(4)).all()
    told = [(topo.identify(some(s, 5, 4, 50)) == np.arange(4)).mean() for s in range(50)]
    assert abs(np.mean(told) - 0.25) < 0.04


def test_the_own_network_is_left_out_of_the_means():
    """Two instances whose labels are swapped: each is told the other's, never its own."""
    first = some(0, 2, 30)
    assert topo.identify(np.stack([first, first[::-1]])).tolist() == [[1, 0], [1, 0]]


def test_told_is_sklearns_nearest_centroid():
    from sklearn.neighbors import NearestCentroid

    vectors = some(3, 6, 4, 20) + 0.3 * some(4, 1, 4, 20)
    for k, found in enumerate(topo.identify(vectors)):
        rest = np.delete(vectors, k, axis=0)
        peer = NearestCentroid().fit(rest.reshape(-1, 20), np.tile(np.arange(4), 5))
        assert found.tolist() == peer.predict(vectors[k]).tolist()


@pytest.mark.parametrize("shape", [(4, 20), (1, 4, 20)])
def test_telling_needs_other_instances(shape):
    with pytest.raises(ValueError, match="instances"):
        topo.identify(some(0, *shape))


def test_telling_refuses_nan():
    vectors = some(0, 3, 2, 10)
    vectors[1, 0, 4] = np.nan
    with pytest.raises(ValueError, match="finite"):
        topo.identify(vectors)


def test_rdms_of_layers_repeat_with_the_generator_and_leave_the_network_alone():
    model, x = models.build("small-cnn", seed=0, widths=[4, 4], pool=[1]), torch.rand(7, 1, 12, 12)
    clean = topo.layer_rdms(model, x, ["relu1", "head"])
    noisy = [topo.layer_rdms(model, x, ["relu1"], 1.0, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert clean.shape == (2, 21) and np.array_equal(*noisy) and not np.allclose(noisy[0], clean[:1])
    assert not model.relu1._forward_hooks


# the recipe


def test_sets_of_digits_are_balanced_and_share_no_image():
    sets = [recipe.stimuli(k) for k in range(33)]
    assert all(len(s) == 60 for s in sets)
    assert len({image.numpy().tobytes() for s in sets for image in s}) == 33 * 60


def test_a_ratio_and_how_often_the_own_layer_is_closer_by_loops():
    vectors = some(5, 3, 2, 10)
    found, closer = recipe.within_across(vectors)
    for k in range(3):
        others = [j for j in range(3) if j != k]
        pairs = [(a, b, j) for a in (0, 1) for b in (0, 1) for j in others]
        away = {(a, b, j): np.linalg.norm(vectors[k, a] - vectors[j, b]) for a, b, j in pairs}
        within = np.mean([value for (a, b, _), value in away.items() if a == b])
        across = np.mean([value for (a, b, _), value in away.items() if a != b])
        assert found[k] == pytest.approx(within / across)
        wins = [away[a, a, j] < away[a, 1 - a, i] for a in (0, 1) for j in others for i in others]
        assert closer[k] == pytest.approx(np.mean(wins))


@pytest.mark.parametrize(
    "pair, name",
    [((0.0, 0.4), "local"), ((0.8, 0.8), "global"), ((0.1, 0.9), "geometry"), ((0.4, 0.6), "topology"),
     ((0.3, 0.6), "intermediate")],
)  # fmt: skip
def test_families_are_the_public_codes(pair, name):
    assert recipe.family(*pair) == name


def test_stored_tables_agree_with_each_other():
    sets, networks = (papers.results("topological-rsa", name) for name in ("sets", "networks"))
    means = [t.groupby(["noise", "size", "statistic"])["accuracy"].mean() for t in (sets, networks)]
    assert (means[0] - means[1]).abs().max() < 1e-3
    assert sets["set"].nunique() == 20 and networks["network"].nunique() == 10
    variants = papers.results("topological-rsa", "variants")
    assert variants.groupby("variant")["network"].nunique().to_dict() == {
        name: 5 if name == "one network" else 10 for name in recipe.VARIANTS
    }


def test_variants_change_one_thing():
    """With four layers the first statistic is that of the first four; of a pair of networks each teaches the other."""
    rdms = recipe.measured(4, "activations", 2.0)
    raw = [row["accuracy"] for row in recipe.varied(4, "four layers", 2.0) if row["statistic"] == "raw"]
    assert raw == pytest.approx(topo.right(rdms[:, :4]).mean(1))
    raw = [row["accuracy"] for row in recipe.varied(4, "one network", 2.0) if row["statistic"] == "raw"]
    assert raw == pytest.approx([topo.right(rdms[k : k + 2]).mean() for k in range(0, 10, 2)])
