"""The generated pages: up to date in this clone, made of what the notebooks stored, and refused where that is wrong."""

from __future__ import annotations

import base64
import io
import json
import struct

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from nbkit import _catalogue, _cells, _paths, claims, pages, papers
from nbkit.pages import _claims, _data, _markdown, _notebooks, _pictures
from nbkit.papers.__main__ import main

SLUG = "neuron-path"
FILE = papers.get(SLUG).file
HEAD = """\
# A title

**Know before**: what a residual stream is ([02 hooks](../00-start/02-hooks.ipynb), [arXiv](https://arxiv.org)).

**Able to afterwards**: find a path.

**Time**: 25 s to run, 45 minutes to work through.

**Difficulty**: medium
"""


def test_the_pages_of_this_clone_are_up_to_date():
    assert [path.as_posix() for path in pages.stale()] == [], "run `make index`"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of nothing but its pages; the tables of data have tests of their own."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("above\n<!-- begin chapters -->\nold\n<!-- end chapters -->\nbelow\n")
    (tmp_path / "data" / "README.md").write_text("<!-- begin sets -->\n<!-- end sets -->\n")
    monkeypatch.setattr(_paths, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(_data, "tables", lambda data: {"sets": ["a table"]})
    return tmp_path


def claim(name="removal", **changes):
    arguments = {"ours": {"path": [0.6, 0.5], "noise": 0.9}, "holds": True, "verdict": "holds", "rule": "lower"}
    return claims.check(SLUG, name, "A claim", **(arguments | changes))


def png(width=40, height=30, colour="red", noise=False):
    image = Image.new("RGB", (width, height), colour)
    if noise:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def shows(picture):
    data = {"text/plain": "<Figure>", "image/png": base64.b64encode(picture).decode()}
    return [new_output("stream", text="drawn\n"), new_output("display_data", data=data)]


def write(clone, *stored, head=HEAD, pictures=(), tag="main-picture", file=FILE):
    cells = [new_markdown_cell(head)]
    cells += [new_code_cell("draw()", outputs=shows(p), metadata={"tags": [tag]}) for p in pictures]
    outputs = [new_output("display_data", data=c._repr_mimebundle_()) for c in stored]
    cells += [new_code_cell("claims.check(...)", outputs=outputs)] if stored else []
    path = clone / "notebooks" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path


# --- writing and checking


def test_check_fails_until_the_pages_are_written(clone, capsys):
    write(clone, claim())
    assert main(["index", "--check"]) == 1
    assert "CLAIMS.md is out of date: run `make index`" in capsys.readouterr().err
    assert not (clone / "CLAIMS.md").exists()
    assert main(["index"]) == 0
    assert main(["index", "--check"]) == 0
    assert pages.write() == []
    write(clone, claim(ours={"path": [0.1]}))
    before = (clone / "CLAIMS.md").read_bytes()
    assert main(["index", "--check"]) == 1
    assert (clone / "CLAIMS.md").read_bytes() == before


def test_only_what_stands_between_the_markers_is_written(clone):
    pages.write()
    lines = (clone / "README.md").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    assert (clone / "data" / "README.md").read_text() == "<!-- begin sets -->\na table\n<!-- end sets -->\n"


@pytest.mark.parametrize(
    "page", ["", "<!-- end chapters -->\n<!-- begin chapters -->\n", "<!-- begin chapters -->\n" * 2]
)
def test_a_page_without_its_markers_is_refused_and_nothing_is_written(clone, page, capsys):
    (clone / "README.md").write_text(page)
    assert main(["index"]) == 1
    assert "README.md needs the line <!-- begin chapters -->" in capsys.readouterr().err
    assert not (clone / "CLAIMS.md").exists()


def test_a_notebook_whose_claims_were_not_stored_is_refused(clone, capsys):
    path = write(clone, claim())
    book = json.loads(path.read_text())
    book["cells"][1]["outputs"] = []
    path.write_text(json.dumps(book))
    assert main(["index", "--check"]) == 1
    assert "1 claims.check and 0 stored claims" in capsys.readouterr().err


def test_an_installed_wheel_has_no_pages_to_write(monkeypatch):
    monkeypatch.setattr(_paths, "repo_root", lambda: None)
    with pytest.raises(FileNotFoundError, match="written in a clone"):
        pages.write()


# --- CLAIMS.md


def test_claims_are_counted_by_chapter_and_our_own_apart():
    found = [
        claim("a"), claim("b", holds=False, verdict="does not hold here"), claim("c", kind="ours"),
        claim("d", holds={"x": True, "y": False}, verdict="mixed"),
        claim("e", holds=None, verdict="not tested", note="too small"),
    ]  # fmt: skip
    rows = [line.replace(_claims.NBSP, " ") for line in _claims.page(found).splitlines()]
    assert "| [03 neurons](#03-neurons) | 1 of 9 | 4 | 1 | 1 | 1 | 1 | 1 of 1 |" in rows
    assert "| **all** | **1 of 88** | **4** | **1** | **1** | **1** | **1** | **1 of 1** |" in rows
    assert "| 05 data | 0 of 4 | - | - | - | - | - | - |" in rows
    assert _claims.verdicts(found) == (
        "1 holds, 1 mixed, 1 does not hold here, 1 not tested, own checks: 1 of 1 hold"
    )


def test_the_page_says_how_many_rules_decide_nothing():
    weak, sharp = {"by_chance": 0.3, "how": "a coin"}, {"by_chance": 0.01, "how": "seven coins"}
    page = _claims.page([claim("a", **weak), claim("b", **sharp), claim("c")])
    assert "Noise passes 1 of 2 rules more often than 5 %. For 1 of 3 rules that chance is not computed." in page
    assert "Noise passes none of 1 rule more often than 5 %." in _claims.page([claim("b", **sharp)])


def test_a_row_holds_all_that_was_stored():
    made = claim(
        method="path", better="lower", paper="0.41 | 0.5", note="a small model", by_chance=0.3, how="a coin",
        unit="p / p0", holds={"ViT": True, "DINOv2": False}, verdict="mixed", rule="p <in> every seed",
    )  # fmt: skip
    row = next(line for line in _claims.page([made]).splitlines() if line.startswith("| paper |"))
    row = row.replace(_claims.NBSP, " ")
    for part in (
        "A claim<br>*Rule:* p &lt;in> every seed<br>*In the paper:* 0.41 \\| 0.5",
        "**path: 0.550 ± 0.071**<br>noise: 0.900<br>(p / p0, 2 runs)", "+0.350 over noise (difference of means)",
        "**mixed**<br>ViT: yes; DINOv2: no<br>a small model",
        "*By chance:* 30 % (a coin)", "**Pure noise passes this rule in 30 % of cases: it is no test.**",
    ):  # fmt: skip
        assert part in row


def test_without_claims_there_is_a_page_of_zeros():
    assert "| **all** | **0" in _claims.page([])


# --- notebooks/README.md and the chapters


def test_a_paper_has_its_title_time_verdicts_and_what_to_know_before(clone):
    write(clone, claim(), pictures=[png()])
    pages.write()
    row = next(
        line for line in (clone / "notebooks" / "README.md").read_text().splitlines() if f"({FILE})" in line
    )
    assert "25 s to run, 45 minutes to work through<br>medium" in row
    assert "[1 holds](../CLAIMS.md#discovering-influential-neuron-path-in-vision-transformers)" in row
    assert "([02 hooks](00-start/02-hooks.ipynb), [arXiv](https://arxiv.org))" in row
    assert f'<img src="pictures/{SLUG}.jpg" width="320"' in row


def test_a_notebook_that_says_nothing_yet_has_a_dash(clone):
    write(clone, head="# A title")
    write(clone, head="# Welcome", file="00-start/01-welcome.ipynb")
    page = _notebooks.page(clone / "notebooks", [])
    assert "et al., 2025 | - | - | - | - |" in page
    assert "| [01 Welcome](00-start/01-welcome.ipynb) | - | - | - |" in page


def test_planned_papers_are_listed_until_they_run(clone):
    title = papers.get(SLUG).title
    assert f"- {title}, " in _notebooks.page(clone / "notebooks", [])
    write(clone)
    assert f"- {title}, " not in _notebooks.page(clone / "notebooks", [])


def test_every_chapter_has_a_row(clone):
    write(clone)
    write(clone, file="00-start/01-welcome.ipynb")
    rows = _notebooks.chapters(clone / "notebooks")
    assert len(rows) == 2 + len(_catalogue.chapters())
    assert rows[2].endswith("| 1 notebook |")
    (neurons,) = (row for row in rows if row.startswith("| [03 neurons](notebooks/README.md#03-neurons) |"))
    assert neurons.endswith("| 1 of 9 |")


def test_the_chapters_are_those_of_the_papers():
    _, *chapters = _catalogue.chapters()
    assert chapters == list(dict.fromkeys(paper.chapter for paper in _catalogue.papers().values()))


# --- the title cell


def cells(text):
    return [{"cell_type": "markdown", "source": text}]


def test_the_head_is_read_from_the_title_cell():
    head = _cells.head(cells(HEAD))
    assert (head.title, head.able, head.difficulty) == ("A title", "find a path.", "medium")
    assert _cells.head_problems(cells(HEAD)) == []
    assert _cells.head(cells(HEAD.replace("\n\n**", "\n**"))) == head
    assert _cells.head(cells(HEAD.replace("find a", "find\na"))) == head


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEAD.replace("**Time**", "Time"), "no paragraph '**Time**: ...'"),
        (HEAD.replace("find a path.", ""), "no paragraph '**Able to afterwards**: ...'"),
        (HEAD.replace("25 s", "half a minute"), "Time reads '25 s to run"),
        (HEAD.replace("medium", "tricky"), "Difficulty is easy, medium or hard, not 'tricky'"),
        ("**Difficulty**: easy\n\n" + HEAD, "in this order"),
        ("", "no paragraph '**Know before**: ...'"),
    ],
)
def test_what_a_head_leaves_out_is_named(text, problem):
    assert problem in "\n".join(_cells.head_problems(cells(text)))


