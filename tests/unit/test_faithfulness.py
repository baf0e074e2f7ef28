"""The checks of attributions: their values on models where the answer is known, and what they leave behind."""

from __future__ import annotations

import copy

import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from nbkit import faithfulness
from nbkit.attribution import saliency
from nbkit.errors import LayerNotFound, NotFinite


def linear_net(weights: torch.Tensor) -> nn.Sequential:
    """Two logits, 0 and the sum of weights times pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(weights.numel(), 2, bias=False))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[1] = weights.flatten()
    return net


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4),
    )  # fmt: skip


def pictures(n: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_deletion_and_insertion_of_a_linear_model_by_hand(device):
    weights = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    net, x = linear_net(weights).to(device), torch.ones(1, 1, 2, 2, device=device)
    gone = faithfulness.deletion(net, x, weights[None], 1, steps=4, probability=False)
    assert gone.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert gone.scores.tolist() == [[10, 6, 3, 1, 0]]
    assert gone.auc.tolist() == [pytest.approx((10 / 2 + 6 + 3 + 1) / 4)]
    come = faithfulness.insertion(net, x, weights[None], 1, steps=4, start=0.0, probability=False)
    assert come.scores.tolist() == [[0, 4, 7, 9, 10]]
    worst = faithfulness.deletion(net, x, -weights[None], 1, steps=4, probability=False)
    assert worst.scores.tolist() == [[10, 9, 7, 4, 0]] and worst.auc > gone.auc
    chances = faithfulness.deletion(net, x, weights[None], 1, steps=4).scores
    torch.testing.assert_close(chances, torch.sigmoid(gone.scores))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_true_contributions_are_the_best_order_of_a_linear_model(seed):
    generator = torch.Generator().manual_seed(seed)
    weights, x = torch.randn(5, 5, generator=generator), torch.rand(1, 1, 5, 5, generator=generator)
    net, other = linear_net(weights), torch.randn(1, 5, 5, generator=generator)
    kwargs = {"steps": 25, "probability": False}
    best = faithfulness.deletion(net, x, weights * x[0], 1, **kwargs).auc
    assert best <= faithfulness.deletion(net, x, other, 1, **kwargs).auc + 1e-5
    best = faithfulness.insertion(net, x, weights * x[0], 1, start=0.0, **kwargs).auc
    assert best >= faithfulness.insertion(net, x, other, 1, start=0.0, **kwargs).auc - 1e-5


def test_the_area_of_a_constant_classifier_is_its_constant():
    net, x = linear_net(torch.zeros(3, 8, 8)), pictures()
    for check in (faithfulness.deletion, faithfulness.insertion):
        torch.testing.assert_close(check(net, x, torch.rand(3, 8, 8), 1).auc, torch.full((3,), 0.5))


def test_curves_start_and_end_at_the_pictures_themselves():
    net, x = conv_net().eval(), pictures()
    c = net(x).argmax(1)
    whole = net(x).softmax(1).gather(1, c[:, None])[:, 0].detach()
    empty = net(torch.full_like(x, 0.2)).softmax(1).gather(1, c[:, None])[:, 0].detach()
    maps = torch.rand(3, 8, 8)
    gone = faithfulness.deletion(net, x, maps, fill=0.2, steps=5)
    come = faithfulness.insertion(net, x, maps, steps=5)
    torch.testing.assert_close(gone.scores[:, 0], whole)
    torch.testing.assert_close(gone.scores[:, -1], empty)
    torch.testing.assert_close(come.scores[:, -1], whole)
    assert gone.scores.shape == (3, 6) and gone.auc.shape == (3,)
    assert "AUC" in repr(gone) and "<svg" in gone._repr_html_()


def test_curves_do_not_depend_on_the_batch_and_channels_add_up():
    net, x = conv_net(), pictures()
    maps = torch.randn(3, 3, 8, 8)
    target = torch.tensor([0, 1, 2])
    one = faithfulness.deletion(net, x, maps, target, batch=1).scores
    for same in (maps.sum(1), maps.sum(1, keepdim=True)):
        torch.testing.assert_close(faithfulness.deletion(net, x, same, target, batch=100).scores, one)


def test_ties_are_broken_at_random_and_repeatably():
    weights = torch.zeros(8, 8)
    weights[0] = 1.0  # the row that raster order would remove first
    net, x, flat = linear_net(weights), torch.ones(1, 1, 8, 8), torch.zeros(1, 8, 8)
    curves = [faithfulness.deletion(net, x, flat, 1, steps=8, probability=False, seed=s).scores[0] for s in range(20)]
    assert torch.equal(curves[0], faithfulness.deletion(net, x, flat, 1, steps=8, probability=False).scores[0])
    # in raster order the score would be 0 after one step; at random it falls in proportion
    torch.testing.assert_close(torch.stack(curves).mean(0), torch.linspace(8, 0, 9), atol=0.8, rtol=0)


def test_features_of_a_table_are_deleted_too():
    net, x = nn.Linear(4, 2), torch.randn(5, 4)
    curve = faithfulness.deletion(net, x, (net.weight[0] * x).detach(), 0, steps=4, probability=False)
    torch.testing.assert_close(curve.scores[:, -1], net.bias[0].detach().expand(5))
    assert (faithfulness.insertion(net, x, torch.rand(5, 4), 0, steps=2).scores.shape) == (5, 3)


def test_of_three_axes_numbers_or_rows_go_as_the_map_says():
    weights = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    net, x = linear_net(weights), torch.ones(1, 2, 2)
    asked = {"steps": 4, "probability": False}
    grey = faithfulness.deletion(net, x, weights[None], 1, **asked)
    assert grey.scores.tolist() == [[10, 6, 3, 1, 0]]
    tokens = faithfulness.deletion(net, x, torch.tensor([[0.0, 1.0]]), 1, steps=2, probability=False)
    assert tokens.scores.tolist() == [[10, 7, 0]]
    places = faithfulness.deletion(net, x, torch.tensor([[[0.0, 1.0]]]), 1, steps=2, probability=False)
    assert places.scores.tolist() == [[10, 6, 0]]
    with pytest.raises(ValueError, match=r"give \(3, 4, 5\) or \(3, 4\)"):
        faithfulness.deletion(net, torch.ones(3, 4, 5), torch.ones(3, 5))


def test_the_only_output_of_a_model_is_followed_as_it_is():
    net, x = nn.Linear(4, 1), torch.randn(5, 4)
    maps = (net.weight[0] * x).detach()
    curve = faithfulness.deletion(net, x, maps, steps=4)
    torch.testing.assert_close(curve.scores[:, 0], net(x)[:, 0].detach())
    torch.testing.assert_close(curve.scores[:, -1], net.bias.detach().expand(5))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_gradient_has_no_infidelity_for_a_linear_model(seed):
    torch.manual_seed(seed)
    net, x = nn.Linear(6, 3), torch.randn(2, 6)
    maps = saliency(net, x, 1)
    assert (faithfulness.infidelity(net, x, maps, 1, noise=1.0, samples=20) < 1e-6).all()
    doubled = faithfulness.infidelity(net, x, 2 * maps, 1, noise=1.0, samples=20)
    assert (doubled > 1e-4).all()
    assert (faithfulness.infidelity(net, x, 2 * maps, 1, noise=1.0, samples=20, scaled=True) < 1e-6).all()


def test_infidelity_agrees_with_captum(device):
    net, x = conv_net().eval().to(device), pictures().to(device)
    maps = torch.randn(3, 3, 8, 8)
    generator = torch.Generator().manual_seed(7)
    changes = 0.3 * torch.randn(3, 10, 3, 8, 8, generator=generator).to(device)

    def both(rows):
        return changes.flatten(0, 1), rows - changes.flatten(0, 1)

    for scaled in (False, True):
        theirs = captum_infidelity(
            net, both, x, maps.to(device), target=2, n_perturb_samples=10, normalize=scaled
        )
        ours = faithfulness.infidelity(
            net, x, maps, 2, perturb=lambda rows, generator: both(rows)[0], samples=10, scaled=scaled, batch=30
        )
        torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-4, atol=1e-6)


def test_infidelity_does_not_depend_on_the_batch():
    net, x, maps = conv_net(), pictures(), torch.randn(3, 3, 8, 8)
    one = faithfulness.infidelity(net, x, maps, 0, samples=7, batch=1)
    torch.testing.assert_close(faithfulness.infidelity(net, x, maps, 0, samples=7, batch=5), one, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(faithfulness.infidelity(net, x, maps, 0, samples=7, seed=1), one)


def test_pointing_game_by_hand():
    maps = torch.zeros(3, 6, 6)
    maps[0, 1, 1] = maps[1, 4, 4] = 1.0
    boxes = torch.tensor([[0, 0, 3, 3]] * 3)
    assert faithfulness.pointing_game(maps, boxes)[:2].tolist() == [1, 0]
    # all 36 pixels of the empty map are tied; 9 of them lie in the box
    assert faithfulness.pointing_game(maps, boxes)[2].item() == pytest.approx(0.25)
    masks = torch.zeros(3, 6, 6, dtype=torch.bool)
    masks[:, :3, :3] = True
    assert torch.equal(faithfulness.pointing_game(maps, masks), faithfulness.pointing_game(maps, boxes))
    # (4, 4) is 2.83 pixels from (2, 2), the nearest of the object
    assert faithfulness.pointing_game(maps, boxes, tolerance=2.8)[1] == 0
    assert faithfulness.pointing_game(maps, boxes, tolerance=2.9)[1] == 1
    with pytest.raises(ValueError, match="tolerance must be at least 0 pixels, not nan"):
        faithfulness.pointing_game(maps, boxes, tolerance=float("nan"))


def test_a_map_that_is_the_mask_points_at_it():
    masks = torch.rand(4, 7, 7) > 0.7
    masks[:, 3, 3] = True
    assert (faithfulness.pointing_game(masks.float(), masks) == 1).all()
    assert (faithfulness.energy_share(masks.float(), masks) == 1).all()
    assert (faithfulness.energy_share(torch.zeros(4, 7, 7), masks) == 0).all()
    share = faithfulness.energy_share(torch.tensor([[[3.0, 1.0], [-5.0, 0.0]]]), torch.tensor([[0, 0, 1, 1]]))
    assert share.item() == pytest.approx(0.75)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(2, 6))
def test_rank_correlation_agrees_with_scipy(seed, levels):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, levels, (3, 4, 5), generator=generator).float()  # many ties
    b = torch.randn(3, 4, 5, generator=generator)
    expected = [spearmanr(p.flatten(), q.flatten()).statistic for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(faithfulness.rank_correlation(a, b), torch.tensor(expected).float(), equal_nan=False)


def test_rank_correlation_sees_order_only():
    a = torch.randn(2, 30)
    torch.testing.assert_close(faithfulness.rank_correlation(a, a.exp()), torch.ones(2))
    torch.testing.assert_close(faithfulness.rank_correlation(a, -a), -torch.ones(2))
    still = torch.ones(2, 30)
    assert faithfulness.rank_correlation(a, still).tolist() == [0, 0]
    assert faithfulness.rank_correlation(still, 2 * still).tolist() == [1, 1]


class Scale(nn.Module):
    """Parameters without a way to reset them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1) + 2)

    def forward(self, x):
        return x * self.weight


