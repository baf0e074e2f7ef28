"""Turbo-VBI: module B against enumeration, the evidence against quadrature, the training loop and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from nbkit import papers, recipes, sparsity, training
from nbkit.errors import NotFinite

turbo = papers.method("turbo-vbi")
recipe = recipes.load("papers/turbo-vbi/recipe.py")
PRIORS = [turbo.Prior(), turbo.Prior(0.3, 0.2), turbo.Prior(0.6, 0.6), turbo.independent(0.25)]


def enumerated(r, prior):
    """logit pi of a row by adding up all supports, in plain Python."""
    step = {(0, 0): 1 - prior.p01, (0, 1): prior.p01, (1, 0): prior.p10, (1, 1): 1 - prior.p10}
    totals = np.zeros((2, len(r)))
    for s in itertools.product((0, 1), repeat=len(r)):
        p = prior.lam if s[0] else 1 - prior.lam
        for pair in itertools.pairwise(s):
            p *= step[pair]
        for m in range(len(r)):
            totals[s[m], m] += p * math.exp(sum(r[k] for k in range(len(r)) if s[k] and k != m))
    return np.log(totals[1] / totals[0])


@pytest.fixture
def data():
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    return x, (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)


@pytest.fixture
def net(data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    training.fit(model, data, steps=60, lr=0.01)
    return model


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("m", [1, 2, 5, 8])
def test_module_b_is_enumeration(prior, m):
    r = 3 * np.random.default_rng(m).normal(size=(3, m))
    found = turbo.module_b(torch.from_numpy(r), prior).numpy()
    np.testing.assert_allclose(found, [enumerated(row, prior) for row in r], rtol=0, atol=1e-12)


@pytest.mark.parametrize("prior", PRIORS)
def test_without_evidence_or_without_structure_pi_is_lam(prior):
    lam = torch.full((2, 7), math.log(prior.lam / (1 - prior.lam)), dtype=torch.float64)
    torch.testing.assert_close(turbo.module_b(torch.zeros(2, 7), prior), lam)
    plain = turbo.independent(prior.lam)
    r = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turbo.module_b(r, plain), lam)


def test_isolated_evidence_lifts_its_neighbours_and_not_itself():
    pi = turbo.module_b(torch.tensor([[0, 0, 5.0, 0, 0]]), turbo.Prior()).sigmoid()[0]
    assert pi[1] == pytest.approx(pi[3].item()) and pi[0] == pytest.approx(pi[4].item())
    assert pi[1] > pi[0] > 0.05 and pi[2].item() == pytest.approx(0.05)


def test_huge_evidence_overflows_nothing():
    r = torch.tensor([[-1e4, 1e4, 0.0, 1e4, -1e4]])
    assert turbo.module_b(r, turbo.Prior(1e-3, 1e-3)).isfinite().all()


@pytest.mark.parametrize("prior", [turbo.Prior(), turbo.Prior(a=2, b=0.5, a_off=1.5, b_off=1e-2)])
@pytest.mark.parametrize("e", [1e-5, 0.01, 0.3, 4.0])
def test_evidence_and_precision_are_integrals_over_rho(prior, e):
    def moment(a, b, k):  # of Gamma(a, b) times exp E[ln N(w; 0, 1/rho)], rho = exp(t)
        def density(t):
            return math.exp((a + k + 0.5) * t + a * math.log(b) - math.lgamma(a) - (b + e / 2) * math.exp(t))

        return integrate.quad(density, -30, 25, limit=400, points=[math.log((a + 0.5) / (b + e / 2))])[0]

    on, off = (prior.a, prior.b), (prior.a_off, prior.b_off)
    size = torch.tensor([[e]], dtype=torch.float64)
    r, logit_pi, rho = turbo.structured(size, torch.tensor([[0.5]]), prior)
    assert r.item() == pytest.approx(math.log(moment(*on, 0) / moment(*off, 0)), abs=1e-6)
    odds = [prior.lam * moment(*on, 0), (1 - prior.lam) * moment(*off, 0)]
    expected = prior.lam * moment(*on, 1) + (1 - prior.lam) * moment(*off, 1)
    assert rho.item() == pytest.approx(expected / sum(odds), rel=1e-6)
    assert torch.sigmoid(r + logit_pi).item() == pytest.approx(odds[0] / sum(odds), rel=1e-6)


def bound(e, active, a, b, prior):
    """The part of the ELBO that holds rho and s, for one weight: q(rho) = Gamma(a, b), q(s = 1) = active."""
    rho, log_rho = a / b, torch.digamma(a) - b.log()

    def log_gamma(shape, rate):
        return shape * math.log(rate) - math.lgamma(shape) + (shape - 1) * log_rho - rate * rho

    entropy = a - b.log() + torch.lgamma(a) + (1 - a) * torch.digamma(a)
    entropy = entropy - torch.xlogy(active, active) - torch.xlogy(1 - active, 1 - active)
    likely = active * (log_gamma(prior.a, prior.b) + math.log(prior.lam))
    unlikely = (1 - active) * (log_gamma(prior.a_off, prior.b_off) + math.log(1 - prior.lam))
    return log_rho / 2 - rho * e / 2 + likely + unlikely + entropy


@pytest.mark.parametrize("start", [0.01, 0.5, 0.99])
def test_mean_field_never_lowers_the_bound_and_as_one_is_at_least_as_high(start):
    prior = turbo.independent(0.2)
    e = torch.linspace(0, 1, 21, dtype=torch.float64)[:, None]
    active = torch.full_like(e, start)
    bounds = []
    for _ in range(6):
        r, logit_pi, _ = turbo.mean_field(e, active, prior, sweeps=1)
        a = active * prior.a + (1 - active) * prior.a_off + 0.5
        b = active * prior.b + (1 - active) * prior.b_off + e / 2
        active = torch.sigmoid(r + logit_pi)
        bounds.append(bound(e, active, a, b, prior))
    assert all((after >= before - 1e-9).all() for before, after in itertools.pairwise(bounds))
    off = prior.a_off * math.log(prior.b_off) - (prior.a_off + 0.5) * torch.log(prior.b_off + e / 2)
    off = off + math.lgamma(prior.a_off + 0.5) - math.lgamma(prior.a_off)
    best = off + torch.log(1 - prior.lam + prior.lam * turbo.evidence(e, prior).exp())
    assert (best >= bounds[-1] - 1e-9).all()


def test_mean_field_locks_where_it_began_and_as_one_does_not():
    e = torch.tensor([[1e-6], [0.25]])
    for start, kept in ((0.5, [True, True]), (1e-3, [False, False])):
        r, logit_pi, _ = turbo.mean_field(e, torch.full_like(e, start), turbo.Prior(), sweeps=30)
        assert (r + logit_pi > 0).flatten().tolist() == kept
    r, logit_pi, _ = turbo.structured(e, torch.full_like(e, 0.5), turbo.Prior())
    assert (r + logit_pi > 0).flatten().tolist() == [False, True]


def test_the_loss_is_the_gaussian_energy_and_its_optimum_the_known_variance():
    mu, rho = torch.zeros(2, 3), torch.tensor([[1.0, 2, 4], [8, 16, 32]])
    q = turbo.first(mu, 0.1)
    adam = torch.optim.Adam([q.log_var], lr=0.05)
    for _ in range(600):
        adam.zero_grad()
        ((rho * q.e(mu) - q.log_var).sum() / 2).backward()
        adam.step()
    torch.testing.assert_close(q.log_var.detach().exp(), 1 / rho, rtol=1e-3, atol=0)


def test_training_is_repeatable_prunes_and_keeps_accuracy(net, data):
    prior, before = turbo.Prior(b_off=1e-4), training.accuracy(net, *data)
    runs = []
    for _ in range(2):
        model = copy.deepcopy(net)
        beliefs, table = turbo.turbo_vbi(model, *data, prior, rounds=6, epochs=4, batch=30)
        runs.append((training.state(model), table))
        masks = turbo.prune(model, beliefs)
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0]) and runs[0][1].equals(runs[1][1])
    assert 0 < masks.sparsity < 1 and len(table) == 6
    assert all(not w[~masks[name]].any() for name, w in sparsity.prunable(model).items())
    assert training.accuracy(model, *data) > before - 0.1
    assert all(p.grad is None for p in model.parameters())


def test_rows_are_neurons_also_of_convolutions(data):
    conv = nn.Conv2d(2, 5, 3)
    assert turbo.first(conv.weight, 0.1).r.shape == (5, 18)
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 0, 1:] = mask[0, 1, 0] = True  # one run of three over a row of six
    assert turbo.run_lengths(mask).tolist() == [3]


def test_run_lengths_are_itertools_groups():
    mask = torch.rand(20, 15, generator=torch.Generator().manual_seed(0)) < 0.4
    by_hand = [len(list(g)) for row in mask.tolist() for on, g in itertools.groupby(row) if on]
    assert turbo.run_lengths(mask).tolist() == by_hand
    assert turbo.run_lengths(torch.zeros(2, 3, dtype=torch.bool)).tolist() == []


def test_a_neuron_is_gone_with_its_row_or_its_column():
    a, b = torch.ones(4, 3), torch.ones(2, 4)
    a[0], b[:, 1], b[0, 2] = 0, 0, 0
    assert recipe.removed(sparsity.Masks({"a": a, "b": b})) == 2


WRONG = [{"lam": 0}, {"lam": 1}, {"p10": 0}, {"p10": 1}, {"lam": 0.9}, {"b_off": 2}, {"a": 0}, {"b_off": 0}]


@pytest.mark.parametrize("bad", WRONG)
def test_priors_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="p01|b_off"):
        turbo.Prior(**bad)


@pytest.mark.parametrize("r", [torch.zeros(3), torch.zeros(2, 0), torch.full((1, 3), math.nan)])
def test_rows_that_are_none_are_refused(r):
    with pytest.raises(ValueError, match=r"\[N, M\]"):
        turbo.module_b(r, turbo.Prior())


def test_bad_input_leaves_the_model_as_it_was(net, data):
    before, (x, y) = training.state(net), data
    for settings in ({"rounds": 0}, {"lr": 0}, {"batch": 0}, {"warm": 0}, {"var": -1}, {"epochs": 0}):
        with pytest.raises(ValueError, match="above 0"):
            turbo.turbo_vbi(net, x, y, **settings)
    for args, error in (((x[:0], y[:0]), ValueError), ((x, y[:-1]), ValueError), ((x, y + 1), IndexError)):
        with pytest.raises(error):
            turbo.turbo_vbi(net, *args)
    with pytest.raises(NotFinite):
        turbo.turbo_vbi(net, x, y, lr=1e30, rounds=3)
    with pytest.raises(ValueError, match="no prunable"):
        turbo.turbo_vbi(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6)), x, y)

    def interrupted(e, active, prior):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turbo.turbo_vbi(net, x, y, update=interrupted)
    assert same(net, before)


def test_a_lock_or_an_empty_layer_is_refused(net):
    before = training.state(net)
    beliefs = {name: turbo.first(w, 0.1) for name, w in sparsity.prunable(net).items()}
    with pytest.raises(ValueError, match="every weight would stay"):
        turbo.prune(net, beliefs)
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight would be empty"):
        turbo.prune(net, beliefs, 0.9)
    del beliefs["2.weight"]
    beliefs["0.weight"] = turbo.first(torch.zeros(3, 3), 0.1)
    with pytest.raises(RuntimeError, match="shape"):
        turbo.prune(net, beliefs)
    assert same(net, before)


# what is stored


def test_rivals_are_as_sparse_as_the_chain_and_every_seed_is_there():
    table = papers.results("turbo-vbi")
    for name, seeds in ((recipe.DIGITS, 5), (recipe.LENET, 3)):
        rows = table[table["network"] == name].pivot(index="seed", columns="arm", values="kept")
        assert len(rows) == seeds and set(recipe.ARMS) <= set(rows)
        for arm in ("ARD", "magnitude", "magnitude by layer", "SNIP", "random"):
            assert (rows[arm] - rows["Markov"]).abs().max() < 0.01


def test_the_stored_supports_are_those_of_the_table():
    table = papers.results("turbo-vbi")
    rows = table[(table["network"] == recipe.LENET) & (table["seed"] == 0)].set_index("arm")
    for arm, eight in papers.tensors("turbo-vbi", "supports").items():
        mask = torch.from_numpy(np.unpackbits(eight.numpy(), axis=1)[:, :784]).bool()
        assert turbo.run_lengths(mask).double().mean().item() == pytest.approx(rows["run_first"][arm], abs=1e-3)


def test_no_shuffled_support_has_twice_the_shuffled_mean():
    """The chance in the claim ``regular``: 50 rows of LeNet, 1,000 times."""
    packed = papers.tensors("turbo-vbi", "supports")["Markov"].numpy()[:50]
    chance, mask = np.random.default_rng(0), np.unpackbits(packed, axis=1)[:, :784]

    def mean_run(mask):
        return turbo.run_lengths(torch.from_numpy(mask)).double().mean().item()

    shuffled = [mean_run(chance.permuted(mask, axis=1)) for _ in range(1000)]
    assert max(shuffled) < 2 * np.mean(shuffled) < mean_run(mask)


def test_the_learning_rates_are_the_best_of_the_search():
    rates = papers.results("turbo-vbi", "rates")
    rates = rates[rates["lam"].isna()].groupby(["network", "arm", "lr"], as_index=False)["accuracy"].mean()
    for network, chosen in recipe.RATES.items():
        for arm, lr in chosen.items():
            rows = rates[(rates["network"] == network) & (rates["arm"] == arm)].set_index("lr")["accuracy"]
            assert rows[lr] == rows.max(), (network, arm, rows.to_dict())
