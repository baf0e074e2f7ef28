"""record and edit: what they keep, what they change, and that the model is the same afterwards."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbkit import hooks
from nbkit.errors import LayerDidNotRun, LayerNotFound, NotFinite
from nbkit.hooks import clamp, edit, record, replace, scale, zero


class Block(nn.Module):
    """Returns a tuple, as transformers blocks do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, hidden_states, mask=None):
        return self.fc(hidden_states), mask


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = Block(), Block(), nn.Linear(6, 6)

    def forward(self, x):
        hidden, _ = self.first(x)
        hidden, _ = self.second(hidden_states=hidden)
        return {"hidden": hidden, "logits": hidden[:, 0]}


def conv_net(inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(4, 5, 3), nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


@pytest.fixture
def maps(device):
    torch.manual_seed(0)
    return conv_net().to(device), torch.randn(2, 1, 6, 6, device=device)


@pytest.fixture
def tokens(device):
    torch.manual_seed(0)
    return Tokens().to(device), torch.randn(2, 4, 6, device=device)


def state_of(model):
    hooks_left = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return {k: v.clone() for k, v in model.state_dict().items()}, hooks_left, modes


def assert_untouched(model, before):
    weights, hooks_left, modes = state_of(model)
    assert all(torch.equal(weights[k], before[0][k]) for k in weights)
    assert (hooks_left, modes) == before[1:]


# ------------------------------------------------------------------ layers


def test_the_table_lists_shapes_neurons_and_every_parameter_once(maps):
    model, x = maps
    table = hooks.layers(model, x).set_index("name")
    assert table.loc["2", "output_shape"] == (5, 4, 4)
    assert table.loc["2", "neurons"] == 5
    assert table.loc["1", "neurons"] == 4, "an activation has no attribute to tell; the example does"
    assert table["parameters"].sum() == sum(p.numel() for p in model.parameters())


def test_without_an_example_the_modules_tell_what_they_can(maps):
    table = hooks.layers(maps[0]).set_index("name")
    assert table.loc["2", "neurons"] == 5 and table["output_shape"].isna().all()


@pytest.mark.parametrize("shape, module, axis", [
    ((2, 3), None, 1), ((2, 7, 3), None, 2), ((2, 3, 7), nn.Conv1d(1, 3, 1), 1), ((2, 3, 5, 5), None, 1),
    ((2, 5, 5, 3), nn.Linear(1, 3), 3), ((2, 5, 5, 3), nn.LayerNorm(3), 3), ((2, 3, 5, 5), nn.Conv2d(1, 3, 1), 1),
])  # fmt: skip
def test_neuron_axis(shape, module, axis):
    assert hooks.neuron_axis(torch.zeros(shape), module) == axis


def test_unknown_layer_names_the_nearest(tokens):
    with pytest.raises(LayerNotFound, match=r"'first\.fcc'.*did you mean 'first\.fc'"):
        hooks.get_layer(tokens[0], "first.fcc")
    with pytest.raises(KeyError):
        record(tokens[0], "nowhere").__enter__()


@pytest.mark.parametrize("layers", [None, [nn.ReLU()], nn.ReLU(), 3])
def test_layers_are_given_by_name(maps, layers):
    with pytest.raises(TypeError, match="by name"):
        hooks.resolve(maps[0], layers)


def test_a_pattern_names_layers_in_the_models_order(tokens):
    assert hooks.resolve(tokens[0], "*.fc") == ["first.fc", "second.fc"]
    with pytest.raises(LayerNotFound):
        hooks.resolve(tokens[0], "*.conv")


# ------------------------------------------------------------------ record


def test_recorded_outputs_are_the_ones_computed_by_hand(maps):
    model, x = maps
    with record(model, ["0", "2"]) as acts:
        model(x)
    assert torch.equal(acts["0"], model[0](x).detach().cpu())
    assert torch.equal(acts["2"], model[:3](x).detach().cpu())
    assert not acts["0"].requires_grad


@pytest.mark.parametrize("detach", [True, False])
def test_an_in_place_activation_does_not_overwrite_what_was_recorded(device, detach):
    torch.manual_seed(0)
    model, x = conv_net(inplace=True).to(device), torch.randn(2, 1, 6, 6, device=device)
    with record(model, "0", detach=detach) as acts:
        out = model(x)
    assert torch.equal(acts["0"].detach().cpu(), model[0](x).detach().cpu())
    assert (acts["0"] < 0).any()
    assert torch.equal(out, model(x))


def test_with_detach_false_gradients_reach_the_layer(maps):
    model, x = maps
    with record(model, "3", detach=False) as acts:
        score = model(x)[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, acts["3"])
    expected = model[6].weight[1][None, :, None, None].expand(2, 5, 4, 4) / 16
    torch.testing.assert_close(gradient, expected)


def test_several_forwards_are_joined_or_the_last_is_kept(maps):
    model, x = maps
    with record(model, "2") as all_of_them, record(model, "2", concat=False) as last:
        model(x)
        model(x[:1])
    assert all_of_them["2"].shape[0] == 3 and last["2"].shape[0] == 1


def test_a_pass_that_broke_off_between_the_layers_leaves_no_rows(maps):
    model, x = maps
    with record(model, ["0", "4"]) as acts:
        with pytest.raises(ZeroDivisionError), edit(model, {"2": replace(lambda part: 1 / 0)}):
            model(x[:1])
        model(x)
        model(x[:1])
    assert len(acts["0"]) == len(acts["4"]) == len(x) + 1


def test_inputs_tuples_and_keyword_arguments(tokens):
    model, x = tokens
    with record(model, ["first", "second"], at="input") as ins, record(model, ["first", "second"]) as outs:
        model(x)
    assert torch.equal(ins["first"], x.cpu())
    assert torch.equal(ins["second"], outs["first"])


def test_a_layer_that_did_not_run_says_so(tokens):
    model, x = tokens
    with record(model, "unused") as acts:
        model(x)
    with pytest.raises(LayerDidNotRun, match="unused"):
        acts["unused"]
    with pytest.raises(LayerNotFound, match="was not recorded"):
        acts["first"]


def test_a_layer_used_twice_in_one_pass_is_not_silently_joined(device):
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu).to(device)
    with record(model, "1") as acts:
        model(torch.randn(2, 3, device=device))
    with pytest.raises(ValueError, match="ran 2 times"):
        acts["1"]


