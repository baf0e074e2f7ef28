"""NAS evaluation: relative improvement, equal cells, evolution, DARTS' gradient, the table of all cells."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from nbkit import models, papers, recipes
from nbkit.models.zoo.cells import operation

nas = papers.method("nas-evaluation")
recipe = recipes.load("papers/nas-evaluation/recipe.py")
SLUG = "nas-evaluation"


def table():
    return papers.results(SLUG, "cells")


# relative improvement


def test_ri_of_a_group_with_itself_is_0_and_the_papers_darts_row_is_0_32():
    assert nas.relative_improvement([50, 60], [60, 50]) == 0
    assert round(nas.relative_improvement([97.23], [96.92]), 2) == 0.32


def test_ri_is_percent_of_the_random_accuracy_not_points():
    assert nas.relative_improvement([60], [50]) == pytest.approx(20)


def test_a_missing_run_gives_nan_not_0():
    assert np.isnan(nas.relative_improvement([97, float("nan")], [96, 97]))


@pytest.mark.parametrize("bad", [[], [101], [-1], [0.97, 0.98], [97, 0.98], [[97, 98]], [0, 0]])
def test_groups_that_are_no_percentages_are_refused(bad):
    with pytest.raises(ValueError, match="percent"):
        nas.relative_improvement(bad, [96])
    with pytest.raises(ValueError, match="percent"):
        nas.relative_improvement([96], bad)


def test_the_interval_holds_ri_shrinks_with_more_runs_and_is_a_point_where_all_runs_agree():
    rng = np.random.default_rng(0)
    ours, lot = 96 + rng.normal(size=8), 95 + rng.normal(size=8)
    low, high = nas.interval(ours, lot)
    assert low < nas.relative_improvement(ours, lot) < high
    few, many = nas.interval(ours, lot), nas.interval(np.tile(ours, 16), np.tile(lot, 16))
    assert many[1] - many[0] < (few[1] - few[0]) / 2
    assert nas.interval([97] * 8, [96] * 8) == pytest.approx([100 / 96] * 2)


# cells


def test_of_125_cells_85_have_no_idle_edge_and_60_are_different_functions():
    assert (len(nas.CELLS), len({nas.twin(c) for c in nas.CELLS})) == (125, 85)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    do = {op: operation(op, 4).double().eval() for op in nas.OPERATIONS}
    with torch.no_grad():
        out = {c: do[c[1]](x) + do[c[2]](do[c[0]](x)) for c in nas.CELLS}
    for one, other in itertools.combinations(nas.CELLS, 2):
        same = torch.allclose(out[one], out[other], atol=1e-9)
        assert same == (nas.function(one) == nas.function(other)), (one, other)
    assert len({nas.function(c) for c in nas.CELLS}) == 60


def test_a_convolution_behind_none_adds_its_bias_and_nothing_of_the_image():
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conv, bias = operation("conv3x3", 4), torch.arange(4.0)
    with torch.no_grad():
        conv.bn.bias[:] = bias
        found = conv(operation("none", 4)(x))
    torch.testing.assert_close(found, bias[:, None, None].expand_as(x))


def test_a_twin_of_a_twin_is_itself_and_what_is_no_cell_is_refused():
    assert all(nas.twin(nas.twin(c)) == nas.twin(c) for c in nas.CELLS)
    for bad in [("skip", "skip"), ("skip", "skip", "conv5x5")]:
        with pytest.raises(ValueError, match="a cell is three of"):
            nas.twin(bad)


def test_random_cells_are_uniform_over_those_without_none():
    lot = torch.Generator().manual_seed(1)
    drawn = [nas.random_cell(lot) for _ in range(6400)]
    counts = [drawn.count(cell) for cell in nas.WHOLE]
    assert sum(counts) == 6400
    assert chisquare(counts).pvalue > 0.001


def test_discretising_takes_the_largest_alpha_but_never_none():
    alpha = torch.zeros(3, 5)
    alpha[:, 0] = 9.0
    alpha[[0, 1, 2], [3, 1, 4]] = 1.0
    assert nas.discretise(alpha) == ("conv3x3", "skip", "avgpool3x3")
    for bad in [torch.zeros(5, 3), torch.full((3, 5), float("nan"))]:
        with pytest.raises(ValueError, match="alpha must be finite"):
            nas.discretise(bad)


# searches


def test_evolution_sees_as_many_cells_as_it_may_and_returns_the_best_of_them():
    seen = []

    def score(cell):
        seen.append(cell)
        return sum(nas.OPERATIONS.index(op) for op in cell)

    best = recipe.evolve(score, nas.CELLS, np.random.default_rng(0))
    assert score(best) == max(score(cell) for cell in set(seen))
    assert len(set(seen)) <= 30


def test_evolution_with_many_evaluations_finds_the_best_cell_and_children_differ_by_one_edge():
    goal = ("conv3x3", "none", "avgpool3x3")

    def score(cell):
        return sum(a == b for a, b in zip(cell, goal, strict=True))

    assert recipe.evolve(score, nas.CELLS, np.random.default_rng(0), evaluations=500) == goal


@pytest.mark.parametrize("sizes", [{"sample": 0}, {"sample": 11}, {"evaluations": 9}])
def test_evolution_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="population"):
        recipe.evolve(len, nas.CELLS, np.random.default_rng(0), **sizes)


# DARTS


def test_alpha_s_gradient_is_its_weight_times_how_far_an_operation_points_along_g():
    cell = nas.supernet(seed=0).cell1.double().eval()
    x, g = torch.randn(2, 2, 16, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (found,) = torch.autograd.grad((cell.edge(1, x) * g).sum(), cell.alpha)
    with torch.no_grad():
        parts = torch.stack([op(x) for op in cell.edges["0-2"]])
        expected = cell.alpha[1].softmax(0) * ((parts - cell.edge(1, x)) * g).sum((1, 2, 3, 4))
    torch.testing.assert_close(found[1], expected)
    assert not found[0].any() and not found[2].any()


def test_alphas_that_are_sure_make_the_supernet_the_cell_net_of_its_path():
    net = nas.supernet(seed=0).eval()
    cell = ("conv3x3", "avgpool3x3", "conv1x1")
    with torch.no_grad():
        net.cell1.alpha[:] = 0
        net.cell1.alpha[range(3), [nas.OPERATIONS.index(op) for op in cell]] = 200
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    one = recipe.walked(net, cell).eval()
    torch.testing.assert_close(net(x), one(x), rtol=1e-5, atol=1e-5)


def test_cells_share_one_alpha_and_the_optimizer_of_weights_leaves_it_out():
    net = nas.supernet(cells=4, seed=0)
    assert all(net.get_submodule(f"cell{i}").alpha is net.cell1.alpha for i in range(1, 5))
    optimised = nas.optimizer_of(net).param_groups[0]["params"]
    assert len(optimised) == len(list(net.parameters())) - 1
    assert not any(p is net.cell1.alpha for p in optimised)


def test_a_first_step_of_darts_by_hand():
    x, y = (part[:64] for part in recipe.split()["train"])
    net, twin = nas.supernet(seed=3).double(), nas.supernet(seed=3).double()
    before = net.cell1.alpha.detach().clone()
    alpha = next(iter(nas.darts(net, x.double(), y, batch=32, alpha_lr=0.01)))
    loss = F.cross_entropy(twin.train()(x[32:].double()), y[32:])
    (grad,) = torch.autograd.grad(loss, [twin.cell1.alpha])
    grad = grad + 1e-3 * before  # Adam's first step has length alpha_lr along the sign
    torch.testing.assert_close(alpha, before - 0.01 * grad / (grad.abs() + 1e-8))


def test_images_without_labels_are_refused_and_nothing_changes():
    x, y = recipe.split()["train"]
    net = nas.supernet(seed=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for images, labels in [(x[:64], y[:60]), (x[:0], y[:0])]:
        with pytest.raises(ValueError, match="as many labels as images"):
            next(iter(nas.darts(net, images, labels)))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_step_of_the_weights_is_at_most_the_learning_rate_long():
    net = nas.supernet(seed=0)
    x, y = (part[:32] for part in recipe.split()["train"])
    optimizer = nas.optimizer_of(net)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    nas.descend(optimizer, 0.5, 1000 * F.cross_entropy(net.train()(x), y))
    moved = [p.detach() - b for p, b in zip(optimizer.param_groups[0]["params"], before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.5, rel=1e-3)


# the recipe


def test_the_split_is_of_1000_300_and_497_digits_that_do_not_overlap():
    parts = recipe.split()
    assert [len(parts[name][1]) for name in ("train", "val", "test")] == [1000, 300, 497]
    rows = torch.cat([x.flatten(1) for x, _ in parts.values()])
    assert len(rows.unique(dim=0)) == 1797


def test_a_shift_moves_by_at_most_a_pixel_and_a_hole_is_3x3():
    x = torch.zeros(200, 1, 8, 8)
    x[:, 0, 3, 4] = 1.0
    moved = recipe.shifted(x, torch.Generator().manual_seed(0))
    where = moved[:, 0].nonzero()[:, 1:] - torch.tensor([3, 4])
    assert len(where) == 200
    assert {tuple(w) for w in where.tolist()} == set(itertools.product((-1, 0, 1), repeat=2))
    holes = (recipe.cut_out(torch.ones(200, 1, 8, 8), torch.Generator().manual_seed(0)) == 0).sum((1, 2, 3))
    assert holes.max() == 9 and holes.min() == 4


def test_the_table_holds_every_cell_five_times_and_twins_have_one_row():
    cells = table()
    assert len(cells) == 625 and not cells.isna().any().any()
    assert (cells.groupby(["twin", "cells", "seed"])["test"].nunique() == 1).all()
    named = list(zip(cells["e01"], cells["e02"], cells["e12"], strict=True))
    assert ["|".join(nas.twin(cell)) for cell in named] == cells["twin"].tolist()


def test_the_exhaustive_average_is_the_mean_of_all_rows():
    accuracies = table().query("cells == 2 and seed == 0")["test"]
    assert nas.relative_improvement(accuracies, accuracies) == 0
    assert len(accuracies) == 125


def test_parameters_in_the_table_are_those_of_the_trained_cell():
    row = table().query("twin == 'conv3x3|skip|conv1x1' and cells == 4").iloc[0]
    net = models.build("cell-net", ops=("conv3x3", "skip", "conv1x1"), cells=4, channels=16, seed=0)
    assert row["parameters"] == sum(p.numel() for p in net.parameters())


def test_final_trainings_of_one_cell_with_one_seed_are_one_row():
    returned = papers.results(SLUG, "searches")
    assert (returned.groupby("method").size() == 8).all()
    assert (returned.groupby(["e01", "e02", "e12", "seed"])["test"].nunique() == 1).all()
