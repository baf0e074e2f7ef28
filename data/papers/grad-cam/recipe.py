"""mosaics.csv and occlusion.csv: the full measurement of notebooks/01-saliency/01-grad-cam.

Three sets of 15 mosaics of four photos, every method asked for every tile's class (1,440 rows); then six photos with
a 7 x 7 occlusion map each. The functions are the notebook's own method cells. About ten minutes on one core.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from nbkit import attribution
from nbkit.recipes import run, write_table

LAYERS = {"head": "_act_head", "block 11": "_blocks.10", "block 5": "_blocks.4"}


def mosaics(method, model, x, y, right) -> pd.DataFrame:
    rows = []
    for seed in range(3):
        for number, tiles in enumerate(method.mosaic_sets(right, seed)):
            maps = method.mosaic_maps(
                model, LAYERS, method.grid_mosaic(x[tiles]), y[tiles], seed=100 * seed + number
            )
            for name, L in maps.items():
                for tile, photo in enumerate(tiles):
                    share = round(method.energy_share(L[tile], tile), 6)
                    rows.append((seed, number, tile, photo, name, int(method.grid_hit(L[tile], tile)), share))
    return pd.DataFrame(rows, columns=["seed", "mosaic", "tile", "photo", "method", "hit", "energy"])


def occlusion(method, model, x, right, photos: int = 6) -> pd.DataFrame:
    rows = []
    for photo in right[:photos]:
        image = x[photo : photo + 1]
        with torch.no_grad():
            c = model(image).argmax(1)
        drops = attribution.occlusion(model, image, c, window=32, per_window=True)[0]  # fall of the logit, [7, 7]
        for name, L in method.mosaic_maps(model, LAYERS, image, c, seed=photo).items():
            rows.append((photo, name, round(method.agreement(L[0], drops), 6)))
    return pd.DataFrame(rows, columns=["photo", "method", "spearman"])


def build(out: Path) -> list[Path]:
    from nbkit import datasets, models, papers, runtime

    runtime.deterministic(seed=0)
    method = papers.method("grad-cam")
    model, photos = models.load("efficientnet-lite0"), datasets.load("imagenet-sample")
    x = models.transform("efficientnet-lite0")(photos)
    with torch.no_grad():
        right = (model(x).argmax(1) == photos.y).nonzero().flatten().tolist()
    tables = {
        "mosaics": mosaics(method, model, x, photos.y, right),
        "occlusion": occlusion(method, model, x, right),
    }
    paths = [out / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        write_table(path, table)
    return paths


if __name__ == "__main__":
    run(build, __doc__)