# ------------------------------------------------------------------ edit


def test_zero_scale_clamp_replace_by_hand(maps):
    model, x = maps
    plain = model[:3](x).detach()
    cases = [
        (zero(1), lambda t: t.index_fill(1, torch.tensor([1], device=t.device), 0)),
        (scale([0, 4], 3.0), lambda t: torch.cat([t[:, :1] * 3, t[:, 1:4], t[:, 4:] * 3], 1)),
        (clamp([2, 3], torch.tensor([5.0, -1.0])),
         lambda t: torch.cat([t[:, :2], t[:, 2:3] * 0 + 5, t[:, 3:4] * 0 - 1, t[:, 4:]], 1)),
        (replace(torch.ones(5, 4, 4)), torch.ones_like),
        (replace(lambda t: -t, slice(0, 2)), lambda t: torch.cat([-t[:, :2], t[:, 2:]], 1)),
    ]  # fmt: skip
    for one, by_hand in cases:
        with edit(model, {"2": one}), record(model, "2") as acts:
            model(x)
        assert torch.equal(acts["2"], by_hand(plain).cpu()), one.label


def test_positions_in_maps_and_tokens(maps, tokens):
    model, x = maps
    with edit(model, {"2": zero([1, 2], positions=[(0, 0), (3, -1)])}), record(model, "2") as acts:
        model(x)
    expected = model[:3](x).detach().cpu()
    expected[:, 1:3, 0, 0] = 0
    expected[:, 1:3, 3, 3] = 0
    assert torch.equal(acts["2"], expected)

    model, x = tokens
    value = torch.arange(6.0)
    with edit(model, {"first": clamp(None, value, positions=-1)}), record(model, "first") as acts:
        model(x)
    expected = model.first(x)[0].detach().cpu()
    expected[:, 3] = value
    assert torch.equal(acts["first"], expected)


