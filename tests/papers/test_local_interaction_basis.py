"""LIB: its identities, a linear map by hand, what edges and ablation mean, and the files its recipe stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import papers, recipes

lib = papers.method("local-interaction-basis")
recipe = recipes.load("papers/local-interaction-basis/recipe.py")


@pytest.fixture(scope="module")
def small():
    """An 8-10-9-4 network with biases: sections and the activations of 200 random inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 4))
        x = torch.randn(200, 8) + 0.5
    return net, lib.fold(net), lib.nodes(lib.fold(net), x), x


def close(a, b, tol=1e-8):
    assert (a - b).abs().max() <= tol * max(1.0, b.abs().max())


# the chain of sections


def test_the_sections_are_the_network(small):
    net, sections, f, x = small
    torch.testing.assert_close(f[-1].float(), net(x).detach(), atol=1e-5, rtol=1e-5)
    assert [len(h[0]) for h in f] == [9, 11, 10, 4]
    assert all((h[:, -1] == 1).all() for h in f[:-1])


def test_folded_relu_sections_scale_with_their_input_so_integrated_gradients_are_gradients(small):
    _, sections, f, _ = small
    out = torch.eye(11, dtype=torch.float64)
    at_one = torch.stack(list(lib.gradients(sections[0], f[0], out)))
    for alpha in (0.01, 0.5):
        close(sections[0](alpha * f[0]), alpha * sections[0](f[0]))
        close(torch.stack(list(lib.gradients(sections[0], alpha * f[0], out))), at_one)


def test_the_jacobian_gram_has_a_short_form_for_a_relu_layer(small):
    _, sections, f, _ = small
    basis = lib.bases(sections, f)[2]
    active = (f[2] > 0).double()
    both = basis.into @ basis.into.T * (active.T @ active / len(active))
    weight = sections[1].weight
    close(weight @ both @ weight.T, lib.relevance(sections[1], f[1], basis.into), 1e-12)


# the basis


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_mean_squares_are_lambda_and_the_jacobian_gram_is_the_identity(small, layer):
    _, sections, f, _ = small
    bases = lib.bases(sections, f)
    a = bases[layer]
    hat = (f[layer] @ a.into)[:, 1:]
    close(hat.T @ hat / len(hat), a.size[1:].diag())
    seen = a.back @ lib.relevance(sections[layer], f[layer], bases[layer + 1].into) @ a.back.T
    close(seen[1:, 1:], torch.eye(len(seen) - 1))


def test_an_invertible_change_of_a_layer_that_the_next_undoes_changes_nothing(small):
    _, sections, f, _ = small
    mix = torch.randn(10, 10, generator=torch.Generator().manual_seed(1)).double()
    mix = torch.block_diag(mix, torch.ones(1).double())
    mixed = [lambda h: sections[0](h) @ mix, lambda h: sections[1](h @ mix.inverse()), sections[2]]
    moved = [f[0], f[1] @ mix, *f[2:]]
    a, b = lib.bases(sections, f)[1], lib.bases(mixed, moved)[1]
    close(b.size, a.size)
    close((moved[1] @ b.into).abs(), (f[1] @ a.into).abs(), 1e-6)


def test_of_a_linear_map_lambda_is_by_hand_and_an_unused_input_disappears():
    x = torch.tensor([[2.0, 1, 0], [2, -1, 1], [-2, 1, 1], [-2, -1, 0]])  # uncorrelated, variances 4, 1, 1/4
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0, 0], [0, 3, 0]])
    sections = lib.fold(nn.Sequential(layer))
    f = lib.nodes(sections, x)
    assert lib.bases(sections, f, "LIB")[0].size[1:].numpy() == pytest.approx([9, 4])
    assert lib.bases(sections, f, "PCA")[0].size[1:].numpy() == pytest.approx([4, 1, 0.25])


def test_a_linear_section_has_one_edge_a_direction():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sections = lib.fold(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)))
        f = lib.nodes(sections, torch.randn(50, 6))
    of = lib.bases(sections, f)
    for k in (0, 1):
        e = lib.edges(sections[k], f[k], of[k], of[k + 1])[1:, 1:]
        assert ((e > 1e-9 * e.max()).sum(1) == 1).all()


def test_before_linear_outputs_lib_is_the_pca_of_the_outputs(small):
    _, sections, f, _ = small
    a = lib.bases(sections, f)[2]
    outputs = lib.frame(nn.functional.pad(f[3], (0, 1), value=1.0))
    close(a.size, outputs.size)
    close((f[2] @ a.into)[:, 1:].abs(), (nn.functional.pad(f[3], (0, 1), value=1.0) @ outputs.into)[:, 1:].abs())


@pytest.mark.parametrize("kind", [*lib.KINDS, *recipe.TURNED])
def test_every_basis_leads_back_and_keeps_the_outputs(small, kind):
    _, sections, f, _ = small
    of = recipe.bases(sections, f, kind, 0)
    for k, a in enumerate(of[:-1]):
        close(sections[k:](f[k] @ a.into @ a.back), f[-1])
        assert (np.diff(a.size[1:]) <= 1e-12).all() or kind in recipe.TURNED
        close(a.back @ a.into, torch.eye(len(a.size)))


def test_principal_components_are_numpy_s(small):
    f = small[2][1][:, :-1].numpy()
    values = np.linalg.eigvalsh(np.cov(f.T, bias=True))[::-1]
    found = lib.frame(small[2][1]).size[1:].numpy()
    assert found == pytest.approx(values[: len(found)])


# edges


