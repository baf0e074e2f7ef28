"""``nbkit.papers.methods.<slug>``: the cells tagged ``method`` of a paper's notebook, imported as a module.

An import hook rather than a call to ``exec``: the modules have a name that ``import`` understands, so functions from
them can be pickled, sent to worker processes and found by ``inspect``, and a traceback shows the notebook's lines.
"""

from __future__ import annotations
import __future__

import ast
import importlib.abc
import importlib.machinery
import linecache
import sys
from pathlib import Path
from types import CodeType, ModuleType

from nbkit import _catalogue, _cells

# Lets import look for submodules of this module, which has no folder: the finder below answers.
__path__: list[str] = []

_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Pass)
_ANNOTATIONS = __future__.annotations.compiler_flag
_CONSTANT_CALLS = {"tuple", "frozenset", "dict", "set", "list", "range", "float", "namedtuple", "TypeVar", "Path"}


def module_name(slug: str) -> str:
    """``"grad-cam"`` -> ``"nbkit.papers.methods.grad_cam"``."""
    return f"{__name__}.{slug.replace('-', '_')}"


def unsafe_statements(source: str) -> list[tuple[int, str]]:
    """(line, why) for what a cell tagged ``method`` may not hold: all but imports, functions, classes and constants.

    A constant is a name given a value that calls nothing but a container's or a type's constructor.

    >>> unsafe_statements("STEPS = 20")
    []
    >>> unsafe_statements("model.eval()")
    [(1, 'a statement that runs on import')]
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [(error.lineno or 1, f"not plain Python: {error.msg}")]
    found = []
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if calls := [call for call in _cells.calls(node) if not _is_constant_call(call)]:
                found.append((node.lineno, f"a value computed on import ({ast.unparse(calls[0].func)}(...))"))
            elif not all(isinstance(name, (ast.Name, ast.Tuple)) for name in targets):
                found.append((node.lineno, "an assignment to something other than a name"))
        elif not isinstance(node, _DEFINITIONS) and not is_text:
            found.append((node.lineno, "a statement that runs on import"))
    return found


def _is_constant_call(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in _CONSTANT_CALLS


class _Loader(importlib.abc.InspectLoader):
    def __init__(self, paper: _catalogue.Paper, path: Path):
        self.paper, self.path = paper, path

    def get_source(self, fullname: str) -> str:
        return "\n\n".join(text for _, text in self._method_cells())

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = f"{self.paper.file} (method cells)"
        module.__doc__ = f"The method of: {self.paper.title}\n\nFrom {self.paper.file}."
        _remember(module.__file__, self.get_source(module.__name__))
        flags = 0
        for number, text in self._method_cells():
            code = self._compile(number, text, flags)
            flags |= code.co_flags & _ANNOTATIONS  # in a notebook, a __future__ import holds for the cells below it
            exec(code, module.__dict__)

    def _method_cells(self) -> list[tuple[int, str]]:
        cells = [(n, _cells.source(cell)) for n, cell in _cells.numbered(self.path, tag="method")]
        if not cells:
            raise ValueError(f"{self.paper.file} has no cell tagged 'method'")
        return cells

    def _compile(self, number: int, text: str, flags: int) -> CodeType:
        where = f"{self.paper.file}, cell {number}"
        if unsafe := unsafe_statements(text):
            line, why = unsafe[0]
            raise ValueError(
                f"{where}, line {line}: {why}; a cell tagged 'method' holds imports, functions, classes and constants"
            )
        _remember(where, text)
        return compile(text, where, "exec", flags=flags, dont_inherit=True)


def _remember(filename: str, source: str) -> None:
    # No modification time: linecache.checkcache then leaves the entry alone.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None):
        if not fullname.startswith(f"{__name__}."):
            return None
        slug = fullname.removeprefix(f"{__name__}.").replace("_", "-")
        paper = _catalogue.papers().get(slug)
        if paper is None or paper.path is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader(paper, paper.path), origin=paper.file)


sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]  # after a reload
sys.meta_path.append(_Finder())