def test_a_notebook_without_cells_has_an_empty_head():
    assert _cells.head([]) == _cells.Head("", "", "", "", "")
    assert len(_cells.head_problems([])) == 4


# --- pictures


def test_the_main_picture_is_packed_into_a_small_jpeg(clone):
    write(clone, pictures=[png(2000, 1200, noise=True)])
    pages.write()
    path = clone / "notebooks" / "pictures" / f"{SLUG}.jpg"
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert image.width <= 900 and image.width / image.height == pytest.approx(2000 / 1200, rel=0.01)
    assert path.stat().st_size <= 60_000


def test_a_picture_is_made_again_only_where_its_source_changed(clone):
    write(clone, pictures=[png()])
    pages.write()
    path = clone / "notebooks" / "pictures" / f"{SLUG}.jpg"
    data, source = path.read_bytes(), png()
    Image.open(path).save(path, quality=30, comment=_pictures.fingerprint(source))  # as another version might pack it
    assert path.read_bytes() != data
    assert pages.stale() == []
    write(clone, pictures=[png(colour="blue")])
    assert pages.stale() == [path.relative_to(clone)]
    pages.write()
    assert Image.open(path).getpixel((5, 5))[2] > 200


def test_where_no_cell_is_tagged_the_picture_stays(clone):
    path = clone / "notebooks" / "pictures" / f"{SLUG}.jpg"
    path.parent.mkdir()
    path.write_bytes(png())
    write(clone, pictures=[png(colour="blue")], tag="method")
    pages.write()
    assert path.read_bytes() == png()
    assert f"pictures/{SLUG}.jpg" in (clone / "notebooks" / "README.md").read_text()


