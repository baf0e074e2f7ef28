"""sep-clr: the terms by plain loops, codes worked by hand, data that do not overlap, probes, bad input, the tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nbkit import papers, recipes
from nbkit.errors import NotFinite

sc = papers.method("sep-clr")
recipe = recipes.load("papers/sep-clr/recipe.py")
SLUG = "sep-clr"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def views(n=12, d=3, seed=0):
    c, s = drawn(2, n, d, seed=seed), drawn(2, n, d, seed=seed + 1)
    return list(c), list(s), torch.arange(n) % 2


def kernel(a, b, tau):
    return math.exp(-sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True)) / (2 * tau))


def slow_joint(c, t, tau):
    n = len(c)
    rows = [[kernel(c[i], c[j], tau) * kernel(t[i], t[j], tau) for j in range(n)] for i in range(n)]
    return np.mean([math.log(np.mean(row)) for row in rows])


def slow_uniformity(a, tau):
    return math.log(np.mean([kernel(a[i], a[j], tau) for i in range(len(a)) for j in range(i)]))


def slow_align(a, b, tau):
    return np.mean([(p - q).square().sum().item() / (2 * tau) for p, q in zip(a, b, strict=True)])


# the terms


@pytest.mark.parametrize("tau", [0.2, 0.5, 2.0])
def test_the_three_functions_are_those_of_plain_loops(tau):
    a, b = drawn(9, 4), drawn(9, 4, seed=5)
    assert sc.align(a, b, tau).item() == pytest.approx(slow_align(a, b, tau), abs=1e-12)
    assert sc.uniformity(a, tau).item() == pytest.approx(slow_uniformity(a, tau), abs=1e-12)
    assert sc.joint(a, b[:, :2], tau).item() == pytest.approx(slow_joint(a, b[:, :2], tau), abs=1e-12)


def test_the_parts_are_those_of_plain_loops_with_zeros_for_background():
    (c1, c2), (s1, s2), y = views()
    found = sc.terms([c1, c2], [s1, s2], y)
    c = [F.normalize(v, dim=1) for v in (c1, c2)]
    t = [v.clone() for v in (s1, s2)]
    for v in t:
        v[y == 0] = 0
    assert found["common"].item() == pytest.approx(
        slow_align(*c, 0.5) + slow_uniformity(c[0], 0.5) + slow_uniformity(c[1], 0.5), abs=1e-12
    )
    assert found["salient"].item() == pytest.approx(
        slow_align(s1[y == 1], s2[y == 1], 0.5) + slow_uniformity(t[0], 0.5) + slow_uniformity(t[1], 0.5),
        abs=1e-12,
    )
    null = np.mean([v[y == 0].square().sum(1).mean().item() for v in (s1, s2)])  # 2 tau is 1
    assert found["null"].item() == pytest.approx(null, abs=1e-12)
    joint = (slow_joint(c[0], t[0], 0.5) + slow_joint(c[1], t[1], 0.5)) / 2
    assert found["joint"].item() == pytest.approx(joint, abs=1e-12)


def test_gradients_are_those_of_differences_and_background_gets_them_from_the_null_term_alone():
    c, s, y = views(6, 2)
    leaves = [v.requires_grad_() for v in (*c, *s)]
    assert torch.autograd.gradcheck(
        lambda *v: tuple(sc.terms(list(v[:2]), list(v[2:]), y).values()),
        leaves,
        eps=1e-6,
        atol=1e-6,
        fast_mode=True,
    )
    for name in ("salient", "joint"):
        gradient = torch.autograd.grad(sc.terms(c, s, y)[name], s[0], retain_graph=True)[0]
        assert not gradient[y == 0].any() and gradient[y == 1].any()
    gradient = torch.autograd.grad(sc.terms(c, s, y)["null"], s[0])[0]
    torch.testing.assert_close(gradient[y == 0], s[0].detach()[y == 0] / 3)  # 3 background rows
    assert not gradient[y == 1].any()


def test_collapse_is_the_maximum_and_far_points_reach_the_floor():
    same = torch.ones(10, 3)
    assert sc.uniformity(same).item() == pytest.approx(0, abs=1e-6)
    assert sc.joint(same, same).item() == pytest.approx(0, abs=1e-6)
    far = 1e3 * torch.eye(10)
    assert sc.joint(far, far).item() == pytest.approx(-math.log(10), abs=1e-5)
    assert torch.isfinite(sc.uniformity(far))


def test_on_a_grid_the_joint_entropy_is_the_sum_and_dependence_lowers_it():
    a, b = drawn(6, 2), drawn(5, 3, seed=2)
    c, t, one = a.repeat_interleave(5, 0), b.repeat(6, 1), torch.ones(30, 1).double()
    apart = sc.joint(c, one) + sc.joint(one, t)
    torch.testing.assert_close(sc.joint(c, t), apart)
    assert sc.joint(a, a) > 2 * sc.joint(a, torch.ones(6, 1).double())


def test_the_order_of_images_does_not_matter_and_the_length_of_c_does_not():
    c, s, y = views()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    plain = sc.terms(c, s, y)
    for other in (
        sc.terms([v[order] for v in c], [v[order] for v in s], y[order]),
        sc.terms([7 * v for v in c], s, y),
    ):
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value)
    assert sc.terms(c, [2 * v for v in s], y)["null"] > plain["null"]


def test_the_total_is_the_weighted_sum():
    parts = sc.terms(*views())
    expected = parts["common"] + 1000 * parts["salient"] + 1000 * parts["null"] + 10 * parts["joint"]
    torch.testing.assert_close(sc.total(parts, recipe.LARGE), expected)
    torch.testing.assert_close(sc.total(parts, {"common": 2.0, "joint": 0.0}), 2 * parts["common"])


# data and views


def made(seed=0, **how):
    tag = (torch.arange(200) / 400).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    return recipe.scenes(
        (tag, torch.arange(200)), (1 - tag, torch.arange(200)), seed, **({"n": 60, "held": 30} | how)
    )


def test_no_garment_and_no_digit_is_used_twice():
    data = made()
    background = (data["background"].mean((1, 2, 3)) * 2 * 400).round().int().tolist()
    used = background + data["train"][1].tolist() + data["validation"][1].tolist()
    assert len(used) == len(set(used)) == 150
    shown = data["train"][2].tolist() + data["validation"][2].tolist()
    assert len(shown) == len(set(shown)) == 90
    images, garment, digit = data["train"]
    expected = 0.5 * garment / 400 + 0.5 * (1 - digit / 400)
    torch.testing.assert_close(images.mean((1, 2, 3)), expected)
    assert data["y"].tolist() == [0] * 60 + [1] * 60 and torch.equal(data["x"][60:], images)
    assert not torch.equal(made(1)["x"], data["x"])


def test_composed_images_are_halves_at_half_the_size():
    a, b = torch.ones(2, 1, 28, 28), torch.zeros(2, 1, 28, 28)
    assert torch.equal(sc.compose(a), torch.full((2, 1, 14, 14), 0.5))
    assert torch.equal(sc.compose(a, a), torch.ones(2, 1, 14, 14))
    assert torch.equal(sc.compose(b, a), sc.compose(a))


def test_a_view_without_change_is_the_image_and_windows_stay_inside():
    random = torch.Generator().manual_seed(0)
    x = torch.rand(20, 1, 14, 14, generator=random)
    torch.testing.assert_close(sc.view(x, random, area=1.0, jitter=0.0), x, rtol=0, atol=1e-5)
    framed = torch.ones(200, 1, 14, 14)
    seen = sc.view(framed, random, area=0.5, jitter=0.0)
    assert seen[:, :, 1:-1, 1:-1].min() > 0.999  # never beyond the border
    ramp = torch.linspace(0, 1, 14).expand(50, 1, 14, 14)
    assert (sc.view(ramp, random, jitter=0.0).diff(dim=3) > -1e-6).all()  # never mirrored
    assert sc.view(x, random).min() >= 0 and sc.view(x, random).max() <= 1


# networks, training, probes


def small():
    return sc.Pair([sc.encoder(4, 4), sc.encoder(4, 4)], [sc.projector(4), sc.projector(4)])


def test_training_is_adam_on_the_objective_and_a_seed_repeats_it():
    data, nets = made(), []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(small())
        course = sc.fit(nets[-1], data["x"], data["y"], recipe.LARGE, epochs=2, lr=0.01, batch=60, seed=1)
    assert len(course) == 2 and set(course[0]) == set(recipe.LARGE)
    torch.manual_seed(3)
    slow, random = small(), torch.Generator().manual_seed(1)
    adam = torch.optim.Adam(slow.parameters(), 0.01)
    for _ in range(2):
        for rows in torch.randperm(120, generator=random).split(60):
            heads = [slow(sc.view(data["x"][rows], random))[1] for _ in range(2)]
            parts = sc.terms([h[0] for h in heads], [h[1] for h in heads], data["y"][rows])
            loss = parts["common"] + 1000 * (parts["salient"] + parts["null"]) + 10 * parts["joint"]
            adam.zero_grad()
            loss.backward()
            adam.step()
    for one, two, three in zip(*(net.parameters() for net in nets), slow.parameters(), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=1e-3, atol=1e-4)


def test_simclr_has_one_head_and_two_halves_and_about_as_many_weights():
    x = torch.rand(5, 1, 14, 14)
    single, pair = recipe.Single().eval(), sc.Pair().eval()
    rows, heads = single(x)
    torch.testing.assert_close(torch.cat(rows, 1), single.encoder(x))
    assert heads[0] is heads[1] and heads[0].shape == (5, 32)
    weights = [sum(p.numel() for p in part.parameters()) for part in (single.encoder, pair.encoders)]
    assert weights[0] == pytest.approx(weights[1], rel=0.1)
    a, b = pair(x)[0]
    assert a.shape == b.shape == (5, 16) and not torch.equal(a, b)


def test_representations_are_of_evaluation_mode_and_leave_the_mode_as_it_was():
    net = small().train()
    x = torch.rand(6, 1, 14, 14)
    whole, part = sc.represent(net, x), sc.represent(net, x[:2])
    assert net.training and not whole[0][0].requires_grad
    torch.testing.assert_close(whole[0][0][:2], part[0][0])


def test_probes_read_what_is_there_and_the_gaps_point_the_right_way():
    garment, digit = torch.arange(300) % 3, torch.arange(300) // 3 % 3
    right = [F.one_hot(garment).float(), F.one_hot(digit).float()]
    found = sc.matrix(right, right, (garment, digit), (garment, digit))
    assert found["C", "garment"] == found["S", "digit"] == 1
    assert max(found["C", "digit"], found["S", "garment"]) < 0.4
    columns = {" ".join(key): value for key, value in found.items()}
    assert recipe.score(columns) > 1.2
    turned = sc.matrix(right[::-1], right[::-1], (garment, digit), (garment, digit))
    assert recipe.score({" ".join(key): value for key, value in turned.items()}) < -1.2


def test_a_probe_is_scaled_by_the_fitted_rows_alone():
    rows, labels = drawn(60, 2).float(), torch.arange(60) % 2
    rows[:, 0] += 4 * labels
    test = rows[:20] + 100
    moved = sc.probe(rows, labels, test, labels[:20])
    assert moved == 0.5  # far on one side: no scaling of its own brings the test rows back
    assert sc.probe(1e6 * rows, labels, 1e6 * rows, labels) == sc.probe(rows, labels, rows, labels) > 0.9


def test_contrastive_pca_is_pca_at_zero_and_turns_from_the_background():
    wide = torch.cat([5 * drawn(500, 1), 2 * drawn(500, 1, seed=1), drawn(500, 1, seed=2)], 1)
    background = torch.cat([5 * drawn(500, 1, seed=3), 0.1 * drawn(500, 2, seed=4)], 1)
    first = recipe.contrastive_pca(wide, background, 0.0, 1)[:, 0].abs()
    torch.testing.assert_close(first, torch.linalg.svd(wide - wide.mean(0)).Vh[0].abs(), rtol=1e-6, atol=1e-6)
    assert first.argmax() == 0
    assert recipe.contrastive_pca(wide, background, 2.0, 1)[:, 0].abs().argmax() == 1
    V = recipe.contrastive_pca(wide, background, 2.0, 3)
    torch.testing.assert_close(V.T @ V, torch.eye(3).double())


def test_the_toy_has_its_second_angle_in_targets_alone_and_variance_is_shared_out():
    x, y = recipe.circles(200)
    assert not x[y == 0, 2:].any()
    torch.testing.assert_close(x[y == 1].square().sum(1), torch.full((200,), 2.0))
    both = torch.cat([x[y == 1, :2], 2 * x[y == 1, 2:]], 1)
    assert recipe.explained(both, x[y == 1, 2:]) == pytest.approx(0.8, abs=0.03)
    assert recipe.explained(both, both) == pytest.approx(1, abs=1e-5)


def test_the_best_setting_is_chosen_and_goes_below_the_grid_where_its_lowest_rate_wins(tmp_path, monkeypatch):
    def tried(name, weights, lr):
        gaps = -abs(math.log(lr / best)) - weights["null"] / 1000
        return [{"method": name, "lr": lr, "gaps": gaps} | {f"weight {k}": w for k, w in weights.items()}]

    monkeypatch.setattr(recipe, "tried", tried)
    for best, found in ((0.0003, 0.0003), (0.001, 0.001), (0.003, 0.003), (0.01, 0.01)):
        rows = recipe.tuned(recipe.Work(tmp_path / str(best)), "no k-JEM")
        assert len(rows) == 6 + (best <= 0.001)
        weights, lr = recipe.chosen(rows)["no k-JEM"]
        assert lr == found and weights == recipe.TUNED["no k-JEM"][0]


# bad input


def test_bad_rows_are_refused():
    c, s, y = views()
    for call in (
        lambda: sc.align(c[0], s[0][:5]),
        lambda: sc.uniformity(c[0][:1]),
        lambda: sc.uniformity(c[0][0]),
        lambda: sc.joint(c[0], s[0][:5]),
        lambda: sc.terms(c, s, torch.zeros(12)),
        lambda: sc.terms(c, s, y[:5]),
        lambda: sc.terms(c, s, 2 * y),
        lambda: sc.terms(c[:1], s, y),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(NotFinite):
        sc.terms([c[0] * float("nan"), c[1]], s, y)
    for tau in (0, -1, float("nan"), float("inf"), "a"):
        with pytest.raises(ValueError, match="tau"):
            sc.uniformity(c[0], tau)
    parts = sc.terms(c, s, y)
    for weights in ({}, {"jem": 1.0}, {"joint": -1.0}, {"joint": float("nan")}):
        with pytest.raises(ValueError, match="weights"):
            sc.total(parts, weights)


def test_other_bad_input_is_refused_and_nothing_is_trained():
    data = made()
    net = small().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    right = {"x": data["x"], "y": data["y"], "weights": recipe.LARGE, "epochs": 1, "lr": 0.1, "batch": 60}
    for wrong in (
        {"lr": 0.0},
        {"lr": float("nan")},
        {"tau": 0.0},
        {"batch": 1},
        {"batch": 121},
        {"epochs": -1},
        {"y": data["y"][:5]},
        {"y": 2 * data["y"]},
        {"y": 0 * data["y"]},
        {"x": data["x"] * float("nan")},
        {"weights": {}},
        {"weights": {"jem": 1.0}},
    ):
        with pytest.raises(ValueError):
            sc.fit(net, **(right | wrong))
        after = net.state_dict()  # running means as well
        assert not net.training and all(torch.equal(value, after[name]) for name, value in before.items()), (
            wrong
        )
    with pytest.raises(ValueError):
        sc.compose(torch.full((2, 1, 28, 28), 2.0))
    with pytest.raises(ValueError):
        sc.compose(torch.full((2, 1, 28, 28), float("nan")))
    with pytest.raises(ValueError):
        made(n=90)
    for how in ({"area": 0.0}, {"area": 1.5}, {"jitter": 1.0}):
        with pytest.raises(ValueError):
            sc.view(data["x"], torch.Generator(), **how)
    rows, labels = drawn(10, 3).float(), torch.arange(10) % 2
    with pytest.raises(ValueError):
        sc.probe(rows, labels[:4], rows, labels)
    with pytest.raises(NotFinite):
        sc.probe(rows * float("nan"), labels, rows, labels)
    with pytest.raises(ValueError):
        recipe.contrastive_pca(rows, rows[:, :2], 1.0, 1)
    for a, k in ((-1.0, 1), (0.0, 0), (0.0, 4)):
        with pytest.raises(ValueError):
            recipe.contrastive_pca(rows, rows, a, k)
    with pytest.raises(ValueError):
        recipe.circles(1)


# the stored tables


def test_every_method_has_its_seeds_and_probes_and_the_network_is_the_main_one():
    probes = papers.results(SLUG, "probes")
    count = probes.groupby(["method", "probe"])["seed"].apply(sorted)
    assert all(seeds == [0, 1, 2] for seeds in count.drop("all pixels")) and len(count) == 22
    tuning = papers.results(SLUG, "tuning")
    assert tuning.groupby("method")["lr"].nunique().ge(3).all()
    best = tuning[tuning["epochs"] == 8].sort_values("gaps").groupby("method").last()
    assert (best["lr"] >= 0.001).all()  # no method is held back by the lower end
    net = sc.Pair()
    net.load_state_dict(papers.tensors(SLUG, "net"))
    heads = sc.represent(net, torch.rand(4, 1, 14, 14))[1]
    assert all(bool(h.isfinite().all()) for h in heads)
