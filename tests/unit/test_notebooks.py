"""Notebooks run in a fresh kernel and are stored in one normal form, or not at all."""

from __future__ import annotations

import json
import os
import re

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nbkit import notebooks
from nbkit.notebooks.__main__ import main

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WIDGET = "application/vnd.jupyter.widget-view+json"


def book(*cells, **metadata):
    return new_notebook(cells=list(cells), metadata=metadata)


def shown(**data):
    return new_output("display_data", data={kind.replace("__", "/"): value for kind, value in data.items()})


def stored(tmp_path, *sources, name="a.ipynb"):
    path = tmp_path / name
    nbformat.write(book(*[new_code_cell(source) for source in sources]), path)
    return path


def normal_outputs(*outputs):
    return notebooks.normalise(book(new_code_cell("x", outputs=list(outputs)))).cells[0].outputs


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One notebook run for real, in a folder of its own."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "here.txt").write_text("found beside the notebook")
    path = stored(
        folder,
        "import os, sys\nprint(open('here.txt').read())\nprint('noise', file=sys.stderr)",
        "",
        "print(os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'])",
        "import ipywidgets\nipywidgets.IntSlider()",
        "6 * 7",
    )
    notebooks.run(path)
    return path


def test_run_executes_in_the_notebooks_folder_on_one_thread_offline(ran):
    cells = nbformat.read(ran, as_version=4).cells
    assert cells[0].outputs[0].text == "found beside the notebook\n"
    assert cells[2].outputs[0].text == "1 1\n"
    assert cells[4].outputs[0].data == {"text/plain": "42"}


def test_a_stored_run_is_in_normal_form(ran):
    assert notebooks.check(ran) == []
    raw = json.loads(ran.read_text())
    assert set(raw["metadata"]) == {"kernelspec", "language_info"}
    assert [cell["execution_count"] for cell in raw["cells"]] == [1, None, 2, 3, 4]
    assert [output["output_type"] for output in raw["cells"][0]["outputs"]] == ["stream"]  # stdout, not stderr
    assert "widget-view" not in ran.read_text()
    assert sorted(os.listdir(ran.parent)) == ["a.ipynb", "here.txt"]


def test_running_again_stores_the_same_bytes(ran):
    before = ran.read_bytes()
    notebooks.run(ran)
    assert ran.read_bytes() == before


