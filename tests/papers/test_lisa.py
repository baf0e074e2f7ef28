"""LISA: what is drawn, frozen, dropped and held; AdamW by hand on the drawn layers; the stored tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nbkit import models, papers, recipes, training
from nbkit.errors import LayerNotFound

lisa = papers.method("lisa")
recipe = recipes.load("papers/lisa/recipe.py")
SLUG = "lisa"
LR = 1e-3


class Out:
    def __init__(self, logits):
        self.logits = logits


class Net(nn.Module):
    """Four layers between an embedding and a head that is the same matrix."""

    def __init__(self, n=4, width=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(n)])
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return Out(self.head(x))


LAYERS = {"layers": "layers"}


def tokens(steps=9, seed=0):
    return torch.randint(11, (steps, 3, 5), generator=torch.Generator().manual_seed(seed))


def tuned(draws=None, steps=9, seed=0, **how):
    """The network, its weights before the first and after every step, and the history."""
    net = Net(seed=seed)
    seen = [training.state(net)]
    how = {"lr": LR, "watch": lambda step: seen.append(training.state(net))} | how
    history = lisa.finetune(net, tokens(steps), draws=draws, **LAYERS, **how)
    return net, seen, history


def moved(before, after):
    return sorted({int(k.split(".")[1]) for k, w in before.items() if "layers." in k and not torch.equal(w, after[k])})


# what is drawn


@pytest.mark.parametrize("gamma", [0, 1, 3, 8])
def test_a_draw_holds_gamma_different_layers_and_its_seed_decides(gamma):
    drawn = lisa.draw(8, gamma, 50, seed=1)
    assert len(drawn) == 50 and all(len(set(a)) == gamma and a == sorted(a) for a in drawn)
    assert drawn == lisa.draw(8, gamma, 50, seed=1)
    assert gamma in (0, 8) or drawn != lisa.draw(8, gamma, 50, seed=2)


def test_every_layer_is_drawn_as_often_and_as_its_chance_says():
    often = np.bincount(np.concatenate(lisa.draw(8, 2, 4000, seed=3)), minlength=8) / 4000
    assert (abs(often - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)).all()
    p = [0.5, 0.25, 0.25, 0]
    one = np.bincount(np.concatenate(lisa.draw(4, 1, 4000, seed=3, p=p)), minlength=4) / 4000
    assert one[3] == 0 and abs(one - p).max() < 4 * math.sqrt(0.25 / 4000)


def test_a_fixed_draw_is_the_first_one_all_along():
    assert lisa.draw(8, 2, 6, seed=4, fixed=True) == 6 * lisa.draw(8, 2, 1, seed=4)


def test_drawing_leaves_the_global_random_states_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    before = (np.random.get_state()[1].copy(), torch.get_rng_state())
    lisa.draw(8, 2, 5, seed=0)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


# what moves


@pytest.mark.parametrize("keep", [False, True])
def test_all_layers_is_full_adamw_bit_for_bit(keep):
    full, _, _ = tuned()
    every, _, _ = tuned(lisa.draw(4, 4, 3, seed=0), period=3, keep=keep)
    assert all(torch.equal(w, every.state_dict()[k]) for k, w in full.state_dict().items())


@pytest.mark.parametrize("keep", [False, True])
def test_between_two_switches_the_drawn_layers_move_and_no_other(keep):
    drawn = [[0, 2], [2, 3], [1, 2], [0, 1], [1, 3]]  # the last one for a step only
    _, seen, history = tuned(drawn, period=2, keep=keep)
    assert len(history) == 9
    assert [moved(seen[2 * i], seen[min(2 * i + 2, 9)]) for i in range(5)] == drawn


def test_no_layer_moves_at_gamma_0_and_the_embedding_does():
    _, seen, _ = tuned([[]], period=9)
    assert moved(seen[0], seen[-1]) == [] and not torch.equal(seen[0]["embed.weight"], seen[-1]["embed.weight"])


def by_hand(drawn, period, keep, steps=9):
    """Adam's formulas written out, a weight at a time."""
    net, memory = Net(), {}
    for t, ids in enumerate(tokens(steps)):
        lr = LR * 0.5 * (1 + math.cos(math.pi * t / steps))
        active = drawn[t // period]
        logits = net(ids).logits[:, :-1]
        named = dict(net.named_parameters())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        slopes = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        for name, w in named.items():
            if name.startswith("layers.") and int(name.split(".")[1]) not in active:
                if not keep:
                    memory.pop(name, None)
                continue
            n, m, v = memory.get(name, (0, 0.0, 0.0))
            n, m, v = n + 1, 0.9 * m + 0.1 * slopes[name], 0.999 * v + 0.001 * slopes[name] ** 2
            memory[name] = (n, m, v)
            w.data -= lr * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
    return net.state_dict()


@pytest.mark.parametrize("keep", [False, True])
def test_the_loop_is_adam_by_hand_with_means_dropped_or_kept(keep):
    drawn = [[0, 2], [1, 2], [0, 3]]
    net, _, _ = tuned(drawn, period=3, keep=keep)
    for name, w in by_hand(drawn, 3, keep).items():
        torch.testing.assert_close(net.state_dict()[name], w, rtol=0, atol=2e-6)


def test_dropping_and_keeping_differ_once_a_layer_comes_back():
    drawn = [[0], [1], [0]]
    dropped, kept = (tuned(drawn, period=3, keep=keep)[1] for keep in (False, True))
    assert all(torch.equal(w, kept[6][k]) for k, w in dropped[6].items())
    assert not torch.equal(dropped[7]["layers.0.weight"], kept[7]["layers.0.weight"])


def test_a_layer_woken_without_memory_moves_by_the_learning_rate():
    _, seen, _ = tuned([[0], [1], [2]], period=3)
    step = (seen[4]["layers.1.weight"] - seen[3]["layers.1.weight"]).abs()
    assert step.median().item() == pytest.approx(LR * training.cosine()(3 / 9), rel=1e-2)


def test_afterwards_every_layer_can_be_trained_again():
    net, _, _ = tuned([[0], [1], [2]], period=3)
    assert all(w.requires_grad for w in net.parameters())


# what is held


def test_the_counted_floats_are_those_of_the_formula_with_the_tied_matrix_once():
    sizes, always = 6 * 6 + 6, 11 * 6
    drawn = [[0, 2], [1, 2], [0, 2]]
    for keep in (False, True):
        _, _, history = tuned(drawn, period=3, keep=keep)
        held = [floats for _, floats in history]
        seen = [set(sum(drawn[: t // 3 + 1], [])) if keep else () for t in range(9)]
        assert held == [lisa.planned(Net(), drawn[t // 3], seen[t], **LAYERS) for t in range(9)]
        assert held[0] == 3 * (always + 2 * sizes) and held[-1] == held[0] + keep * 2 * sizes
    assert {floats for _, floats in tuned()[2]} == {3 * (always + 4 * sizes)}


def test_lora_holds_three_floats_for_every_weight_of_its_adapters():
    model = recipe.with_adapters(models.load("tiny-llama", seed=0), 17, recipe.ATTENTION_AND_MLP)
    (_, floats), *_ = lisa.finetune(model, recipe.batches(0)[:1], lr=LR)
    assert floats == 3 * 8 * 17 * (4 * (64 + 64) + 3 * (64 + 192))


# bad input


def test_bad_settings_are_refused_and_change_nothing():
    net = Net()
    before = training.state(net)
    good = {"lr": LR, "draws": [[0]] * 3, "period": 3, **LAYERS}
    rates = [{"lr": lr} for lr in (0.0, -LR, math.nan, math.inf)]
    others = [{"period": 0}, {"draws": [[0]] * 2}, {"draws": [[4]] * 3}, {"draws": [[-1]] * 3}, {"layers": "head"}]
    for bad in rates + others:
        with pytest.raises(ValueError):
            lisa.finetune(net, tokens(), **good | bad)
    with pytest.raises(LayerNotFound):
        lisa.finetune(net, tokens(), **good | {"layers": "decoder"})
    assert all(torch.equal(w, before[k]) for k, w in net.state_dict().items())
    assert all(w.requires_grad for w in net.parameters())


def test_bad_draws_are_refused():
    for gamma, periods in ((-1, 3), (9, 3), (1.5, 3), (2, 0)):
        with pytest.raises(ValueError):
            lisa.draw(8, gamma, periods, seed=0)
    for p in ([1.0], [1.0] + 7 * [0], 8 * [1.0]):  # too few, too few above 0, a sum that is not 1
        with pytest.raises(ValueError):
            lisa.draw(8, 2, 3, seed=0, p=p)


# the recipe and its tables


def test_a_part_moves_by_what_training_or_an_adapter_adds():
    model = models.load("tiny-llama", seed=0)
    start = recipe.weights(model)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 2.0
        model.model.embed_tokens.weight[5, 5] -= 3.0
    found = recipe.norms(recipe.weights(model), start)
    assert {part: round(update, 3) for part, (_, update) in found.items() if update} == {"3": 2.0, "E": 3.0, "H": 3.0}
    adapted = recipe.with_adapters(models.load("tiny-llama", seed=0), 2, recipe.EVERYWHERE)
    start = recipe.weights(adapted)
    with torch.no_grad():
        for name, w in adapted.named_parameters():
            if "layers.6" in name and "q_proj.lora_B" in name:
                w[1, 0] = 1.0
                row = adapted.get_parameter(name.replace("lora_B", "lora_A"))[0].norm().item()
    found = recipe.norms(recipe.weights(adapted), start)
    assert found["6"][1] == pytest.approx(2 * row, rel=1e-4)  # alpha is twice the rank
    assert sum(update > 1e-6 for _, update in found.values()) == 1


def test_a_small_start_changes_the_embeddings_adapter_alone_and_no_output():
    found = {}
    for small in (False, True):
        torch.manual_seed(0)
        found[small] = recipe.with_adapters(models.load("tiny-llama", seed=0), 14, recipe.EVERYWHERE, small=small)
    pairs = zip(found[False].named_parameters(), found[True].parameters(), strict=True)
    other = {name: (a / b).unique() for (name, a), b in pairs if not torch.equal(a, b)}
    assert [name.split(".")[-2] for name in other] == ["lora_embedding_B"]
    assert next(iter(other.values())).mean().item() == pytest.approx(math.sqrt(3 * 64), rel=1e-5)
    ids = recipe.batches(0)[0]
    with torch.no_grad():
        assert torch.equal(found[False](input_ids=ids).logits, found[True](input_ids=ids).logits)


def test_no_training_window_is_among_the_others_and_few_are_read_twice():
    rows = {part: {tuple(row) for row in recipe.windows(part).tolist()} for part in ("train", "validation", "test")}
    assert not rows["train"] & rows["validation"] and not (rows["train"] | rows["validation"]) & rows["test"]
    read = recipe.batches(0).flatten(0, 1).tolist()
    assert len(read) == recipe.STEPS * recipe.BATCH
    assert len({tuple(row) for row in read}) >= 0.99 * len(read)  # some of the texts repeat parts of others


def test_every_arm_ran_on_both_networks_with_three_seeds_at_its_best_rate():
    losses, tuning = papers.results(SLUG, "losses"), papers.results(SLUG, "tuning")
    arms = losses[losses["arm"] != "untrained"]
    assert set(arms["arm"]) == set(recipe.ARMS) and (arms.groupby("arm").size() == 6).all()
    for arm, tried in tuning.groupby("arm"):
        best = tried.sort_values("validation").iloc[0]["lr"]
        assert set(arms.loc[arms["arm"] == arm, "lr"]) == {best}
        assert tried["lr"].min() < best < tried["lr"].max(), arm
        assert np.allclose(tried["lr"].sort_values().to_numpy()[1:] / tried["lr"].sort_values().to_numpy()[:-1], 2)


def test_the_longer_runs_have_the_rates_of_the_short_ones_and_both_networks():
    longer, losses = papers.results(SLUG, "longer"), papers.results(SLUG, "losses")
    assert set(longer["arm"]) == set(recipe.LONG_ARMS) and set(longer["base"]) == set(recipe.BASES)
    rates = losses.groupby("arm")["lr"].max()
    assert (longer["lr"] == longer["arm"].map(rates)).all()
    assert recipe.LONG * recipe.BATCH <= len(recipe.windows("train")), "no window twice"
    short = losses.query("seed == 0").merge(longer, on=["arm", "base", "seed"])
    assert len(short) == 4 and (short["loss_y"] < short["loss_x"]).all()


def test_the_stored_states_are_those_of_the_formulas():
    model = models.load("tiny-llama", seed=0)
    floats = papers.results(SLUG, "losses").groupby("arm")["floats"].max()
    planned = {"full": range(8), "LISA": [0, 1], "frozen middle": [], "LISA, gamma 4": range(4), "fixed layers": [0, 1]}
    assert {arm: lisa.planned(model, active) for arm, active in planned.items()} == floats[list(planned)].to_dict()
    equal = ["LoRA 17", "LoRA 11, E trained", "LoRA 14, E and H too", "LoRA 14, small start"]
    assert (floats[equal] >= floats["LISA"]).all() and (floats[equal] < 1.04 * floats["LISA"]).all()
    assert floats["LISA"] < floats["LISA, state kept"] <= lisa.planned(model, [0, 1], range(8))
