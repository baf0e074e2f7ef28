"""A notebook's solutions are run after its cells, in its kernel, and what took long is said."""

from __future__ import annotations

import re
import subprocess
import sys

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbkit import _paths, exercises
from tests.notebooks.plugin import summary

DIGEST = exercises.digest(0.75)
SOLUTIONS = [
    f'answer = x\nexercises.check("kept", answer, "{DIGEST}")',
    "from_another = answer",
    "assert from_another == 0.75",
    f'exercises.check("lost", 0.1, "{DIGEST}")',
    "1 / 0",
]


def test_solutions_run_in_the_final_namespace_and_have_to_be_right(tmp_path):
    fences = "\n\n".join(f"```python\n{code}\n```" for code in SOLUTIONS)
    cells = [
        new_markdown_cell("# A title\n\n```python\nnot run\n```"),
        new_code_cell("from nbkit import exercises\n\nx = 0.5"),
        new_markdown_cell("## Exercises\n\n```python\nnot run\n```"),
        new_code_cell(f'answer = ...\nexercises.check("kept", answer, "{DIGEST}")'),
        new_markdown_cell(f"<details><summary>Solutions</summary>\n\n{fences}\n\n</details>"),
        new_code_cell("x = 0.75"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    root = _paths.repo_root()
    flags = ["-v", "--color=no", "-p", "tests.notebooks.plugin", "--nbval-lax", "--nbval-current-env"]
    where = ["-c", str(root / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *flags, *where]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    outcomes = re.findall(r"(PASSED|FAILED) +\[", done.stdout)
    assert outcomes == ["PASSED"] * 6 + ["FAILED"] * 2, done.stdout
    assert "the solution of 'lost' was not found right; it printed\nlost: not yet" in done.stdout
    assert "slowest notebooks: a " in done.stdout


def test_the_longest_notebooks_are_named_and_88_papers_foretold():
    spent = {
        "notebooks/00-start/01-welcome.ipynb": 10.0,
        "notebooks/01-saliency/01-grad-cam.ipynb": 30.0,
        "notebooks/02-concepts/01-craft.ipynb": 50.0,
        "tests/papers/test_craft.py": 4.0,
        "tests/papers/test_grad_cam.py": 16.0,
        "tests/unit/test_hooks.py": 110.0,
    }
    assert summary(spent, workers=2) == [
        "slowest notebooks: 01-craft 50 s, 01-grad-cam 30 s, 01-welcome 10 s",
        # two papers took 100 s, the rest 120 s: (88 * 50 + 120) / 60 / 2
        "a paper takes 50 s (notebook and tests), everything else 2.0 minutes: 88 papers about 38 minutes on 2 workers",
    ]


def test_without_a_notebook_nothing_is_said():
    assert summary({"tests/unit/test_hooks.py": 1.0}, workers=1) == []
