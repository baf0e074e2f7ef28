"""A network of small cells whose edges carry chosen operations: a search space that can be tried out whole."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from nbkit.errors import UnknownName, did_you_mean

EDGES = ("0-1", "0-2", "1-2")
OPERATIONS = ("none", "skip", "conv1x1", "conv3x3", "avgpool3x3")


class Zero(nn.Module):
    """No connection: zeros of the shape that comes in, which pass no gradient on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def operation(name: str, channels: int) -> nn.Module:
    """What an edge does to maps ``[N, channels, H, W]``, their size kept: one of ``OPERATIONS``. Raises UnknownName."""
    if name not in OPERATIONS:
        raise UnknownName(f"no operation {name!r}{did_you_mean(str(name), OPERATIONS)}")
    if name == "none":
        return Zero()
    if name == "skip":
        return nn.Identity()
    if name == "avgpool3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    size = 3 if name == "conv3x3" else 1
    conv = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv, bn=nn.BatchNorm2d(channels)))


class Cell(nn.Module):
    """Three nodes: 0 takes in, 1 is ``0-1`` of it, 2 is the sum of ``0-2`` of node 0 and ``1-2`` of node 1."""

    def __init__(self, ops: tuple[str, str, str], channels: int):
        super().__init__()
        self.edges = nn.ModuleDict({edge: operation(op, channels) for edge, op in zip(EDGES, ops, strict=True)})

    def forward(self, x: Tensor) -> Tensor:
        return self.edges["0-2"](x) + self.edges["1-2"](self.edges["0-1"](x))


def cell_net(
    *, ops: tuple[str, str, str] = ("conv3x3", "skip", "conv1x1"), cells: int = 2, channels: int = 16, inputs: int = 1,
    classes: int = 10,
) -> nn.Sequential:  # fmt: skip
    """``cells`` equal cells between a 3x3 stem and a linear head; maps are halved after the first half of the cells.

    ``ops``: of the edges 0-1, 0-2 and 1-2, each one of ``none``, ``skip``, ``conv1x1``, ``conv3x3`` and ``avgpool3x3``
    (convolutions are ReLU, convolution, BatchNorm). Images ``[N, inputs, H, W]`` of any size. Members: ``stem, bn0,
    cell1, ..., pool, ..., gap, flatten, head``; an edge is ``cell1.edges.0-1``. After X. Dong and Y. Yang,
    *NAS-Bench-201*, 2020, with three nodes in place of four.
    """
    if len(ops) != len(EDGES):
        raise ValueError(f"a cell has the edges {', '.join(EDGES)}: three operations, not {len(ops)}")
    if cells < 1:
        raise ValueError(f"cells must be at least 1, not {cells}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
    layers["bn0"] = nn.BatchNorm2d(channels)
    for i in range(1, cells + 1):
        layers[f"cell{i}"] = Cell(tuple(ops), channels)
        if i == (cells + 1) // 2:
            layers["pool"] = nn.AvgPool2d(2)
    layers |= OrderedDict(relu=nn.ReLU(), gap=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    layers["head"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)
