"""doubly-robust-training: weights, running estimate, implicit gradient, attacks, rivals, bad input, tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import datasets, models, papers, recipes
from nbkit.errors import NotFinite, UnknownName

dr = papers.method("doubly-robust-training")
recipe = recipes.load("papers/doubly-robust-training/recipe.py")
SLUG = "doubly-robust-training"
EPS = 0.1


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


X, Y = 0.2 + 0.6 * drawn(8, 1, 2, 3, seed=1), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


# the worst mixture


def test_the_worst_mixture_by_hand():
    w, value = dr.worst_mixture(torch.tensor([0, 2 * math.log(3)]), 2.0)
    assert w.tolist() == pytest.approx([0.25, 0.75]) and value.item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("r", [0.3, 1.0, 4.0])
def test_no_mixture_is_worth_more(r):
    losses = 3 * drawn(6)
    w, value = dr.worst_mixture(losses, r)

    def worth(p):
        return (p * losses).sum() - r * torch.special.xlogy(p, 6 * p).sum()

    assert worth(w).item() == pytest.approx(value.item(), abs=1e-12)
    others = [dr.worst_mixture(5 * drawn(6, seed=s), 1.0)[0] for s in range(200)]
    others += [0.99 * w + 0.01 * torch.eye(6, dtype=w.dtype)[k] for k in range(6)]
    assert max(worth(p).item() for p in others) < value.item()


def test_a_large_r_is_plain_training_a_small_one_the_worst_example_and_equal_losses_weigh_alike():
    losses = drawn(7)
    assert dr.worst_mixture(losses, 1e6)[1].item() == pytest.approx(losses.mean().item(), abs=1e-5)
    assert dr.worst_mixture(losses, 1e-4)[0].argmax() == losses.argmax()
    assert dr.worst_mixture(losses, 1e-4)[0].max().item() == pytest.approx(1)
    assert dr.worst_mixture(torch.full((4,), 800.0), 0.5)[0].tolist() == pytest.approx([0.25] * 4)


# the running estimate


def test_eta_1_is_the_gradient_of_the_batches_log_mean_exp():
    net, delta, r = tiny(), 0.05 * drawn(*X.shape), 0.7
    losses = dr.cross_entropy(net(X + delta), Y)
    expected = torch.autograd.grad(dr.worst_mixture(losses, r)[1], [*net.parameters()])
    w = torch.exp(losses.detach() / r - dr.tracked(None, losses.detach(), r, 1.0))
    found = torch.autograd.grad(dr.objective(net, X, Y, delta, w, eps=EPS), [*net.parameters()])
    torch.testing.assert_close(flat(found), flat(expected), atol=1e-14, rtol=0)


def test_the_estimate_is_a_moving_average_and_survives_losses_that_overflow():
    u, log_u = None, None
    for step in range(20):
        losses = 2 * drawn(8, seed=step)
        now = (losses / 0.7).exp().mean()
        u = now if u is None else 0.9 * u + 0.1 * now
        log_u = dr.tracked(log_u, losses, 0.7, 0.1)
        assert log_u.exp().item() == pytest.approx(u.item(), rel=1e-12)
    assert dr.tracked(log_u, torch.full((4,), 1e4), 0.5, 0.1).isfinite()


def test_the_weights_of_the_second_batch_by_hand():
    logits, y = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    w, log_u = dr.done(1.0, 0.25)(logits, y, None, torch.tensor(0.0, dtype=torch.float64))
    assert log_u.exp().item() == pytest.approx(0.75 + 0.25 * 2) and w.tolist() == pytest.approx(
        [2 / 1.25] * 2
    )


# the barrier and the implicit gradient


def ascent(net, delta, inner):
    """The derivative of the attack's loss in delta."""
    with torch.enable_grad():
        delta = delta.detach().requires_grad_()
        return torch.autograd.grad(inner(net(X + delta), Y).sum(), delta)[0]


def slope(delta, lo, hi, c):
    return c / (hi - delta) - c / (delta - lo)


