"""task-geometry: gradients by autograd, parallelism and CCGP by brute force, kernels, axes, bad input, the tables."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nbkit import papers, recipes

tg = papers.method("task-geometry")
recipe = recipes.load("papers/task-geometry/recipe.py")
SLUG = "task-geometry"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SQUARE = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])


# training


@pytest.mark.parametrize("activation", [a for a in tg.ACTIVATIONS if "slope" not in a])
@pytest.mark.parametrize("K", [1, 3])
def test_a_step_is_plain_gradient_descent_on_the_cross_entropy(activation, K):
    x, y = drawn(40, 6), (drawn(40, K, seed=1) > 0).float()
    net = tg.start(6, K, activation, seed=2)
    leaves = {name: net[name].clone().requires_grad_() for name in "WbRc"}
    response = tg.ACTIVATIONS[activation][0]
    logits = response(x @ leaves["W"].T + leaves["b"]) @ leaves["R"].T + leaves["c"]
    F.binary_cross_entropy_with_logits(logits, y, reduction="sum").div(40).backward()
    tg.step(net, x, y, 0.5, trained=tuple("WbRc"))
    for name, leaf in leaves.items():
        torch.testing.assert_close(net[name], leaf.detach() - 0.5 * leaf.grad, rtol=1e-5, atol=1e-6)


def test_the_ungated_relu_answers_as_relu_and_learns_from_every_example():
    x = drawn(30, 5)
    gated, open_ = (tg.start(5, 1, name) for name in ("ReLU", "ReLU, slope 1"))
    assert torch.equal(tg.respond(gated, x)[0], tg.respond(open_, x)[0])
    assert (tg.respond(open_, x)[1] == 1).all()


def test_the_readout_is_balanced_and_stays_and_a_shift_of_all_responses_changes_no_logit():
    net = tg.start(5, 3, "tanh")
    assert torch.equal(net["R"].abs(), torch.full((3, 128), 128**-0.5))
    assert len({tuple(column) for column in net["R"].T.sign().tolist()}) == 8
    torch.testing.assert_close(net["R"] @ torch.ones(128), torch.zeros(3))
    x, y = drawn(50, 5), (drawn(50, 3, seed=1) > 0).float()
    kept = tg.train(x, y, "tanh", epochs=3)
    assert list(kept) == [0, 1, 2, 3]
    assert torch.equal(kept[3]["R"], net["R"]) and not kept[3]["b"].any()
    assert not torch.equal(kept[3]["W"], kept[0]["W"])


def test_without_biases_tanh_cannot_learn_xor_of_symmetric_clusters_and_relu_can():
    x, condition = tg.sample(tg.xor_means(0.0, seed=0), 0.3, 100, seed=1)
    y = tg.targets(condition, (1, 2))
    accuracy = {
        name: tg.judge(tg.train(x, y, name, epochs=60, batch=50)[60], x, y)["accuracy"] for name in ("ReLU", "tanh")
    }
    assert accuracy["ReLU"] == 1
    assert accuracy["tanh"] < 0.8


def test_a_seed_gives_the_same_network_and_paired_activations_start_alike():
    x, y = drawn(60, 4), (drawn(60, 1, seed=1) > 0).float()
    one, two = (tg.train(x, y, "ReLU", epochs=2, seed=5) for _ in range(2))
    assert torch.equal(one[2]["W"], two[2]["W"])
    assert torch.equal(one[0]["W"], tg.train(x, y, "tanh", epochs=1, seed=5)[0]["W"])


# tasks


def test_the_centres_of_xor_are_those_of_the_equation():
    means = tg.xor_means(0.5, seed=3)
    u1, u2, u3 = (means[1] + means[3]) / 2, (means[2] + means[3]) / 2, (means[1] + means[2]) / 2
    torch.testing.assert_close(u3.norm(), torch.tensor(0.5 * 40**0.5))
    torch.testing.assert_close(means[3], u1 + u2 - u3)
    torch.testing.assert_close(means[0], -u1 - u2 - u3)
    torch.testing.assert_close(u1.norm(), torch.tensor(40**0.5))
    assert abs(u1 @ u2) < 1e-5 and (u1 > -1e-5).all() and (u2 > -1e-5).all()


def test_samples_come_by_condition_and_without_noise_are_the_centres():
    means = drawn(3, 5)
    x, condition = tg.sample(means, 0.0, 4, seed=0)
    assert condition.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(tg.condition_means(x, condition), means)
    assert tg.targets(condition, (0,), (1, 2)).sum(0).tolist() == [4, 8]


# geometry


def test_alignment_sees_neither_rotation_nor_scale_nor_shift_and_targets_are_aligned_with_themselves():
    x, y = drawn(40, 6), (drawn(40, 1, seed=1) > 0).float()
    turned = 3 * x @ torch.linalg.qr(drawn(6, 6, seed=2)).Q + 5
    assert tg.geometry(turned, x, y)["input"] == pytest.approx(1, abs=1e-6)
    assert tg.geometry(y, x, y)["target"] == pytest.approx(1, abs=1e-9)


def test_alignment_is_the_cosine_of_the_centred_matrices():
    z, x, y = drawn(30, 6), drawn(30, 4, seed=3), (drawn(30, 2, seed=1) > 0).float()
    H = np.eye(30) - 1 / 30
    a, b, c = (H @ (v.double() @ v.double().T).numpy() @ H for v in (z, x, y))
    found = tg.geometry(z, x, y)
    for name, other in (("input", b), ("target", c)):
        expected = (a * other).sum() / np.linalg.norm(a) / np.linalg.norm(other)
        assert found[name] == pytest.approx(expected, abs=1e-9)


def test_on_a_square_sides_are_parallel_and_diagonals_opposite():
    assert [round(tg.parallelism(SQUARE, d), 6) for d in [(0, 1), (0, 2), (0, 3)]] == [1, 1, -1]


@pytest.mark.parametrize("C", [4, 6, 8])
def test_parallelism_is_the_best_pairing_by_brute_force_and_the_same_for_either_class(C):
    means = drawn(C, 7, seed=C).double().numpy()
    positive, negative = range(C // 2), range(C // 2, C)
    best = -2.0
    for partners in permutations(negative):
        steps = [means[a] - means[b] for a, b in zip(positive, partners, strict=True)]
        cosines = [
            s @ t / np.linalg.norm(s) / np.linalg.norm(t) for i, s in enumerate(steps) for t in steps[:i]
        ]  # fmt: skip
        best = max(best, float(np.mean(cosines)))
    found = tg.parallelism(torch.from_numpy(means), positive)
    assert found == pytest.approx(best, abs=1e-9)
    assert tg.parallelism(torch.from_numpy(means), negative) == pytest.approx(best, abs=1e-9)


def test_ccgp_is_the_mean_over_splits_of_conditions_in_loops():
    z, condition = drawn(120, 4, seed=1), torch.arange(120) % 6
    scores = []
    for one in range(3):
        for other in range(3, 6):
            seen = [one, other]
            high = np.mean([z[i].numpy() for i in range(120) if condition[i] in seen and condition[i] < 3], axis=0)
            low = np.mean([z[i].numpy() for i in range(120) if condition[i] in seen and condition[i] >= 3], axis=0)
            tried = [i for i in range(120) if condition[i] not in seen]
            nearer = [np.linalg.norm(z[i].numpy() - high) < np.linalg.norm(z[i].numpy() - low) for i in tried]
            scores.append(np.mean([n == (condition[i].item() < 3) for n, i in zip(nearer, tried, strict=True)]))
    assert tg.ccgp(z, condition, (0, 1, 2)) == pytest.approx(np.mean(scores), abs=1e-9)


def test_on_a_square_sides_generalise_from_neighbours_and_diagonals_never_do():
    condition = torch.arange(80) % 4
    assert [tg.ccgp(SQUARE[condition], condition, d) for d in [(0, 1), (0, 2), (0, 3)]] == [0.75, 0.75, 0]
    oblong = SQUARE * torch.tensor([3.0, 1])  # classes far apart: the diagonal splits generalise as well
    assert tg.ccgp(oblong[condition], condition, (0, 1)) == 1


def test_axes_span_the_centred_means_and_the_first_is_the_class_axis():
    means = drawn(6, 20, seed=4)
    axes = tg.axes_of(means, (0, 2, 4))
    torch.testing.assert_close(axes @ axes.T, torch.eye(5).double())
    centred = (means - means.mean(0)).double()
    torch.testing.assert_close(centred @ axes.T @ axes, centred, rtol=1e-6, atol=1e-6)
    between = (means[[0, 2, 4]].mean(0) - means[[1, 3, 5]].mean(0)).double()
    assert abs(F.normalize(between, dim=0) @ axes[0]) == pytest.approx(1, abs=1e-6)
    share = tg.class_share(torch.stack([between, axes[1]]).float(), axes)
    torch.testing.assert_close(share, torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-6)
    assert tg.class_share(drawn(4000, 20, seed=9), axes).mean().item() == pytest.approx(1 / 5, abs=0.02)


# equal loss


def test_networks_are_read_where_all_have_reached_the_worst_final_value():
    fast = [{"epoch": e, "loss": loss, "accuracy": a} for e, loss, a in [(0, 0.7, 0.5), (1, 0.2, 0.9), (2, 0.1, 1.0)]]
    slow = [{"epoch": e, "loss": loss, "accuracy": a} for e, loss, a in [(0, 0.7, 0.5), (1, 0.5, 0.8), (2, 0.3, 0.85)]]
    assert recipe.read_at({"fast": fast, "slow": slow}, "loss") == {"fast": 1, "slow": 2}
    assert recipe.read_at({"fast": fast, "slow": slow}, "accuracy") == {"fast": 1, "slow": 2}
    with pytest.raises(ValueError):
        recipe.read_at({"fast": []}, "loss")


# bad input


def test_bad_training_input_is_refused():
    x, y = drawn(10, 3), torch.zeros(10, 1)
    for wrong in ({"y": y[:5]}, {"y": y + 2}, {"x": x[0]}):
        with pytest.raises(ValueError):
            tg.train(**({"x": x, "y": y} | wrong), activation="ReLU")
    rates = [{"lr": lr} for lr in (0, float("nan"), float("inf"))]
    for wrong in (*rates, {"epochs": 0}, {"batch": 0}, {"trained": ("V",)}):
        with pytest.raises(ValueError):
            tg.train(x, y, "ReLU", **wrong)
    with pytest.raises(ValueError, match="NaN"):
        tg.train(x * float("nan"), y, "ReLU")
    with pytest.raises(ValueError, match="ReLU"):
        tg.train(x, y, "relu")
    with pytest.raises(ValueError):
        tg.start(3, 8, "ReLU")


@pytest.mark.parametrize("positive", [(0,), (0, 1, 2), (), (7, 8)])
def test_a_dichotomy_needs_as_many_conditions_on_either_side(positive):
    z, condition = drawn(40, 3), torch.arange(40) % 4
    for call in (
        lambda: tg.parallelism(SQUARE, positive),
        lambda: tg.ccgp(z, condition, positive),
        lambda: tg.axes_of(SQUARE, positive),
    ):
        with pytest.raises(ValueError):
            call()


def test_other_bad_input_is_refused():
    z, condition = drawn(40, 3), torch.arange(40) % 4
    with pytest.raises(ValueError):
        tg.ccgp(z, condition[:5], (0, 1))
    with pytest.raises(ValueError, match="finite"):
        tg.ccgp(z * float("nan"), condition, (0, 1))
    for dichotomies in ((), ((9,),), ((0, 1), (3, 4))):
        with pytest.raises(ValueError, match="dichotomy"):
            tg.targets(condition, *dichotomies)
    with pytest.raises(ValueError):
        tg.parallelism(torch.zeros(4, 2), (0, 1))
    with pytest.raises(ValueError):
        tg.parallelism(drawn(12, 2), range(6))
    with pytest.raises(ValueError):
        tg.condition_means(z, condition[:5])
    with pytest.raises(ValueError):
        tg.sample(SQUARE, -1.0, 5, seed=0)
    with pytest.raises(ValueError):
        tg.geometry(z, z, torch.zeros(40, 1))


# the stored tables


def test_every_pair_has_all_its_seeds_and_the_pair_at_equal_loss_has_nearly_equal_losses():
    nets = papers.results(SLUG, "networks")
    pair = nets[nets.activation.isin(["ReLU", "tanh"])]
    seeds = pair.groupby(["study", "setting", "at", "activation"])["seed"].nunique()
    assert seeds.loc["unstructured"].eq(10).all()
    assert seeds.drop("unstructured").eq(6).all()
    end = pair[pair["at"] == "end"].groupby(["study", "setting", "seed"])["loss"].max()
    equal = pair[pair["at"] == "same loss"].set_index(["study", "setting", "seed"])["loss"]
    assert (equal <= end.reindex(equal.index) + 1e-9).all()
