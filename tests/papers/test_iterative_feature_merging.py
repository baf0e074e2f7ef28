"""Iterative feature merging: exact merges, the loop against one written out, its rivals, and what the recipe stored."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from nbkit import models, papers, recipes, training

method = papers.method("iterative-feature-merging")
recipe = recipes.load("papers/iterative-feature-merging/recipe.py")
RULES = list(method.RULES)


@pytest.fixture(scope="module")
def mlp():
    return models.load("lenet-300-100", dataset="mnist", seed=0)


@pytest.fixture
def small(device):
    """5-6-7-3 with random weights and biases."""
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return net.to(device)


@pytest.fixture
def conv():
    """Two convolutions and a linear layer that sees 4 places of every channel."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 3
    return net


def same(a, b):
    return a.members == b.members and all(torch.equal(s, t) for s, t in zip((*a.W, *a.b), (*b.W, *b.b), strict=True))


def split(chain, at, unit, share):
    """The unit twice, its outgoing weights shared: the same function."""
    chain = copy.deepcopy(chain)
    twice = [*range(len(chain.b[at])), unit]
    chain.W[at], chain.b[at] = chain.W[at][twice], chain.b[at][twice]
    chain.W[at + 1] = chain.W[at + 1][:, twice]
    chain.W[at + 1][:, unit] *= share
    chain.W[at + 1][:, -1] *= 1 - share
    chain.members[at].append([len(twice) - 1])
    return chain


def inputs(net, n=6):
    shape = (1, 8, 8) if isinstance(net[0], nn.Conv2d) else (net[0].in_features,)
    device = next(net.parameters()).device
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(2)).to(device)


# one merge


@pytest.mark.parametrize("at", [0, 1])
def test_a_duplicated_unit_is_found_at_beta_0_and_merged_exactly(small, conv, at):
    for net in (small, conv):
        whole = method.read(net)
        twins = split(whole, at, 2, 0.5)
        merged = method.ifm(twins, 0.0)
        assert merged.widths() == whole.widths() and [2, len(whole.b[at])] in merged.members[at]
        x = inputs(net)
        for chain in (twins, merged):
            torch.testing.assert_close(method.write(net, chain)(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, -2.0, 1.0])
def test_equal_incoming_weights_merge_exactly_whatever_goes_out(small, share):
    twins = split(method.read(small), 0, 3, share)
    method.join(twins, 0, 3, 6)
    x = inputs(small)
    torch.testing.assert_close(method.write(small, twins)(x), small(x), rtol=1e-4, atol=1e-4)


def test_mean_in_and_sum_out_is_the_same_function_for_any_two_units_and_any_counts(small):
    first, second = method.read(small), method.read(small)
    x = inputs(small)
    for m, n in ((0, 4), (4, 1), (0, 1)):
        method.join(first, 0, m, n)
        method.join(second, 0, m, n, "mean, sum")
        a, b = method.write(small, first)(x), method.write(small, second)(x)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first.W[0], second.W[0])


def test_all_units_in_one_are_the_sum_of_rows_and_the_mean_of_columns(small):
    chain = method.read(small)
    whole = copy.deepcopy(chain)
    for _ in range(5):
        method.join(chain, 0, 0, 1)
    torch.testing.assert_close(chain.W[0][0], whole.W[0].sum(0))
    torch.testing.assert_close(chain.b[0][0], whole.b[0].sum())
    torch.testing.assert_close(chain.W[1][:, 0], whole.W[1].mean(1))
    assert sorted(chain.members[0][0]) == list(range(6))


def test_the_distances_are_those_of_all_weights_that_touch_two_channels(conv):
    chain = method.read(conv)
    D = method.distances(chain, 1)
    w, out = conv[3].weight, conv[7].weight.view(3, 5, 4)
    for m, n in itertools.combinations(range(5), 2):
        expected = (w[m] - w[n]).square().sum() + (out[:, m] - out[:, n]).square().sum()
        assert D[m, n].item() == pytest.approx(expected.item(), rel=1e-5)
    m, n = method.smallest(D)
    assert D[m, n] == min(D[a, b] for a, b in itertools.combinations(range(5), 2))


# the loop