def test_curvature_is_the_barriers_second_derivative():
    lo, hi = dr.box(X, EPS)
    delta = (lo + (hi - lo) * (0.1 + 0.8 * drawn(*X.shape))).requires_grad_()
    barrier = -0.3 * (hi - delta).log().sum() - 0.3 * (delta - lo).log().sum()
    (first,) = torch.autograd.grad(barrier, delta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), delta)
    torch.testing.assert_close(slope(delta, lo, hi, 0.3), first)
    torch.testing.assert_close(dr.curvature(delta, lo, hi, 0.3), second)


def test_settled_is_where_the_slopes_meet_and_moves_by_one_over_h():
    x = drawn(2, 30)
    lo, hi = dr.box(x, EPS)
    up = 4 * drawn(2, 30, seed=2) - 2
    at = dr.settled(up, lo, hi, 1e-3)
    assert ((lo < at) & (at < hi)).all()
    torch.testing.assert_close(slope(at, lo, hi, 1e-3), up, atol=1e-9, rtol=1e-9)
    moved = (dr.settled(up + 1e-6, lo, hi, 1e-3) - dr.settled(up - 1e-6, lo, hi, 1e-3)) / 2e-6
    torch.testing.assert_close(moved, 1 / dr.curvature(at, lo, hi, 1e-3), atol=1e-8, rtol=1e-5)


def optimum(net, c, inner, delta, times=60, share=0.5):
    """The fixed point of settling; a share of the way each time."""
    lo, hi = dr.box(X, EPS)
    for _ in range(times):
        up = ascent(net, delta, inner)
        delta = (1 - share) * delta + share * dr.settled(up, lo, hi, c)
    return delta


def differences(net, c, inner, delta, w, h=1e-5):
    found = []
    for parameter in net.parameters():
        for i in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * h
                    there = optimum(net, c, inner, delta, times=2, share=1)  # linear pieces: one would do
                    values.append((w * dr.cross_entropy(net(X + there), Y)).mean().item())
                    parameter.view(-1)[i] -= sign * h
            found.append((values[0] - values[1]) / (2 * h))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("c", [0.1, 0.01])
def test_the_total_gradient_is_that_of_finite_differences_through_the_attack(c):
    """Exact where the attack's loss is piecewise linear in delta, as the margin of a ReLU network is."""
    net, w = tiny(), drawn(8, seed=3)
    delta = optimum(net, c, dr.margin, torch.zeros_like(X))
    total = torch.autograd.grad(
        dr.objective(net, X, Y, delta, w, eps=EPS, c=c, inner=dr.margin), [*net.parameters()]
    )
    direct = torch.autograd.grad(dr.objective(net, X, Y, delta, w, eps=EPS), [*net.parameters()])
    up = ascent(net, delta, dr.margin)
    assert (up - slope(delta, *dr.box(X, EPS), c)).abs().max() < 1e-9
    expected = differences(net, c, dr.margin, delta, w)
    torch.testing.assert_close(flat(total), expected, atol=1e-8, rtol=0)
    assert (flat(direct) - expected).abs().max() > 1e-4  # without the implicit term it is another gradient


def implicit_by_brute_force(net, c, inner, delta, w):
    """The implicit function theorem with the whole Hessian of the barrier problem, an example at a time."""
    parameters, total = [*net.parameters()], 0.0
    for i in range(len(X)):
        x, y, d = X[i : i + 1], Y[i : i + 1], delta[i : i + 1].clone().requires_grad_()
        lo, hi = dr.box(x, EPS)
        barred = -inner(net(x + d), y).sum() - c * (hi - d).log().sum() - c * (d - lo).log().sum()
        (slope,) = torch.autograd.grad(barred, d, create_graph=True)
        H = torch.stack([torch.autograd.grad(s, d, retain_graph=True)[0].flatten() for s in slope.flatten()])
        loss = dr.cross_entropy(net(x + d), y).sum()
        outer = torch.autograd.grad(loss, d, retain_graph=True)[0].flatten()
        v = torch.linalg.solve(H, outer).detach()
        theirs = torch.autograd.grad((slope.flatten() * v).sum(), parameters, allow_unused=True)
        total = total - w[i] / len(X) * flat([torch.zeros_like(p) if g is None else g
                                              for p, g in zip(parameters, theirs, strict=True)])  # fmt: skip
    return total