def test_randomization_goes_from_the_output_down_and_restores_the_model():
    net, x = nn.Sequential(Scale(), *conv_net()).train(), pictures()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    seen = []

    def method(model, inputs, target):
        seen.append([not torch.equal(v, state[k]) for k, v in model.state_dict().items() if k.endswith("weight")])
        return saliency(model, inputs, target)

    result = faithfulness.randomization_check(net, x, method, 2)
    assert result.layers == ("9", "4", "2", "1", "0") and result.correlations.shape == (5, 3)
    # weights in the order of the model: scale, conv, norm, conv, linear (the norm's initial weights are ones)
    assert seen[0] == [False] * 5 and seen[1] == [False] * 4 + [True] and seen[2] == [False] * 3 + [True] * 2
    assert seen[-1] == [True, True, False, True, True]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert "rank correlation" in repr(result) and "<table>" in result._repr_html_()
    again = faithfulness.randomization_check(net, x, saliency, 2)
    assert torch.equal(again.correlations, result.correlations)


class Gain(nn.Module):
    """A block that resets the layer in it along with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.gain, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def reset_parameters(self):
        nn.init.ones_(self.gain)
        self.layer.reset_parameters()

    def forward(self, x):
        return self.gain * self.layer(x)


def test_a_model_comes_back_from_resets_of_whole_blocks_and_from_methods_that_train():
    net, x = (
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), Gain(), nn.Linear(4, 3)).train(),
        torch.randn(5, 6),
    )
    state, modes = copy.deepcopy(net.state_dict()), []

    def plain(model, inputs, target):
        modes.append(model.training)
        model.train()  # the statistics of the BatchNorm move
        inputs = inputs.clone().requires_grad_()
        return torch.autograd.grad(model(inputs)[:, target].sum(), inputs)[0]

    faithfulness.randomization_check(net, x, plain, 1, layers=["2"])
    assert modes[0] is False and net.training and net[2].training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_attention_is_randomised_with_its_output_projection():
    block, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)
    net, seen = nn.Sequential(block, nn.Flatten(), nn.Linear(40, 3)), []
    before = copy.deepcopy(net.state_dict())

    def method(model, inputs, target):
        attention = model[0].self_attn
        seen.append(not torch.equal(attention.out_proj.weight, before["0.self_attn.out_proj.weight"]))
        return saliency(model, inputs, target)

    result = faithfulness.randomization_check(net, x, method, 1)
    assert result.layers[-1] == "0.self_attn" and seen == [False] * (len(seen) - 1) + [True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_weights_of_a_linear_model_do_not_survive_randomization():
    """New weights are independent of the old ones: over 3,000 of them four standard errors are 0.07."""
    net, x = linear_net(torch.randn(3, 40, 25, generator=torch.Generator().manual_seed(0))), torch.rand(2, 3, 40, 25)
    check = faithfulness.randomization_check(net, x, saliency, 1)
    assert check.layers == ("1",) and (check.correlations.abs() < 0.07).all()


def test_a_method_that_ignores_the_model_survives_randomization():
    edges = faithfulness.randomization_check(conv_net(), pictures(), lambda model, x, target: x.abs().sum(1))
    assert (edges.correlations == 1).all()


def test_one_layer_at_a_time():
    net, x, seen = conv_net(), pictures(), []
    state = copy.deepcopy(net.state_dict())

    def method(model, inputs, target):
        seen.append([n for n in ("0", "3", "8") if not torch.equal(model[int(n)].weight, state[f"{n}.weight"])])
        return saliency(model, inputs, target)

    faithfulness.randomization_check(net, x, method, 0, layers=["8", "0"], cascade=False)
    assert seen == [[], ["8"], ["0"]]
    with pytest.raises(ValueError, match="no parameters"):
        faithfulness.randomization_check(net, x, saliency, layers=["2"])
    with pytest.raises(LayerNotFound):
        faithfulness.randomization_check(net, x, saliency, layers=["12"])


def test_an_exception_restores_the_randomised_model():
    net, x, calls = conv_net(), pictures(), []
    state = copy.deepcopy(net.state_dict())

    def method(model, inputs, target):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return saliency(model, inputs, target)

    with pytest.raises(RuntimeError, match="broken"):
        faithfulness.randomization_check(net, x, method)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_bad_maps_and_regions_are_refused():
    net, x = conv_net(), pictures()
    maps = torch.rand(3, 8, 8)
    for check in (faithfulness.deletion, faithfulness.insertion):
        with pytest.raises(ValueError, match="do not fit the inputs"):
            check(net, x, maps[:, :4])
        with pytest.raises(NotFinite):
            check(net, x, maps * float("nan"))
        with pytest.raises(TypeError):
            check(net, x, maps.numpy())
        with pytest.raises(ValueError, match="steps"):
            check(net, x, maps, steps=0)
        with pytest.raises(IndexError):
            check(net, x, maps, 4)
        with pytest.raises(ValueError, match="batch"):
            check(net, x, maps, batch=0)
    with pytest.raises(ValueError, match="broadcast"):
        faithfulness.deletion(net, x, maps, fill=torch.zeros(5))
    with pytest.raises(NotFinite, match="start"):
        faithfulness.insertion(net, x, maps, start=float("inf"))
    with pytest.raises(ValueError, match="shaped like the inputs"):
        faithfulness.infidelity(net, x, maps)
    with pytest.raises(ValueError, match="perturb must return"):
        faithfulness.infidelity(net, x, x, perturb=lambda rows, g: rows[:1])
    with pytest.raises(ValueError, match="noise"):
        faithfulness.infidelity(net, x, x, noise=0.0)
    with pytest.raises(ValueError, match="does not lie in a map"):
        faithfulness.pointing_game(maps, torch.tensor([[0, 0, 9, 4]] * 3))
    with pytest.raises(ValueError, match="do not fit"):
        faithfulness.pointing_game(maps, torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="region 1 is empty"):
        regions = torch.ones(3, 8, 8)
        regions[1] = 0
        faithfulness.energy_share(maps, regions)
    with pytest.raises(ValueError, match="compared"):
        faithfulness.rank_correlation(maps, maps[:, :4])


class Rescaling(nn.Module):
    """A linear model that works on its input in place, or not, and keeps what it was given last."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.inplace, self.kept = nn.Linear(6, 3), inplace, None

    def forward(self, x):
        self.kept = x.mul_(2).sub_(1) if self.inplace else x * 2 - 1
        return self.layer(self.kept)


