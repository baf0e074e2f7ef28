"""The rules themselves: a well-formed notebook passes every one, and each defect is caught by the rule made for it."""

from __future__ import annotations

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nbkit import claims, exercises, notebooks, papers
from tests.notebooks.book import SECTIONS, Book
from tests.notebooks.paper import PAPER

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SLUG = "neuron-path"
TITLE = f"""# {papers.get(SLUG).title}
Yifan Wang et al., 2025, arXiv {papers.get(SLUG).arxiv}.

**Know before**: what a class token is.

**Able to afterwards**: to find a path.

**Time**: 25 s to run, 45 minutes to work through.

**Difficulty**: medium"""
CHECK = f'exercises.check("sum", answer, "{exercises.digest(4)}")'
SOLUTION = f"<details>\n\n```python\nanswer = 2 + 2\n{CHECK}\n```\n\n</details>"


def picture():
    return new_output("display_data", data={"image/png": PNG, "text/plain": "<Figure size 640x480>"})


def line(text):
    return new_output("stream", text=f"{text}\n")


def stored_claim(**changed):
    about = {"kind": "paper", "ours": {"x": [1.0, 2.0]}, "holds": True, "verdict": "holds", "rule": "mean above 1"}
    claim = claims.check(SLUG, "a", "A claim", **{**about, "by_chance": 0.01, "how": "by counting", **changed})
    return new_output("display_data", data=claim._repr_mimebundle_())


def good():
    """A paper's notebook that follows every rule."""
    code = {
        "The question": new_code_cell(
            "fig, ax = plt.subplots()\nfig, ax = ax, fig", outputs=[picture()], metadata={"tags": ["main-picture"]}
        ),
        "The method": new_code_cell("import torch\n\n\ndef f(x):\n    g(torch)", metadata={"tags": ["method"]}),
        "A case with a known answer": new_code_cell("assert f(1) == 1"),
        "On real data": new_code_cell("plt.show()", outputs=[picture()]),
        "Explore": new_code_cell("widgets.explore(f, a=(0, 1), b=[1, 2], dpi=90)", outputs=[picture()]),
        "Does the claim hold here?": new_code_cell("claims.check(...)", outputs=[stored_claim()]),
        "Your own model": new_code_cell("low, high = f(mine)\nfor x in [f(y) for y in mine]:\n    g(x)"),
        "Exercises": new_code_cell(
            f"answer = ...\n{CHECK}", outputs=[line("sum: not yet")], metadata={"tags": ["exercise"]}
        ),
    }
    cells = [new_markdown_cell(TITLE), new_code_cell("from nbkit import runtime\n\nruntime.deterministic()")]
    for name in SECTIONS:
        cells.append(new_markdown_cell(f"## {name}\n" + "words " * 100))
        cells += [code[name]] if name in code else []
    cells.insert(-1, new_markdown_cell(SOLUTION))
    said = line("selfcheck: 1 explorer, 2 controls, every control answers")
    cells.append(new_code_cell("# NBVAL_CHECK_OUTPUT\nwidgets.selfcheck()", outputs=[said]))
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


def add(source, *outputs, tags=()):
    """One cell more at the end, in normal form."""
    cell = new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)} if tags else {})

    def apply(book):
        book.cells.append(cell)
        book.update(notebooks.normalise(book))

    return apply


def shows(text):
    output = new_output("execute_result", data={"text/plain": text}, execution_count=1)
    return change("plt.show()", "plt.show()", lambda cell: cell.outputs.append(output))


def empty_outputs(words):
    return change(words, words, lambda cell: cell.outputs.clear())


def tag(words, *tags):
    return change(words, words, lambda cell: cell.metadata.update(tags=list(tags)))


def claim(**changed):
    return change("claims.check(...)", "claims.check(...)", lambda cell: cell.update(outputs=[stored_claim(**changed)]))


