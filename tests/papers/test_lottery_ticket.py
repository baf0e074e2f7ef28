"""The lottery ticket hypothesis: the search, its training loop, its controls and the files its recipe stored."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from nbkit import papers, recipes, sparsity, training
from nbkit.errors import LayerNotFound, NotFinite
from nbkit.sparsity import Masks

lottery = papers.method("lottery-ticket")
recipe = recipes.load("papers/lottery-ticket/recipe.py")
RATES = {"0.weight": 0.2, "2.weight": 0.1}


@pytest.fixture
def small(device):
    return lottery.draw(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), 0).to(device)


@pytest.fixture(scope="module")
def data():
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)
    return {"train": (x[:60], y[:60]), "val": (x[60:75], y[60:75]), "test": (x[75:], y[75:])}


def trainer(data, **settings):
    options = {"j": 12, "seed": 3, "every": 4, "batch": 20, "lr": 0.01, **settings}
    return lambda model, m: lottery.train(model, m, data, **options)


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_ten_weights_at_20_percent_go_10_8_6_5():
    mask, kept = torch.ones(1, 10, dtype=torch.bool), []
    for _ in range(3):
        mask = lottery.prune(mask, torch.arange(1.0, 11)[None], 0.2)
        kept.append((mask[0].nonzero().flatten() + 1).tolist())
    assert kept == [list(range(k, 11)) for k in (3, 5, 6)]


@pytest.mark.parametrize("seed", range(5))
def test_one_round_is_torchs_own_l1_pruning(seed):
    layer = nn.Linear(17, 23)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    ours = lottery.prune(torch.ones(23, 17, dtype=torch.bool), layer.weight, 0.37)
    torch_prune.l1_unstructured(layer, "weight", amount=0.37)
    assert torch.equal(ours, layer.weight_mask.bool())


@pytest.mark.parametrize("seed", range(5))
def test_pruned_weights_are_never_ranked_again_and_ties_fall_in_order_as_in_the_kit(seed):
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randint(-4, 5, (8, 9), generator=chance).float()  # many ties
    mask = torch.rand(8, 9, generator=chance) < 0.6
    ours = lottery.prune(mask, weight, 0.3)
    kit = sparsity.prune_surviving(Masks({"w": mask}), {"w": weight.abs()}, 0.3)["w"]
    assert torch.equal(ours, kit) and not (ours & ~mask).any()


def test_the_plain_search_finds_the_kits_masks(small, data):
    start = training.state(small)
    kit = sparsity.iterative_magnitude(small, trainer(data), rounds=4, per_layer={"2": 0.1})
    assert same(small, start)
    plain = lottery.find_tickets(small, trainer(data), rounds=4, rates=RATES)
    assert plain == [r.masks for r in kit]
    assert [list(m.kept().values()) for m in plain[:4]] == [[72, 36], [58, 32], [46, 29], [37, 26]]


def test_every_round_starts_at_theta_0_bit_for_bit_and_masks_are_nested(small, data):
    theta_0, begun = training.state(small), []

    def train(model, m):
        begun.append((m, training.state(model)))
        trainer(data)(model, m)

    masks = lottery.find_tickets(small, train, rounds=4, rates=RATES)
    assert len(begun) == 4
    for m, start in begun:
        for name, value in start.items():
            kept = m[name].to(value.device) if name in m else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value, torch.where(kept, theta_0[name], 0))
    assert all((a & b) == b for a, b in zip(masks, masks[1:], strict=False))


def test_p_0_repeats_the_dense_run_exactly(small, data):
    first, *others = sparsity.iterative_magnitude(small, trainer(data), rounds=2, rate=0.0)
    for other in others:
        assert other.result.equals(first.result) and other.masks == first.masks
        assert all(torch.equal(value, first.trained[name]) for name, value in other.trained.items())


def test_the_loop_is_training_fit_with_a_mask_bit_for_bit(small, data):
    m, start = sparsity.magnitude_mask(small, 0.6), training.state(small)
    ours = trainer(data, j=30)(small, m)
    after = training.state(small)
    m.rewind(small, start)
    history = training.fit(small, data["train"], steps=30, lr=0.01, batch=20, seed=3, every=4, post_step=m.post_step,
                           optimizer=functools.partial(torch.optim.Adam, fused=True),
                           validation={name: data[name] for name in ("val", "test")})  # fmt: skip
    assert same(small, after)
    rows = [[e["step"], e["val_loss"], e["test_accuracy"]] for e in history.evaluations]
    assert ours.to_numpy().tolist() == rows


def test_training_under_the_mask_is_training_with_masked_gradients(small, data):
    m, start = sparsity.magnitude_mask(small, 0.6), training.state(small)
    trainer(data, j=30)(small, m)
    ours = training.state(small)
    small.load_state_dict(start)
    adam = functools.partial(torch.optim.Adam, fused=True)
    with m.enforced(small):
        training.fit(small, data["train"], steps=30, lr=0.01, batch=20, seed=3, optimizer=adam)
    assert same(small, ours)


def test_pruned_weights_are_zero_in_every_forward_pass(small, data):
    m, passes = sparsity.magnitude_mask(small, 0.5).shuffled(0), []
    weights = dict(small.named_parameters())
    m.apply(small, keep_original=False)
    small.register_forward_pre_hook(
        lambda *_: passes.append(all(not weights[name][~mask].any() for name, mask in m.items()))
    )
    trainer(data)(small, m)
    assert len(passes) > 12 and all(passes)


def test_an_epoch_holds_every_example_once_in_the_seeds_order():
    x = torch.arange(7)
    stream = lottery.batches(x, x, 3, seed=1)
    epochs = [torch.cat([next(stream)[0] for _ in range(3)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0][:3], next(lottery.batches(x, x, 3, seed=1))[0])


def test_the_order_of_examples_is_the_seeds(small, data):
    start, m = training.state(small), Masks({"0.weight": torch.ones(12, 6)})
    first, again, other = (trainer(data, seed=seed)(m.rewind(small, start), m) for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)


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
    build, per_layer, *_ = recipe.settings(lottery)[name]
    net = build(0)
    assert sum(w.numel() for w in sparsity.prunable(net).values()) == weights
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert all(f"{layer}.weight" in sparsity.prunable(net) for layer in per_layer)


@pytest.mark.parametrize("setting", [{"j": 0}, {"every": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": -1.0}])
def test_bad_settings_are_refused_and_change_nothing(small, data, setting):
    before, m = training.state(small), sparsity.magnitude_mask(small, 0.5)
    with pytest.raises(ValueError, match="above 0"):
        trainer(data, **setting)(small, m)
    assert same(small, before)


def test_bad_data_and_masks_are_refused_and_change_nothing(small, data):
    before, m = training.state(small), sparsity.magnitude_mask(small, 0.5)
    x, y = data["val"]
    bad = {
        "no val": ({"train": data["train"], "test": data["test"]}, KeyError, "val"),
        "fewer labels": ({**data, "val": (x, y[:-1])}, ValueError, "15"),
        "a label out of range": ({**data, "val": (x, y + 1)}, IndexError, "3"),
        "NaN": ({**data, "train": (data["train"][0] * torch.nan, data["train"][1])}, NotFinite, "NaN"),
        "another width": ({**data, "test": (x[:, :5], y)}, RuntimeError, "shape"),
    }
    for case, (parts, error, words) in bad.items():
        with pytest.raises(error, match=words):
            trainer(parts)(small, m)
        assert same(small, before), case
    with pytest.raises(ValueError, match="shape"):
        trainer(data)(small, Masks({"0.weight": torch.ones(3, 3)}))
    with pytest.raises(LayerNotFound, match="1st"):
        trainer(data)(small, Masks({"1st.weight": torch.ones(12, 6)}))
    with pytest.raises(ValueError, match="nothing|no prunable"):
        lottery.draw(nn.ReLU(), 0)
    assert same(small, before)


# the recipe's controls


def test_the_controls_are_as_sparse_as_the_ticket_in_every_layer(small, data):
    theta_0 = training.state(small)
    fresh = training.state(lottery.draw(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), 9).to(
        next(small.parameters()).device))  # fmt: skip
    found = sparsity.iterative_magnitude(small, trainer(data), rounds=3)
    starts = recipe.starts(found, 3, theta_0, fresh, seed=0)
    m = found[3].masks
    assert {name: mask.kept() for name, (mask, _) in starts.items()} == dict.fromkeys(starts, m.kept())
    assert starts["ticket"] == (m, theta_0) and starts["reinit"] == (m, fresh)
    assert starts["random mask"][0] == starts["both redrawn"][0] != m
    assert starts["random mask"][1] is theta_0 and starts["both redrawn"][1] is fresh
    assert starts["no last reset"] == (m, found[2].trained)
    for control, values in {"one-shot": found[0].trained, "largest at birth": theta_0}.items():
        for name, mask in starts[control][0].items():
            size = values[name].abs().cpu()
            assert size[mask].min() >= size[~mask].max()


def test_signs_and_sizes_come_from_where_the_name_says(small):
    theta_0 = training.state(small)
    fresh = {name: value.flip(0) for name, value in theta_0.items()}
    m = sparsity.magnitude_mask(small, 0.5)
    rounds = [sparsity.Round(m, theta_0, None)] * 2
    starts = recipe.starts(rounds, 1, theta_0, fresh, seed=0)
    for name in m:
        signs, sizes, dealt = (starts[c][1][name] for c in ("old signs", "old sizes", "shuffled values"))
        assert torch.equal(signs.sign(), theta_0[name].sign()) and torch.equal(signs.abs(), fresh[name].abs())
        assert torch.equal(sizes.abs(), theta_0[name].abs()) and torch.equal(sizes.sign(), fresh[name].sign())
        kept = m[name].to(dealt.device)
        assert torch.equal(dealt[kept].sort().values, theta_0[name][kept].sort().values)
        assert not torch.equal(dealt[kept], theta_0[name][kept])


# what is stored


def test_the_stored_masks_are_as_large_as_the_table_says():
    table = papers.results("lottery-ticket")
    table = table.query("network == 'LeNet-300-100' and seed == 0 and control == 'ticket'")
    survived = papers.tensors("lottery-ticket", "survived")
    assert {name: t.shape for name, t in survived.items()} == {
        name: w.shape for name, w in sparsity.prunable(lottery.lenet(0)).items()
    }
    for row in table.itertuples():
        m = sparsity.mask_of_round(survived, row.round)
        assert 100 * (1 - m.sparsity) == pytest.approx(row.p_m, abs=1e-3)


def test_every_control_is_stored_for_three_seeds_and_as_sparse_as_the_ticket():
    table = papers.results("lottery-ticket")
    usual = table[(table["lr"] == recipe.LR) & (table["j"] < recipe.LONG)].groupby(["network", "control"])
    for network, controls in recipe.CONTROLS.items():
        for control, rounds in controls.items():
            rows = usual.get_group((network, control))
            assert sorted(zip(rows["round"], rows["seed"], strict=True)) == [(r, s) for r in rounds for s in range(3)]
    sizes = table.groupby(["network", "round"])["p_m"].agg(["min", "max"])
    assert (sizes["max"] - sizes["min"]).max() < 1e-3


def test_what_was_trained_again_is_in_the_table_and_came_out_alike():
    keys = ["network", "seed", "control", "round"]
    table = papers.results("lottery-ticket")
    usual = table[(table["lr"] == recipe.LR) & (table["j"] < recipe.LONG)]
    again = papers.results("lottery-ticket", "again").merge(usual, on=keys, suffixes=("", " before"), how="left")
    apart = (again["accuracy"] - again["accuracy before"]).abs()
    assert len(again) == 37 and apart.mean() < 0.002 and apart.max() < 0.008


def test_the_chances_are_what_the_recipe_counts():
    stored = papers.results("lottery-ticket", "chance")
    now = recipe.chances(papers.results("lottery-ticket"))
    assert stored[["claim", "case"]].equals(now[["claim", "case"]])
    assert (stored["by_chance"] - now["by_chance"]).abs().max() < 0.002
    assert now["by_chance"].max() < 0.05
