"""A paper that was just begun runs, and lacks nothing but what its author has to say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nbkit import _paths, exercises, notebooks, papers, recipes
from nbkit.papers import _new
from nbkit.papers.__main__ import main
from nbkit.papers.methods import module_name
from tests.notebooks.book import Book
from tests.notebooks.paper import PAPER, title_cell

UNRUN = {"normal_form", "drawn", "selfchecked", "exercised", "claim", "illustrated", "main_picture"}
UNWRITTEN = {"written", "told"}
PLANNED = [slug for slug in papers.catalogue()["slug"] if papers.get(slug).path is None]


def broken_rules(path, paper):
    book = Book.read(path, paper)
    return {rule.__name__: found for rule in PAPER if (found := rule(book))}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder in which a paper was begun, and the paper."""
    root, paper = tmp_path_factory.mktemp("clone"), papers.get("there-and-back-again")
    _new.begin(paper, root)
    return root, paper


@pytest.fixture
def nothing_imported(begun):
    """The method of the paper itself may be imported already; it comes back."""
    name = module_name(begun[1].slug)
    own = sys.modules.pop(name, None)
    yield
    sys.modules.pop(name, None)
    if own is not None:
        sys.modules[name] = own


def test_the_skeleton_of_every_planned_paper_has_its_title_and_place(tmp_path):
    for slug in PLANNED:
        paper = papers.get(slug)
        _new.begin(paper, tmp_path)
        assert title_cell(Book.read(tmp_path / "notebooks" / paper.file, paper)) == []


def test_what_was_never_run_lacks_only_its_outputs_and_words(tmp_path):
    paper = papers.get("there-and-back-again")
    _new.begin(paper, tmp_path)
    assert set(broken_rules(tmp_path / "notebooks" / paper.file, paper)) == UNRUN | UNWRITTEN


def test_it_runs_and_then_lacks_only_its_words(begun, capsys):
    root, paper = begun
    path = root / "notebooks" / paper.file
    notebooks.run(path)
    assert set(broken_rules(path, paper)) == UNWRITTEN
    for solution in Book.read(path, paper).solutions:
        exec(solution, {"exercises": exercises})
    assert capsys.readouterr().out == "warm-up: right\n"


def test_its_recipe_measures_and_its_test_passes(begun, monkeypatch, nothing_imported):
    root, paper = begun
    monkeypatch.setattr(_paths, "notebooks_dir", lambda: root / "notebooks")
    folder = root / "data" / "papers" / paper.slug
    (path,) = recipes.load(str(folder / "recipe.py")).build(folder, seeds=1)
    assert path.read_text().startswith("seed,method,share\n0,this paper,0.")
    source = (root / "tests" / "papers" / f"test_{paper.slug.replace('-', '_')}.py").read_text()
    tests = {}
    exec(source, tests)
    tests["test_of_a_linear_model_the_score_is_the_size_of_its_weights"]()


def test_what_it_writes_is_checked_code(begun):
    root, _ = begun
    config = str(_paths.repo_root() / "pyproject.toml")
    # method cells import for themselves, so that they can be imported alone
    command = [sys.executable, "-m", "ruff", "check", "--config", config, "--ignore", "F811", str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_begun_is_not_overwritten(tmp_path):
    paper = papers.get(PLANNED[0])
    path = tmp_path / "data" / "papers" / paper.slug / "recipe.py"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=rf"nothing was written: there is data/papers/{paper.slug}/recipe.py"):
        _new.begin(paper, tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"


def test_the_command_says_where_and_refuses_what_is_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_paths, "repo_root", lambda: tmp_path)
    assert main(["new", "there-and-back-again"]) == 0
    said = capsys.readouterr().out
    assert "wrote notebooks/01-saliency/02-there-and-back-again.ipynb" in said
    assert "make check P=there-and-back-again" in said
    assert main(["new", "there-and-back-again"]) == 1
    assert main(["new", "there-and-back"]) == 1
    said = capsys.readouterr().err
    assert "is begun already" in said
    assert "did you mean" in said