def by_hand(net, beta):
    """The paper's loop with the rows and columns of two hidden layers written out. Counts, and the weights."""
    W = [m.weight.detach().double().cpu() for m in net if isinstance(m, nn.Linear)]
    counts = [torch.ones(len(w)) for w in W[:-1]]
    while True:
        merged = False
        for at, c in enumerate(counts):
            n = len(c)
            pairs = {
                (i, j): (W[at][i] - W[at][j]).square().sum() + (W[at + 1][:, i] - W[at + 1][:, j]).square().sum()
                for i, j in itertools.combinations(range(n), 2)
            }
            if not pairs or min(pairs.values()) > beta * max(pairs.values()):
                continue
            i, j = min(pairs, key=pairs.get)
            keep = [k for k in range(n) if k not in (i, j)]
            row = W[at][i] + W[at][j]
            column = (c[i] * W[at + 1][:, i] + c[j] * W[at + 1][:, j]) / (c[i] + c[j])
            W[at] = torch.vstack([W[at][keep], row])
            W[at + 1] = torch.column_stack([W[at + 1][:, keep], column])
            counts[at] = torch.cat([c[keep], (c[i] + c[j])[None]])
            merged = True
        if not merged:
            return counts, W


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.9])
def test_the_loop_is_the_papers(small, beta):
    counts, W = by_hand(small, beta)
    merged = method.ifm(method.read(small), beta)
    assert [[len(g) for g in groups] for groups in merged.members] == [c.tolist() for c in counts]
    for ours, theirs in zip(merged.W, W, strict=True):
        torch.testing.assert_close(ours[..., 0], theirs)


def test_no_duplicates_no_threshold_or_no_sweeps_change_nothing(mlp):
    chain = method.read(mlp)
    assert same(method.ifm(chain, 0.0), chain) and same(method.ifm(chain, 1.0, 0.0), chain)
    assert same(method.ifm(chain, 1.0, keep=1.0), chain)


def test_max_ratio_caps_the_share_of_every_layer(mlp):
    assert method.ifm(method.read(mlp), 1.0, 0.25).widths() == [48, 48]


def test_the_order_of_the_units_does_not_matter(small):
    chain = method.read(small)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()
    other = copy.deepcopy(chain)
    other.W[0], other.b[0], other.W[1] = chain.W[0][order], chain.b[0][order], chain.W[1][:, order]
    other.members[0] = [[i] for i in order]
    groups = [{tuple(sorted(g)) for g in method.ifm(c, 0.4).members[0]} for c in (chain, other)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("rule", RULES)
def test_rivals_reach_the_widths_and_leave_the_network_alone(conv, rule):
    chain = method.read(conv)
    before = copy.deepcopy(chain)
    found = method.ifm(chain, 1.0, rule=rule, least=[2, 3], seed=4)
    assert found.widths() == [2, 3] and same(chain, before)
    assert method.write(conv, found)(inputs(conv)).shape == (6, 3)
    assert same(found, method.ifm(chain, 1.0, rule=rule, least=[2, 3], seed=4))


def test_dropping_takes_the_smallest_norm_and_srinivas_and_babu_the_smallest_change(small):
    chain = method.read(small)
    norms = method.incoming(chain, 0).norm(1, dim=1)
    dropped = method.ifm(chain, 1.0, rule="L1 drop", least=[5, 7])
    gone = norms.argmin().item()
    assert not any((row == chain.W[0][gone]).all() for row in dropped.W[0])
    rows = torch.cat([chain.W[0].flatten(1), chain.b[0][:, None]], 1)
    out = chain.W[1].flatten(2)[..., 0]
    cost = {
        (m, n): ((rows[m] - rows[n]).square().sum() * out[:, n].square().sum()).item()
        for m, n in itertools.permutations(range(6), 2)
    }
    m, n = min(cost, key=cost.get)
    found = method.pair(chain, 0, method.distances(chain, 0), "saliency", torch.Generator())
    assert found == (m, n)
    method.join(chain, 0, m, n, "one, sum")
    torch.testing.assert_close(chain.W[1][:, -1, 0], out[:, m] + out[:, n])


def test_dropping_goes_on_where_all_norms_are_equal(small):
    small[0].weight.data[:] = 1.0
    assert method.ifm(method.read(small), 1.0, rule="L1 drop", least=[2, 7]).widths() == [2, 7]


def test_balancing_leaves_the_function_alone_and_evens_the_norms(small, conv):
    for net in (small, conv):
        level = method.balance(method.read(net), passes=100)
        x = inputs(net)
        torch.testing.assert_close(method.write(net, level)(x), net(x), rtol=1e-3, atol=1e-4)
        for at in range(2):
            a, b = method.incoming(level, at).norm(dim=1), method.outgoing(level, at).norm(dim=1)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_batchnorm_is_computed_into_the_convolution_and_summing_its_statistics_would_not_be_exact():
    net = models.load("small-cnn", variant="thin", seed=0)
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    fused = method.fuse(net)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-3, atol=1e-3)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net)
    bn = nn.BatchNorm2d(1).eval()
    bn.running_mean[:], bn.running_var[:] = 0.5, 2.0
    summed = copy.deepcopy(bn)
    for t in (summed.weight.data, summed.bias.data, summed.running_mean, summed.running_var):
        t *= 2
    z = torch.linspace(-1, 3, 8).view(8, 1, 1, 1)
    assert not torch.allclose(summed(2 * z), 2 * bn(z), rtol=0.1)
    torch.testing.assert_close(summed(2 * z), 2 * 2**0.5 * bn(z))


# bad input


