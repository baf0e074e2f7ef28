"""Starts of a rank, measures of laziness and the linear theory: values by hand, autograd, and what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nbkit import papers, recipes

rich = papers.method("rich-lazy-connectivity")
recipe = recipes.load("papers/rich-lazy-connectivity/recipe.py")
SEEDS = st.integers(0, 1000)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def series():
    x = torch.rand(60, 5, 3, generator=drawn(0))
    return x, (x.sum((1, 2)) > 7.5).long()


def net_of(seed=0, n=12, rank=12):
    full = rich.gaussian(n, 1.25, drawn(seed))
    return rich.start(rich.as_large_as(rich.low_rank(full, rank), full), 3, 2, seed)


# starts


@given(SEEDS, st.integers(1, 12), st.sampled_from(list(rich.SIZES)))
def test_a_start_has_the_rank_and_the_size_asked_for(seed, rank, measure):
    full = rich.gaussian(12, 1.25, drawn(seed))
    w = rich.as_large_as(rich.low_rank(full, rank), full, measure)
    values = torch.linalg.svdvals(w)
    assert (values > 1e-9 * values[0]).sum() == rank
    assert torch.isclose(rich.SIZES[measure](w), rich.SIZES[measure](full))


def test_full_rank_is_the_matrix_itself_and_a_cut_the_nearest():
    full = rich.gaussian(9, 1.0, drawn(1))
    torch.testing.assert_close(rich.low_rank(full, 9), full)
    lost = torch.linalg.svdvals(full)[4:].norm()
    assert torch.isclose((full - rich.low_rank(full, 4)).norm(), lost)  # Eckart and Young


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be 1 to 12"):
        rich.low_rank(torch.eye(12), rank)


def test_sizes_that_cannot_be_had_are_refused():
    shift = torch.diag(torch.ones(3, dtype=torch.float64), 1)  # nilpotent: no eigenvalue but 0
    with pytest.raises(ValueError, match="spectral radius 0"):
        rich.as_large_as(shift, torch.eye(4, dtype=torch.float64), "spectral radius")
    with pytest.raises(ValueError, match="must be one of"):
        rich.as_large_as(shift, shift, "trace")


def test_dale_columns_have_one_sign_and_no_mean():
    w = recipe.dale(rich.gaussian(50, 1.25, drawn(0)), drawn(1))
    signs = w.sign()
    assert (signs == signs[0]).all() and {-1.0, 1.0} == set(signs[0].tolist())
    with pytest.raises(ValueError, match="both kinds"):
        recipe.dale(torch.ones(5, 5), drawn(0), excitatory=1.0)


def test_a_shuffle_keeps_entries_and_diagonal():
    w = rich.gaussian(8, 1.0, drawn(2))
    mixed = recipe.shuffled(w, drawn(3))
    assert torch.equal(mixed.diagonal(), w.diagonal()) and not torch.equal(mixed, w)
    assert torch.equal(mixed.flatten().sort().values, w.flatten().sort().values)


# the network


def test_the_network_is_the_recursion_by_hand(series):
    x, net = series[0], net_of()
    h = torch.zeros(len(x), 12)
    for t in range(5):
        h = (h @ net.recurrent.weight.T + x[:, t] @ net.input.weight.T).clamp(min=0)
    torch.testing.assert_close(net(x), h @ net.output.weight.T)


def test_training_is_torchs_sgd_and_repeats(series):
    x, y = series
    nets = [net_of(), net_of(), net_of()]
    for net in nets[:2]:
        rich.train(net, x, y, steps=7, lr=0.01, batch=20, seed=3)
    optimizer, draw = torch.optim.SGD(nets[2].parameters(), lr=0.01, momentum=0.9), drawn(3)
    for _ in range(7):
        rows = torch.randint(60, (20,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(nets[2](x[rows]), y[rows]).backward()
        optimizer.step()
    for name, weight in nets[0].named_parameters():
        assert torch.equal(weight, nets[1].get_parameter(name))
        torch.testing.assert_close(weight, nets[2].get_parameter(name))


def test_a_run_that_diverges_says_so(series):
    with pytest.raises(ValueError, match="at step"):
        rich.train(net_of(), *series, steps=50, lr=1e6)


def test_the_kernel_is_that_of_a_loop_over_gradients(series):
    x, net = series[0][:4], net_of()
    rows = []
    for item in net(x):
        rows += [torch.autograd.grad(logit, net.recurrent.weight, retain_graph=True)[0].flatten() for logit in item]
    j = torch.stack(rows)
    torch.testing.assert_close(rich.tangent_kernel(net, x), j @ j.T)
    assert net.recurrent.weight.grad is None


def test_without_training_nothing_changed_and_scale_alone_is_lazy(series):
    x, net = series[0][:10], net_of()
    before = rich.snapshot(net, x)
    found = rich.laziness(before, rich.snapshot(net, x))
    assert found["weight change"] == 0 and found["same sign"] == 1
    assert [found[name] for name in ("RA", "RA centred", "KA")] == pytest.approx([1, 1, 1])
    with torch.no_grad():
        net.output.weight *= 3  # K grows ninefold, H stays
    assert rich.laziness(before, rich.snapshot(net, x))["KA"] == pytest.approx(1)


# the linear theory


@given(SEEDS)
def test_the_closed_form_is_autograds(seed):
    g = drawn(seed)
    w1, w2, xs = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in [(5, 3), (5,), (6, 3)])
    rows = [
        torch.cat([p.flatten() for p in torch.autograd.functional.jacobian(lambda a, b, x=x: b @ a @ x, (w1, w2))])
        for x in xs
    ]
    torch.testing.assert_close(rich.linear_kernel(w1, w2, xs), torch.stack(rows) @ torch.stack(rows).T)


def test_descent_follows_autograd_in_every_task_at_once():
    g = drawn(0)
    w1, w2, beta = (torch.randn(*s, generator=g, dtype=torch.float64) for s in [(3, 5, 4), (3, 5), (3, 4)])
    together = rich.descend(w1, w2, beta)
    alone = rich.descend(w1[1], w2[1], beta[1])
    torch.testing.assert_close([part[1] for part in together], list(alone))
    a, b = w1[1].clone().requires_grad_(), w2[1].clone().requires_grad_()
    for _ in range(3000):
        grads = torch.autograd.grad(((a.T @ b - beta[1]) ** 2).sum() / 2, (a, b))
        a, b = ((p - 0.03 * g).detach().requires_grad_() for p, g in zip((a, b), grads, strict=True))
    torch.testing.assert_close((a.detach(), b.detach()), alone)
    with pytest.raises(ValueError, match="not learnt"):
        rich.descend(w1, w2, beta, steps=2)


# what is stored


def test_stored_starts_are_those_of_the_seed():
    full = recipe.ranked(0, 100, "Frobenius norm", 1.25)
    assert torch.isclose(recipe.ranked(0, 1, "Frobenius norm", 1.25).norm(), full.norm())
    table = papers.results("rich-lazy-connectivity", "results")
    assert set(table["ended"]) <= {"trained", "silent", "diverged"} and table["seed"].nunique() == 5
    assert (table.groupby(["start", "measure", "gain", "at"])["seed"].nunique() == 5).all()
    sizes = dict(zip(rich.SIZES, ("frobenius", "spectral", "radius"), strict=True))
    for measure, rows in table[table["start"].str.startswith("rank") & (table["gain"] == 1.25)].groupby("measure"):
        assert (rows.groupby("seed")[sizes[measure]].agg(np.ptp) < 1e-3).all()  # equal in it across ranks


def test_stored_networks_have_learnt_what_the_table_says():
    table = papers.results("rich-lazy-connectivity", "results").query(
        "seed == 0 and gain == 1.25 and measure == 'Frobenius norm' and at == 'end'"
    )
    data, stored = recipe.series(), papers.tensors("rich-lazy-connectivity", "weights")
    for rank in (1, 100):
        net = rich.RNN(8, 100, 10)
        net.load_state_dict({name: stored[f"rank {rank}.{name}"].float() for name in net.state_dict()})
        accuracy = (net(data["x_test"]).argmax(1) == data["y_test"]).float().mean().item()
        said = table.set_index("start")["accuracy"][f"rank {rank}"]
        assert abs(accuracy - said) < 0.01
        change = (net.recurrent.weight - recipe.ranked(0, rank, "Frobenius norm", 1.25)).norm().item()
        assert np.isclose(change, table.set_index("start")["weight change"][f"rank {rank}"], atol=0.01)
