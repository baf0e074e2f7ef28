"""basic-motions.npz: 40 training and 40 test recordings of a smart watch [6 channels, 100], from pip aeon 1.6.0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nbkit.recipes import from_wheel, run, write_npz

SHA256 = "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409"
CLASSES = ("Standing", "Running", "Walking", "Badminton")


def parse(ts: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A ``.ts`` file: after @data one recording a line, channels parted by ':', the class last."""
    lines = ts.decode().split("@data", 1)[1].strip().splitlines()
    *channels, labels = zip(*(line.strip().split(":") for line in lines), strict=True)
    x = np.array([[[float(v) for v in c.split(",")] for c in row] for row in zip(*channels, strict=True)])
    return x.astype(np.float32), np.array([CLASSES.index(c) for c in labels], np.uint8)


def build(out: Path) -> list[Path]:
    members = [f"aeon/datasets/data/BasicMotions/BasicMotions_{part}.ts" for part in ("TRAIN", "TEST")]
    train, test = map(parse, from_wheel("aeon", "1.6.0", SHA256, *members))
    path = out / "basic-motions.npz"
    write_npz(path, x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1])
    return [path]


if __name__ == "__main__":
    run(build, __doc__)