def test_a_failing_cell_is_named_and_leaves_the_file_alone(tmp_path, capsys):
    path = stored(tmp_path, "x = 1", "def f():\n    return 1 / 0\nf()", "print('never')")
    before = path.read_bytes()
    with pytest.raises(notebooks.CellFailed, match=r"a\.ipynb, cell 2:\n    def f\(\)") as error:
        notebooks.run(path)
    assert "ZeroDivisionError" in str(error.value)
    assert "\x1b[" not in str(error.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ipynb"]
    assert main(["run", str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_printed_absolute_path_is_refused(tmp_path, capsys):
    path = stored(tmp_path, "import pathlib; print(pathlib.Path('/home') / 'somebody')")
    before = path.read_bytes()
    assert main(["run", str(path)]) == 1
    assert "cell 1: an absolute path in its output: /home/somebody" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_cell_that_takes_too_long_is_named(tmp_path):
    path = stored(tmp_path, "import time; time.sleep(30)")
    with pytest.raises(notebooks.CellFailed, match="cell 1"):
        notebooks.run(path, timeout=1)


def test_execute_can_ask_one_more_question_and_touches_no_file(tmp_path):
    path = stored(tmp_path, "x = 20")
    before = path.read_bytes()
    assert notebooks.execute(path, append="print(x + 1)").cells[-1].outputs[0].text == "21\n"
    assert path.read_bytes() == before


def test_an_explorer_keeps_its_picture_and_loses_its_view():
    outputs = normal_outputs(
        shown(**{"image__png": PNG, WIDGET.replace("/", "__"): {"model_id": "1"}, "text__plain": "explore(f, k=...)"})
    )
    assert outputs[0].data == {"image/png": PNG, "text/plain": "explore(f, k=...)"}


def test_an_explorer_is_captioned_once_and_its_description_stays():
    about = {"alt": "f at k=1", "controls": ["k"]}
    view = {WIDGET.replace("/", "__"): {"model_id": "1"}}
    live = shown(image__png=PNG, text__plain="explore(f, k=...)", **view)
    live.metadata = {"image/png": about, "needs_background": None}
    once = notebooks.normalise(book(new_code_cell("x", outputs=[live])))
    picture, below = once.cells[0].outputs
    assert picture.metadata == {"image/png": about}
    assert below.data["text/plain"] == "[a stored picture; run this cell for 1 control: k]"
    assert notebooks.normalise(once) == once


def test_a_figures_description_moves_with_it_to_its_lighter_form(monkeypatch):
    from nbkit.notebooks import _normal

    monkeypatch.setattr(_normal, "lighter", lambda png: ("image/jpeg", b"lighter"))
    figure = shown(image__png=PNG)
    figure.metadata = {"image/png": {"alt": "a cat"}}
    [stored] = normal_outputs(figure)
    assert set(stored.data) == {"image/jpeg"}
    assert stored.metadata == {"image/jpeg": {"alt": "a cat"}}


def test_a_widget_without_a_picture_leaves_a_hint_and_a_progress_bar_nothing():
    view = {WIDGET.replace("/", "__"): {"model_id": "1"}}
    slider, bar = normal_outputs(shown(text__plain="IntSlider(value=3)", **view)), normal_outputs(
        shown(text__plain="train:   0%|          | 0/3 [00:00<?, ?it/s]", **view)
    )  # fmt: skip
    assert slider[0].data == {"text/plain": notebooks.PLACEHOLDER}
    assert bar == []


def test_streams_are_joined_and_stderr_and_progress_dropped():
    outputs = normal_outputs(
        new_output("stream", name="stdout", text="a\n"),
        new_output("stream", name="stderr", text="UserWarning: mind\n"),
        new_output("stream", name="stdout", text=" 10%|#    | 1/10\r100%|#####| 10/10\nb\n"),
    )
    assert [(output.name, output.text) for output in outputs] == [("stdout", "a\nb\n")]


def test_metadata_keeps_tags_and_loses_the_rest():
    cell = new_code_cell("x", metadata={"tags": ["method"], "execution": {"iopub.status.busy": "2024"}})
    theirs = {"name": "conda-env-x", "display_name": "My environment"}
    normal = notebooks.normalise(book(cell, widgets={"state": {}}, kernelspec=theirs))
    assert normal.cells[0].metadata == {"tags": ["method"]}
    assert set(normal.metadata) == {"kernelspec", "language_info"}
    assert normal.metadata.kernelspec.name == "python3"


def test_a_cell_tagged_hide_input_or_checking_controls_is_collapsed_and_no_other_one():
    shown = new_code_cell("x", metadata={"jupyter": {"source_hidden": True, "outputs_hidden": True}})
    tagged = new_code_cell("y", metadata={"tags": ["hide-input"]})
    text = new_markdown_cell("z", metadata={"tags": ["hide-input"]})
    checking = new_code_cell("# NBVAL_CHECK_OUTPUT\nwidgets.selfcheck()")
    naming = new_code_cell("print('what selfcheck() does')")
    normal = notebooks.normalise(book(shown, tagged, text, checking, naming)).cells
    collapsed = {"source_hidden": True}
    assert [cell.metadata.get("jupyter") for cell in normal] == [None, collapsed, None, collapsed, None]


def test_check_tells_a_cell_that_is_hidden_or_shown_against_its_tag(tmp_path):
    for tags, jupyter in ([], {"source_hidden": True}), (["hide-input"], {}):
        cell = new_code_cell("x = 1", execution_count=1, metadata={"tags": tags, "jupyter": jupyter})
        nbformat.write(book(cell), tmp_path / "a.ipynb")
        assert "not in normal form" in notebooks.check(tmp_path / "a.ipynb")[0]


def test_cell_ids_stay_and_missing_or_doubled_ones_are_made_the_same_way_each_time(tmp_path):
    path = stored(tmp_path, "a", "b", "c")

    def ids():
        raw = json.loads(path.read_text())
        raw["nbformat_minor"] = 4
        raw["cells"][0]["id"] = raw["cells"][1]["id"] = "kept"
        raw["cells"][2].pop("id", None)
        path.write_text(json.dumps(raw))
        return [cell["id"] for cell in notebooks.execute(path).cells]

    path.write_text(path.read_text().replace('"b"', '"pass"').replace('"a"', '"pass"').replace('"c"', '"pass"'))
    first = ids()
    assert first == ids()
    assert first[0] == "kept"
    assert len(set(first)) == 3


@given(st.lists(st.sampled_from(["x = 1", "", "   ", "print(2)", "# text"]), max_size=6), st.data())
def test_normalising_twice_is_normalising_once(sources, data):
    texts = st.sampled_from(["a\n", " 5%|# | 1/9\r", "", "b"])
    cells = []
    for source in sources:
        outputs = [
            new_output("stream", name=data.draw(st.sampled_from(["stdout", "stderr"])), text=data.draw(texts))
            for _ in range(data.draw(st.integers(0, 3)))
        ]
        cells.append(new_code_cell(source, outputs=outputs, execution_count=data.draw(st.integers(1, 99))))
    once = notebooks.normalise(book(*cells))
    assert notebooks.normalise(once) == once


@pytest.mark.parametrize("text", ["/home/ada/x.py", "in '/root/kit'", "/Users/ada", "C:\\Users\\ada", "(/tmp/tmpabc)"])
def test_a_path_of_a_machine_is_a_problem_in_source_and_output(text):
    assert "absolute path" in notebooks.problems(book(new_code_cell(repr(text))))[0]
    output = new_output("execute_result", data={"text/plain": text})
    assert "cell 1: an absolute path in its output" in notebooks.problems(book(new_code_cell("x", outputs=[output])))[0]


@pytest.mark.parametrize(
    "text", ["https://example.org/home/page", "data/home/x", "a/tmp/b", "$P:\\mathbb R$", "and/or", "~/work/x", "1/2"]
)
def test_what_only_looks_like_a_path_is_none(text):
    assert notebooks.problems(book(new_markdown_cell(text))) == []


def test_an_objects_address_is_a_problem():
    output = new_output("execute_result", data={"text/plain": "<function f at 0x7f1234567890>"})
    assert "address" in notebooks.problems(book(new_code_cell("x", outputs=[output])))[0]


def test_check_names_cells_never_run_and_files_never_normalised(tmp_path):
    path = stored(tmp_path, "x = 1")
    assert notebooks.check(path) == ["cell 1: not executed"]
    nbformat.write(book(new_code_cell("x = 1", execution_count=7)), path)
    assert "not in normal form" in notebooks.check(path)[0]
    assert main(["check", str(tmp_path)]) == 1


@pytest.mark.parametrize("action", ["run", "check"])
def test_a_file_that_is_missing_or_no_notebook_gets_a_line(tmp_path, action, capsys):
    (tmp_path / "a.ipynb").write_text("not json")
    assert main([action, str(tmp_path / "a.ipynb"), str(tmp_path / "b.ipynb")]) == 2
    assert capsys.readouterr().err == f"there is no {tmp_path / 'b.ipynb'}\n"
    assert main([action, str(tmp_path / "a.ipynb")]) == 1
    assert "a.ipynb is not a notebook" in capsys.readouterr().err


def test_a_good_run_says_how_long_it_took_and_returns_0(tmp_path, capsys):
    path = stored(tmp_path, "x = 1")
    assert main(["run", str(path)]) == 0
    assert re.fullmatch(rf"{re.escape(str(path))}: \d+\.\d s, \d+ KB\n", capsys.readouterr().out)
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out == "1 of 1 notebooks in normal form\n"


def test_one_bad_notebook_among_good_ones_returns_1(tmp_path, capsys):
    nbformat.write(notebooks.normalise(book(new_code_cell("x = 1"))), tmp_path / "good.ipynb")
    stored(tmp_path, "1 +", name="bad.ipynb")
    assert main(["check", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "1 of 2 notebooks in normal form\n"
    assert main(["format", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'good.ipynb'}: formatted already\n"
    assert "bad.ipynb: ruff cannot format it" in said.err


def test_formatting_lays_out_code_at_100_columns_and_keeps_all_else(tmp_path, capsys):
    long = f"f({', '.join(['argument'] * 9)})"  # 90 columns
    sources = [f"x = {{'a':1}};  y=2\n%time {long}", long, "", f"{long[:-1]}, one_more_of_them)", "plt.plot();"]
    cells = [new_code_cell(source, execution_count=3, metadata={"tags": ["a"]}) for source in sources]
    cells[0].outputs = [new_output("stream", text="kept\n")]
    path = tmp_path / "a.ipynb"
    nbformat.write(book(new_markdown_cell("# A  title"), *cells, mine=1), path)
    before = nbformat.read(path, as_version=4)
    assert notebooks.unformatted(path)[:2] == [f"cell {n}: not as ruff formats it" for n in (2, 5)]
    assert main(["format", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: formatted\n"
    after = nbformat.read(path, as_version=4)
    assert after.cells[1].source == f'x = {{"a": 1}}\ny = 2\n%time {long}'
    assert after.cells[2].source == long
    assert after.cells[4].source.startswith("f(\n    argument,\n")
    for number in (1, 4):
        before.cells[number].source = after.cells[number].source
    assert after == before
    assert notebooks.unformatted(path) == []
    assert notebooks.reformat(path) is False


def test_cells_are_picked_by_tag(tmp_path):
    path = tmp_path / "a.ipynb"
    cells = [new_code_cell("a = 1", metadata={"tags": ["method"]}), new_markdown_cell("text"), new_code_cell("b = 2")]
    nbformat.write(book(*cells), path)
    assert notebooks.cells(path) == ["a = 1", "b = 2"]
    assert notebooks.cells(path, tag="method") == ["a = 1"]


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"nbformat": 3, "cells": []}'])
def test_a_file_that_is_no_notebook_is_named(tmp_path, text):
    (tmp_path / "a.ipynb").write_text(text)
    with pytest.raises(ValueError, match="is not a notebook"):
        notebooks.cells(tmp_path / "a.ipynb")
