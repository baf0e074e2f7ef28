"""Does a map find an object whose place is known?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nbkit.faithfulness._maps import finite


def pointing_game(maps: Tensor, regions: Tensor, *, tolerance: float = 0) -> Tensor:
    """Whether the maximum of each map lies on the object: 1 or 0, and where it is tied, the share of ties that do.

    Args:
        maps: ``[N, H, W]``.
        regions: the objects: masks ``[N, H, W]`` (bool), or boxes ``[N, 4]`` as ``(top, left, bottom, right)`` in
            pixels, ``bottom`` and ``right`` not included.
        tolerance: a maximum this many pixels beside the object still counts (15 at 224 x 224 in the paper).

    Returns: ``[N]``; its mean is the accuracy.

    Raises: ValueError for regions of another shape, empty ones, boxes outside of the map; NotFinite.

    Source: J. Zhang et al., *Top-down Neural Attention by Excitation Backprop*, 2016, section 4.2.

    >>> pointing_game(maps, boxes, tolerance=15).mean()
    """
    maps = _plane(maps)
    masks = _regions(regions, maps)
    if not tolerance >= 0:  # so that NaN is refused too
        raise ValueError(f"tolerance must be at least 0 pixels, not {tolerance}")
    if tolerance > 0:
        from scipy.ndimage import distance_transform_edt

        away = [torch.as_tensor(distance_transform_edt(~mask.numpy())) for mask in masks]
        masks = torch.stack(away) <= tolerance
    top = maps == maps.amax((1, 2), keepdim=True)
    return (top & masks).sum((1, 2)) / top.sum((1, 2))


def energy_share(maps: Tensor, regions: Tensor) -> Tensor:
    """The share of each map's positive mass that lies on the object, ``[N]``; 0 for a map without positive values.

    Arguments and errors as in :func:`pointing_game`.

    Source: H. Wang et al., *Score-CAM*, 2020, section 4.3 (energy-based pointing game).

    >>> energy_share(maps, masks).mean()
    """
    maps = _plane(maps)
    mass = maps.clamp(min=0)
    total = mass.sum((1, 2))
    return (mass * _regions(regions, maps)).sum((1, 2)) / total.masked_fill(total == 0, 1)


def _plane(maps: Tensor) -> Tensor:
    maps = finite(maps)
    if maps.ndim != 3:
        raise ValueError(f"maps must be [N, H, W], not {tuple(maps.shape)}")
    return maps


def _regions(regions: Tensor, maps: Tensor) -> Tensor:
    regions = torch.as_tensor(regions).cpu()
    if regions.shape == (len(maps), 4) and regions.dtype != torch.bool:
        masks = torch.zeros(maps.shape, dtype=torch.bool)
        for mask, (top, left, bottom, right) in zip(masks, regions.tolist(), strict=True):
            if not (0 <= top < bottom <= mask.shape[0] and 0 <= left < right <= mask.shape[1]):
                box = (top, left, bottom, right)
                raise ValueError(f"box {box} (top, left, bottom, right) does not lie in a map of {tuple(mask.shape)}")
            mask[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = True
        return masks
    if regions.shape != maps.shape:
        expected = f"masks {tuple(maps.shape)} or boxes ({len(maps)}, 4)"
        raise ValueError(f"regions of shape {tuple(regions.shape)} do not fit the maps; give {expected}")
    masks = regions != 0
    if not masks.flatten(1).any(1).all():
        raise ValueError(f"region {int((~masks.flatten(1).any(1)).nonzero()[0])} is empty: there is no object to hit")
    return masks
