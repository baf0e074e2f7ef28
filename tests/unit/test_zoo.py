"""The networks trained here: shapes, layer names, seeds, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbkit import models
from nbkit.errors import UnknownName
from nbkit.models.zoo import vision


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
        ("resnet-small", {}, (2, 1, 28, 28), 10, 44_014),
        ("resnet-small", {"widths": (8, 16, 32), "blocks": 2, "stride": 1}, (2, 1, 14, 14), 10, None),
        ("tiny-swin", {}, (2, 1, 28, 28), 10, None),
        ("cell-net", {}, (2, 1, 8, 8), 10, 5_594),
        ("cell-net", {"cells": 1, "inputs": 3, "classes": 4}, (2, 3, 14, 14), 4, None),
        ("tiny-moe", {}, (2, 1, 28, 28), 10, 77_258),
        ("tiny-moe", {"channels": 3, "size": 14, "classes": 4, "stored": (1, 2)}, (2, 3, 14, 14), 4, None),
        ("lenet-300-100", {}, (2, 1, 28, 28), 10, 266_610),
        ("lenet-conv", {}, (2, 1, 28, 28), 10, 54_314),
        ("lenet-300-100", {"inputs": 64}, (2, 1, 8, 8), 10, None),
    ],
)
def test_logits_and_size(name, config, shape, classes, parameters, device):
    model = models.build(name, seed=0, **config).to(device)
    assert model(torch.rand(shape, device=device)).shape == (shape[0], classes)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_seed_fixes_the_weights_and_the_global_state_is_left_alone():
    for name in models.architectures():
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        a = models.build(name, seed=0).state_dict()
        assert torch.equal(state, torch.random.get_rng_state())
        torch.manual_seed(2)
        b, c = models.build(name, seed=0).state_dict(), models.build(name, seed=1).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert any(not torch.equal(a[k], c[k]) for k in a)


def test_attention_is_the_scaled_dot_product(device):
    model = vision.Attention(16, 4).to(device)
    x = torch.randn(2, 5, 16, device=device)
    q, k, v = (t.reshape(2, 5, 4, 4).transpose(1, 2) for t in model.qkv(x).chunk(3, -1))
    expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16)
    torch.testing.assert_close(model(x), model.proj(expected))


def test_attention_probabilities_can_be_recorded_at_their_own_layer(device):
    model, seen = models.build("tiny-vit", seed=0).to(device), []
    handle = model.blocks[3].attn.weights.register_forward_hook(lambda m, i, out: seen.append(out))
    model(torch.rand(2, 1, 28, 28, device=device))
    handle.remove()
    assert seen[0].shape == (2, 4, 50, 50)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 4, 50, device=device))


def test_the_transformer_has_the_layer_names_that_notebooks_use():
    names = dict(models.build("tiny-vit", seed=0).named_modules())
    for part in ("norm1", "attn.qkv", "attn.weights", "attn.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2"):
        assert f"blocks.5.{part}" in names
    assert {"patch_embed", "norm", "head"} <= set(names)


def test_a_residual_block_adds_its_input():
    block = vision.Residual(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_shifted_windows_agree_with_transformers_swin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=28, patch_size=2, num_channels=1, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=7,
        mlp_ratio=3.0, num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    reference, ours = SwinForImageClassification(config).eval(), models.build("tiny-swin", seed=0).eval()
    for p in reference.parameters():
        nn.init.normal_(p, std=0.2)
    ours.load_state_dict(_as_tiny_swin(reference.state_dict()))
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(ours(x), reference(x).logits, rtol=1e-4, atol=1e-5)


def _as_tiny_swin(state):
    """transformers' parameters under the names of the network here, q, k and v stacked."""
    names = {
        "swin.embeddings.patch_embeddings.projection": "patch_embed", "swin.embeddings.norm": "patch_norm",
        "swin.encoder.layers.0.downsample": "merge1", "swin.layernorm": "norm", "classifier": "head",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj",
        "attention.relative_position_bias.relative_position_bias_table": "attn.bias",
    } | {f"swin.encoder.layers.{i}.blocks": f"stage{i + 1}" for i in (0, 1)}  # fmt: skip
    found = {}
    for name, value in state.items():
        if "relative_position_index" in name or "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            value = torch.cat([state[name.replace("q_proj", f"{k}_proj")] for k in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return found


def test_sequential_networks_split_into_two_that_compose():
    x = torch.rand(2, 1, 28, 28)
    for name in ("small-cnn", "vgg-small", "mobilenet-small", "resnet-small", "lenet-300-100"):
        model = models.build(name, seed=0).eval()
        middle = len(model) // 2
        assert torch.equal(model[middle:](model[:middle](x)), model(x))


def test_lenet_starts_from_glorot_normal_weights_and_zero_biases():
    model = models.build("lenet-300-100", seed=0)
    assert model.fc1.weight.std().item() == pytest.approx((2 / (784 + 300)) ** 0.5, rel=0.02)
    assert (model.fc1.bias == 0).all()


