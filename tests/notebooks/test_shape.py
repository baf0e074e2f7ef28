"""Every notebook has the shape the kit promises: found on disk, checked rule by rule."""

from __future__ import annotations

import pytest

from nbkit import _paths, claims, papers
from tests.notebooks.book import Book
from tests.notebooks.paper import PAPER
from tests.notebooks.shape import EVERY

ROOT = _paths.notebooks_dir()
FOUND = [path for path in sorted(ROOT.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
FILES = {path.relative_to(ROOT).as_posix(): path for path in FOUND}
PAPERS = {paper.file: paper for slug in papers.catalogue()["slug"] if (paper := papers.get(slug)).file in FILES}
START = [name for name in FILES if name.startswith("00-")]


def _case(name, rule):
    return pytest.param(name, rule, id=f"{name}-{rule.__name__}")


@pytest.mark.parametrize(("name", "rule"), [_case(name, rule) for name in START for rule in EVERY])
def test_a_start_notebook(name, rule):
    assert rule(Book.read(FILES[name])) == []


@pytest.mark.parametrize(("name", "rule"), [_case(name, rule) for name in PAPERS for rule in PAPER])
def test_a_papers_notebook(name, rule):
    assert rule(Book.read(FILES[name], PAPERS[name])) == []


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_method_imports(name):
    module = papers.method(PAPERS[name].slug)
    assert any(callable(value) for value in vars(module).values())


def test_every_notebook_stands_where_the_catalogue_says():
    assert sorted(FILES) == sorted([*START, *PAPERS])


def test_the_stored_claims_can_be_collected():
    collected = {claim.slug for claim in claims.collect(ROOT)}
    assert collected == {paper.slug for paper in PAPERS.values()}
