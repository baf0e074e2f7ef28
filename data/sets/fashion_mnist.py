"""fashion-mnist.npz: 10,000 training and 2,000 test images, 1,000 and 200 a class, from apt dataset-fashion-mnist."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nbkit.recipes import from_apt, idx, run, write_pictures

FOLDER = "usr/share/datasets/fashion-mnist"
FILES = {
    f"{FOLDER}/train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    f"{FOLDER}/train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    f"{FOLDER}/t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    f"{FOLDER}/t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


def full() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All of it, uint8: x_train [60000, 28, 28], y_train [60000], x_test [10000, 28, 28], y_test [10000]."""
    return tuple(map(idx, from_apt("dataset-fashion-mnist", FILES)))


def build(out: Path) -> list[Path]:
    path = out / "fashion-mnist.npz"
    write_pictures(path, *full())
    return [path]


if __name__ == "__main__":
    run(build, __doc__)
