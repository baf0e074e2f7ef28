"""The code of a notebook's cell as the rules see it: its lines, statements, calls and names."""

from __future__ import annotations

import ast
import symtable


def lines(source: str) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in source.splitlines())


def _python(source: str) -> str:
    """A cell without its magics."""
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


def tree(source: str) -> ast.Module:
    return ast.parse(_python(source))


def last(source: str) -> str:
    """A cell's last statement."""
    body = tree(source).body
    return ast.unparse(body[-1]) if body else ""


def statements(source: str) -> int:
    """How many statements a cell holds; a docstring is none."""
    nodes = [node for node in ast.walk(tree(source)) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


def calls(source: str, *, run_now: bool = False) -> list[ast.Call]:
    """The calls in a cell; with ``run_now`` those the cell makes itself, not those inside the functions it defines."""
    todo: list[ast.AST] = [tree(source)]
    found = []
    while todo:
        node = todo.pop()
        if run_now and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        found += [node] if isinstance(node, ast.Call) else []
        todo += ast.iter_child_nodes(node)
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def name(call: ast.Call) -> str:
    """``show`` of ``plt.show()``."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def owner(call: ast.Call) -> str:
    """``plt`` of ``plt.gca().set(...)``; empty where a call belongs to nobody by name."""
    node: ast.AST = call.func
    if isinstance(node, ast.Name):
        return ""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def answers(source: str) -> dict[str, str]:
    """Exercise -> digest, of the ``exercises.check(name, answer, digest)`` calls in a piece of code."""
    found = {}
    for call in calls(source, run_now=True):
        texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if owner(call) == "exercises" and name(call) == "check" and len(texts) >= 2:
            found[texts[0]] = texts[-1]
    return found


def top_level(source: str) -> tuple[set[str], dict[str, set[str]]]:
    """The names that a cell assigns itself, and the globals that each function it defines reads."""
    table = symtable.symtable(_python(source), "cell", "exec")
    assigned = {s.get_name() for s in table.get_symbols() if s.is_assigned() and not s.is_imported()}
    functions = {child.get_name(): _globals(child) for child in table.get_children() if child.get_type() == "function"}
    return assigned - set(functions), functions


def _globals(table: symtable.SymbolTable) -> set[str]:
    own = {s.get_name() for s in table.get_symbols() if s.is_global() and not s.is_assigned()}
    return own.union(*(_globals(child) for child in table.get_children()))


def reached(function: str, reads: dict[str, set[str]]) -> set[str]:
    """The globals a function reads, and those read by the functions among them."""
    seen, todo = set(), [function]
    while todo:
        for one in reads.get(todo.pop(), set()) - seen:
            seen.add(one)
            todo.append(one)
    return seen