def test_a_bool_mask_selects_positions(tokens):
    model, x = tokens
    mask = torch.tensor([True, False, True, False])
    with edit(model, {"first.fc": zero(positions=mask)}), record(model, "first.fc") as acts:
        model(x)
    assert (acts["first.fc"][:, mask] == 0).all() and (acts["first.fc"][:, ~mask] != 0).all()


def test_a_mask_over_a_map_may_be_a_list_or_an_array(maps):
    model, x = maps
    mask = np.zeros(model[:2](x).shape[2:], dtype=bool)
    mask[0, 0] = True
    for written in (mask, mask.tolist(), torch.from_numpy(mask)):
        with edit(model, {"1": zero(positions=written)}), record(model, "1") as acts:
            model(x)
        assert (acts["1"] == 0).all(1).all(0).tolist() == mask.tolist()


def test_an_edit_may_name_the_axis_that_counts_neurons(device):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Tanh()).to(device), torch.randn(2, 3, 18, device=device)
    plain = model(x).detach()
    channel, place = plain.clone(), plain.clone()
    channel[:, 5], place[:, :, 5] = 0, 0
    for one, expected in ((zero(5), place), (zero(5, axis=1), channel), (zero(5, axis=-2), channel),
                          (scale(5, 0.0, axis=1), channel), (clamp(5, axis=1), channel),
                          (replace(torch.zeros(1), 5, axis=1), channel)):  # fmt: skip
        with edit(model, {"1": one}):
            assert torch.equal(model(x), expected), one
    with edit(model, {"1": zero(5, positions=slice(4, None), axis=1)}):
        assert torch.equal(model(x), torch.cat([plain[..., :4], channel[..., 4:]], -1))
    for wrong, error in ((0, IndexError), (3, IndexError), (-3, IndexError), ("1", TypeError)):
        with pytest.raises(error, match="axis"), edit(model, {"1": zero(5, axis=wrong)}):
            model(x)


@pytest.mark.parametrize("shape", ["whole", "row"])
def test_an_in_place_activation_does_not_write_into_a_replacement(device, shape):
    model, x = conv_net(inplace=True).to(device), torch.randn(2, 1, 6, 6, device=device)
    new = -torch.ones_like(model[0](x) if shape == "whole" else model[0](x)[:1])
    for value in (new, lambda part: new, new.clone().requires_grad_()):
        with edit(model, {"0": replace(value)}):
            model(x)
        assert (new == -1).all()


def test_all_neurons_may_be_called_all(maps):
    model, x = maps
    with edit(model, {"2": zero("all")}), record(model, "2") as acts:
        model(x)
    assert (acts["2"] == 0).all()


def test_edits_compose_from_left_to_right_and_nest(maps):
    model, x = maps
    both = {"2": [clamp(0, 1.0), scale(0, 4.0)]}
    with edit(model, both), record(model, "2") as acts:
        model(x)
    assert (acts["2"][:, 0] == 4).all()
    with edit(model, {"2": clamp(0, 1.0)}), edit(model, {"2": scale(0, 4.0)}), record(model, "2") as acts:
        model(x)
    assert (acts["2"][:, 0] == 4).all()


def test_editing_an_input_and_a_dict_output(tokens):
    model, x = tokens
    with edit(model, {"second": zero(at="input")}):
        out = model(x)["hidden"]
    torch.testing.assert_close(out, model.second.fc.bias.expand_as(out))
    with edit(model, {"": replace(lambda t: t + 1)}):
        edited = model(x)
    assert isinstance(edited, dict) and set(edited) == {"hidden", "logits"}


def test_a_named_tuple_keeps_its_type(device):
    Pair = namedtuple("Pair", "a b")

    class Two(nn.Module):
        def forward(self, x):
            return Pair(x, 2)

    model = nn.Sequential(Two())
    with edit(model, {"0": scale(None, 2.0)}):
        out = model(torch.ones(1, 3, device=device))
    assert isinstance(out, Pair) and out.b == 2 and (out.a == 2).all()