DRAWING = "ax.plot()\n" * 11
DEFECTS = {
    "normal_form": [
        change("f(mine)", "open('/home/ada/x')"),
        lambda book: book.metadata.update(widgets={"state": {}}),
        lambda book: find(book, "f(mine)").update(execution_count=None),
        lambda book: find(book, "f(mine)").outputs.append(new_output("stream", name="stderr", text="careful")),
        lambda book: find(book, "f(mine)").outputs.append(new_output("error", ename="E", evalue="", traceback=[])),
        lambda book: find(book, "f(mine)").metadata.update(jupyter={"source_hidden": True}),
        tag("plt.subplots", "main-picture", "hide-input"),
    ],
    "formatted": [change("f(mine)", "f( mine )"), change("def f(x):\n    ", "def f(x): ")],
    "small": [lambda book: find(book, "f(mine)").outputs.append(new_output("stream", text="x" * 500_000))],
    "titled": [change("# Discovering", "Discovering")],
    "headed": [change("**Know before**", "**Before**"), change(": medium", ": so so"), change("25 s to run, ", "")],
    "brief": [change("## Sources\n", "## Sources\n" + "word " * 1200)],
    "few_statements": [add("f(1)\n" * 210), change("f(1) == 1", "f(1) == 1\n" + "if x:\n    f(1)\n" * 100)],
    "short_cells": [add("f(1)\n" * 26), change("f(mine)", f"f({'mine, ' * 20})")],
    "plain": [
        add("a, b = 1, 2"),
        add("a, b = (f(x) for x in y)"),
        add("[a, b] = [f(x) for x in y]"),
        add("(a, b), c = d, e"),
        add("def f():\n    a, b = b, c"),
        add("for x in [f(y) for y in [g(z) for z in a]]:\n    f(x)"),
        add("for x, y in [(x, y) for x in a for y in b]:\n    f(x)"),
    ],
    "deterministic": [change("runtime.deterministic()", "# runtime.deterministic()")],
    "hidden": [
        add(DRAWING),
        add(f"def draw(a):\n    {DRAWING.replace(chr(10), chr(10) + '    ')}"),
        add("\n".join(["x = f(x)"] * 10 + ["sns.lineplot(x)"])),
        add("x = 1", tags=["hide-input"]),
        add("def f(ax):\n    ax.plot()", tags=["method", "hide-input"]),
    ],
    "drawn": [empty_outputs("plt.show()"), empty_outputs("widgets.explore")],
    "tidy": [shows("<Axes: title={'left': 'a'}>"), shows("[<matplotlib.lines.Line2D>]"), shows("Text(0, 1, 'a')")],
    "selfchecked": [change("# NBVAL_CHECK_OUTPUT", ""), empty_outputs("widgets.selfcheck()")],
    "steady": [
        add("torch = None"),
        lambda book: [
            find(book, "widgets.explore").update(source="def draw(a):\n    helper(a)\n\nwidgets.explore(draw, a=1)"),
            find(book, "import torch").update(source="import torch\n\ndef helper(a):\n    return fig"),
            book.cells.append(new_code_cell("fig = 1")),
        ],
    ],
    "untimed": [change("widgets.selfcheck()", "time.perf_counter()\nwidgets.selfcheck()")],
    "exercised": [
        tag("answer = ...", "other"),
        empty_outputs("answer = ..."),
        change(f"answer = ...\n{CHECK}", f"answer = ...\n{CHECK}\nprint(1)"),
        change(f"2 + 2\n{CHECK}", "2 + 2"),
        change(f"2 + 2\n{CHECK}", f"2 + 2\n{CHECK.replace(exercises.digest(4), exercises.digest(5))}"),
        change("```python", "```"),
        change("<details>", ""),
        change("answer = 2 + 2", "answer = 2 +"),
    ],
    "sections": [swap_sections, change("## Sources", "## Further reading"), change("## Explore", "### Explore")],
    "title_cell": [change("2503.09046", ""), change("2025, ", ""), change("Neuron Path", "Neurons")],
    "written": [change("## Sources", "## Sources\nTo write."), change("f(mine)", "f(mine)  # to write")],
    "told": [lambda book: [c.update(source=c.source.replace("words", "")) for c in book.cells]],
    "method_cells": [
        change("import torch\n", "torch.manual_seed(0)\n"),
        tag("import torch\n", "other"),
    ],
    "known_answer": [change("assert f(1) == 1", "f(1)")],
    "explorer": [change("b=[1, 2], ", "")],
    "claim": [
        empty_outputs("claims.check(...)"),
        change("claims.check(...)", "print('it holds')"),
        add("claims.check(...)\nf(1)"),
        claim(kind="ours"),
        claim(by_chance=None, how=""),
        lambda book: find(book, "claims.check(...)").outputs[0].data[claims.MIME].pop("kind"),
    ],
    "illustrated": [empty_outputs("plt.show()")],
    "main_picture": [
        tag("plt.subplots", "other"),
        tag("plt.show()", "main-picture"),
        lambda book: [tag("plt.subplots", "other")(book), tag("f(mine)", "main-picture")(book)],
    ],
    "own_model": [lambda book: book.cells.remove(find(book, "f(mine)"))],
}  # fmt: skip


ALLOWED = {
    "unpacking what a call returns": add("a, b = f(x)"),
    "swapping": add("a, b = b, a"),
    "a comprehension in a loop's header": add("for x in [f(y) for y in a]:\n    f(x)"),
    "long drawing code, folded": add(DRAWING.rstrip(), tags=["hide-input"]),
    "a long cell that draws nothing": add("\n".join(["x = f(x)"] * 20)),
    "setting up the drawing in a long cell": add("\n".join([*["x = f(x)"] * 12, "plots.style()"])),
    "a claim that is not tested": claim(holds=None, verdict="not tested", note="too small", by_chance=None, how=""),
    "a starter that is right": lambda book: find(book, "answer = ...").update(outputs=[line("sum: right")]),
}


def test_a_well_formed_notebook_breaks_no_rule(tmp_path):
    assert broken_rules(good(), tmp_path) == {}


@pytest.mark.parametrize("allowed", ALLOWED)
def test_what_is_allowed_breaks_no_rule(allowed, tmp_path):
    book = good()
    ALLOWED[allowed](book)
    assert broken_rules(book, tmp_path) == {}


def test_every_rule_has_a_defect_to_catch():
    assert set(DEFECTS) == {rule.__name__ for rule in PAPER}


@pytest.mark.parametrize(("rule", "defect"), [(rule, defect) for rule, all_ in DEFECTS.items() for defect in all_])
def test_each_defect_is_caught(rule, defect, tmp_path):
    book = copy.deepcopy(good())
    defect(book)
    assert rule in broken_rules(book, tmp_path)
