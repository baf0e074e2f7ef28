"""The method cells of the neuron-path notebook, used without the notebook."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit import hooks, models, neurons, papers, recipes
from nbkit.errors import LayerNotFound, NotFinite

method = papers.method("neuron-path")
recipe = recipes.load("papers/neuron-path/recipe.py")
LAYERS = [f"blocks.{i}.mlp.act" for i in range(3)]
WIDTH = 10


def vit() -> nn.Module:
    return models.build("tiny-vit", seed=0, size=8, depth=3, width=8, heads=2, hidden=WIDTH, classes=4).double().eval()


x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
y = torch.tensor([0, 3, 1])


class Toy(nn.Module):
    """Two layers of units that pass their inputs [N, 2, F] on; the output is f(w1, w2)."""

    def __init__(self, f):
        super().__init__()
        self.one, self.two, self.f = nn.Identity(), nn.Identity(), f

    def forward(self, x):
        return self.f(self.one(x[:, :1])[:, 0], self.two(x[:, 1:])[:, 0])


@pytest.mark.parametrize("k", [1, 3])
def test_search_and_score_agree_with_the_package(k):
    model = vit()
    path, scores = method.search_path(model, x, y, LAYERS, m=5, k=k)
    found = neurons.neuron_path(model, x, y, layers=LAYERS, steps=5, top_k=k)
    assert path.shape == (3, 3, k) and scores.shape == (3, 3, WIDTH)
    assert torch.equal(path, found.path.reshape(3, 3, k))
    torch.testing.assert_close(scores.topk(k, 2).values, found.scores.reshape(3, 3, k))
    torch.testing.assert_close(method.joint_score(model, x, y, LAYERS, path, m=5), found.joint)


def test_score_of_a_linear_function_is_sum_times_sum_and_of_a_product_holds_cross_terms():
    units, out = torch.zeros(1, 2, 1, dtype=torch.long), lambda output: output[:, 0]
    w = torch.tensor([[[1.3], [0.7]]])
    for m in (2, 7, 20):
        linear = method.joint_score(Toy(lambda u, v: 2 * u - 0.5 * v), w, out, ["one", "two"], units, m)
        product = method.joint_score(Toy(lambda u, v: u * v), w, out, ["one", "two"], units, m)
        assert linear.item() == pytest.approx(3, rel=1e-6)
        assert product.item() == pytest.approx(4 * (m - 1) / (2 * m), rel=1e-6)


def test_one_unit_is_complete_in_the_limit():
    model, unit = vit(), torch.full((3, 1, 1), 4)
    without = method.edited_logits(model, x, LAYERS[1:2], method.chosen_units(unit, WIDTH))
    gap = method.probability(model(x), y) - method.probability(without, y)
    errors = [(method.joint_score(model, x, y, LAYERS[1:2], unit, m) - gap).abs().max() for m in (10, 1000)]
    assert errors[1] < 0.02 * errors[0] and errors[1] < 1e-2 * gap.abs().min()


def test_derivatives_are_those_of_the_class_token_row_with_later_layers_running():
    model, w = vit(), method.record_rows(vit(), x, LAYERS)
    dP = method.slopes(model, x, y, LAYERS, w[:, :1].movedim(1, 0)[:, None])[0, 0]      # clean row of layer 1
    step = 1e-6 * torch.eye(WIDTH, dtype=torch.double)[2]
    with hooks.edit(model, {LAYERS[0]: hooks.replace(lambda row: row + step, positions=0)}):
        up = method.probability(model(x), y)
    torch.testing.assert_close((up - method.probability(model(x), y)) / 1e-6, dP[:, 2], rtol=1e-3, atol=1e-8)


def test_influence_is_the_mean_derivative_along_the_image_and_ig_the_search_without_memory():
    model = vit()
    influence = method.influence_scores(model, x, y, LAYERS, m=2)
    for row, layer in enumerate(LAYERS):
        slope = 0
        for images in (0 * x, x / 2):
            by = lambda out: out.softmax(1).gather(1, y[:, None])[:, 0]  # noqa: E731
            slope = slope + neurons.gradient(model, images, by, layer=layer, positions=0) / 2
        torch.testing.assert_close(influence[:, row], slope)
    single = method.scores_by("single-neuron IG", model, x, y, LAYERS, m=4)
    alone = [neurons.neuron_path(model, x, y, layers=[layer], steps=4).path for layer in LAYERS]
    assert torch.equal(single.argmax(2), torch.cat(alone, 1))
    assert torch.equal(method.scores_by("activation", model, x, y, LAYERS), method.record_rows(model, x, LAYERS))
    searched = method.scores_by("neuron path", model, x, y, LAYERS, m=4, k=2).topk(2).indices
    assert torch.equal(searched, method.search_path(model, x, y, LAYERS, m=4, k=2)[0])
    a, b = (recipe.scored(method, model, x, y, LAYERS, "random", seed=seed) for seed in (3, 3))
    assert torch.equal(a, b) and a.shape == (3, 3, WIDTH)


def test_edits_touch_the_chosen_units_of_the_class_token_alone():
    model = vit()
    chosen = method.chosen_units(torch.tensor([[[1], [2], [3]]]).expand(3, -1, -1), WIDTH)
    places = list(zip(LAYERS, (1, 2, 3), strict=True))
    for by in (0.0, 2.0):
        with hooks.edit(model, {name: hooks.scale([unit], by, positions=0) for name, unit in places}):
            expected = model(x)
        torch.testing.assert_close(method.edited_logits(model, x, LAYERS, chosen, by), expected)
    keep_one = {name: hooks.zero([u for u in range(WIDTH) if u != unit], positions=0) for name, unit in places}
    with hooks.edit(model, keep_one):
        expected = model(x)
    torch.testing.assert_close(method.edited_logits(model, x, LAYERS, ~chosen), expected)


def test_pruning_protects_the_chosen_and_drops_others_by_chance():
    model, path = vit(), torch.tensor([[[1], [2], [3]]]).expand(3, -1, -1)
    rows = recipe.prune(method, model, x, y, LAYERS, {("path", 1): path, ("nothing", 0): None}, WIDTH)
    sure = rows[rows.p.isin([0, 1])].set_index(["protected", "p"]).probability
    clean = method.probability(model(x), y).mean().item()
    kept = method.edited_logits(model, x, LAYERS, ~method.chosen_units(path, WIDTH))
    assert sure["path", 0] == pytest.approx(clean) == sure["nothing", 0]
    assert sure["path", 1] == pytest.approx(method.probability(kept, y).mean().item())
    assert rows[rows.p == 0.5].groupby("protected").probability.nunique().tolist() == [3, 3]  # three draws


def test_counts_and_overlaps_by_hand():
    path = torch.tensor([[[0], [1]], [[0], [2]], [[3], [2]]])
    cosines = method.class_similarity(path, torch.tensor([0, 0, 1]), 4)
    expected = 1 / (6 * 2) ** 0.5  # they share one unit, used once each; lengths sqrt(4 + 1 + 1) and sqrt(2)
    torch.testing.assert_close(cosines, torch.tensor([[1, expected], [expected, 1]]))
    assert method.overlap(path).tolist() == [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]


def test_a_probe_reads_the_class_token():
    class Backbone(nn.Module):
        def forward(self, x):
            return type("Output", (), {"last_hidden_state": x})

    probe = recipe.ClassTokenProbe(2, 3)
    probe.load_state_dict({"weight": torch.tensor([[1.0, 2], [0, 1], [3, 0]]), "bias": torch.tensor([0.0, 1, 0])})
    net = nn.Sequential(Backbone(), probe)
    assert net(torch.tensor([[[1.0, 1], [9, 9]]])).tolist() == [[3, 2, 3]]


def test_bad_input_raises_and_changes_nothing():
    model = vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call, error in (
        (lambda: method.search_path(model, x, y, ["blocks.9.mlp.act"]), LayerNotFound),
        (lambda: method.search_path(model, x, y + 9, LAYERS), IndexError),
        (lambda: method.search_path(model, x, y[:2], LAYERS, m=2), ValueError),
        (lambda: method.search_path(model, x, y, LAYERS, m=1), ValueError),
        (lambda: method.search_path(model, x * float("nan"), y, LAYERS), NotFinite),
        (lambda: method.record_rows(model, x, ["patch_embed"]), ValueError),
        (lambda: method.joint_score(model, x, y, LAYERS, torch.full((3, 3, 1), WIDTH)), ValueError),
        (lambda: method.scores_by("loudest", model, x, y, LAYERS), ValueError),
        (lambda: method.edited_logits(model, x, LAYERS, torch.ones(3, 2, WIDTH, dtype=torch.bool)), ValueError),
        (lambda: method.edited_logits(model, x, LAYERS, torch.ones(3, 3, 4, dtype=torch.bool)), RuntimeError),
    ):
        with pytest.raises(error):
            call()
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
