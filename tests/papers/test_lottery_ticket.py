"""The lottery ticket hypothesis: iterative magnitude pruning, its controls and the files its recipe stored."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from nbkit import datasets, papers, sparsity, training
from nbkit.errors import LayerNotFound
from nbkit.sparsity import Masks

lottery = papers.method("lottery-ticket")


@pytest.fixture
def ten(device):
    """One layer with the weights 1 ... 10."""
    net = nn.Sequential(nn.Linear(10, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 11)[None])
    return net.to(device)


@pytest.fixture
def small(device):
    return lottery.draw(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), 0).to(device)


@pytest.fixture(scope="module")
def data():
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)
    return {"train": (x[:60], y[:60]), "val": (x[60:75], y[60:75]), "test": (x[75:], y[75:])}


def survivors(masks: Masks) -> list[int]:
    return [int(i) + 1 for i in masks["0.weight"][0].nonzero()]


def no_training(model, m):
    return None


def trainer(data, **settings):
    options = {"j": 12, "seed": 3, "every": 4, "batch": 20, "lr": 0.01, **settings}
    return lambda model, m: lottery.train(model, m, data, **options)


def test_ten_weights_at_20_percent_go_10_8_6_5(ten):
    found = lottery.find_tickets(ten, no_training, rounds=3)
    assert [survivors(r.m) for r in found] == [list(range(k, 11)) for k in (1, 3, 5, 6)]


def test_the_fraction_is_of_the_survivors_and_of_each_layer(small):
    found = lottery.find_tickets(small, no_training, rounds=3, per_layer={"2": 0.1})
    assert [list(r.m.kept().values()) for r in found] == [[72, 36], [58, 32], [46, 29], [37, 26]]


def test_every_round_starts_at_theta_0_bit_for_bit(small, data):
    theta_0, begun = lottery.state_of(small), []

    def train(model, m):
        begun.append((m, lottery.state_of(model)))
        trainer(data)(model, m)

    found = lottery.find_tickets(small, train, rounds=4)
    for m, start in begun:
        for name, value in start.items():
            kept = m[name].to(value.device) if name in m else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value, torch.where(kept, theta_0[name], 0))
    assert all((a.m & b.m) == b.m for a, b in zip(found, found[1:], strict=False))
    assert all(torch.equal(value, theta_0[name]) for name, value in small.state_dict().items())


def test_pruned_weights_are_zero_in_every_forward_pass(small, data):
    m, passes = sparsity.magnitude_mask(small, 0.5).shuffled(0), []
    weights = dict(small.named_parameters())
    small.register_forward_pre_hook(
        lambda *_: passes.append(all(not weights[name][~mask].any() for name, mask in m.items()))
    )
    lottery.train(small, m, data, j=12, seed=0, every=4, batch=20)
    assert len(passes) > 12 and all(passes)


def test_training_under_the_mask_is_training_with_masked_gradients(small, data):
    m, start = sparsity.magnitude_mask(small, 0.6), lottery.state_of(small)
    lottery.train(small, m, data, j=30, seed=5, every=10, batch=20)
    ours = lottery.state_of(small)
    small.load_state_dict(start)
    with m.enforced(small):
        adam = functools.partial(torch.optim.Adam, fused=True)
        training.fit(small, data["train"], steps=30, lr=1.2e-3, batch=20, seed=5, optimizer=adam)
    assert all(torch.equal(value, ours[name]) for name, value in small.state_dict().items())


def test_p_0_repeats_the_dense_run_exactly(small, data):
    first, *others = lottery.find_tickets(small, trainer(data), rounds=2, p=0.0)
    for other in others:
        assert other.result.evaluations == first.result.evaluations and other.m == first.m
        assert all(torch.equal(value, first.theta_j[name]) for name, value in other.theta_j.items())


def test_the_order_of_examples_is_the_seeds(small, data):
    start, m = lottery.state_of(small), Masks({"0.weight": torch.ones(12, 6)})
    losses = [trainer(data, seed=seed)(m.rewind(small, start), m).evaluations for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_the_controls_are_as_sparse_as_the_ticket_in_every_layer(small, data):
    theta_0, fresh = lottery.state_of(small), lottery.state_of(lottery.draw(small, 9))
    small.load_state_dict(theta_0)
    found = lottery.find_tickets(small, trainer(data), rounds=3)
    starts = lottery.starts(found, 3, theta_0, fresh, seed=0)
    assert {name: m.kept() for name, (m, _) in starts.items()} == dict.fromkeys(starts, found[3].m.kept())
    assert starts["ticket"] == (found[3].m, theta_0) and starts["reinit"] == (found[3].m, fresh)
    assert starts["random mask"][0] != found[3].m and starts["random mask"][1] is theta_0
    assert starts["fine-tune"] == (found[3].m, found[2].theta_j)
    at_once, dense = starts["one-shot"][0], found[0].theta_j
    for name, mask in at_once.items():
        size = dense[name].abs().cpu()
        assert size[mask].min() >= size[~mask].max()


def test_draw_is_glorot_normal_and_exact_in_float16():
    net = lottery.lenet(seed=4)
    weight = net.fc1.weight.detach()
    assert torch.equal(weight, weight.half().float())
    assert weight.std().item() == pytest.approx((2 / (784 + 300)) ** 0.5, rel=0.02)
    assert not any(net.get_parameter(f"fc{i}.bias").any() for i in (1, 2, 3))
    assert torch.equal(weight, lottery.lenet(seed=4).fc1.weight)
    assert not torch.equal(weight, lottery.lenet(seed=5).fc1.weight)


@pytest.mark.parametrize(("name", "weights"), [("LeNet-300-100", 266_200), ("small conv", 54_216)])
def test_the_networks_have_the_weights_the_text_says(name, weights):
    build, per_layer, *_ = lottery.SETTINGS[name]
    net = build(0)
    assert sum(w.numel() for w in sparsity.prunable(net).values()) == weights
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert all(f"{layer}.weight" in sparsity.prunable(net) for layer in per_layer)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"p": 1.0}, ValueError, "1.0"),
        ({"p": -0.1}, ValueError, "-0.1"),
        ({"p": 0.9, "rounds": 9}, ValueError, "no weight"),
        ({"rounds": 0}, ValueError, "rounds"),
        ({"per_layer": {"1st": 0.1}}, LayerNotFound, "1st"),
    ],
)
def test_bad_settings_are_refused_before_any_training(small, settings, error, words):
    trained = []
    with pytest.raises(error, match=words):
        lottery.find_tickets(small, lambda model, m: trained.append(1), **{"rounds": 2, **settings})
    assert not trained


def test_a_training_that_moves_pruned_weights_is_refused(small):
    def careless(model, m):
        with torch.no_grad():
            model[0].weight.add_(1)

    with pytest.raises(ValueError, match="moved pruned weights"):
        lottery.find_tickets(small, careless, rounds=2)


def test_bad_masks_data_and_rounds_are_refused_and_change_nothing(small, data):
    before, m = lottery.state_of(small), sparsity.magnitude_mask(small, 0.5)
    with pytest.raises(ValueError, match="shape"):
        trainer(data)(small, Masks({"0.weight": torch.ones(3, 3)}))
    with pytest.raises(ValueError, match="not binary"):
        Masks({"0.weight": torch.full((12, 6), 0.5)})
    with pytest.raises(ValueError, match="'val'"):
        trainer({"train": data["train"], "test": data["test"]})(small, m)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    found = lottery.find_tickets(small, no_training, rounds=2)
    for r in (0, 3):
        with pytest.raises(IndexError, match="rounds 1 to 2"):
            lottery.starts(found, r, before, before, seed=0)


def test_the_stored_tickets_are_what_the_text_says():
    table = datasets.results("lottery-ticket").query("network == 'LeNet-300-100'")
    for seed in sorted(set(table.seed)):
        stored = datasets.tensors(f"lottery-ticket-seed{seed}")
        for name, value in lottery.lenet(seed).state_dict().items():
            # another processor may draw a value that rounds to the neighbour in float16
            torch.testing.assert_close(stored[f"theta_0.{name}"].float(), value, rtol=1e-3, atol=1e-6)
        survived = {n.removeprefix("survived."): t for n, t in stored.items() if n.startswith("survived.")}
        for row in table[(table.seed == seed) & (table.control == "ticket")].itertuples():
            m = sparsity.mask_of_round(survived, row.round)
            assert 100 * (1 - m.sparsity) == pytest.approx(row.p_m, abs=1e-3)
