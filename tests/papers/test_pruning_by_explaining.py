"""The method cells of the pruning-by-explaining notebook, used without the notebook."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit import attribution, models, papers, recipes, sparsity, training
from nbkit.errors import NotFinite, UnknownName

explaining = papers.method("pruning-by-explaining")
recipe = recipes.load("papers/pruning-by-explaining/recipe.py")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).eval()


@pytest.fixture
def reference():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, 6, generator=generator), torch.arange(9) % 3


def conv(seed: int = 0) -> nn.Sequential:
    """Convolutions, max and mean pooling, with BatchNorms that have seen something."""
    torch.manual_seed(seed)
    model = models.build("small-cnn", seed=seed, widths=(5, 6, 7), pool=(1,), batch_norm=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.eval()


def same(model, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# the rule


@pytest.mark.parametrize(("weights", "expected"), [((3.0, -1.0), (1, 0)), ((1.0, 1.0), (1 / 3, 2 / 3))])
def test_the_rule_by_hand(weights, expected):
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([weights])
    found = explaining.hand_back(layer, torch.tensor([[1.0, 2.0]]), torch.ones(1, 1))
    torch.testing.assert_close(found, torch.tensor([expected]).float())


def test_the_rule_is_the_formula_in_loops():
    torch.manual_seed(2)
    layer, a, r = nn.Linear(4, 3), torch.rand(2, 4), torch.rand(2, 3)
    found = explaining.hand_back(layer, a, r)
    for n in range(2):
        for i in range(4):
            share = 0.0
            for j in range(3):
                parts = [a[n, k] * max(layer.weight[j, k].item(), 0) for k in range(4)]
                share += parts[i] / (sum(parts) + explaining.EPS) * r[n, j]
            assert found[n, i].item() == pytest.approx(float(share), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_relevance_is_the_rule_layer_by_layer_and_the_kits_divided_by_the_logit(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 3)).double()
    x, y = torch.randn(8, 6).double(), torch.arange(8) % 3
    last = explaining.hand_back(model[4], model[:4](x).detach(), torch.eye(3).double()[y])
    plain = {"0": explaining.hand_back(model[2], model[:2](x).detach(), last), "2": last}
    logit = model(x).gather(1, y[:, None]).detach()
    kit = attribution.layer_relevance(model, x, y, layer=["0", "2"], rule="zplus", bias=False, epsilon=1e-9)
    ours, scaled = explaining.relevance(model, x, y), explaining.relevance(model, x, y, start="logit")
    for name, r in ours.items():
        torch.testing.assert_close(r, plain[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(r, kit[name] / logit, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scaled[name], kit[name], rtol=1e-4, atol=1e-6)


def test_folding_changes_no_output_and_no_relevance():
    model = conv().double()
    x, y = torch.rand(6, 1, 12, 12).double(), torch.arange(6)
    folded = recipe.fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x))
    before, after = explaining.relevance(model, x, y), explaining.relevance(folded, x, y)
    for name, r in before.items():
        torch.testing.assert_close(after[name], r, rtol=1e-3, atol=1e-5)


def test_every_layer_carries_one_unit_of_relevance_an_example():
    folded = recipe.fold(conv())
    for layer in folded:
        if hasattr(layer, "bias") and layer.bias is not None:
            layer.bias.data.fill_(0.1)  # so that no unit lives without inputs
    with torch.no_grad():
        for layer in folded:
            if hasattr(layer, "weight"):
                layer.weight[..., 0] = layer.weight[..., 0].abs()
    found = explaining.relevance(folded, torch.rand(5, 1, 12, 12), torch.arange(5))
    for r in found.values():
        torch.testing.assert_close(r.flatten(1).sum(1), torch.ones(5), rtol=1e-4, atol=1e-4)


def test_a_dead_unit_and_one_that_only_speaks_against_score_nothing_and_go_first(net, reference):
    with torch.no_grad():
        for layer in (net[2], net[4]):
            layer.weight[0] = layer.weight[0].abs()
        net[0].bias[3] = -100  # never active
        net[2].weight[:, 5] = -1  # against every unit
    score = explaining.scores(net, *reference, "relevance")["0"]
    assert score[3] == score[5] == 0
    keep = explaining.prune(net, *reference, "relevance", remove=0.3)[-1]["0"]
    assert not keep[3] and not keep[5]


def test_every_reference_twice_is_the_same_score(net, reference):
    x, y = reference
    once, twice = (
        explaining.scores(net, a, b, "relevance")
        for a, b in ((x, y), (torch.cat([x, x]), torch.cat([y, y])))
    )
    for name in once:
        torch.testing.assert_close(once[name], twice[name])
        assert once[name].sum().item() == pytest.approx(1)


def test_from_the_logit_a_negative_one_counts_against(net, reference):
    x, y = reference
    logit = net(x).gather(1, y[:, None]).detach()
    assert (logit < 0).any() and (logit > 0).any()
    one, start = explaining.relevance(net, x, y), explaining.relevance(net, x, y, start="logit")
    torch.testing.assert_close(start["2"], one["2"] * logit)
    assert one["2"].min() >= 0 and start["2"].min() < 0


# criteria and masks


def test_the_criteria_are_what_their_names_say(net, reference):
    x, y = reference
    a = net[1](net[0](x)).detach().requires_grad_()
    loss = nn.functional.cross_entropy(net[4](net[3](net[2](a))), y)
    (g,) = torch.autograd.grad(loss, a)
    taylor = (a * g).sum(0).abs().detach()
    active = (g * (a > 0)).sum(0).abs()
    wanted = {"Taylor": taylor / taylor.norm(), "gradient": active / active.norm()}
    wanted["weight"] = net[0].weight.abs().sum(1) / net[0].weight.abs().sum()
    wanted["activation"] = a.sum(0) / a.sum()
    for criterion, value in wanted.items():
        found = explaining.scores(net, x, y, criterion)["0"]
        torch.testing.assert_close(found, value.detach(), msg=criterion)


@pytest.mark.parametrize("criterion", explaining.CRITERIA)
def test_steps_remove_exactly_what_was_asked_and_what_is_gone_stays_gone(net, reference, criterion):
    before = training.state(net)
    history = explaining.prune(net, *reference, criterion, remove=0.5, step=0.1)
    gone = [sum(int((~mask).sum()) for mask in keep.values()) for keep in history]
    assert gone == [2, 4, 6, 8, 10, 11]
    for early, late in zip(history, history[1:], strict=False):
        assert all((early[name] | ~late[name]).all() for name in early)
    assert same(net, before) and not any(p.grad is not None for p in net.parameters())


def test_the_lowest_of_all_layers_go_and_none_is_emptied():
    score = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([0.5, 0.9, 0.7])}
    keep = {name: torch.ones(len(s)).bool() for name, s in score.items()}
    found = explaining.without_lowest(score, keep, 3)
    assert {n: m.tolist() for n, m in found.items()} == {"a": [False, True], "b": [False, True, False]}
    assert all(mask.all() for mask in keep.values())
    rest = {"a": score["a"][1:], "b": torch.tensor([0.5, 0.9])}  # of those that are left
    first = {"a": torch.tensor([False, True]), "b": torch.tensor([True, True, False])}
    found = explaining.without_lowest(rest, first, 1)
    assert {n: m.tolist() for n, m in found.items()} == {"a": [False, True], "b": [False, True, False]}
    with pytest.raises(ValueError, match="1 units more"):
        explaining.without_lowest(score, keep, 4)
    with pytest.raises(NotFinite, match="NaN"):
        explaining.without_lowest({"a": torch.tensor([0.1, torch.nan])}, {"a": torch.ones(2).bool()}, 1)


def test_scores_after_a_step_are_those_of_the_smaller_network():
    model = conv()
    x, y = torch.rand(6, 1, 12, 12), torch.arange(6)
    first, second, _ = explaining.prune(model, x, y, "relevance", remove=0.5, step=0.25)
    small = sparsity.structured(model, first, example=x)
    expected = explaining.without_lowest(explaining.scores(small, x, y, "relevance"), first, 4)
    assert all(torch.equal(second[name], expected[name]) for name in expected)
    assert sum(small.get_submodule(name).out_channels for name in first) == 14


# bad input


def test_bad_input_is_refused_and_changes_nothing(net, reference):
    x, y = reference
    before = training.state(net)
    cases = [
        (lambda: explaining.prune(net, x[:0], y[:0], "relevance", remove=0.5), ValueError, "empty"),
        (lambda: explaining.prune(net, x, y[:-1], "relevance", remove=0.5), ValueError, "8"),
        (lambda: explaining.prune(net, x, y + 1, "relevance", remove=0.5), IndexError, "3"),
        (lambda: explaining.prune(net, x * torch.nan, y, "relevance", remove=0.5), NotFinite, "NaN"),
        (lambda: explaining.prune(net, x, y, "relevant", remove=0.5), UnknownName, "relevance"),
        (lambda: explaining.prune(net, x, y, "weight", remove=0.0), ValueError, "remove 0.0"),
        (lambda: explaining.prune(net, x, y, "weight", remove=1.0), ValueError, "remove 1.0"),
        (lambda: explaining.prune(net, x, y, "weight", remove=0.5, step=0.0), ValueError, "step 0.0"),
        (lambda: explaining.prune(net, x, y, "weight", remove=0.97), ValueError, "at least one"),
        (lambda: explaining.prune(nn.Sequential(nn.Linear(6, 3)), x, y, "weight", remove=0.5), ValueError, "0 hidden"),
        (lambda: recipe.references(x, y, 4, 0), ValueError, "1 to 3"),
        (lambda: recipe.references(x, y, 0, 0), ValueError, "1 to 3"),
    ]  # fmt: skip
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    with torch.no_grad():
        for parameter in net[4].parameters():
            parameter.zero_()  # logits of exactly 0
    before = training.state(net)
    with pytest.raises(NotFinite, match="NaN"):
        explaining.prune(net, x, y, "relevance", remove=0.5)
    assert same(net, before)


# data and tables


@pytest.mark.parametrize("name", recipe.TOYS)
def test_the_toys_are_drawn_from_their_seed(name):
    x, y = recipe.toy(name, 20, 3)
    assert y.bincount().tolist() == [20] * recipe.TOYS[name]
    assert torch.equal(x, recipe.toy(name, 20, 3)[0]) and not torch.equal(x, recipe.toy(name, 20, 4)[0])


def test_a_reference_set_holds_as_many_of_every_class():
    x, y = recipe.toy("spiral", 20, 0)
    a, b = recipe.references(x, y, 5, 1)
    assert b.bincount().tolist() == [5] * 4 and len(a.unique(dim=0)) == 20
    assert torch.equal(a, recipe.references(x, y, 5, 1)[0]) and not torch.equal(a, recipe.references(x, y, 5, 2)[0])


def test_a_subtask_keeps_the_logits_of_its_classes():
    model = conv()
    x = torch.rand(4, 1, 12, 12)
    small = recipe.on_subtask(model, (5, 7, 9))
    torch.testing.assert_close(small(x), model(x)[:, [5, 7, 9]])
    images, labels = recipe.subtask(torch.arange(20.0), torch.arange(20) % 10, (5, 7, 9), 1)
    assert images.tolist() == [5, 7, 9] and labels.tolist() == [0, 1, 2]


def test_every_cell_of_the_tables_is_there():
    toys = papers.results("pruning-by-explaining", "toys").query("criterion != 'whole'")
    filters = papers.results("pruning-by-explaining", "filters").query("criterion != 'whole'")
    assert toys.groupby("set")["seed"].nunique().tolist() == [recipe.NETS] * 3
    counts = filters.groupby(["network", "criterion", "n", "gone"]).size()
    for network, sizes in recipe.FILTERS.items():
        for n, draws in sizes.items():
            assert counts[network, "relevance", n, 0.25] == counts[network, "relevance", n, 0.5] == 9 * draws
        assert counts[network, "weight", 5, 0.5] == 9
    assert len(papers.results("pruning-by-explaining", "tuned")) == 9 * 8


def test_the_chance_is_what_the_recipe_counts():
    stored = papers.results("pruning-by-explaining", "chance")["by_chance"]
    now = recipe.chances(papers.results("pruning-by-explaining", "tuned"))["by_chance"]
    assert abs(stored - now).max() < 0.002