@pytest.mark.parametrize("kind", ["LIB", "neurons"])
def test_an_edge_is_the_mean_square_of_gradient_times_coordinate(small, kind):
    _, sections, f, _ = small
    a, b = lib.bases(sections, f, kind)[1:3]
    found = lib.edges(sections[1], f[1], a, b)

    def hat(h):
        return sections[1](h @ a.back) @ b.into

    expected = 0
    for row in f[1][:40] @ a.into:
        jacobian = torch.autograd.functional.jacobian(hat, row)
        expected = expected + (jacobian * row) ** 2
    close(lib.edges(sections[1], f[1][:40], a, b), expected / 40)
    assert found.shape == (len(b.size), len(a.size))


def test_with_all_edges_the_section_is_whole_and_with_few_each_output_is_computed_alone(small):
    _, sections, f, _ = small
    a, b = lib.bases(sections, f)[1:3]
    e = lib.edges(sections[1], f[1], a, b)
    whole = lib.with_edges(sections[1], f[1], a, b, lib.keep_edges(e, e[:, 1:].numel()))
    close(sections[2](whole), f[-1])
    mask = lib.keep_edges(e, 12)
    assert mask.sum() == 12 + len(e) and mask[:, 0].all()
    assert e[:, 1:][mask[:, 1:]].min() >= e[:, 1:][~mask[:, 1:]].max()
    few = lib.with_edges(sections[1], f[1], a, b, mask) @ b.into
    for i, row in enumerate(mask):
        alone = sections[1]((f[1] @ a.into * row) @ a.back) @ b.into[:, i]
        close(few[:, i], alone)


def test_bisection_finds_the_fewest():
    assert [recipe.fewest(lambda n, k=k: float(n >= k), 50, 1.0) for k in (1, 2, 17, 49, 50)] == [1, 2, 17, 49, 50]


def test_a_wave_of_the_sum_lies_at_its_frequency():
    total = torch.arange(31)[:, None] + torch.arange(31)
    features = torch.stack([torch.cos(2 * torch.pi * k * total / 31 + 1).flatten() for k in (1, 4, 15)], 1)
    shares = recipe.sum_spectrum(features + 5)
    assert shares.argmax(0).tolist() == [0, 3, 14] and shares.max(0).values.min() > 0.9999


# bad input


def test_bad_input_is_refused_and_changes_nothing(small):
    net, sections, f, x = small
    before = [p.clone() for p in net.parameters()]
    of = lib.bases(sections, f)
    e = lib.edges(sections[1], f[1], of[1], of[2])
    first, own = nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for model in (first, own, nn.Sequential()):
        with pytest.raises(ValueError, match="linear layer"):
            lib.fold(model)
    with pytest.raises(ValueError, match="NaN"):
        lib.nodes(sections, torch.full((3, 8), float("nan")))
    for h in (f[0][:1], 2 * f[0], f[0][:1].repeat(5, 1)):
        with pytest.raises(ValueError, match="two examples"):
            lib.frame(h)
    for args in ((f, "ICA"), (f[:-1], "LIB")):
        with pytest.raises(ValueError, match="kind is one of"):
            lib.bases(sections, *args)
    for n in (-1, e[:, 1:].numel() + 1):
        with pytest.raises(ValueError, match="n lies between"):
            lib.keep_edges(e, n)
    for mask in (torch.ones(2, 2, dtype=torch.bool), lib.keep_edges(e, 3).int()):
        with pytest.raises(ValueError, match="boolean mask"):
            lib.with_edges(sections[1], f[1], of[1], of[2], mask)
    with pytest.raises(ValueError, match="n lies between"):
        recipe.with_nodes(f[1], of[1], 99)
    with pytest.raises(ValueError, match="961"):
        recipe.sum_spectrum(torch.ones(10, 2))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


# what is stored


def test_every_basis_is_stored_for_six_networks_of_both_kinds():
    kinds = [*lib.KINDS, *recipe.TURNED]
    needs = papers.results("local-interaction-basis", "edges")
    assert len(needs) == 2 * 6 * 3 * len(kinds) and not needs.duplicated(["model", "seed", "basis", "section"]).any()
    assert (needs["edges"] <= needs["of"]).all() and (needs["nodes"] <= needs["rank"]).all()
    curves, nodes = (papers.results("local-interaction-basis", name) for name in ("curves", "nodes"))
    assert set(kinds) <= set(curves) and len(curves) == 2 * 6 * 3 * len(recipe.EDGES)
    assert set(kinds) <= set(nodes) and len(nodes) == 2 * 6 * 3 * len(recipe.NODES)
    for (_, edges), part in curves.groupby(["model", "edges"]):
        assert edges in recipe.EDGES and (part.groupby("section")["seed"].nunique() == 6).all()


def test_the_stored_adders_add_and_their_middle_section_needs_the_stored_edges():
    accuracies = papers.results("local-interaction-basis", "networks").set_index(["model", "seed"])
    needs = papers.results("local-interaction-basis", "edges").set_index(["model", "seed", "basis", "section"])
    for seed in range(recipe.STORED):
        model, x, x_test, y = recipe.stored("mod-add", seed)
        sections = lib.fold(model)
        f, g = lib.nodes(sections, x), lib.nodes(sections, x_test)
        base = recipe.scores(g[-1], y)[0]
        assert base == pytest.approx(accuracies.loc[("mod-add", seed), "test"], abs=1e-4)
        of = lib.bases(sections, f)
        e = lib.edges(sections[1], f[1], of[1], of[2])
        out = lib.with_edges(
            sections[1], g[1], of[1], of[2], lib.keep_edges(e, needs.loc[("mod-add", seed, "LIB", 2), "edges"])
        )
        assert recipe.scores(sections[2](out), y)[0] >= base - 0.001
