"""OP-GFN: graphs and ways, the loss against values by hand, exact chances against enumeration, and what is stored."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nbkit import papers, recipes

gfn = papers.method("order-preserving-gflownets")
recipe = recipes.load("papers/order-preserving-gflownets/recipe.py")


def random_policy(where, seed=0):
    g = torch.Generator().manual_seed(seed)
    return gfn.policy(torch.randn(len(where.stops), where.child.shape[1] + 1, generator=g).double(), where)


def every_way(where, state=0):
    """All ways from a state, as lists of (state, action)."""
    stop = where.child.shape[1]
    found = [[(state, stop)]] if where.stops[state] else []
    for action, child in enumerate(where.child[state].tolist()):
        if child >= 0:
            found += [[(state, action), *rest] for rest in every_way(where, child)]
    return found


def columns(ways):
    """states and actions [L, N] of ways given as lists."""
    longest = max(map(len, ways))
    padded = [way + [(0, -1)] * (longest - len(way)) for way in ways]
    return torch.tensor(padded).permute(2, 1, 0)


GRAPHS = [gfn.grid(3), recipe.walled(4), recipe.blanks(3, 2), recipe.blanks(2, 3)]


# graphs and ways


@pytest.mark.parametrize("where", GRAPHS)
def test_parents_are_children_read_backwards(where):
    moves = {(s, a, c) for s, row in enumerate(where.child.tolist()) for a, c in enumerate(row) if c >= 0}
    back = {(p, a, s) for s, row in enumerate(where.parent.tolist()) for a, p in enumerate(row) if p >= 0}
    assert moves == back


def test_a_grid_moves_one_coordinate_and_walls_end_the_way():
    assert gfn.grid(3).child[4].tolist() == [7, 5]  # (1, 1) to (2, 1), (1, 2)
    walls = recipe.walled(3)
    assert walls.child[5].tolist() == [-1, -1] and walls.parent[8].tolist() == [-1, -1]
    assert walls.parent[7].tolist() == [4, -1]  # (2, 0) is at the wall: nobody comes from there


def test_a_form_has_every_filling_once_and_as_many_ways_as_orders():
    form = recipe.blanks(3, 5)
    assert len(form.stops) == 216 and form.stops.sum() == 125
    ends = [way[-1][0] for way in every_way(form)]
    assert set(ends) == set(form.stops.nonzero().squeeze(1).tolist())
    assert {ends.count(end) for end in set(ends)} == {6}
    digits = list(itertools.product(range(6), repeat=3))
    assert [digits[s] for s in form.stops.nonzero().squeeze(1)] == list(itertools.product(range(1, 6), repeat=3))


@pytest.mark.parametrize("where", GRAPHS)
def test_uniform_way_back_counts_the_parents(where):
    log_pb = gfn.uniform(where)
    parents = (where.parent >= 0).sum(1)
    for s in range(1, len(parents)):
        if parents[s]:
            assert log_pb[s].exp().max().item() == pytest.approx(1 / parents[s].item())
    assert log_pb[0, -1] == 0


@pytest.mark.parametrize("where", GRAPHS)
def test_ways_follow_the_graph_and_end_where_they_say(where):
    log_pf = random_policy(where)
    at = torch.zeros(300, dtype=torch.long)
    states, actions, ends = gfn.walk(log_pf, where, at, 0.3, torch.Generator().manual_seed(0))
    known = {tuple(way) for way in every_way(where)}
    for n in range(300):
        way = tuple((s, a) for s, a in zip(states[:, n].tolist(), actions[:, n].tolist(), strict=True) if a >= 0)
        assert way in known and way[-1][0] == ends[n]
    states, actions = gfn.walk_back(gfn.uniform(where), where, ends, torch.Generator().manual_seed(0))
    for n in range(300):
        way = [(s, a) for s, a in zip(states[:, n].tolist(), actions[:, n].tolist(), strict=True) if a >= 0]
        assert tuple(sorted(way)) in {tuple(sorted(one)) for one in known} and max(way)[0] <= ends[n]
        assert (ends[n].item(), where.child.shape[1]) in way


# exact chances


@pytest.mark.parametrize("where", GRAPHS)
def test_landing_is_the_sum_over_all_ways_and_the_mean_learned_reward(where):
    log_pf, ways = random_policy(where), every_way(where)
    states, actions = columns(ways)
    log_pb = gfn.uniform(where).double()
    log_r = gfn.log_reward(log_pf, log_pb, where, states, actions)
    by_hand = torch.zeros(len(where.stops), dtype=torch.float64)
    mean_reward = torch.zeros_like(by_hand)
    for way, score in zip(ways, log_r, strict=True):
        forward = sum(log_pf[s, a] for s, a in way)
        backward = sum(log_pb[where.child[s, a], a] for s, a in way[:-1])
        torch.testing.assert_close(score, forward - backward)
        by_hand[way[-1][0]] += forward.exp()
        mean_reward[way[-1][0]] += (backward + score).exp() if len(way) > 1 else score.exp()
    p = gfn.landing(log_pf, where, torch.tensor([0]))
    torch.testing.assert_close(p, by_hand)
    torch.testing.assert_close(p, mean_reward)  # p_T is the mean of R-hat over ways back
    torch.testing.assert_close(p.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_copies_run_side_by_side_without_touching():
    one, many = gfn.grid(3), gfn.copies(gfn.grid(3), 4)
    log_pf = random_policy(many)
    p = gfn.landing(log_pf, many, 9 * torch.arange(4)).view(4, 9)
    for run in range(4):
        torch.testing.assert_close(p[run], gfn.landing(log_pf.view(4, 9, 3)[run], one, torch.tensor([0])))


def test_draws_follow_the_exact_chances():
    where = gfn.grid(3)
    log_pf = random_policy(where).float()
    _, _, ends = gfn.walk(log_pf, where, torch.zeros(40_000, dtype=torch.long), 0.0, torch.Generator().manual_seed(1))
    p = gfn.landing(log_pf, where, torch.tensor([0]))
    error = (ends.bincount(minlength=9) / 40_000 - p).abs() / (p * (1 - p) / 40_000).sqrt()
    assert error.max() < 4


# the loss


@pytest.mark.parametrize("d", [1, 2, 3])
def test_undominated_is_the_definition_and_counts_twins(d):
    u = torch.randint(0, 4, (5, 12, d), generator=torch.Generator().manual_seed(d))
    for batch, found in zip(u.tolist(), gfn.undominated(u).tolist(), strict=True):
        for mine, free in zip(batch, found, strict=True):
            beaten = any(all(b >= a for a, b in zip(mine, other, strict=True)) and other != mine for other in batch)
            assert free == (not beaten)
    assert gfn.undominated(torch.tensor([[1.0], [1], [0]])).tolist() == [True, True, False]


def test_order_loss_by_hand():
    log_r = torch.tensor([2.0, 0.0])
    for u, wanted in (([1, 0], 0.0), ([1, 1], 1.0), ([0, 1], 2.0)):
        loss = gfn.order_loss(log_r, torch.tensor(u)[:, None])
        assert loss.item() == pytest.approx(wanted + math.log1p(math.exp(-2)))
    for u in (torch.eye(5), torch.tensor([[1.0], [0], [0], [0], [0]])):
        assert gfn.order_loss(torch.zeros(5), u).item() == pytest.approx(math.log(5))


def test_pair_loss_is_the_mean_over_a_shuffle_and_sees_the_order_only():
    g = torch.Generator().manual_seed(3)
    log_r, u = torch.randn(2, 7, generator=g), torch.randint(0, 3, (2, 7), generator=g).double()
    other = torch.rand(2, 7, generator=torch.Generator().manual_seed(5)).argsort(-1)
    by_hand = []
    for k in range(2):
        losses = []
        for i, j in enumerate(other[k].tolist()):
            target = 0.5 + 0.5 * torch.sign(u[k, i] - u[k, j])
            gap = (log_r[k, i] - log_r[k, j]).double()
            losses.append(-target * torch.sigmoid(gap).log() - (1 - target) * torch.sigmoid(-gap).log())
        by_hand.append(torch.stack(losses).mean().float())
    for values in (u, u.exp(), -1 / (u + 1)):
        found = gfn.pair_loss(log_r, values, torch.Generator().manual_seed(5))
        torch.testing.assert_close(found, torch.stack(by_hand))


def test_three_in_a_chain_put_the_middle_at_half():
    middle = torch.tensor([-1.0], requires_grad=True)
    adam = torch.optim.Adam([middle], lr=0.05)
    pairs, u = torch.combinations(torch.arange(3)), torch.tensor([0.0, 5, 900])
    for _ in range(400):
        log_r = torch.cat([torch.tensor([-6.0]), middle, torch.zeros(1)])
        adam.zero_grad()
        gfn.order_loss(log_r[pairs], u[pairs][..., None]).sum().backward()
        adam.step()
    assert middle.item() == pytest.approx(-3, abs=0.01)


def test_the_middle_moves_with_how_often_each_level_is_drawn():
    places = {}
    for many in ((1, 1, 1), (12, 5, 3), (3, 5, 12)):
        low, high = 0.0, 8.0  # where the slope, n0 sigmoid(-a) = n2 sigmoid(a - 8), is 0
        for _ in range(60):
            a = (low + high) / 2
            up = many[0] / (1 + math.exp(a)) > many[2] / (1 + math.exp(8 - a))
            low, high = (a, high) if up else (low, a)
        middle = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        log_r = torch.stack([torch.zeros_like(middle), middle, torch.full_like(middle, 8)])
        drawn = torch.arange(3).repeat_interleave(torch.tensor(many))
        pairs = torch.combinations(drawn)
        gfn.order_loss(log_r[pairs], pairs[..., None]).sum().backward()
        assert middle.grad.abs() < 1e-9
        places[many] = a / 8
    assert places[1, 1, 1] == pytest.approx(0.5)
    assert places[12, 5, 3] > 0.55 and places[3, 5, 12] < 0.45


# training


def test_training_sees_the_order_only():
    u = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    found = [gfn.train(gfn.grid(4), values, gfn.pair_loss, steps=20, seed=4) for values in (u, u.exp() * 9)]
    assert torch.equal(found[0][0], found[1][0])


def test_log_z_gets_no_gradient():
    log_z = torch.tensor(0.7, requires_grad=True)
    u = torch.rand(30, generator=torch.Generator().manual_seed(0))
    gfn.pair_loss(u.flip(0) + log_z, u).backward()
    assert log_z.grad.abs() < 1e-6


def test_balance_reaches_the_rewards_on_a_form():
    form = recipe.blanks(2, 2)
    reward = torch.rand(1, 9, generator=torch.Generator().manual_seed(0)) + 0.2
    _, log_z, seen = gfn.train(form, reward.log(), gfn.balance_loss, steps=400, watch=[400])
    inside = reward[:, form.stops]
    torch.testing.assert_close(seen[400][:, form.stops], inside / inside.sum(), atol=1e-4, rtol=0)
    torch.testing.assert_close(log_z, inside.sum().log()[None], atol=1e-3, rtol=0)


def test_ways_back_come_from_the_ends_asked_for():
    where, among = gfn.grid(4), torch.tensor([[5, 6], [7, 7]])
    batches = gfn.ways_back(gfn.copies(where, 2), among + torch.tensor([[0], [16]]), 8, torch.Generator(), chunk=3)
    for _, (_, _, ends) in zip(range(5), batches, strict=False):
        assert set(ends[0].tolist()) <= {5, 6} and set(ends[1].tolist()) == {23}


def test_only_forward_or_only_backward_ways_will_do():
    for batch in ((8, 0, 0.1), (0, 8, 0.0)):
        _, _, seen = gfn.train(gfn.grid(3), torch.arange(9.0)[None], gfn.pair_loss, 5, batch=batch, watch=[5])
        assert seen[5].sum().item() == pytest.approx(1, abs=1e-5)


def test_the_grid_has_four_peaks_on_four_plateaus():
    found = recipe.levels(16)
    assert found.bincount().tolist() == [192, 60, 4]
    assert torch.equal(found.view(16, 16), found.view(16, 16).T.flip(0))
    assert recipe.rewards(16, 0.1).unique().tolist() == pytest.approx([0.1, 0.6, 2.6])


# bad input


@pytest.mark.parametrize(
    ("child", "stops"),
    [
        (torch.tensor([1, -1]), torch.ones(2, dtype=torch.bool)),
        (torch.tensor([[1], [2]]), torch.ones(2, dtype=torch.bool)),
        (torch.tensor([[1], [0]]), torch.ones(2, dtype=torch.bool)),
        (torch.tensor([[1], [-1]]), torch.tensor([True, False])),
        (torch.tensor([[2, -1], [2, -1], [-1, -1]]), torch.ones(3, dtype=torch.bool)),
        (torch.tensor([[1], [-1]]), torch.ones(3)),
        (torch.zeros(0, 2, dtype=torch.long), torch.ones(0)),
    ],
)
def test_a_bad_graph_is_refused(child, stops):
    with pytest.raises(ValueError):
        gfn.space(child, stops)


def test_a_cycle_is_refused():
    with pytest.raises(ValueError, match="cycle"):
        gfn.landing(torch.zeros(2, 2), gfn.Space(torch.tensor([[1], [1]]), None, None), torch.tensor([0]))


def test_bad_values_are_refused():
    log_r = torch.zeros(3)
    for u in (torch.zeros(3), torch.zeros(4, 2), torch.full((3, 2), math.nan)):
        with pytest.raises(ValueError):
            gfn.order_loss(log_r, u)
    with pytest.raises(ValueError):
        gfn.order_loss(torch.zeros(1), torch.zeros(1, 2))
    for u in (torch.zeros(3, 1), torch.tensor([0, math.nan, 1])):
        with pytest.raises(ValueError):
            gfn.pair_loss(log_r, u)
    for values in (torch.zeros(1, 8), torch.full((1, 9), math.nan), torch.zeros(1, 9).log()):
        with pytest.raises(ValueError):
            gfn.train(gfn.grid(3), values, gfn.pair_loss)
    with pytest.raises(ValueError, match="steps"):
        gfn.train(gfn.grid(3), torch.zeros(1, 9), gfn.pair_loss, 0)
    with pytest.raises(ValueError):
        gfn.grid(0)
    with pytest.raises(ValueError):
        recipe.blanks(0)


# the recipe's own


def test_igd_plus_counts_lacks_only():
    best = torch.tensor([[1.0, 0], [0, 1]])
    assert recipe.igd_plus(best, best) == 0
    assert recipe.igd_plus(torch.tensor([[2.0, 2]]), best) == 0
    assert recipe.igd_plus(torch.tensor([[1.0, 0]]), best) == pytest.approx(0.5)


def test_known_points_of_the_test_functions():
    u = recipe.objectives(("branin", "beale"), 301).view(301, 301, 2)
    assert u[..., 0].max().item() == pytest.approx(1 - 0.397887 / 308.13, abs=1e-4)  # Branin's known minimum
    assert u[300, 150, 1].item() == pytest.approx((0.5**2 + 1.25**2 + 1.625**2) / 38.8, abs=1e-5)  # beale(1, 0)


def test_stored_runs_are_distributions_and_agree_with_the_maps():
    table, maps = papers.results("order-preserving-gflownets", "grid"), papers.tensors(
        "order-preserving-gflownets", "grid"
    )
    peaks = recipe.levels(16) == 2
    for name, log_p in maps.items():
        p = log_p.double().exp()
        assert (p.sum((1, 2)) - 1).abs().max() < 0.01, name
    op = table.query("name == 'OP' and seed == 0 and step == 1000")[[f"mode {i}" for i in range(4)]].to_numpy()[0]
    assert (maps["OP"][-1].double().exp().flatten()[peaks] - torch.tensor(op)).abs().max() < 1e-3
