"""The networks trained here: shapes, layer names, seeds, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit.errors import UnknownName
from nbkit.models import _zoo


@pytest.mark.parametrize(
    ("name", "config", "shape", "classes", "parameters"),
    [
        ("tiny-vit", {}, (2, 1, 28, 28), 10, 305_034),
        ("tiny-vit", {"channels": 3, "size": 32, "classes": 3, "depth": 2}, (2, 3, 32, 32), 3, None),
        ("small-cnn", {}, (2, 1, 28, 28), 10, 241_546),
        ("small-cnn", {"classes": 3, "pool": (1, 2, 3)}, (2, 1, 112, 112), 3, None),
        ("small-cnn", {"batch_norm": True}, (2, 1, 28, 28), 10, None),
        ("vgg-small", {}, (2, 1, 28, 28), 10, 288_170),
        ("mobilenet-small", {}, (2, 1, 28, 28), 10, 273_674),
        ("lenet-300-100", {}, (2, 1, 28, 28), 10, 266_610),
        ("lenet-conv", {}, (2, 1, 28, 28), 10, 54_314),
        ("lenet-300-100", {"inputs": 64}, (2, 1, 8, 8), 10, None),
    ],
)
def test_logits_and_size(name, config, shape, classes, parameters, device):
    model = _zoo.build(name, seed=0, **config).to(device)
    assert model(torch.rand(shape, device=device)).shape == (shape[0], classes)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_seed_fixes_the_weights_and_the_global_state_is_left_alone():
    for name in _zoo.ARCHITECTURES:
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        a = _zoo.build(name, seed=0).state_dict()
        assert torch.equal(state, torch.random.get_rng_state())
        torch.manual_seed(2)
        b, c = _zoo.build(name, seed=0).state_dict(), _zoo.build(name, seed=1).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert any(not torch.equal(a[k], c[k]) for k in a)


def test_attention_is_the_scaled_dot_product(device):
    model = _zoo.Attention(16, 4).to(device)
    x = torch.randn(2, 5, 16, device=device)
    q, k, v = (t.reshape(2, 5, 4, 4).transpose(1, 2) for t in model.qkv(x).chunk(3, -1))
    expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16)
    torch.testing.assert_close(model(x), model.proj(expected))


def test_attention_probabilities_can_be_recorded_at_their_own_layer(device):
    model, seen = _zoo.build("tiny-vit", seed=0).to(device), []
    handle = model.blocks[3].attn.weights.register_forward_hook(lambda m, i, out: seen.append(out))
    model(torch.rand(2, 1, 28, 28, device=device))
    handle.remove()
    assert seen[0].shape == (2, 4, 50, 50)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 4, 50, device=device))


def test_the_transformer_has_the_layer_names_that_notebooks_use():
    names = dict(_zoo.build("tiny-vit", seed=0).named_modules())
    for part in ("norm1", "attn.qkv", "attn.weights", "attn.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2"):
        assert f"blocks.5.{part}" in names
    assert {"patch_embed", "norm", "head"} <= set(names)


def test_sequential_networks_split_into_two_that_compose():
    x = torch.rand(2, 1, 28, 28)
    for name in ("small-cnn", "vgg-small", "mobilenet-small", "lenet-300-100"):
        model = _zoo.build(name, seed=0).eval()
        middle = len(model) // 2
        assert torch.equal(model[middle:](model[:middle](x)), model(x))


def test_lenet_starts_from_glorot_normal_weights_and_zero_biases():
    model = _zoo.build("lenet-300-100", seed=0)
    assert model.fc1.weight.std().item() == pytest.approx((2 / (784 + 300)) ** 0.5, rel=0.02)
    assert (model.fc1.bias == 0).all()


def test_unknown_names_and_settings():
    with pytest.raises(UnknownName, match="did you mean 'tiny-vit'"):
        _zoo.build("tinyvit", seed=0)
    with pytest.raises(TypeError, match="did you mean 'classes'"):
        _zoo.build("small-cnn", seed=0, clases=3)
    with pytest.raises(ValueError, match="patch 5 must divide size 28"):
        _zoo.build("tiny-vit", seed=0, patch=5)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model = _zoo.build("small-cnn", seed=3, classes=4, widths=(4, 8), batch_norm=True).eval()
    path = tmp_path / "deep" / "a.safetensors"
    _zoo.save_checkpoint(
        path, model, "small-cnn", {"classes": 4, "widths": [4, 8], "batch_norm": True}, accuracy=0.5
    )
    again, facts = _zoo.load_checkpoint(path)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(again(x), model(x)) and not again.training
    assert facts["accuracy"] == 0.5 and facts["config"]["classes"] == 4
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_broken_checkpoint_is_said_to_be_one(tmp_path):
    model = _zoo.build("small-cnn", seed=3, widths=(4,))
    whole, broken = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    _zoo.save_checkpoint(whole, model, "small-cnn", {"widths": [4]})
    broken.write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(ValueError, match="b.safetensors is not a checkpoint"):
        _zoo.load_checkpoint(broken)
    _zoo.save_checkpoint(whole, model, "small-cnn", {"widths": [8]})
    with pytest.raises(ValueError, match="size mismatch"):
        _zoo.load_checkpoint(whole)
    with pytest.raises(FileNotFoundError):
        _zoo.load_checkpoint(tmp_path / "none.safetensors")