def test_a_transparent_picture_stands_on_white():
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(out, "png")
    assert min(Image.open(io.BytesIO(_pictures.shrunk(out.getvalue()))).getpixel((4, 4))) > 250


def test_two_main_pictures_or_none_stored_are_refused(clone):
    with pytest.raises(ValueError, match="cells 2, 3 are all tagged main-picture"):
        _pictures.main_picture(write(clone, pictures=[png(), png()]))
    path = clone / "notebooks" / FILE
    cell = new_code_cell("draw()", metadata={"tags": ["main-picture"]})
    nbformat.write(new_notebook(cells=[cell]), path)
    with pytest.raises(ValueError, match="cell 1: tagged main-picture, but it stores no picture"):
        _pictures.main_picture(path)


# --- the tables of data


def checkpoint(path, facts):
    header = json.dumps({"__metadata__": {key: json.dumps(value) for key, value in facts.items()}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_a_checkpoint_tells_its_own_facts(tmp_path):
    facts = {
        "settings": {"batch": 64, "optimizer": "adamw", "lr": 0.1}, "dataset": "mnist", "train_examples": 10000,
        "config": {"width": 0.5}, "steps": 471, "test_accuracy": 0.871, "test_examples": 2000, "seconds": 1234,
        "seed": 0, "recipe": "data/models/train.py", "loss": 0.25,
    }  # fmt: skip
    checkpoint(tmp_path / "net-seed0.safetensors", facts)
    row = _data._models(tmp_path)[-1]
    assert row.startswith(
        "| `net-seed0.safetensors` | mnist, 10,000 | width 0.5, 471 steps of 64, optimiser adamw, lr 0.1 | "
        "87.10% of 2,000 right, loss 0.25 | 1,234 s | `train.py` | "
    )


def test_a_checkpoint_without_facts_has_dashes_and_a_broken_one_is_named(tmp_path):
    checkpoint(tmp_path / "net.safetensors", {})
    assert "| - | - | - | - | - |" in _data._models(tmp_path)[-1]
    (tmp_path / "net.safetensors").write_bytes(b"12345678 no header")
    with pytest.raises(ValueError, match=r"data/models/net.safetensors is no safetensors file"):
        _data._models(tmp_path)


def test_data_sets_and_their_catalogue_agree(tmp_path):
    with pytest.raises(ValueError, match=r"data/sets/.* is not there"):
        _data._sets(tmp_path)


def test_markdown_keeps_a_table_in_one_piece():
    assert _markdown.table(["a"], [["x | y\nz"]]) == ["| a |", "| --- |", "| x \\| y z |"]
    assert _markdown.anchor("Grad-CAM: Why, and How?") == "grad-cam-why-and-how"
    assert _markdown.relinked("[a](#b) [c](../d/e.md) [f](g.ipynb)", "h") == "[a](#b) [c](d/e.md) [f](h/g.ipynb)"