def test_gradients_flow_through_an_edit(maps):
    model, x = maps
    x.requires_grad_()
    with edit(model, {"0": scale(None, 2.0)}):
        (g,) = torch.autograd.grad(model(x).sum(), x)
    assert g.abs().sum() > 0
    with edit(model, {"0": zero()}):
        (g,) = torch.autograd.grad(model(x).sum(), x)
    assert g.abs().sum() == 0


def test_clamping_to_the_value_it_has_changes_no_bit(maps):
    model, x = maps
    plain = model(x)
    with record(model, "2", to=None) as acts:
        model(x)
    for one in (replace(acts["2"]), replace(lambda t: t, [1, 3], positions=[(0, 0), (2, 1)])):
        with edit(model, {"2": one}):
            assert torch.equal(model(x), plain)


@settings(max_examples=30, deadline=None)
@given(neurons=st.sets(st.integers(0, 4), min_size=1), k=st.floats(-5, 5), seed=st.integers(0, 99))
def test_only_the_named_neurons_change(neurons, k, seed):
    torch.manual_seed(seed)
    model, x = conv_net(), torch.randn(2, 1, 6, 6)
    before = state_of(model)
    with edit(model, {"2": scale(sorted(neurons), k)}), record(model, "2") as acts:
        model(x)
    plain = model[:3](x).detach()
    others = [i for i in range(5) if i not in neurons]
    assert torch.equal(acts["2"][:, others], plain[:, others])
    torch.testing.assert_close(acts["2"][:, sorted(neurons)], plain[:, sorted(neurons)] * k)
    assert_untouched(model, before)


# ------------------------------------------------------------------ bad input leaves nothing behind


@pytest.mark.parametrize("bad, error, match", [
    (zero(5), IndexError, "neurons 0 to 4"),
    (zero(-1), IndexError, "neurons 0 to 4"),
    (zero(0, positions=(0, 9)), IndexError, "out of range on axis 1"),
    (zero([1, 1]), ValueError, "twice"),
    (zero(0.5), TypeError, "ints"),
    (clamp([0, 1], torch.ones(3)), ValueError, "3 values were given for 2 neurons"),
    (replace(torch.ones(9)), ValueError, "does not fit"),
    (zero(torch.tensor([True])), ValueError, "bool mask"),
    (zero({1, 3}), TypeError, "ints or a bool mask"),
    (zero(positions=slice(2)), TypeError, "ints or a bool mask"),
])  # fmt: skip
def test_bad_edits_raise_and_leave_the_model_as_it_was(maps, bad, error, match):
    model, x = maps
    before = state_of(model)
    with pytest.raises(error, match=match), edit(model, {"2": bad}):
        model(x)
    assert_untouched(model, before)


def test_edits_are_checked_before_any_hook_is_set(maps):
    model, _ = maps
    before = state_of(model)
    wrong = ({"2": 3}, {"2": lambda part: part}, [zero(0)])
    for edits, error in (({"2": zero(0), "22": zero(0)}, LayerNotFound), *((w, TypeError) for w in wrong)):
        with pytest.raises(error), edit(model, edits):
            pass
    for bad in (lambda: clamp(0, float("nan")), lambda: replace(torch.tensor([1.0, float("inf")]))):
        with pytest.raises(NotFinite):
            bad()
    with pytest.raises(TypeError, match="a number or a tensor"):
        scale(0, "twice")
    with pytest.raises(ValueError, match="'output' or 'input'"), edit(model, {"2": zero(at="middle")}):
        pass
    assert_untouched(model, before)


def test_an_edit_that_never_ran_is_reported(tokens):
    model, x = tokens
    with pytest.raises(LayerDidNotRun, match="unused"), edit(model, {"unused": zero()}):
        model(x)


def test_the_model_is_restored_after_an_exception(maps):
    model, x = maps
    model.train()
    before = state_of(model)
    with pytest.raises(RuntimeError), record(model, "0"), edit(model, {"2": zero()}):
        model(x[:, :, :0])
    assert_untouched(model, before)