@pytest.mark.parametrize("check", [
    lambda net, x: faithfulness.deletion(net, x, torch.ones(4, 6), 0).scores,
    lambda net, x: faithfulness.infidelity(net, x, torch.ones(4, 6), 0, samples=5),
    lambda net, x: faithfulness.randomization_check(net, x, saliency, 0).correlations,
])  # fmt: skip
def test_a_model_may_work_in_place_and_be_trained_afterwards(check):
    x = torch.randn(4, 6)
    before, net = x.clone(), Rescaling(True)
    torch.testing.assert_close(check(net, x), check(Rescaling(False), x))
    assert torch.equal(x, before)
    net.layer(net.kept.detach()).sum().backward()  # not a tensor of inference mode
    with torch.inference_mode():
        check(net, torch.randn(4, 6))


def test_results_compare_by_identity():
    net, x = nn.Linear(6, 3), torch.randn(4, 6)
    curve = faithfulness.deletion(net, x, x, 0)
    assert curve == curve and curve != faithfulness.deletion(net, x, x, 0)
    check = faithfulness.randomization_check(net, x, saliency, 0)
    assert check == check and check != faithfulness.randomization_check(net, x, saliency, 0)


def test_the_model_is_left_alone():
    net, x = conv_net().train(), pictures()
    state = copy.deepcopy(net.state_dict())
    faithfulness.deletion(net, x, torch.rand(3, 8, 8))
    faithfulness.insertion(net, x, torch.rand(3, 8, 8))
    faithfulness.infidelity(net, x, torch.rand(3, 3, 8, 8), samples=3)
    assert all(m.training for m in net.modules()) and torch.is_grad_enabled()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
