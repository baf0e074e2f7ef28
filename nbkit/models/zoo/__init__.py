"""The small architectures of this kit, one module a kind of input; small enough to train on a laptop."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from nbkit.errors import UnknownName, did_you_mean
from nbkit.models.zoo import cells, language, moe, vision, windows

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "tiny-vit": vision.TinyViT,
    "small-cnn": vision.small_cnn,
    "vgg-small": vision.vgg_small,
    "mobilenet-small": vision.mobilenet_small,
    "resnet-small": vision.resnet_small,
    "tiny-swin": windows.TinySwin,
    "lenet-300-100": vision.lenet_300_100,
    "lenet-conv": vision.lenet_conv,
    "cell-net": cells.cell_net,
    "tiny-llama": language.tiny_llama,
    "tiny-moe": moe.TinyMoE,
}


def build(name: str, *, seed: int, **config) -> nn.Module:
    """A freshly initialised network, the same for the same seed; the global random state is left alone.

    Raises: UnknownName, or TypeError for a setting the architecture does not have.

    >>> build("small-cnn", seed=0, classes=3)(torch.zeros(1, 1, 112, 112)).shape
    torch.Size([1, 3])
    """
    if name not in ARCHITECTURES:
        raise UnknownName(f"no architecture {name!r}{did_you_mean(str(name), ARCHITECTURES)}")
    known = inspect.signature(ARCHITECTURES[name]).parameters
    for key in config:
        if key not in known:
            raise TypeError(f"{name} has no setting {key!r}{did_you_mean(key, known)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch the GPUs' generators
        return ARCHITECTURES[name](**config)
