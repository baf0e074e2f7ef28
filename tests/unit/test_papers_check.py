"""`make check P=...` tests one paper alone, and names what failed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from nbkit import _paths, papers
from nbkit.papers import _check
from nbkit.papers.__main__ import main

PAPER = papers.get("grad-cam")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder in which grad-cam has its three places, and the steps of the check are run by nobody."""
    real = _paths.repo_root()
    for name in (f"notebooks/{PAPER.file}", "tests/papers/test_grad_cam.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(real / name, tmp_path / name)
    shutil.copytree(real / "data" / "papers" / "grad-cam", tmp_path / "data" / "papers" / "grad-cam")
    monkeypatch.setattr(_paths, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(_paths, "data_dir", lambda: tmp_path / "data")
    return tmp_path


def outcome(monkeypatch, capsys, **codes):
    """What the check returns and prints where its steps end with these codes, 0 otherwise."""
    steps = {name: [sys.executable, "-c", f"print('words'); exit({codes.get(name, 0)})"] for name in ("ruff", "tests")}
    monkeypatch.setattr(_check, "commands", lambda paper, root: steps)
    return main(["check", "grad-cam"]), capsys.readouterr().out


def test_a_paper_that_passes_everything(clone, monkeypatch, capsys):
    code, said = outcome(monkeypatch, capsys)
    assert code == 0
    assert [line.split(",")[0] for line in said.splitlines()[:-1]] == ["ok     files", "ok     ruff", "ok     tests"]
    assert said.splitlines()[-1].startswith("grad-cam: all well, in ")


def test_what_failed_is_named_with_what_it_said(clone, monkeypatch, capsys):
    code, said = outcome(monkeypatch, capsys, tests=3)
    assert code == 1
    assert "FAILED tests, 0 s\nwords\n" in said
    assert said.splitlines()[-1].startswith("grad-cam: tests failed, in ")


def test_missing_unlisted_and_large_files_are_named(clone, monkeypatch, capsys):
    assert _check.shelf_problems(PAPER, clone) == []
    folder = clone / "data" / "papers" / "grad-cam"
    (folder / "more.csv").write_bytes(b"x" * 500_000)
    (folder / "occlusion.csv").unlink()
    (clone / "tests" / "papers" / "test_grad_cam.py").unlink()
    found = _check.shelf_problems(PAPER, clone)
    assert found[0] == "there is no tests/papers/test_grad_cam.py"
    assert [line for line in found if "do not agree" in line] == [
        "data/papers/grad-cam: more.csv and facts.toml do not agree",
        "data/papers/grad-cam: occlusion.csv and facts.toml do not agree",
    ]
    assert found[-1].endswith("KB, over 400")
    (folder / "facts.toml").unlink()
    assert "there is no data/papers/grad-cam/facts.toml" in _check.shelf_problems(PAPER, clone)[1]
    code, said = outcome(monkeypatch, capsys)
    assert (code, said.splitlines()[-1].startswith("grad-cam: files failed")) == (1, True)


def test_the_steps_are_those_of_the_paper_and_find_tests():
    root = _paths.repo_root()
    steps = _check.commands(PAPER, root)
    assert list(steps) == ["notebook and solutions", "ruff", "rules and claims", "tests"]
    assert steps["ruff"][-2:] == ["data/papers/grad-cam", "tests/papers/test_grad_cam.py"]
    listed = subprocess.run([*steps["rules and claims"], "--collect-only"], cwd=root, capture_output=True, text=True)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    assert names and all("01-saliency/01-grad-cam.ipynb" in name for name in names)


def test_a_paper_not_written_yet_has_no_steps(clone):
    planned = papers.get("there-and-back-again")
    assert _check.commands(planned, clone) == {}
    assert _check.shelf_problems(planned, clone) == [
        f"there is no notebooks/{planned.file}", "there is no tests/papers/test_there_and_back_again.py",
    ]  # fmt: skip


def test_an_unknown_slug_is_a_sentence(capsys):
    assert main(["check", "gradcam"]) == 1
    assert "did you mean 'grad-cam'" in capsys.readouterr().err
