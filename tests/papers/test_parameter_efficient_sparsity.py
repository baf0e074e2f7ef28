"""The method cells of the parameter-efficient-sparsity notebook, used without the notebook."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit import errors, papers, recipes

method = papers.method("parameter-efficient-sparsity")
recipe = recipes.load("papers/parameter-efficient-sparsity/recipe.py")


def linear(n: int = 6, k: int = 8, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def data(n: int = 60):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def tuned(kind: str, v_f: float = 0.5, *, lr: float = 0.05, steps: int = 40, **options):
    model = method.replace(network(), ["0", "2"], getattr(method, kind), **options)
    losses = list(method.fine_tune(model, *data(), head="4", lr=lr, steps=steps, seed=0, v_f=v_f))
    return model, losses


def test_at_first_the_layer_is_the_one_it_replaces():
    layer = linear()
    x = torch.randn(5, 8)
    torch.testing.assert_close(method.PST(layer)(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("v", [0, 0.3, 0.5, 0.9])
def test_the_first_mask_is_magnitude_prunings_and_has_the_right_number_of_zeros(v):
    layer = linear()
    new = method.PST(layer)
    new.sparsity = v
    mask = new.masked() != 0
    smallest = layer.weight.abs().flatten().argsort()[: int(v * 48)]
    expected = torch.ones(48, dtype=torch.bool)
    expected[smallest] = False
    assert torch.equal(mask.flatten(), expected)


def test_gradients_are_the_closed_forms_worked_out_by_hand():
    """With G the gradient of the masked weight: dL/dS = G W', of R its row sums, of C its column sums, of A and B its
    products with B and A; U and V have it through the mask and, unmasked, through |W'|."""
    layer = method.PST(linear(2, 3), r1=2, r2=2, alpha1=0.5, alpha2=2.0, seed=3)
    for p in (layer.V, layer.B, layer.R, layer.C):
        nn.init.normal_(p, std=0.1)
    layer.sparsity = 0.5
    weight, A, B, U, V = (t.detach() for t in (layer.weight(), layer.A, layer.B, layer.U, layer.V))
    G = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.5, -1.0]])
    mask = (layer.masked() != 0).float()
    (layer.masked() * G).sum().backward()
    S = G * weight
    torch.testing.assert_close(layer.R.grad, 2 * S.sum(1, keepdim=True))
    torch.testing.assert_close(layer.C.grad, 2 * S.sum(0, keepdim=True))
    torch.testing.assert_close(layer.A.grad, 0.5 * S @ B.T)
    torch.testing.assert_close(layer.B.grad, 0.5 * A.T @ S)
    through = mask * G + weight.sign() * S
    torch.testing.assert_close(layer.U.grad, through @ V.T)
    torch.testing.assert_close(layer.V.grad, U.T @ through)


def test_a_masked_weight_can_come_back():
    """Its score has a gradient although it is masked."""
    layer = method.Movement(linear())
    layer.sparsity = 0.5
    layer.masked().sum().backward()
    assert (layer.S.grad != 0).all() and (layer.linear.weight.grad == 0).sum() == 24


def test_descent_on_a_score_prunes_where_shrinking_the_weight_helps():
    """The loss asks weight 0 to shrink and weight 1 to grow."""
    layer = method.Movement(nn.Linear(2, 1, bias=False))
    layer.linear.weight.data[:] = torch.tensor([[1.0, 1.0]])
    (layer(torch.tensor([[1.0, -1.0]])) * 1.0).sum().backward()
    assert layer.S.grad[0, 0] > 0 > layer.S.grad[0, 1]


def test_magnitudes_mask_has_no_gradient():
    layer = method.Magnitude(linear())
    layer.sparsity = 0.5
    layer.masked().sum().backward()
    assert all(p.grad is None for p in (layer.A, layer.B, layer.R, layer.C))
    assert layer.V.grad.abs().sum() > 0