def test_what_cannot_be_merged_exactly_is_refused_by_name(small):
    bent = (nn.GELU(), nn.Sigmoid(), nn.ReLU6(), nn.Hardswish())
    for layer in (*bent, nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)):
        net = nn.Sequential(small[0], layer, small[2])
        with pytest.raises(ValueError, match="1 does not double"):
            method.read(net)
    for layer in (nn.ReLU(), nn.LeakyReLU(), nn.Dropout(), nn.Identity()):
        method.read(nn.Sequential(small[0], layer, small[2]))
    for net in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), models.build("resnet-small", seed=0)):
        with pytest.raises(ValueError):
            method.read(net)
    with pytest.raises(ValueError, match="2 needs a bias, all 4 units"):
        method.read(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)))
    with pytest.raises(ValueError, match="0 needs a bias"):
        method.read(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    with pytest.raises(ValueError, match="0 needs a bias"):
        method.read(nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)))
    bad = copy.deepcopy(small)
    bad[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        method.read(bad)


def test_bad_settings_are_refused_and_change_nothing(small):
    chain = method.read(small)
    before = copy.deepcopy(chain)
    for settings in ({"beta": -0.1}, {"beta": 1.1}, {"beta": float("nan")}, {"beta": 0.1, "max_ratio": 2},
                     {"beta": 0.1, "keep": -1}):  # fmt: skip
        with pytest.raises(ValueError, match=r"shares in \[0, 1\]"):
            method.ifm(chain, **settings)
    for settings in ({"rule": "L3"}, {"least": [1]}, {"least": [0, 1]}):
        with pytest.raises(ValueError, match="a rule of RULES, widths from 1"):
            method.ifm(chain, 0.5, **settings)
    assert same(chain, before)


# the recipe, and what it stored


def test_even_widths_are_the_widest_within_the_budget(mlp):
    chain = method.read(mlp)
    widths = recipe.even(chain, 0.5)
    assert method.ifm(chain, 1.0, least=widths).size() <= 0.5 * chain.size()
    wider = [w + 1 for w in widths]
    assert method.ifm(chain, 1.0, least=wider).size() > 0.5 * chain.size()


def test_dead_units_leave_without_a_trace(small):
    small[0].bias.data[1] = -100.0
    x = inputs(small, 50)
    alive = recipe.living(small, x)
    assert not alive[0][1]
    less = recipe.without(method.read(small), alive)
    torch.testing.assert_close(method.write(small, less)(x), small(x), rtol=1e-4, atol=1e-4)


def test_every_network_and_arm_is_stored_at_its_budget():
    table = papers.results("iterative-feature-merging")
    assert not table.duplicated(["kind", "seed", "budget", "arm", "draw"]).any()
    full = table.query("budget in [0.5, 0.7] and arm != 'retrained'")
    assert (full.groupby("arm")["seed"].nunique() == 3).all() and set(RULES) <= set(full["arm"])
    assert (full.groupby(["kind", "budget"])["arm"].nunique().groupby("kind").nunique() == 1).all()
    assert len(full.groupby(["kind", "budget", "seed"])) == 18
    apart = table.query("arm != 'retrained'").eval("budget - share")
    assert apart.between(0, 0.02).all()
    even = table[table["arm"].str.endswith(", even")]
    assert {rule.removesuffix(", even") for rule in even["arm"]} == set(RULES)
    assert (even.groupby(["kind", "budget", "seed"])["widths"].nunique() == 1).all()
    random = full[full["arm"].str.startswith("random")]
    assert (random.groupby(["kind", "budget", "seed", "arm"]).size() == recipe.DRAWS).all()
    fixed = full[full["arm"].isin(RULES)]
    assert (fixed.groupby(["kind", "budget", "seed"])["widths"].nunique() == 1).all()


def test_stored_shares_and_accuracies_come_again(mlp):
    table = papers.results("iterative-feature-merging").query("kind == 'MLP' and seed == 0 and budget == 0.5")
    stored = table.set_index("arm").loc["IFM"]
    net, beta = recipe.to_budget(method.read(mlp), 0.5)
    assert beta == pytest.approx(stored["beta"], abs=1e-3)
    assert "-".join(map(str, net.widths())) == stored["widths"]
    x, y = recipe.images("MLP")[2:]
    assert training.accuracy(method.write(mlp, net), x, y) == pytest.approx(stored["accuracy"], abs=0.002)


def test_the_other_tables_are_complete():
    widths = papers.results("iterative-feature-merging", "width")
    assert len(widths) == 2 * 3 * len(recipe.WIDTHS) and widths[["beta", "max_ratio"]].stack().between(0, 1).all()
    pairs = papers.results("iterative-feature-merging", "pairs")
    assert len(pairs) == 9 and (pairs["pairs"] > 0).all()
    layers = papers.results("iterative-feature-merging", "layers")
    assert len(layers) == 2 * 3 * 6 * len(recipe.DEPTHS) and (layers["left"] <= layers["channels"]).all()