def test_unknown_names_and_settings():
    with pytest.raises(UnknownName, match="did you mean 'tiny-vit'"):
        models.build("tinyvit", seed=0)
    with pytest.raises(TypeError, match="did you mean 'classes'"):
        models.build("small-cnn", seed=0, clases=3)
    with pytest.raises(ValueError, match="patch 5 must divide size 28"):
        models.build("tiny-vit", seed=0, patch=5)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model = models.build("small-cnn", seed=3, classes=4, widths=(4, 8), batch_norm=True).eval()
    path = tmp_path / "deep" / "a.safetensors"
    models.save_checkpoint(
        path, model, "small-cnn", {"classes": 4, "widths": [4, 8], "batch_norm": True}, accuracy=0.5
    )
    again, facts = models.load_checkpoint(path)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(again(x), model(x)) and not again.training
    assert facts["accuracy"] == 0.5 and facts["config"]["classes"] == 4
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_broken_checkpoint_is_said_to_be_one(tmp_path):
    model = models.build("small-cnn", seed=3, widths=(4,))
    whole, broken = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    models.save_checkpoint(whole, model, "small-cnn", {"widths": [4]})
    broken.write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(ValueError, match="b.safetensors is not a checkpoint"):
        models.load_checkpoint(broken)
    models.save_checkpoint(whole, model, "small-cnn", {"widths": [8]})
    with pytest.raises(ValueError, match="do not fit this network: of another shape: conv1.weight"):
        models.load_checkpoint(whole)
    with pytest.raises(FileNotFoundError):
        models.load_checkpoint(tmp_path / "none.safetensors")


class Net(nn.Sequential):
    """A class of a notebook's own."""

    def __init__(self, width: int = 3):
        super().__init__(nn.Linear(2, width), nn.BatchNorm1d(width))


@pytest.mark.parametrize("fresh", [Net, lambda width: Net(width), Net(5)], ids=["class", "factory", "module"])
def test_a_network_of_ones_own_class_comes_back_into_a_fresh_one(tmp_path, fresh):
    model, path = Net(width=5), tmp_path / "own.safetensors"
    model(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    models.save_checkpoint(path, model, config={"width": 5}, seed=1)
    again, facts = models.load_checkpoint(path, fresh)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert isinstance(again, Net) and not again.training
    assert facts["architecture"] is None and facts["class"].endswith("test_zoo.Net") and facts["seed"] == 1
    with pytest.raises(ValueError, match=r"holds a .*test_zoo.Net; pass model="):
        models.load_checkpoint(path)


def test_weights_that_do_not_fit_leave_the_network_as_it_was(tmp_path):
    models.save_checkpoint(tmp_path / "own.safetensors", Net(5), config={"width": 5})
    narrow = Net(4)
    before = {k: v.clone() for k, v in narrow.state_dict().items()}
    with pytest.raises(ValueError, match=r"0.weight \[5, 2\] in place of \[4, 2\]"):
        models.load_checkpoint(tmp_path / "own.safetensors", model=narrow)
    with pytest.raises(ValueError, match="missing: weight, bias; left over: 0.bias, 0.weight, 1.bias ..."):
        models.load_checkpoint(tmp_path / "own.safetensors", model=nn.Linear(2, 5))
    assert narrow.training and all(torch.equal(v, before[k]) for k, v in narrow.state_dict().items())


def test_what_cannot_be_stored_writes_nothing(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'tiny-vit'"):
        models.save_checkpoint(tmp_path / "a.safetensors", Net(), "tinyvit")
    with pytest.raises(TypeError, match="JSON"):
        models.save_checkpoint(tmp_path / "a.safetensors", Net(), accuracy=torch.ones(1))
    assert not list(tmp_path.iterdir())


CELL = {"0-1": "conv3x3", "0-2": "skip", "1-2": "conv1x1"}


def test_a_cell_is_its_three_edges():
    net, x = models.build("cell-net", seed=0).eval(), torch.randn(2, 16, 6, 6)
    edges = net.cell1.edges
    assert list(edges) == list(CELL)
    torch.testing.assert_close(net.cell1(x), x + edges["1-2"](edges["0-1"](x)))
    pooled = models.build("cell-net", seed=0, ops=("none", "avgpool3x3", "none")).cell1(torch.ones(1, 16, 5, 5))
    assert torch.equal(pooled, torch.ones(1, 16, 5, 5))  # what lies outside does not count
    sizes = []
    four = models.build("cell-net", seed=0, cells=4)
    for i in range(1, 5):
        four.get_submodule(f"cell{i}").register_forward_hook(lambda m, a, out: sizes.append(out.shape[-1]))
    four(torch.randn(1, 1, 8, 8))
    assert sizes == [8, 8, 4, 4]


def test_a_cell_without_a_way_through_says_the_same_of_everything():
    for ops in (("none", "none", "conv3x3"), ("skip", "none", "none")):
        dead = models.build("cell-net", seed=0, ops=ops).eval()
        a, b = dead(torch.randn(2, 1, 8, 8))
        torch.testing.assert_close(a, b)


def test_wrong_cells():
    with pytest.raises(UnknownName, match="conv3x3"):
        models.build("cell-net", seed=0, ops=("conv3", "skip", "none"))
    with pytest.raises(ValueError, match="three operations, not 2"):
        models.build("cell-net", seed=0, ops=("skip", "none"))
    with pytest.raises(ValueError, match="at least 1"):
        models.build("cell-net", seed=0, cells=0)
