"""Nested dynamical systems: hand values, what composes to what, special cases, refused types, the stored tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nbkit import papers, recipes

nested = papers.method("nested-dynamical-systems")
recipe = recipes.load("papers/nested-dynamical-systems/recipe.py")
SLUG = "nested-dynamical-systems"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(value):
    return torch.tensor([value], dtype=torch.float64)


def scalar(p, eps=0.1):
    one = nested.reals(1)
    return nested.gradient_learner(lambda p, a: p[0] * a, (number(p),), eps, one, one)


def identity(n):
    space = nested.reals(n)
    return nested.Learner(space, space, (), lambda p, a: a, lambda p, a, target: ((), target))


def rows(*sizes, eps=0.05):
    last = len(sizes) - 2
    return [
        nested.dense(a, b, eps, seed, torch.positive if seed == last else torch.tanh)
        for seed, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    ]


def happen(T=30, k=4, n=8, seed=0):
    forecast = draw(T, k, n, seed=seed).softmax(-1)
    return forecast, torch.randint(n, (T,), generator=torch.Generator().manual_seed(seed))


# learners


def test_the_scalar_learner_of_the_card_and_two_in_a_row_by_hand():
    (p,), request = scalar(2.0).respond((number(2.0),), number(3.0), number(4.0))
    assert p.item() == pytest.approx(1.4) and request.item() == pytest.approx(-1)
    row = scalar(2.0) >> scalar(3.0)
    ((p,), (q,)), request = row.respond(row.state, number(1.0), number(4.0))
    # b = 2, c = 6: q' = 3 - 0.1 * 2 * 2, inner target 2 - 2 * 3 = -4, p' = 2 - 0.1 * 6 * 1, request 1 - 6 * 2
    assert (p.item(), q.item(), request.item()) == pytest.approx((1.4, 2.6, -11))


def test_a_dense_layer_moves_by_the_gradients_written_out():
    layer, x, t = nested.dense(5, 3, 0.1, 0), draw(4, 5), draw(4, 3, seed=1)
    W, c = layer.state
    out = (x @ W + c).tanh()
    back = (out - t) * (1 - out**2)
    (W1, c1), request = layer.respond(layer.state, x, t)
    torch.testing.assert_close(W1, W - 0.1 * x.T @ back)
    torch.testing.assert_close(c1, c - 0.1 * back.sum(0))
    torch.testing.assert_close(request, x - back @ W.T)
    assert torch.equal(W, layer.state[0])  # nothing is changed in place


@pytest.mark.parametrize("sizes", [(6, 4), (6, 5, 4), (6, 5, 5, 5, 4)])
def test_a_row_of_learners_is_backpropagation_after_every_batch(sizes):
    layers = rows(*sizes)
    data = [(draw(8, 6, seed=s), draw(8, 4, seed=100 + s)) for s in range(20)]
    net = layers[0]
    for layer in layers[1:]:
        net = net >> layer
    p, path = net.state, [recipe.flat(net.state)]
    for x, y in data:
        p, _ = net.respond(p, x, y)
        path.append(recipe.flat(p))
    torch.testing.assert_close(torch.stack(path), recipe.by_autograd(layers, data, 0.05), rtol=0, atol=1e-12)


def test_bracketing_and_identities_change_nothing():
    one, two, three = rows(6, 5, 5, 4)
    x, t = draw(8, 6), draw(8, 4, seed=1)
    left, right = (one >> two) >> three, one >> (two >> three)
    (pq, r), request = left.respond(left.state, x, t)
    (p, qr), other = right.respond(right.state, x, t)
    assert torch.equal(request, other) and torch.equal(recipe.flat((pq, r)), recipe.flat((p, qr)))
    padded = identity(6) >> (one >> identity(5))
    ((), (new, ())), request = padded.respond(padded.state, x, draw(8, 5, seed=2))
    alone, same = one.respond(one.state, x, draw(8, 5, seed=2))
    assert torch.equal(request, same) and torch.equal(recipe.flat(new), recipe.flat(alone))


def test_requests_with_new_weights_are_off_by_the_order_of_the_step_and_gradients_by_more():
    off = {}
    data = [(draw(8, 6), draw(8, 4, seed=1))]
    for eps in (1e-3, 1e-4):
        layers = rows(6, 5, 4, eps=eps)
        exact = recipe.by_autograd(layers, data, eps)[-1]
        for late in (True, False):
            wrong = recipe.mistaken(layers, late)
            p, _ = wrong.respond(wrong.state, *data[0])
            off[eps, late] = (recipe.flat(p) - exact).abs().max().item()
    assert off[1e-3, True] / off[1e-4, True] == pytest.approx(100, rel=0.05)  # eps in the request, eps in the update
    assert off[1e-3, False] / off[1e-4, False] == pytest.approx(10, rel=0.05)


def test_the_softmax_learner_requests_what_the_log_loss_asks_for():
    z, y = draw(6, 5).requires_grad_(), torch.eye(5, dtype=torch.float64)[[0, 1, 2, 3, 4, 0]]
    (gradient,) = torch.autograd.grad(-(z.log_softmax(-1) * y).sum(), z)
    _, request = recipe.softmax(5).respond((), z.detach(), y)
    torch.testing.assert_close(request, z.detach() - gradient)


# machines and wirings


def test_a_learner_run_as_a_dils_is_the_learner_and_tells_its_box_the_request():
    layer, x, t = rows(6, 4)[0], draw(3, 6), draw(3, 4, seed=1)
    space = nested.Interface(nested.reals(6), nested.reals(6))
    box = nested.System(space, (x, None), lambda s: s[0], lambda s, direction: (s[0], direction))
    machine = nested.wire(nested.as_dils(layer), box)
    torch.testing.assert_close(machine.position, layer.implement(layer.state, x))
    state, (box,) = machine.step(t).state
    new, request = layer.respond(layer.state, x, t)
    assert torch.equal(recipe.flat(state), recipe.flat(new)) and torch.equal(box.state[1], request)


def test_without_a_step_the_control_loop_is_a_fixed_wiring():
    b, noise, target, dither = recipe.world(range(3), 50)
    p = torch.tensor([0.5, 1.0], dtype=torch.float64).expand(3, 2)
    machine = nested.wire(nested.tracking(p, 0.0, 0.2), *recipe.boxes_of(0.5, b, noise, target, dither))
    x = torch.zeros(3, 1, dtype=torch.float64)
    for t, system in enumerate(nested.run(machine, [None] * 120)):
        u = (target[t] - 0.5 * x + 0.2 * dither[t]).clamp(-1.5, 1.5)
        torch.testing.assert_close(system.position, torch.cat([x, target[t], u], 1))
        x = 0.5 * x + b[t] * u + noise[t]


def test_the_force_is_the_request_and_the_wiring_moves_by_the_gradient():
    p = torch.tensor([[0.4, -0.7]], dtype=torch.float64)
    dils = nested.tracking(p, 0.1)
    boxes = [number(0.3)[None], number(1.0)[None], number(0.0)[None]]
    space = nested.reals(2), nested.reals(1)
    model = nested.gradient_learner(lambda p, z: (p[0] * z).sum(-1, keepdim=True), (p,), 0.1, *space)
    _, request = model.respond((p,), torch.tensor([[0.3, 0.0]], dtype=torch.float64), boxes[1])
    torch.testing.assert_close(dils.show(dils.state, boxes)[:, 2:], request[:, 1:])
    z = torch.tensor([[0.2, 0.5]], dtype=torch.float64)
    (new,), now = dils.update(((p,), z), boxes, None)
    error = 0.4 * 0.2 - 0.7 * 0.5 - 0.3
    torch.testing.assert_close(new, p - 0.1 * error * z)
    torch.testing.assert_close(now, torch.cat([boxes[0], request[:, 1:]], 1))


def test_what_is_told_the_sign_tracks_up_to_noise_and_force():
    e = recipe.arm("told", range(3), 50, 0.5, [(0.0, 0.0)])[0]
    assert recipe.rms(e).max() < 0.25


@pytest.mark.parametrize("flips", [200, 20])
def test_the_last_step_shows_the_sign_to_a_box_that_remembers(flips):
    b, noise, target, dither = recipe.world([3], flips)
    found = recipe.arm("last step", [3], flips, 0.8, [(0.0, 0.1)])[0, 0]
    x, sign, then, off = 0.0, 1.0, (0.0, 0.0), []
    for t in range(recipe.STEPS - 1):
        u = sign * (target[t].item() - 0.8 * x) + 0.1 * dither[t].item()
        u = min(1.5, max(-1.5, u))
        sign = 1.0 if (x - 0.8 * then[0]) * then[1] >= 0 else -1.0
        then, x = (x, u), 0.8 * x + b[t].item() * u + noise[t].item()
        off.append(x - target[t].item())
    np.testing.assert_allclose(found, off, atol=1e-9)


def test_the_bounded_wiring_is_the_free_one_until_the_bound():
    step = [(0.02, 0.0)]
    free, bounded = (recipe.arm(name, [0], 200, 0.5, step)[0, 0] for name in ("gradient", "bounded"))
    apart = (free - bounded).abs() > 1e-12
    assert not apart[:2].any() and apart.any()
    p = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    boxes = recipe.boxes_of(0.5, *recipe.world([0], 200))
    machine = nested.wire(recipe.tame(nested.tracking(p, 1.2), 1.0), *boxes)
    for system in nested.run(machine, [None] * 399):
        assert system.state[0][0][0].abs().max() <= 1


def test_the_geometric_mean_is_the_product_of_the_forecasts_to_one_over_k():
    forecast, outcome = happen()
    product = forecast.prod(1) ** 0.25
    logp = (product / product.sum(-1, keepdim=True)).gather(-1, outcome[:, None]).log().sum()
    torch.testing.assert_close(recipe.scores(forecast[None], outcome[None], None)["geometric mean"], logp[None])


def test_least_squares_without_forgetting_is_the_ridge_regression_of_all_so_far():
    p = torch.zeros(1, 2, dtype=torch.float64)
    dils = recipe.least_squares(nested.tracking(p, 0.0), torch.ones(1, 1, dtype=torch.float64))
    z, x = draw(12, 2), draw(12, 1, seed=1)
    state = dils.state
    for t in range(12):
        state = ((state[0][0],), z[t : t + 1], state[2])
        state = dils.update(state, [x[t : t + 1], number(0.0)[None], number(0.0)[None]], None)
    ridge = torch.linalg.solve(z.T @ z + torch.eye(2), z.T @ x)
    torch.testing.assert_close(state[0][0], ridge.T)


# markets


def test_wealth_is_bayes_rule_and_the_score_the_log_of_the_mean_product():
    forecast, outcome = happen()
    start = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    score, wealth = recipe.traded(forecast, outcome, start)
    given = recipe.happened(forecast, outcome[:, None].expand(-1, 4))
    joint = start * given.cumsum(0).exp()
    torch.testing.assert_close(score.cumsum(0), joint.sum(-1).log())
    torch.testing.assert_close(wealth[1:], (joint / joint.sum(-1, keepdim=True))[:-1])
    best = (given.sum(0) + start.log()).max()
    assert -1e-12 < score.sum() - best < math.log(4)


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[2], [0, 1, 3]], [[3, 0], [1], [2]]])
def test_a_market_of_markets_is_the_flat_one(groups):
    forecast, outcome = happen(seed=3)
    start = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    whole = recipe.trade(forecast, outcome, start)
    for a, b in zip(whole, recipe.trade(forecast, outcome, start, groups=groups), strict=True):
        torch.testing.assert_close(a.position, b.position, rtol=0, atol=1e-12)
        owned = torch.stack([a.state[0][group].sum() for group in groups])
        torch.testing.assert_close(owned, b.state[0], rtol=0, atol=1e-12)


def test_a_share_keeps_a_floor_under_every_expert():
    forecast, outcome = happen(T=200)
    even = torch.full((4,), 0.25, dtype=torch.float64)
    _, wealth = recipe.traded(forecast, outcome, even, 0.1)
    assert wealth.min() >= 0.025 - 1e-12
    torch.testing.assert_close(wealth.sum(-1), torch.ones(200, dtype=torch.float64))


def test_regret_is_nothing_among_equals_and_all_of_ln_k_beside_hopeless_rivals():
    good, bad = torch.tensor([0.98, 0.02]), torch.tensor([0.02, 0.98])
    even, outcome = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(30, dtype=torch.int64)
    for pair, expected in (([good, good], 0.0), ([good, bad], 1.0)):
        forecast = torch.stack(pair).double().expand(30, 2, 2)
        forecast = forecast / forecast.sum(-1, keepdim=True)
        score, _ = recipe.traded(forecast, outcome, even)
        assert recipe.regret(forecast, outcome, score).item() == pytest.approx(expected, abs=1e-6)


def test_experts_use_the_past_alone_and_the_prefix_for_what_they_fit():
    x, _, _ = recipe.motions()
    forecast, outcome = recipe.experts(x[:2])
    changed = x[:2].clone()
    changed[..., 60:] += 5
    other, then = recipe.experts(changed)
    assert torch.equal(forecast[:, :, :31], other[:, :, :31]) and not torch.equal(outcome, then)
    torch.testing.assert_close(forecast.sum(-1), torch.ones_like(forecast[..., 0]))
    assert forecast.min() >= 0.01 / 8 - 1e-12


def test_an_autoregression_is_forecast_from_its_own_recursion():
    x = [0.3, 0.9]
    for _ in range(58):
        x.append(0.2 + 1.2 * x[-1] - 0.8 * x[-2])
    forecast, outcome = recipe.experts(torch.tensor(x, dtype=torch.float64)[None], bins=4)
    assert recipe.happened(forecast[:, :, 2], outcome).exp().median() > 0.9


def test_fitted_weights_are_the_best_fixed_ones():
    given = draw(500, 3) * 0.5 - 1
    best = recipe.fitted(given)
    score = lambda w: (given.exp() @ w).log().sum().item()  # noqa: E731
    for seed in range(20):
        assert score(best) >= score(draw(3, seed=seed).softmax(0)) - 1e-6


# what is refused


def test_wrong_types_are_refused_by_name():
    with pytest.raises(TypeError, match="gives R5, the next takes R4"):
        nested.dense(6, 5, 0.1, 0) >> nested.dense(4, 3, 0.1, 1)
    source = nested.player([number(0.0)], nested.Interface(nested.reals(1), nested.nothing()))
    with pytest.raises(TypeError, match=r"R1 y\^1 stands where the wiring has R1 y\^R1"):
        nested.wire(nested.as_dils(scalar(1.0)), source)
    with pytest.raises(TypeError, match="is not in 1"):
        source.step(number(1.0))
    with pytest.raises(ValueError, match="shorter|longer"):
        nested.wire(nested.as_dils(scalar(1.0)))
    with pytest.raises(TypeError, match="is not in R1"):
        _ = nested.player([number(math.nan)], source.interface).position


def test_directions_may_depend_on_the_position():
    duty = nested.Interface(nested.outcomes(2), lambda awake: nested.reals(1) if awake else nested.nothing())
    sensor = nested.System(duty, torch.tensor(0), lambda state: state, lambda state, _: 1 - state)
    with pytest.raises(TypeError):
        sensor.step(number(0.5))
    awake = sensor.step()
    with pytest.raises(TypeError):
        awake.step()
    assert awake.step(number(0.5)).position == 0


@pytest.mark.parametrize(
    "space, good, bad",
    [
        (nested.reals(2), torch.ones(3, 2), [torch.ones(3), torch.tensor([1.0, math.inf]), [1.0, 2.0], None]),
        (nested.forecasts(2), torch.tensor([0.25, 0.75]), [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.6])]),
        (nested.outcomes(3), torch.tensor([0, 2]), [torch.tensor(3), torch.tensor(-1), torch.tensor(1.0), 1]),
        (nested.nothing(), None, [0, torch.ones(1)]),
    ],
)
def test_spaces_hold_what_they_say(space, good, bad):
    assert space.holds(good) and not any(space.holds(value) for value in bad)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="step"):
        scalar(1.0, eps=-0.1)
    with pytest.raises(ValueError, match="step"):
        nested.tracking(torch.ones(2), -0.1)
    even = torch.full((4,), 0.25, dtype=torch.float64)
    for start in (torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.6]), torch.tensor([]), even[None]):
        with pytest.raises(ValueError, match="wealth"):
            nested.market(start, 3)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share"):
            nested.market(even, 3, share)
    for how in ({"prefix": 100}, {"prefix": 4}, {"bins": 1}, {"floor": 0.0}):
        with pytest.raises(ValueError, match="prefix"):
            recipe.experts(draw(2, 100), **how)


# the tables


def test_every_arm_of_the_plant_ran_in_every_case_and_no_setting_is_the_last_of_its_grid():
    table = papers.results(SLUG, "tracking")
    assert (table.groupby(["a", "flips", "arm"])["seed"].nunique() == len(recipe.RUNS)).all()
    assert table["arm"].nunique() == 9 and not set(recipe.RUNS) & set(recipe.OTHERS)
    grid = {name: {s[0] for s in recipe.GRIDS[name]} for name in ("gradient", "bounded", "normalised", "least squares")}
    for name, values in grid.items():
        chosen = set(table[table["arm"] == name]["first"])
        assert chosen <= values and max(values) not in chosen and min(values) not in chosen


def test_a_run_of_the_plant_comes_out_as_stored():
    table = papers.results(SLUG, "tracking").query("a == 0.5 and flips == 200 and arm == 'gradient' and seed < 3")
    setting = table[["first", "second"]].iloc[0].tolist()
    found = recipe.rms(recipe.arm("gradient", range(3), 200, 0.5, [setting])[0])
    np.testing.assert_allclose(found, table["error"], atol=1e-3)


def test_the_theorem_holds_in_every_row_of_the_markets():
    table = papers.results(SLUG, "markets").pivot(index=["what", "number"], columns="arm", values="score")
    series = np.where(table.index.get_level_values("what").str.startswith("digits"), 1, 6)
    regret = table["best afterwards"] - table["market"]
    assert (regret > -0.01).all() and (regret < series * math.log(4) + 0.01).all()
    assert (table["market"] <= table["best afterwards"] + 0.01).all()
    assert table.groupby("what").size().tolist() == [10] * 6
