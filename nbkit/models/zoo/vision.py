"""Small networks for pictures: convolutional, fully connected and a transformer, named so that hooks read well.

All but the transformer are plain ``nn.Sequential`` with named members, so a network splits where one likes:
``model[: k]`` and ``model[k:]`` compose to ``model``, and ``model.relu3`` is a layer called ``"relu3"``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, ``[N, T, D]`` to ``[N, T, D]``.

    The attention probabilities ``[N, heads, T, T]`` pass through ``weights``, an identity: record or edit that layer.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.weights = nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.weights((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each added to the residual stream."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """A small vision transformer: ``[N, channels, size, size]`` to logits ``[N, classes]``.

    Token 0 is the class token; the patches follow row by row. With the defaults 49 + 1 tokens, 6 blocks of width 64
    with 4 heads and 256 hidden units, 0.3 million parameters. ``blocks.{i}.mlp.act`` holds the hidden units.
    """

    def __init__(
        self, *, size: int = 28, patch: int = 4, channels: int = 1, classes: int = 10,
        depth: int = 6, width: int = 64, heads: int = 4, hidden: int = 256,
    ):  # fmt: skip
        super().__init__()
        if size % patch or width % heads:
            raise ValueError(
                f"patch {patch} must divide size {size}, and heads {heads} must divide width {width}"
            )
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for p in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # 0.02, usual at width 768, is far too small at 64 and costs hundreds of steps
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def small_cnn(
    *, channels: int = 1, widths: tuple[int, ...] = (32, 64, 128, 128), pool: tuple[int, ...] = (1, 2),
    classes: int = 10, batch_norm: bool = False,
) -> nn.Sequential:  # fmt: skip
    """3x3 convolutions with ReLU, halved by max pooling after the stages in ``pool``, mean over positions, linear head.

    Takes images of any size. Members: ``conv1, (bn1,) relu1, pool1, conv2, ... gap, flatten, head``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, width in enumerate(widths, 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm)
        if batch_norm:
            layers[f"bn{i}"] = nn.BatchNorm2d(width)
        layers[f"relu{i}"] = nn.ReLU()
        if i in pool:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        channels = width
    layers |= _head(channels, classes)
    return _he_initialised(nn.Sequential(layers))


def vgg_small(*, channels: int = 1, classes: int = 10) -> nn.Sequential:
    """Six 3x3 convolutions with BatchNorm in three pairs (32, 64, 128 channels), 0.29 million weights."""
    widths = (32, 32, 64, 64, 128, 128)
    return small_cnn(channels=channels, widths=widths, pool=(2, 4), classes=classes, batch_norm=True)


def mobilenet_small(*, channels: int = 1, classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """Depthwise-separable convolutions with BatchNorm, as in MobileNet-V1; 0.26 million weights, half in the last one.

    Members: ``stem, bn0, relu0``, then for each block i ``dw{i}, dw_bn{i}, dw_relu{i}, pw{i}, pw_bn{i}, pw_relu{i}``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    c = max(1, round(32 * width))
    layers["stem"] = nn.Conv2d(channels, c, 3, padding=1, bias=False)
    layers["bn0"], layers["relu0"] = nn.BatchNorm2d(c), nn.ReLU()
    for i, (out, stride) in enumerate([(64, 2), (128, 1), (128, 2), (256, 1), (256, 1), (512, 1)], 1):
        out = max(1, round(out * width))
        layers[f"dw{i}"] = nn.Conv2d(c, c, 3, stride, padding=1, groups=c, bias=False)
        layers[f"dw_bn{i}"], layers[f"dw_relu{i}"] = nn.BatchNorm2d(c), nn.ReLU()
        layers[f"pw{i}"] = nn.Conv2d(c, out, 1, bias=False)
        layers[f"pw_bn{i}"], layers[f"pw_relu{i}"] = nn.BatchNorm2d(out), nn.ReLU()
        c = out
    layers |= _head(c, classes)
    return _he_initialised(nn.Sequential(layers))


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(channels, width, 1, stride, bias=False), bn=nn.BatchNorm2d(width))
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(h + self.shortcut(x))


def resnet_small(
    *, channels: int = 1, widths: tuple[int, ...] = (12, 24, 48), blocks: int = 1, stride: int = 2, classes: int = 10,
) -> nn.Sequential:  # fmt: skip
    """A residual network (He et al. 2016): stem of ``stride``, a stage a width, each after the first at half the size.

    With the defaults 40,000 weights for images of 28 x 28. Members: ``stem, bn0, relu0, stage1.{block}, stage2 ...,
    gap, flatten, head``.
    """
    c = widths[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Conv2d(channels, c, 3, stride, padding=1, bias=False)
    layers["bn0"], layers["relu0"] = nn.BatchNorm2d(c), nn.ReLU()
    for i, width in enumerate(widths, 1):
        first = Residual(c, width, 1 if i == 1 else 2)
        layers[f"stage{i}"] = nn.Sequential(first, *(Residual(width, width, 1) for _ in range(blocks - 1)))
        c = width
    layers |= _head(c, classes)
    return _he_initialised(nn.Sequential(layers))


def lenet_300_100(
    *, inputs: int = 784, hidden: tuple[int, ...] = (300, 100), classes: int = 10
) -> nn.Sequential:
    """The fully connected LeNet of the lottery-ticket paper, ``[N, ...]`` to ``[N, classes]``; 266,610 parameters.

    Glorot normal weights and zero biases (Frankle and Carbin, 2019). Members: ``flatten, fc1, relu1, fc2, ...``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    sizes = (inputs, *hidden, classes)
    for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        layers[f"fc{i}"] = nn.Linear(a, b)
        nn.init.xavier_normal_(layers[f"fc{i}"].weight)
        nn.init.zeros_(layers[f"fc{i}"].bias)
        if i <= len(hidden):
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)


def lenet_conv(*, channels: int = 1, classes: int = 10) -> nn.Sequential:
    """Two 5x5 convolutions of stride 2 (8 and 16 maps), then 64 units, for images of 28 x 28; 54,216 weights.

    Members: ``conv1, relu1, conv2, relu2, flatten, fc1, relu3, fc2``.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 8, 5, stride=2, padding=2), relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, 5, stride=2, padding=2), relu2=nn.ReLU(), flatten=nn.Flatten(),
            fc1=nn.Linear(784, 64), relu3=nn.ReLU(), fc2=nn.Linear(64, classes),
        )
    )  # fmt: skip


def _head(channels: int, classes: int) -> dict[str, nn.Module]:
    return {"gap": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(channels, classes)}


def _he_initialised(model: nn.Sequential) -> nn.Sequential:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
