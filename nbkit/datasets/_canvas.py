"""Pictures composed of smaller ones on a grid, whose places are therefore known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbkit.errors import NotFinite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Canvas:
    """Composed pictures, and where their parts are."""

    images: Tensor
    """``[N, C, rows * h, columns * w]``."""
    boxes: Tensor
    """``[N, rows, columns, 4]``: (top, left, bottom, right) of every place in pixels, the last two not included."""


def canvas(tiles: Tensor, cells: Tensor, *, noise: float = 0.0, seed: int = 0) -> Canvas:
    """Compose pictures of tiles on a grid: simulated scenes of real parts, with a box for every part.

    Args:
        tiles: ``[M, C, h, w]``, floating, in [0, 1].
        cells: ``[N, rows, columns]``, integers: which tile lies at each place, -1 for none (black).
        noise: standard deviation of the Gaussian noise added everywhere; the result is cut off to [0, 1].
        seed: of the noise.

    Raises: ValueError (other shapes, no tile of that number, a noise below 0), TypeError (tiles that are not floating,
    cells that are not integers), NotFinite.

    >>> scenes = canvas(digits, torch.tensor([[[3, -1], [-1, 7]]]))       # digit 3 above left, 7 below right
    >>> scenes.images.shape, scenes.boxes[0, 1, 1]
    (torch.Size([1, 1, 56, 56]), tensor([28, 28, 56, 56]))
    """
    import torch

    if not tiles.is_floating_point() or cells.is_floating_point() or cells.dtype == torch.bool:
        raise TypeError(f"tiles must be floating and cells integers, not {tiles.dtype} and {cells.dtype}")
    if tiles.ndim != 4 or cells.ndim != 3 or not cells.numel():
        shapes = f"{tuple(tiles.shape)} and {tuple(cells.shape)}"
        raise ValueError(f"tiles must be [M, C, h, w] and cells [N, rows, columns], not {shapes}")
    if not torch.isfinite(tiles).all():
        raise NotFinite("tiles holds NaN or infinite values")
    if cells.min() < -1 or cells.max() >= len(tiles):
        raise ValueError(f"cells name tiles {cells.min()} to {cells.max()}; there are 0 to {len(tiles) - 1}, and -1")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, not {noise}")
    n, rows, columns = cells.shape
    _, channels, height, width = tiles.shape
    placed = torch.cat([tiles, tiles.new_zeros(1, channels, height, width)])[cells]  # the last one is the empty tile
    images = placed.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, rows * height, columns * width)
    if noise:
        drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
        images = (images + noise * drawn.to(images)).clamp(0, 1)
    corners = torch.cartesian_prod(torch.arange(rows) * height, torch.arange(columns) * width)
    boxes = torch.cat([corners, corners + torch.tensor([height, width])], 1).view(rows, columns, 4)
    return Canvas(images, boxes.repeat(n, 1, 1, 1))