def test_random_masks_differ_between_layers_and_seeds_and_stay_as_drawn():
    masks = []
    for seed in (0, 1):
        model = method.replace(nn.Sequential(linear(), linear()), ["0", "1"], method.Magnitude, seed=seed)
        recipe.draw_masks(method.sparse_layers(model), seed)
        for layer in method.sparse_layers(model).values():
            layer.sparsity = 0.5
            masks.append(layer.masked() != 0)
            layer.V.data += 1
            assert torch.equal(layer.masked() != 0, masks[-1])
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[i + 1 :])


def test_the_schedule_begins_at_0_ends_on_a_plateau_and_never_falls():
    values = [method.schedule(t, 100, 0.9) for t in range(101)]
    assert values[:11] == [0.0] * 11 and values[71:] == [0.9] * 30
    assert all(a <= b for a, b in zip(values, values[1:], strict=False))
    assert values[40] == pytest.approx(0.9 - 0.9 * 0.5**3)


@pytest.mark.parametrize("kind", ["PST", "Magnitude", "Movement"])
def test_after_tuning_each_layer_has_its_zeros_and_the_export_says_the_same(kind):
    model, losses = tuned(kind)
    exported = method.export(model)
    assert not method.sparse_layers(exported)
    for name, size in (("0", 96), ("2", 120)):
        assert (exported.get_submodule(name).weight == 0).sum() == size // 2
    x, y = data()
    torch.testing.assert_close(exported(x), model(x))
    assert losses[-1] < losses[0]
    assert method.accuracy(model, x, y) == (model(x).argmax(1) == y).double().mean().item()


def test_only_what_should_is_trained():
    before = network()
    model, _ = tuned("PST")
    for name in ("0", "2"):
        assert torch.equal(model.get_submodule(name).linear.weight, before.get_submodule(name).weight)
    assert not torch.equal(model[4].weight, before[4].weight)
    model, _ = tuned("Movement")
    assert not torch.equal(model[0].linear.weight, before[0].weight)


def test_the_given_model_is_left_alone():
    model = network()
    kept = {name: p.clone() for name, p in model.state_dict().items()}
    new = method.replace(model, ["0"])
    new[0].V.data += 1
    assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_structure_of_a_random_mask_is_near_1_and_that_of_whole_rows_far_above():
    layer = method.Magnitude(nn.Linear(200, 200))
    recipe.draw_masks({"": layer}, 0)
    layer.sparsity = 0.9
    found = recipe.structure(layer)
    assert 0.6 < found["rows"] < 1.5 and 0.6 < found["columns"] < 1.5
    assert abs(found["first 8"] - found["shuffled"]) < 0.02
    rows = torch.arange(200.0)[:, None].expand(200, 200) + 0.1 * torch.rand(200, 200)
    layer.scores = lambda weight: rows
    found = recipe.structure(layer)
    assert found["rows"] > 50 and found["columns"] < 1 and found["first 8"] > 0.9


def test_definitions_have_one_length_and_every_topic_as_often():
    from nbkit import datasets, models

    tokenizer = models.tokenizer("minilm")
    ids, y = recipe.definitions(tokenizer, datasets.load("wordnet"), each=20)
    assert ids.shape == (160, 12) and y.bincount().tolist() == [20] * 8


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: method.PST(nn.ReLU()), ValueError, "torch.nn.Linear"),
        (lambda: method.PST(linear(), r2=0), ValueError, "ranks"),
        (lambda: method.replace(network(), ["5"]), errors.LayerNotFound, "5"),
        (lambda: method.replace(network(), ["1"]), ValueError, "ReLU"),
        (lambda: method.schedule(0, 10, 1.0), ValueError, "1"),
        (lambda: method.schedule(0, 10, 0.5, warm=0.5, cool=0.5), ValueError, "warm"),
        (lambda: next(method.fine_tune(network(), *data(), head="4", lr=0.1, steps=5, seed=0)), ValueError, "sparse"),
        (lambda: tuned("PST", -0.1), ValueError, "sparsity"),
        (lambda: tuned("PST", lr=1e30), ValueError, "lower lr"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
