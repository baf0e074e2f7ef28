"""The rules themselves: a well-formed notebook passes every one, and each defect is caught by the rule made for it."""

from __future__ import annotations

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nbkit import claims, notebooks, papers
from tests.notebooks.shape import PAPER, SECTIONS, Book

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SLUG = "neuron-path"


def picture():
    return new_output("display_data", data={"image/png": PNG, "text/plain": "<Figure size 640x480>"})


def good():
    """A paper's notebook that follows every rule."""
    claim = claims.check(
        SLUG, "a", "A claim", ours={"x": [1.0, 2.0]}, holds=True, verdict="holds", threshold="mean above 1"
    )
    stored = new_output("display_data", data=claim._repr_mimebundle_())
    paper = papers.get(SLUG)
    filler = "\n".join(f"a{i} = {i}" for i in range(30))
    code = {
        "The question": new_code_cell("fig, ax = plt.subplots()\n" + filler, outputs=[picture()]),
        "The method": new_code_cell("import torch\n\ndef f(x):\n    g(torch)", metadata={"tags": ["method"]}),
        "A case with a known answer": new_code_cell("assert f(1) == 1\n" + filler),
        "On real data": new_code_cell("plt.show()", outputs=[picture()]),
        "Explore": new_code_cell("widgets.explore(f, a=(0, 1), b=[1, 2], dpi=90)", outputs=[picture()]),
        "Does the claim hold here?": new_code_cell("claims.check(...)", outputs=[stored]),
        "Your own model": new_code_cell("f(mine)\n" + filler),
    }
    title = f"# {paper.title}\nYifan Wang et al., 2025, arXiv {paper.arxiv}. Run time: 12 s."
    cells = [new_markdown_cell(title), new_code_cell("from nbkit import runtime\nruntime.deterministic()")]
    for name in SECTIONS:
        cells.append(new_markdown_cell(f"## {name}\n" + "words " * 100 + "<details>an answer</details>"))
        cells += [code[name]] if name in code else []
    line = new_output("stream", text="selfcheck: 1 explorer, 2 controls, every control answers\n")
    cells.append(new_code_cell("# NBVAL_CHECK_OUTPUT\nwidgets.selfcheck()", outputs=[line]))
    return notebooks.normalise(new_notebook(cells=cells))


def broken_rules(book, folder):
    path = folder / "book.ipynb"
    nbformat.write(book, path)
    read = Book.read(path, papers.get(SLUG))
    return {rule.__name__: found for rule in PAPER if (found := rule(read))}


def find(book, words):
    return next(cell for cell in book.cells if words in cell.source)


def change(words, to, also=lambda cell: None):
    def apply(book):
        cell = find(book, words)
        cell.source = cell.source.replace(words, to)
        also(cell)

    return apply


def swap_sections(book):
    explore, real = find(book, "## Explore"), find(book, "## On real data")
    explore.source, real.source = real.source, explore.source


def add(cell):
    return lambda book: book.cells.append(cell)


def shows(text):
    output = new_output("execute_result", data={"text/plain": text}, execution_count=1)
    return change("plt.show()", "plt.show()", lambda cell: cell.outputs.append(output))


def empty_outputs(words):
    return change(words, words, lambda cell: cell.outputs.clear())


DEFECTS = {
    "normal_form": [
        change("f(mine)", "open('/home/ada/x')"),
        lambda book: book.metadata.update(widgets={"state": {}}),
        lambda book: find(book, "f(mine)").update(execution_count=None),
        lambda book: find(book, "f(mine)").outputs.append(new_output("stream", name="stderr", text="careful")),
        lambda book: find(book, "f(mine)").outputs.append(new_output("error", ename="E", evalue="", traceback=[])),
    ],
    "small": [lambda book: find(book, "f(mine)").outputs.append(new_output("stream", text="x" * 500_000))],
    "short_cells": [change("f(mine)", "\n".join(["f(mine)"] * 15))],
    "deterministic": [change("runtime.deterministic()", "# runtime.deterministic()")],
    "titled": [change("# Discovering", "Discovering")],
    "drawn": [empty_outputs("plt.show()"), empty_outputs("widgets.explore")],
    "tidy": [shows("<Axes: title={'left': 'a'}>"), shows("[<matplotlib.lines.Line2D>]"), shows("Text(0, 1, 'a')")],
    "selfchecked": [change("# NBVAL_CHECK_OUTPUT", ""), empty_outputs("widgets.selfcheck()")],
    "steady": [
        add(new_code_cell("torch = None")),
        lambda book: [
            find(book, "widgets.explore").update(source="def draw(a):\n    helper(a)\n\nwidgets.explore(draw, a=1)"),
            find(book, "import torch").update(source="import torch\n\ndef helper(a):\n    return fig"),
            book.cells.append(new_code_cell("fig = 1")),
        ],
    ],
    "untimed": [change("widgets.selfcheck()", "time.perf_counter()\nwidgets.selfcheck()")],
    "sections": [swap_sections, change("## Sources", "## Further reading"), change("## Explore", "### Explore")],
    "title_cell": [change("2503.09046", ""), change("Run time: 12 s", ""), change("Neuron Path", "Neurons")],
    "method_cells": [
        change("import torch\n", "torch.manual_seed(0)\n"),
        change("import torch\n", "import torch\n", lambda cell: cell.metadata.pop("tags")),
    ],
    "explorer": [change("b=[1, 2], ", "")],
    "claim": [empty_outputs("claims.check(...)"), change("claims.check(...)", "print('it holds')")],
    "illustrated": [empty_outputs("plt.show()")],
    "length": [
        change("## Sources\n", "## Sources\n" + "word " * 1400),
        change("f(mine)\n", "", lambda cell: cell.update(source="")),
    ],
    "known_answer": [change("assert f(1) == 1", "f(1)")],
    "own_model": [lambda book: book.cells.remove(find(book, "f(mine)"))],
    "solutions": [lambda book: [c.update(source=c.source.replace("<details>", "")) for c in book.cells]],
}


def test_a_well_formed_notebook_breaks_no_rule(tmp_path):
    assert broken_rules(good(), tmp_path) == {}


def test_every_rule_has_a_defect_to_catch():
    assert set(DEFECTS) == {rule.__name__ for rule in PAPER}


@pytest.mark.parametrize(("rule", "defect"), [(rule, defect) for rule, all_ in DEFECTS.items() for defect in all_])
def test_each_defect_is_caught(rule, defect, tmp_path):
    book = copy.deepcopy(good())
    defect(book)
    assert rule in broken_rules(book, tmp_path)
