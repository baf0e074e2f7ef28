"""The method cells of the Quad notebook, used without the notebook."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nbkit import models, papers

method = papers.method("quad-data-selection")
SIZES = {"layers": 2, "width": 16, "heads": 2, "hidden": 24, "vocab": 64, "positions": 32}


@pytest.fixture(scope="module")
def model():
    return models.build("tiny-llama", seed=0, **SIZES).double()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(64, (12, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def layers(model):
    return method.linear_layers(model)


@pytest.fixture(scope="module")
def factors(model, ids, layers):
    return method.ekfac(model, ids, layers)


def each_gradient(model, ids, layers) -> dict[str, torch.Tensor]:
    """The same by plain backward passes, one chunk at a time."""
    weights, rows = [model.get_submodule(name).weight for name in layers], []
    for one in ids:
        loss = torch.nn.functional.cross_entropy(model(input_ids=one[None]).logits[0, :-1], one[1:])
        rows.append(torch.autograd.grad(loss, weights))
    return {name: torch.stack(column) for name, column in zip(layers, zip(*rows, strict=True), strict=True)}


def dense(f) -> torch.Tensor:
    """H of a layer, [out in, out in], from its eigenvectors."""
    turn = torch.kron(f.Q_S, f.Q_A)
    return turn @ torch.diag(f.Lambda.flatten()) @ turn.T


def test_attention_and_mlp_layers_are_found_and_the_output_layer_is_not(model, layers):
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    assert len(method.linear_layers(model, method.ATTENTION)) == 8
    with pytest.raises(ValueError, match="layers"):
        next(method.tapes(model, torch.zeros(1, 3, dtype=torch.long), method.linear_layers(model, ("wqkv",))))


def test_tapes_hold_every_chunks_own_gradient_whatever_the_batch(model, ids, layers):
    wanted = each_gradient(model, ids, layers)
    for batch in (5, 64):
        seen = 0
        for tape in method.tapes(model, ids, layers, batch=batch):
            n = len(tape[layers[0]][0])
            for name, (a, d) in tape.items():
                torch.testing.assert_close(torch.einsum("nto,nti->noi", d, a), wanted[name][seen : seen + n])
            seen += n
        assert seen == len(ids)


def test_the_model_comes_back_as_it_was(model, ids, layers):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.ekfac(model, ids[:2], layers)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()


def test_factors_are_those_of_a_plain_loop(model, ids, layers, factors):
    name = layers[4]
    f, G = factors[name], each_gradient(model, ids, layers)[name]
    values = torch.linalg.eigvalsh(f.A)
    torch.testing.assert_close(f.Q_A @ torch.diag(values) @ f.Q_A.T, f.A)
    wanted = sum((f.Q_S.T @ g @ f.Q_A) ** 2 for g in G) / len(G)
    torch.testing.assert_close(f.Lambda, wanted)
    A, S = 0, 0
    for tape in method.tapes(model, ids, [name]):
        a, d = tape[name]
        for n in range(len(a)):
            for t in range(a.shape[1]):
                A = A + torch.outer(a[n, t], a[n, t]) / ids.numel()
                S = S + torch.outer(d[n, t], d[n, t]) / len(ids)
    torch.testing.assert_close(f.A, A)
    torch.testing.assert_close(f.S, S)


@pytest.mark.parametrize("which", [0, 3, 6])
def test_solving_and_applying_is_the_identity(factors, layers, which):
    f = factors[layers[which]]
    V = torch.randn(3, *f.Lambda.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    lam = 0.1 * float(f.Lambda.mean())
    U = method.solve(V, f, lam)
    back = (dense(f) @ U.flatten(1).T + lam * U.flatten(1).T).T.view_as(V)
    torch.testing.assert_close(back, V)
    wrong = f.Q_S @ ((f.Q_S @ V @ f.Q_A) * (f.Lambda + lam)) @ f.Q_A  # the public formula
    assert (dense(f) @ wrong.flatten(1).T + lam * wrong.flatten(1).T - V.flatten(1).T).norm() > 0.5 * V.norm()


def test_the_eigenvalue_form_solves_the_kronecker_product_and_split_damping_does_not(factors, layers):
    f = factors[layers[3]]
    values = torch.outer(torch.linalg.eigvalsh(f.S), torch.linalg.eigvalsh(f.A))
    exact = method.Factor(f.S, f.A, f.Q_S, f.Q_A, values)
    H, lam = torch.kron(f.S, f.A), 0.1 * float(values.mean())
    V = torch.randn(values.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    wanted = torch.linalg.solve(H + lam * torch.eye(len(H)).double(), V.flatten()).view_as(V)
    torch.testing.assert_close(method.solve(V, exact, lam), wanted)
    split = method.solve(V, exact, lam, "K-FAC")
    assert (split - wanted).abs().max() > 0.1 * wanted.abs().max()
    pi = (f.A.trace() / len(f.A) / (f.S.trace() / len(f.S))).sqrt()
    S, A = f.S + lam**0.5 / pi * torch.eye(len(f.S)), f.A + lam**0.5 * pi * torch.eye(len(f.A))
    torch.testing.assert_close((torch.kron(S, A) @ split.flatten()).view_as(V), V)


def test_constant_curvature_only_scales(factors, layers):
    f = factors[layers[0]]
    flat = method.Factor(f.S, f.A, f.Q_S, f.Q_A, torch.full_like(f.Lambda, 1.5))
    V = torch.randn(f.Lambda.shape, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(method.solve(V, flat, 0.5), V / 2)
    assert torch.equal(method.solve(V, f, 1.0, "identity"), V)


@pytest.mark.parametrize("cosine", [True, False])
def test_influence_is_that_of_dense_solves(model, ids, layers, factors, cosine):
    reference, some = ids[:3], layers[:5]
    part = {name: factors[name] for name in some}
    solved = []
    for g in zip(*each_gradient(model, reference, some).values(), strict=True):
        pieces = []
        for f, v in zip(part.values(), g, strict=True):
            H = dense(f) + 0.1 * f.Lambda.mean() * torch.eye(f.Lambda.numel()).double()
            pieces.append(torch.linalg.solve(H, v.flatten()))
        whole = torch.cat(pieces)
        solved.append(whole / whole.norm() if cosine else whole)
    G = torch.cat([g.flatten(1) for g in each_gradient(model, ids, some).values()], 1)
    wanted = G @ torch.stack(solved).mean(0) / (G.norm(dim=1) if cosine else 1)
    U = method.direction(model, reference, part, cosine=cosine)
    torch.testing.assert_close(method.influence(model, ids, U, cosine=cosine), wanted)
    stacked = {name: torch.stack([u, -2 * u]) for name, u in U.items()}
    dots, _ = method.layer_scores(model, ids, stacked)
    torch.testing.assert_close(dots[..., 1], -2 * dots[..., 0])


def test_a_small_step_on_a_chunk_gains_what_its_score_says(model, ids, layers, factors):
    U = method.direction(model, ids[:4], factors, form="identity", cosine=False)
    score = method.influence(model, ids, U, cosine=False)
    weights, eta = [model.get_submodule(name).weight for name in layers], 1e-4
    with torch.no_grad():
        before = method.chunk_loss(model(input_ids=ids[:4]).logits, ids[:4]).mean()
        for n in (5, 9):
            step = [g[n] for g in each_gradient_once(model, ids, layers).values()]
            for weight, g in zip(weights, step, strict=True):
                weight -= eta * g
            after = method.chunk_loss(model(input_ids=ids[:4]).logits, ids[:4]).mean()
            for weight, g in zip(weights, step, strict=True):
                weight += eta * g
            assert (before - after) / eta == pytest.approx(float(score[n]), rel=0.02, abs=1e-4)


def each_gradient_once(model, ids, layers):
    with torch.enable_grad():
        return each_gradient(model, ids, layers)


def test_cluster_scores_by_hand():
    found = method.cluster_score([0.6, 0.0, 1.0], [3, 0, 17], 0.5)
    assert found[0] == pytest.approx(0.2 + 0.5 * math.sqrt(2 * math.log(20) / 3)) and found[1] == math.inf
    assert method.cluster_score([0.6, 1.0], [3, 17], 0.0).tolist() == pytest.approx([0.2, 1 / 17])


ARMS = np.repeat([0, 1, 2], 40)
APART = 1 - np.eye(3)


def pulls(score, **options):
    given = {"alpha": 0.0, "tau": -1.0, "width": 1, "draw": 1, "take": 2} | options
    chosen, log = method.quad(score, ARMS, given.pop("distance", APART), given.pop("budget", 40), **given)
    return chosen, log, np.bincount([pull["cluster"] for pull in log], minlength=3)


def test_without_a_bonus_it_is_greedy_and_with_a_huge_one_takes_turns():
    score = np.array([1, 0.5, 0])[ARMS]
    assert pulls(score)[2].tolist() == [18, 1, 1]
    turns = pulls(score, alpha=1e9)[2]
    assert turns.max() - turns.min() <= 1


def test_nothing_is_taken_twice_and_only_what_was_drawn_is_read():
    score = np.random.default_rng(0).random(120)
    chosen, log, _ = pulls(score, alpha=0.3, budget=100, draw=1, take=4, tau=0.5)
    assert len(set(chosen.tolist())) == 100
    read = {pull["reward"] for pull in log}  # one chunk a pull
    other = np.where(np.isin(score, list(read)), score, 99.0)
    again, lines, _ = pulls(other, alpha=0.3, budget=100, draw=1, take=4, tau=0.5)
    assert np.array_equal(again, chosen) and [p["reward"] for p in lines] == [p["reward"] for p in log]


def test_the_threshold_passes_pieces_over_and_fills_up_with_the_best_of_them():
    score = np.array([1.0, -1, -2])[ARMS]
    chosen, log, _ = pulls(score, tau=0.0, budget=60)
    assert (ARMS[chosen[:40]] == 0).all() and (ARMS[chosen[40:]] == 1).all()
    assert [pull["taken"] for pull in log].count(True) == 20


def test_a_neighbour_shares_the_reward():
    near = np.array([[0, 0.1, 1], [0.1, 0, 1], [1, 1, 0]])
    score = np.array([1.0, 0, 0.7])[ARMS]
    for seed in range(8):  # the order of the first round is by lot
        _, log, counts = pulls(score, distance=near, near=0.2, budget=8, width=3, seed=seed)
        assert [pull["cluster"] for pull in log[3:4]] == [2]  # 0 has (1 + half of 0) / 2, 1 a quarter, 2 has 0.7
        alone = pulls(score, budget=8, width=3, seed=seed)[1]
        assert alone[3]["cluster"] == 0
        _, log, _ = pulls(np.array([1.0, 0, 0.2])[ARMS], distance=near, near=0.2, budget=8, width=3, seed=seed)
        assert [pull["cluster"] for pull in log[3:6]] == [0, 1, 2]  # 1 has a quarter by its neighbour, 2 has 0.2


def test_entropy_by_hand():
    assert method.entropy(np.array([0, 1, 2, 3]), 8) == pytest.approx(math.log(4))
    assert method.entropy(np.zeros(5, int), 3) == 0


GOOD = {"alpha": 0.1, "tau": 0.0}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"budget": 121}, "budget"),
        ({"budget": 0}, "budget"),
        ({"draw": 7}, "draw"),
        ({"near": 0.0}, "near"),
        ({"alpha": -1.0}, "alpha"),
        ({"tau": math.nan}, "tau"),
        ({"score": np.full(120, np.nan)}, "finite"),
        ({"score": np.zeros(119)}, "cluster"),
        ({"cluster": np.repeat([0, 1, 1], 40)}, "used"),
        ({"distance": np.ones((3, 3))}, "distance"),
    ],
)
def test_a_bandit_that_cannot_be(change, match):
    given = {"score": np.zeros(120), "cluster": ARMS, "distance": APART, "budget": 30} | GOOD | change
    with pytest.raises(ValueError, match=match):
        method.quad(given.pop("score"), given.pop("cluster"), given.pop("distance"), given.pop("budget"), **given)


def test_bad_damping_forms_shapes_and_chunks(model, ids, layers, factors):
    f = factors[layers[0]]
    V = torch.zeros_like(f.Lambda)
    for lam in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="lam"):
            method.solve(V, f, lam)
    with pytest.raises(ValueError, match="form"):
        method.solve(V, f, 1.0, "ekfac")
    with pytest.raises(ValueError, match="V "):
        method.solve(V[:, :3], f, 1.0)
    for bad in (ids[0], ids[:0], ids[:, :1], ids.float()):
        with pytest.raises(ValueError, match="ids"):
            next(method.tapes(model, bad, layers))