def test_the_implicit_term_is_that_of_the_implicit_function_theorem_and_nearly_so_with_cross_entropy():
    net, w = tiny(), drawn(8, seed=3)
    for inner, within in ((dr.margin, 1e-10), (dr.cross_entropy, 0.2)):
        delta = optimum(net, 0.01, inner, torch.zeros_like(X))
        parts = [dr.objective(net, X, Y, delta, w, eps=EPS, c=c, inner=inner) for c in (0.01, 0)]
        total, direct = (flat(torch.autograd.grad(part, [*net.parameters()])) for part in parts)
        expected = implicit_by_brute_force(net, 0.01, inner, delta, w)
        assert (total - direct - expected).norm() <= within * expected.norm() + 1e-12


def test_the_implicit_term_is_the_gradient_of_a_penalty_on_the_slope():
    net, w, c = tiny(), drawn(8, seed=3), 0.01
    delta = 0.05 * drawn(*X.shape).requires_grad_()
    (up,) = torch.autograd.grad(dr.cross_entropy(net(X + delta), Y).sum(), delta, create_graph=True)
    h = dr.curvature(dr.settled(up.detach(), *dr.box(X, EPS), c), *dr.box(X, EPS), c)
    penalty = 0.5 * (w * (up.square() / h).flatten(1).sum(1)).mean()
    expected = torch.autograd.grad(penalty, [*net.parameters()], retain_graph=True, allow_unused=True)
    parts = [dr.objective(net, X, Y, delta, w, eps=EPS, c=k) for k in (c, 0)]
    total, direct = (torch.autograd.grad(part, [*net.parameters()]) for part in parts)
    for t, d, e in zip(total, direct, expected, strict=True):
        torch.testing.assert_close(t - d, torch.zeros_like(t) if e is None else e, atol=1e-12, rtol=0)


# the attack


@pytest.mark.parametrize("c", [0.0, 1e-4])
def test_an_attack_stays_in_the_box_and_raises_the_loss(c):
    x = drawn(16, 1, 28, 28).float()
    x[:, :, :10], x[:, :, 20:] = 0, 1
    net = models.build("lenet-conv", seed=1)
    y = net(x).argmax(1)
    delta, kappa = dr.attack(net, x, y, eps=EPS, steps=6, step=0.03, c=c)
    assert delta.abs().max() <= EPS and (x + delta).min() >= 0 and (x + delta).max() <= 1 + 1e-6
    if c:
        lo, hi = dr.box(x, EPS)
        assert ((delta > lo) & (delta < hi)).all()
    before, after = (dr.cross_entropy(net(x + d), y).mean() for d in (0, delta))
    assert after > before and 0 <= kappa.min() and kappa.max() <= 6
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_kappa_counts_right_answers():
    net, x = models.build("lenet-conv", seed=1), drawn(8, 1, 28, 28).float()
    y = net(x).argmax(1)
    y[:4] = (y[:4] + 1) % 10
    kappa = dr.attack(net, x, y, eps=1e-6, steps=3, step=1e-7)[1]
    assert kappa.tolist() == [0] * 4 + [3] * 4


# rivals


def test_gairat_and_mail_by_hand():
    kappa = torch.tensor([0.0, 2, 4], dtype=torch.float64)
    raw = [(1 + math.tanh(z)) / 2 for z in (-1 + 5, -1, -1 - 5)]
    assert recipe.gairat(kappa, 4, -1.0).tolist() == pytest.approx([3 * a / sum(raw) for a in raw])
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    raw = [1 / (1 + math.exp(-10 * (gap - 0.5))) for gap in (0.5, -0.5)]
    found = recipe.mail(logits, torch.tensor([0, 0]), -0.5, 10.0)
    assert found.tolist() == pytest.approx([2 * a / sum(raw) for a in raw], rel=1e-4)


def test_inverse_frequency_gives_every_class_the_same_total_and_mean_1():
    y = torch.tensor([0] * 6 + [1] * 3 + [2])
    w = recipe.inverse_frequency(y, y.bincount(), 1.0)
    assert w.mean().item() == pytest.approx(1)
    assert [w[y == k].sum().item() for k in range(3)] == pytest.approx([10 / 3] * 3)
    assert recipe.inverse_frequency(y, y.bincount(), 0.0).tolist() == [1] * 10


