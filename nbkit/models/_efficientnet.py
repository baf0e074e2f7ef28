"""EfficientNet-Lite0, written out with one module for every operation, so that each can be recorded, edited, explained.

Architecture: M. Tan and Q. Le, *EfficientNet*, 2019, table 1 (B0), in its Lite form: no squeeze-and-excitation, ReLU6
for Swish, stem and head of fixed width. The parameters have the names of the published weights.
"""

from __future__ import annotations

from torch import Tensor, nn

# blocks, kernel, stride of the first block, expansion, channels out
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _pad(kernel: int, stride: int) -> nn.ZeroPad2d:
    """TensorFlow's "same" padding of an even-sized map: where it strides, the odd pixel goes right and below."""
    total = kernel - stride
    return nn.ZeroPad2d((total // 2, total - total // 2) * 2)


class InvertedResidual(nn.Module):
    """Widen (1 x 1), filter each channel (k x k), project back (1 x 1, no activation); add the input where it fits."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = channels * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = _norm(wide)
            self._act0 = nn.ReLU6()
        self._pad = _pad(kernel, stride)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._act1 = nn.ReLU6()
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        wide = self._act0(self._bn0(self._expand_conv(x))) if self.expands else x
        wide = self._act1(self._bn1(self._depthwise_conv(self._pad(wide))))
        out = self._bn2(self._project_conv(wide))
        return x + out if self.adds else out


class EfficientNetLite0(nn.Module):
    """Pictures ``[N, 3, H, W]`` (224 x 224 in training; multiples of 32) to logits ``[N, classes]``.

    ``_act_head`` puts out the last maps, ``[N, 1280, H/32, W/32]``; ``_blocks.0`` to ``_blocks.15`` are the blocks.
    """

    def __init__(self, classes: int = 1000):
        super().__init__()
        self._pad = _pad(3, 2)
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        self._act_stem = nn.ReLU6()
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in _STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._act_head = nn.ReLU6()
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._flatten = nn.Flatten()
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self._act_stem(self._bn0(self._conv_stem(self._pad(x))))
        for block in self._blocks:
            x = block(x)
        x = self._act_head(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(self._flatten(self._avg_pooling(x))))
