"""representation-biases: networks against torch's modules, R2 against scikit-learn and loops, steering, bad input."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import nn

from nbkit import papers, recipes

rb = papers.method("representation-biases")
recipe = recipes.load("papers/representation-biases/recipe.py")
SLUG = "representation-biases"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module_of(nets, s):
    """The s-th network as torch's own modules, in double."""
    parts = []
    for i in range(0, len(nets), 2):
        linear = nn.Linear(*nets[i].shape[1:]).double()
        linear.weight.data = nets[i][s].T.double().clone()
        linear.bias.data = nets[i + 1][s, 0].double().clone()
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


# networks and training


@pytest.mark.parametrize("hidden", [(6,), (6, 5, 4)])
def test_networks_side_by_side_answer_as_torchs_modules_do(hidden):
    nets = rb.start([3, 4], 7, 2, hidden)
    x = drawn(2, 10, 7)
    for s in range(2):
        found = rb.layers(nets, x)
        wanted = x[s].double()
        for part, layer in zip(module_of(nets, s), found, strict=True):
            wanted = part(wanted)
            torch.testing.assert_close(layer[s].double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_answer_goes_on_from_any_hidden_layer():
    nets, x = rb.start([0], 5, 2, (4, 3, 6)), drawn(1, 8, 5)
    whole = rb.layers(nets, x)
    for layer in (1, 2, 3):
        torch.testing.assert_close(rb.layers(nets, whole[2 * layer - 1], first=layer)[-1], whole[-1])


@pytest.mark.parametrize(("optimizer", "lr"), [("SGD", 0.1), ("Adam", 0.01)])
@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_training_is_that_of_each_network_alone_on_the_summed_cross_entropy(optimizer, lr, smooth):
    nets = [p.double() for p in rb.start([1, 2], 6, 2, (8, 8))]
    x = drawn(2, 40, 6).double()
    f = drawn(2, 40, 2, seed=1).sign().double()
    weight = torch.tensor([1.0, 0.5])
    *_, (epoch, after) = rb.train(
        nets, x, f, [weight] * 12, lr=lr, batch=16, optimizer=optimizer, smooth=smooth, seeds=[5, 6]
    )
    assert epoch == 12
    for s in range(2):
        model = module_of(nets, s)
        step = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[optimizer](model.parameters(), lr=lr)
        order = torch.Generator().manual_seed([5, 6][s])
        for _ in range(12):
            for rows in torch.randperm(40, generator=order).split(16):
                z, wanted = model(x[s, rows]), (f[s, rows] > 0).double() * (1 - smooth) + smooth / 2
                p = z.sigmoid()
                each = -(wanted * p.log() + (1 - wanted) * (1 - p).log())
                step.zero_grad()
                (each[:, 0].mean() + 0.5 * each[:, 1].mean()).backward()
                step.step()
        for i, part in enumerate(model[::2]):
            torch.testing.assert_close(after[2 * i][s], part.weight.T.detach(), rtol=0, atol=1e-9)
            torch.testing.assert_close(after[2 * i + 1][s, 0], part.bias.detach(), rtol=0, atol=1e-9)


def test_an_output_of_weight_zero_and_an_example_of_weight_zero_teach_nothing():
    nets, x, f = rb.start([0], 5, 2, (6,)), drawn(1, 20, 5), drawn(1, 20, 2, seed=1).sign()
    ((_, one),) = rb.train(nets, x, f, [torch.tensor([1.0, 0.0])], batch=20, seeds=[0])
    other = f.clone()
    other[..., 1] *= -1
    ((_, two),) = rb.train(nets, x, other, [torch.tensor([1.0, 0.0])], batch=20, seeds=[0])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(one[2][..., 1], nets[2][..., 1]) and not torch.equal(one[2][..., 0], nets[2][..., 0])
    mask = torch.ones(1, 20, 2)
    mask[:, 10:] = 0
    ((_, some),) = rb.train(nets, x, f, [mask], batch=20, seeds=[0])
    torch.manual_seed(0)
    changed = torch.where(mask > 0, f, -f)
    ((_, same),) = rb.train(nets, x, changed, [mask], batch=20, seeds=[0])
    assert all(torch.equal(a, b) for a, b in zip(some, same, strict=True))


def test_a_network_does_not_depend_on_those_beside_it_and_the_start_is_not_changed():
    nets, x, f = rb.start([0, 1], 5, 1, (6, 6)), drawn(2, 30, 5), drawn(2, 30, 1, seed=1).sign()
    before = [p.clone() for p in nets]
    *_, (_, both) = rb.train(nets, x, f, [torch.ones(1)] * 5, batch=8, seeds=[7, 8])
    *_, (_, alone) = rb.train([p[1:] for p in nets], x[1:], f[1:], [torch.ones(1)] * 5, batch=8, seeds=[8])
    for a, b, c, d in zip(both, alone, nets, before, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-6)
        assert torch.equal(c, d)


def test_dropout_is_for_training_alone():
    nets, x = rb.start([0], 5, 1, (50,)), drawn(1, 30, 5)
    torch.manual_seed(0)
    a, b = (rb.layers(nets, x, dropout=0.5)[-1] for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(rb.layers(nets, x)[-1], rb.layers(nets, x)[-1])
    mean = torch.stack([rb.layers(nets, x, dropout=0.5)[-1] for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, rb.layers(nets, x)[-1], rtol=0, atol=0.03)


# features


def test_features_are_products_of_bits_and_balanced_and_independent():
    x = rb.draw_bits([0, 1], 4000)
    assert set(x.unique().tolist()) == {-1, 1} and not torch.equal(x[0], x[1])
    f = rb.features(x, rb.EASY, rb.XOR, (1, 2, 3))
    assert torch.equal(f[..., 0], x[..., 0])
    assert torch.equal(f[..., 1] > 0, x[..., 1] == x[..., 2])
    ones = (x[..., 1:4] < 0).sum(-1)
    assert torch.equal(f[..., 2] < 0, ones % 2 == 1)
    for s in range(2):
        assert (torch.corrcoef(f[s].T) - torch.eye(3)).abs().max() < 0.05
        assert f[s].mean(0).abs().max() < 0.05


def test_pairs_of_digits_are_two_images_and_their_labels():
    images, labels = drawn(30, 1, 2, 2), torch.arange(30) % 10
    x, pair = recipe.pair_up(images, labels, 50, seed=0)
    for row, (left, right) in zip(x, pair, strict=True):
        for half, label in ((row[:4], left), (row[4:], right)):
            hit = (images.flatten(1) == half).all(1).nonzero().item()
            assert labels[hit] == label
    digits = torch.arange(10)
    assert recipe.signs(digits, "magnitude").tolist() == [-1] * 5 + [1] * 5
    assert recipe.signs(digits, "parity").tolist() == [-1, 1] * 5


def test_the_digits_features_are_those_of_the_pairs_labels():
    from nbkit import datasets

    data = datasets.load("digits")
    mean, sd = data.x_train.mean(0), data.x_train.std()
    tests = ((data.x_test - mean) / sd).flatten(1)
    for easy, hard in recipe.DIGITS.values():
        x, f = (t[0, :40] for t in recipe.digits([3], easy, hard)["test"])
        for row, (one, two) in zip(x, f.tolist(), strict=True):
            left, right = (int(data.y_test[(tests == half).all(1)][0]) for half in row.split(64))
            of = {"magnitude": lambda d: d >= 5, "parity": lambda d: d % 2 == 1}
            assert (one > 0) == of[easy](left)
            assert (two > 0) == (of[hard](left) == of[hard](right) if hard else of[easy](right))


def test_the_two_features_of_the_digits_are_nearly_independent_in_every_set_of_every_seed():
    for name, labels in recipe.DIGITS.items():
        data = recipe.digits(range(6), *labels)
        for x, f in data.values():
            assert x.isfinite().all()
            assert max(abs(torch.corrcoef(f[s].T)[0, 1].item()) for s in range(6)) < 0.09, name


# variance explained


@pytest.mark.parametrize("k", [1, 3])
def test_explained_is_scikit_learns_regression_scored_against_the_fitted_mean(k):
    f_fit, f = drawn(200, k), drawn(90, k, seed=1)
    mix = drawn(k, 6, seed=2)
    phi_fit, phi = f_fit @ mix + drawn(200, 6, seed=3) + 4, f @ mix + drawn(90, 6, seed=4) + 4.5
    model = LinearRegression().fit(f_fit.double().numpy(), phi_fit.double().numpy())
    left = (phi.double().numpy() - model.predict(f.double().numpy())) ** 2
    total = (phi.double().numpy() - phi_fit.double().numpy().mean(0)) ** 2
    assert float(rb.explained(phi_fit, f_fit, phi, f)) == pytest.approx(1 - left.sum() / total.sum(), abs=1e-9)


def test_for_a_feature_of_two_values_it_is_a_loop_over_class_means():
    f_fit, f = drawn(300, seed=1).sign(), drawn(100, seed=2).sign()
    phi_fit, phi = drawn(300, 4, seed=3) + f_fit[:, None], drawn(100, 4, seed=4) + f[:, None]
    left = total = 0.0
    for row, value in zip(phi, f, strict=True):
        guess = phi_fit[f_fit == value].mean(0)
        left += float(((row - guess) ** 2).sum())
        total += float(((row - phi_fit.mean(0)) ** 2).sum())
    assert float(rb.explained(phi_fit, f_fit, phi, f)) == pytest.approx(1 - left / total, abs=1e-5)


def test_it_sees_no_rotation_scale_or_shift_and_independent_features_add():
    f = torch.tensor([[a, b] for a in (1.0, -1) for b in (1.0, -1)]).repeat(5, 1)
    noise = drawn(20, 3)
    noise -= rb.fit_features(noise, torch.cat([f, f[:, :1] * f[:, 1:]], 1))[0]
    phi = torch.cat([3 * f[:, :1], f[:, 1:], f.prod(1, keepdim=True)], 1)
    one, two = (float(rb.explained(phi, f[:, k], phi, f[:, k])) for k in range(2))
    assert (one, two) == (pytest.approx(9 / 11), pytest.approx(1 / 11))
    assert float(rb.explained(phi, f, phi, f)) == pytest.approx(one + two)
    turned = 4 * phi @ torch.linalg.qr(drawn(3, 3)).Q - 9
    assert float(rb.explained(turned, f[:, 0], turned, f[:, 0])) == pytest.approx(one, abs=1e-5)
    assert float(rb.explained(phi, torch.ones(20), phi, torch.ones(20))) == pytest.approx(0, abs=1e-9)


def test_it_is_scored_on_what_was_not_fitted():
    phi_fit, f_fit = drawn(30, 5), drawn(30, 20, seed=1)
    assert float(rb.explained(phi_fit, f_fit, phi_fit, f_fit)) > 0.5
    assert float(rb.explained(phi_fit, f_fit, drawn(300, 5, seed=2), drawn(300, 20, seed=3))) < 0


def test_components_are_those_of_the_covariance():
    phi_fit = drawn(100, 4) * torch.tensor([100.0, 1, 3, 0])
    pcs = rb.project(phi_fit, phi_fit, 3)
    values = torch.linalg.eigvalsh(torch.cov(phi_fit.T.double())).flip(0)
    torch.testing.assert_close(pcs.double().var(0), values[:3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rb.project(phi_fit, phi_fit[:1], 1), pcs[:1, :1], rtol=1e-3, atol=1e-3)


def planted(n=400):
    """A representation [n, 4]: 3 f1, f2, 0.5 f2 and noise; and f [n, 2]."""
    f = drawn(n, 2, seed=8).sign()
    noise = 0.1 * drawn(n, 4, seed=9)
    return torch.stack([3 * f[:, 0], f[:, 1], 0.5 * f[:, 1], 0 * f[:, 0]], 1) + noise, f


def test_the_tables_measures_are_those_of_a_planted_representation():
    (fit, f_fit), (phi, f) = ([part[rows] for part in planted()] for rows in (slice(200), slice(200, 400)))
    row = recipe.last_layer(fit, f_fit, phi, f)
    assert row["PC 1 easy"] > 0.95 and row["PC 1 hard"] < 0.05
    assert row["follows easy"] > 0.95
    assert (row["dense easy"], row["dense hard"]) == (0.25, 0.5)
    assert row["scaled hard"] == pytest.approx(0.5, abs=0.08)
    assert row["scaled easy"] == pytest.approx(0.25, abs=0.08)
    assert row["decoded easy"] == row["decoded hard"] == 1
    swapped = recipe.last_layer(fit, f_fit.flip(1), phi, f.flip(1))
    assert swapped["follows easy"] < 0.05 and swapped["PC 1 hard"] > 0.95
    assert row["variance"] == pytest.approx(9 + 1 + 0.25 + 0.04, abs=0.5)


def test_a_step_of_half_the_answers_is_found_and_the_other_answer_and_a_random_step_counted():
    phi, f = planted()
    W = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]])[None]
    nets = [torch.eye(4)[None], torch.zeros(1, 1, 4), W, torch.zeros(1, 1, 2)]
    row = recipe.steered(nets, phi, f, phi, f, layer=1)
    for name, length in (("easy", 3), ("hard", 1.25**0.5)):
        assert row[f"half {name}"] == pytest.approx(0.5, abs=0.02)
        assert row[f"length {name}"] == pytest.approx(length, rel=0.08)
        assert row[f"other of {name}"] < 0.05
    assert row["random easy"] < 0.5


# steering


def test_a_step_moves_against_the_feature_and_is_counted_by_hand():
    nets = [torch.eye(2)[None], torch.zeros(1, 1, 2), torch.eye(2)[None], torch.zeros(1, 1, 2)]
    phi = torch.tensor([[2.0, 1], [0.5, 1], [-2.0, 1], [-0.4, -1]])
    f = phi[:, 0].sign()
    found = rb.flips(nets, phi, f, torch.tensor([1.0, 0.0]), layer=1)
    assert found.tolist() == [0.5, 0.0]
    assert rb.flips(nets, phi, f, torch.zeros(2), layer=1).tolist() == [0, 0]
    torch.testing.assert_close(rb.direction(phi, f), torch.tensor([1.25 + 1.2, 1.0 - 0.0]))


def test_at_the_last_layer_half_of_the_answers_change_at_the_median_over_twice_the_mean_margin():
    nets = rb.start([3], 6, 2, (12, 12))
    phi = drawn(2001, 12, seed=4).relu()
    logits = rb.layers(nets, phi[None], first=2)[-1][0]
    centred = [p.clone() for p in nets]
    centred[-1] = nets[-1] - logits.median(0).values
    logits = rb.layers(centred, phi[None], first=2)[-1][0]
    f = torch.where(logits[:, 0] > 0, 1.0, -1.0)
    margin, delta = f * logits[:, 0], rb.direction(phi, f)
    balanced = logits[f == 1, 0].mean() - logits[f == -1, 0].mean()
    c = margin.median() / balanced
    for factor, wanted in ((0.5, None), (1.0001, 0.5), (0.0, 0.0)):
        share = rb.flips(centred, phi, f, factor * c * delta, layer=2)[0].item()
        assert share < 0.4 if wanted is None else share == pytest.approx(wanted, abs=0.01)


# bad input


def test_bad_input_to_training_is_refused():
    nets, x, f = rb.start([0], 4, 2, (3,)), drawn(1, 10, 4), drawn(1, 10, 2, seed=1).sign()
    once = [torch.ones(2)]
    for wrong in ({"f": f * 0.5}, {"f": f[:, :5]}, {"x": x[0]}, {"x": x * float("nan")}):
        with pytest.raises(ValueError):
            next(rb.train(**({"nets": nets, "x": x, "f": f, "weights": once, "seeds": [0]} | wrong)))
    for wrong in ({"lr": 0}, {"lr": float("nan")}, {"batch": 0}, {"dropout": 1.0}, {"smooth": -0.1}, {"seeds": []}):
        with pytest.raises(ValueError):
            next(rb.train(nets, x, f, once, **({"seeds": [0]} | wrong)))
    with pytest.raises(ValueError, match="SGD"):
        next(rb.train(nets, x, f, once, seeds=[0], optimizer="sgd"))


def test_other_bad_input_is_refused():
    phi, f = drawn(20, 3), drawn(20, seed=1).sign()
    bad = [
        (phi * float("nan"), f, phi, f),
        (phi, f * float("inf"), phi, f),
        (phi[0], f, phi, f),
        (phi, f[:5], phi, f),
        (phi, f, phi[:, :2], f),
        (phi, f, phi[:0], f[:0]),
        (torch.ones(20, 3), f, torch.ones(20, 3), f),
    ]
    for arguments in bad:
        with pytest.raises(ValueError):
            rb.explained(*arguments)
    for wrong in ((), ((),), ((40,),), ((-1,),)):
        with pytest.raises(ValueError):
            rb.features(rb.draw_bits([0], 5), *wrong)
    with pytest.raises(ValueError):
        rb.draw_bits([0], 0)
    with pytest.raises(ValueError):
        rb.start([0], 4, 2, (0,))
    with pytest.raises(ValueError):
        rb.start([], 4, 2, (3,))
    with pytest.raises(ValueError):
        rb.features(torch.zeros(1, 5, 4), (0,))
    for wrong in ((phi, torch.ones(20)), (phi, f / 2), (phi, f[:5]), (phi * float("nan"), f)):
        with pytest.raises(ValueError):
            rb.direction(*wrong)
    with pytest.raises(ValueError):
        rb.project(phi * float("nan"), phi, 1)
    nets = rb.start([0], 5, 2, (3,))
    steps = (phi, f, torch.full((3,), float("nan"))), (phi, f, torch.zeros(1)), (phi, f, torch.zeros(()))
    for wrong in ((phi, f[:5], torch.zeros(3)), (phi[:, :2], f, torch.zeros(2)), *steps):
        with pytest.raises(ValueError):
            rb.flips(nets, *wrong, 1)
    for k in (0, 4):
        with pytest.raises(ValueError):
            rb.project(phi, phi, k)
    for layer in (0, 2):
        with pytest.raises(ValueError):
            rb.flips(rb.start([0], 5, 2, (3,)), phi, f, torch.zeros(3), layer)


# the stored tables


def test_a_run_is_counted_only_where_what_was_asked_is_known():
    nets = papers.results(SLUG, "networks")
    last = nets[nets["last"]]
    assert last.groupby("arm")["seed"].nunique().eq(6).all()
    counted = last[last["at"].eq("criterion") & ~last["arm"].str.contains("only|digits")]
    assert (counted[["accuracy easy", "accuracy hard"]].min(axis=1) > 0.99).all()
    twice = last.set_index(["arm", "seed", "at"])["epoch"].unstack("at").dropna(subset=["criterion", "twice"])
    before = twice["phase 1"].fillna(0)
    assert ((twice["twice"] - before) == 2 * (twice["criterion"] - before)).all()


def test_the_stored_networks_are_those_of_the_table():
    stored = papers.tensors(SLUG, "networks")
    nets = papers.results(SLUG, "networks")
    for name in recipe.STORED:
        parts = [stored[f"{name}/{i}"].float() for i in range(10)]
        data = recipe.bits([0], (1, 2, 3) if name == "parity 3" else rb.XOR)
        fit, shown = recipe.both(parts, 0, data)
        row = nets[nets["last"] & nets["arm"].eq(name) & nets["seed"].eq(0) & nets["at"].eq("criterion")].iloc[0]
        for k, feature in enumerate(recipe.NAMES):
            f_fit, f = (data[s][1][0, :, k] for s in ("val", "test"))
            assert float(rb.explained(fit[-2], f_fit, shown[-2], f)) == pytest.approx(row[feature], abs=0.003)