def test_resampling_draws_classes_alike():
    y = torch.tensor([0] * 900 + [1] * 100)
    drawn_ = torch.cat(recipe.batches("resampled AT", y, 64, torch.Generator().manual_seed(0)))
    assert len(drawn_) == 1000 and 0.44 < (y[drawn_] == 1).double().mean() < 0.56
    plain = torch.cat(recipe.batches("AT", y, 64, torch.Generator().manual_seed(0)))
    assert plain.sort().values.tolist() == list(range(1000))


# data and measures


def test_a_long_tail_falls_by_a_constant_factor():
    y = datasets.load("fashion-mnist").y_train
    index, order = recipe.long_tail(y, seed=3)
    counts = y[index].bincount()[order]
    assert len(index) == len(index.unique()) == 3000 and counts[0] == 734 and counts[-1] == 73
    ratios = counts[1:] / counts[:-1]
    assert (ratios - 0.1 ** (1 / 9)).abs().max() < 0.01
    assert order.tolist() != recipe.long_tail(y, seed=4)[1].tolist()


def test_tail_30_scores_classes_where_they_were_not_chosen():
    chosen = torch.tensor([0.0, 0.1, 0.2, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    scored = torch.tensor([0.3, 0.3, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.0])
    assert dr.tail_30(chosen, scored) == pytest.approx((0.3 + (0.9 + 0 + 0.1) / 3) / 2)
    with pytest.raises(ValueError):
        dr.tail_30(chosen, scored[:5])


def test_halves_part_every_class():
    y = torch.arange(10).repeat(6)
    first, second = recipe.halves(y)
    assert (
        not (first & second).any()
        and y[first].bincount().tolist() == y[second].bincount().tolist() == [3] * 10
    )


# training


def test_two_steps_by_hand_attack_weigh_track_and_descend():
    net, r, eta, rate, c = tiny(), 0.5, 0.3, 0.2, 0.01
    budget = {"eps": EPS, "steps": 2, "step": 0.05}
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
    log_u, u = None, None
    for _ in range(2):
        before = [p.detach().clone() for p in net.parameters()]
        delta, _ = dr.attack(net, X, Y, c=c, g=theirs, **budget)
        losses = dr.cross_entropy(net(X + delta), Y).detach()
        now = (losses / r).exp().mean()
        u = now if u is None else (1 - eta) * u + eta * now
        w = (losses / r).exp() / u
        loss = dr.objective(net, X, Y, delta, w, eps=EPS, c=c)
        expected = torch.autograd.grad(loss, [*net.parameters()], allow_unused=True)
        found, logits, log_u = dr.one_step(
            net, optimizer, X, Y, dr.done(r, eta), log_u, budget=budget, g=ours, c=c
        )
        torch.testing.assert_close(found, w, atol=1e-12, rtol=0)
        torch.testing.assert_close(dr.cross_entropy(logits, Y).detach(), losses, atol=1e-12, rtol=0)
        assert log_u.exp().item() == pytest.approx(u.item())
        for new, old, g in zip(net.parameters(), before, expected, strict=True):
            torch.testing.assert_close(new.detach(), old - rate * g, atol=1e-12, rtol=0)


@pytest.mark.parametrize("arm", [*recipe.ARMS])
def test_every_arm_trains_and_the_global_random_state_is_left_alone(arm):
    x, y = drawn(40, 1, 28, 28).float(), torch.arange(10).repeat(4)
    before = torch.get_rng_state()
    net, log = recipe.train(x, y, arm, epochs=1, batch=20, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert log.shape == (1, 3) and log.isfinite().all() and not net.training
    again, _ = recipe.train(x, y, arm, epochs=1, batch=20, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_uniform_weights_are_plain_training_and_a_huge_r_comes_to_the_same():
    x, y = drawn(40, 1, 28, 28).float(), torch.arange(10).repeat(4)
    plain, _ = recipe.train(x, y, "AT", epochs=1, batch=20)
    for arm, knobs in (("inverse frequency", {"power": 1.0}), ("DONE, first order", {"r": 1e6})):
        other, _ = recipe.train(x, y, arm, epochs=1, batch=20, knobs=knobs)  # classes are balanced here
        for a, b in zip(plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_bad_input_raises():
    net, x, y = models.build("lenet-conv", seed=0), drawn(4, 1, 28, 28).float(), torch.arange(4)
    for call in (
        lambda: dr.worst_mixture(drawn(3), 0),
        lambda: dr.worst_mixture(drawn(3, 3), 1),
        lambda: dr.worst_mixture(drawn(3)[:0], 1),
        lambda: dr.tracked(None, drawn(3), 1.0, 0.0),
        lambda: dr.tracked(None, drawn(3), 1.0, 1.1),
        lambda: dr.tracked(None, drawn(3), -1.0, 0.5),
        lambda: dr.box(x + 1, EPS),
        lambda: dr.box(x, 0),
        lambda: dr.attack(net, x, y, eps=25, steps=1, step=0.1),
        lambda: dr.attack(net, x, y, eps=EPS, steps=0, step=0.1),
        lambda: dr.attack(net, x, y, eps=EPS, steps=1, step=0.0),
        lambda: dr.attack(net, x, y, eps=EPS, steps=1, step=0.1, c=-1),
        lambda: recipe.gairat(torch.tensor([5.0]), 4, 0.0),
        lambda: recipe.gairat(torch.tensor([float("nan")]), 4, 0.0),
        lambda: recipe.long_tail(torch.arange(10).repeat(3), 30, 0.1),
        lambda: recipe.long_tail(torch.arange(10), 10, 0.0),
        lambda: recipe.train(x, y, "nothing"),
        lambda: recipe.train(x, y, "DONE", knobs={"q": 1}),
    ):
        with pytest.raises((ValueError, UnknownName)):
            call()
    with pytest.raises(NotFinite):
        dr.box(x / 0, EPS)
    with pytest.raises(NotFinite):
        dr.worst_mixture(torch.tensor([1.0, float("nan")]), 1.0)


# the tables


def test_the_tables_hold_every_arm_seed_attack_and_half():
    accuracy = papers.results(SLUG, "accuracy")
    cases = accuracy.groupby(["seed", "arm", "attack", "half"]).size()
    assert (cases == 1).all() and set(accuracy["arm"]) == set(recipe.ARMS)
    assert len(cases) == accuracy["seed"].nunique() * len(recipe.ARMS) * 3 * 2
    shares = accuracy[[f"class {k}" for k in range(10)]].to_numpy()
    assert np.allclose(100 * shares, np.round(100 * shares)) and 0 <= shares.min() and shares.max() <= 1
    means = accuracy.assign(all=shares.mean(1)).groupby(["seed", "arm", "attack"])["all"].mean().unstack()
    assert (means["clean"] >= means["PGD"]).all() and (means["clean"] >= means["margin"]).all()


def test_the_stored_networks_are_the_ones_that_were_measured():
    data = datasets.load("fashion-mnist")
    accuracy = (
        papers.results(SLUG, "accuracy").query("seed == 0 and attack == 'clean'").set_index(["arm", "half"])
    )
    for arm in recipe.KEPT:
        net, facts = models.load_checkpoint(papers.folder(SLUG) / f"{arm}-seed0.safetensors")
        found = recipe.by_class(recipe.right(net, data.x_test, data.y_test, "clean"), data.y_test)
        for half in (0, 1):
            stored = accuracy.loc[(arm, half)].filter(like="class").tolist()
            assert found[half] == pytest.approx(stored, abs=0.011)
        assert facts["variant"] == arm


def test_weights_stay_near_mean_1_so_that_no_arm_has_another_learning_rate():
    log = papers.results(SLUG, "training")
    assert log["weight"].between(0.7, 1.3).all()


def test_the_longer_table_holds_every_seed_and_the_entropies_fall_with_r():
    longer, entropy = papers.results(SLUG, "longer"), papers.results(SLUG, "entropy")
    assert (longer.groupby(["seed", "arm"]).size() == 1).all()
    assert all([*rows["arm"]] == [*recipe.LONGER["arms"]] for _, rows in longer.groupby("seed"))
    assert {*longer["seed"]} == {*entropy["seed"]} == {*papers.results(SLUG, "accuracy")["seed"]}
    fixed = entropy.pivot(index="seed", columns="r", values="AT's losses")
    assert (fixed.diff(axis=1).iloc[:, 1:] > 0).all(axis=None) and fixed.max(axis=None) <= 1
