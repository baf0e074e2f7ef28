"""From a picture to what a network takes, and back to something one can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nbkit.errors import NotFinite

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageTransform:
    """Shorter side to ``resize`` pixels (bicubic), the middle ``size`` x ``size``, then ``(x / 255 - mean) / std``.

    Call it on one picture for ``[3, size, size]``, on a list (or a batch) of them for ``[N, 3, size, size]``; float32
    on the CPU. A picture is a PIL image, an array ``[H, W]``, ``[H, W, 1 | 3 | 4]``, or a tensor ``[1 | 3, H, W]``;
    a batch is an array ``[N, H, W, C]``, a tensor ``[N, C, H, W]``, a dict of pictures, or a data set with such
    ``.images``. Values are uint8, or floats from 0 to 1 (rounded to 8 bits on the way); grey becomes RGB, alpha is
    dropped.

    Raises: TypeError, ValueError (shape, range, empty), NotFinite.

    >>> ImageTransform(224, 256, (0.5,) * 3, (0.5,) * 3)(np.zeros((300, 400, 3), np.uint8)).shape
    torch.Size([3, 224, 224])
    """

    size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        if not 1 <= self.size <= self.resize:
            raise ValueError(
                f"size must lie in [1, resize], but size is {self.size} and resize {self.resize}"
            )

    def __call__(self, images: Any) -> Tensor:
        images = getattr(images, "images", images)
        if isinstance(images, Mapping):
            images = list(images.values())
        elif isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
            images = list(images)
        if isinstance(images, Sequence) and not isinstance(images, str):
            if not images:
                raise ValueError("no pictures: the list is empty")
            return torch.stack([self(image) for image in images])
        pixels = torch.from_numpy(np.array(self.crop(images), dtype=np.float32)).permute(2, 0, 1) / 255
        mean, std = self._statistics(pixels)
        return ((pixels - mean) / std).contiguous()

    def crop(self, image: Any) -> Image:
        """What the network sees of one picture: a PIL image of ``size`` x ``size`` in RGB."""
        from PIL import Image

        image = _rgb(image)
        scale = self.resize / min(image.size)
        w, h = (max(self.resize, round(side * scale)) for side in image.size)
        if (w, h) != image.size:
            image = image.resize((w, h), Image.Resampling.BICUBIC)
        left, top = (w - self.size) // 2, (h - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def picture(self, x: Tensor) -> np.ndarray:
        """Undo the normalisation for showing: ``[..., 3, H, W]`` to an array ``[..., H, W, 3]`` from 0 to 1."""
        if x.ndim < 3 or x.shape[-3] != 3:
            raise ValueError(f"a picture of this transform has shape [..., 3, H, W], not {list(x.shape)}")
        x = x.detach().cpu().float()
        mean, std = self._statistics(x)
        return (x * std + mean).clamp(0, 1).movedim(-3, -1).numpy()

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(v, dtype=like.dtype)[:, None, None] for v in (self.mean, self.std))


def _rgb(image: Any) -> Image:
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise ValueError(
                f"a picture of mode {image.mode!r} has no fixed range; scale it to 8 bits or 0..1 first"
            )
        return ImageOps.exif_transpose(image).convert("RGB")
    if isinstance(image, Tensor):
        image = (
            image.detach().cpu().movedim(0, -1).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
        )
    if not isinstance(image, np.ndarray):
        raise TypeError(f"a picture must be a PIL image, an array or a tensor, not {type(image).__name__}")
    if image.size == 0 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
        raise ValueError(f"a picture must have shape [H, W] or [H, W, 1 | 3 | 4], not {list(image.shape)}")
    if np.issubdtype(image.dtype, np.floating):
        if not np.isfinite(image).all():
            raise NotFinite(f"a picture holds {(~np.isfinite(image)).sum()} NaN or infinite values")
        if image.min() < 0 or image.max() > 1:
            raise ValueError(
                f"a float picture must lie in [0, 1], not [{image.min():.3g}, {image.max():.3g}]"
            )
        image = (image * 255).round().astype(np.uint8)
    elif image.dtype != np.uint8:
        raise TypeError(f"a picture must hold uint8 or floats, not {image.dtype}")
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).convert("RGB")
