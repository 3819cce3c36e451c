"""What the docstrings of public functions and methods say of the errors that they raise."""

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documentation import PROJECT

MODULES = sorted(path for package in ("vrt", "pipelines") for path in (PROJECT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
BASES = {
    node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}
# These say that we were wrong, which is for nobody to catch.
UNTOLD = frozenset({"AssertionError", "NotImplementedError"})
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(body: list[ast.stmt], above: str = "", told: str = "") -> Iterator[tuple[str, Function, str]]:
    """(name, definition, docstring) of each public function, and method of a public class; a class speaks for its `__init__`."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, f"{node.name}.", ast.get_docstring(node) or "")
        elif isinstance(node, Function) and (node.name == "__init__" or not node.name.startswith("_")):
            spoken = ast.get_docstring(node) or ""
            yield above + node.name, node, f"{told} {spoken}" if node.name == "__init__" else spoken


def raised(node: ast.AST, caught: frozenset[str] = UNTOLD) -> set[str]:
    """The classes of the new errors that leave it: raised in it, or in a function within it, and not `caught` there under their own name."""
    match node:
        case ast.Raise(exc=ast.Call(func=ast.Name(id=error))) if error[0].isupper() and error not in caught:
            return {error}
        case ast.Try(body=body):
            named = {name.id for handler in node.handlers if handler.type for name in ast.walk(handler.type) if isinstance(name, ast.Name)}
            rest = [*node.handlers, *node.orelse, *node.finalbody]
            return set().union(*(raised(each, caught | named) for each in body), *(raised(each, caught) for each in rest))
    return set().union(*(raised(each, caught) for each in ast.iter_child_nodes(node)))


def names(error: str) -> set[str]:
    """The class and what it is derived from, as far as that says something."""
    if hasattr(builtins, error):
        return {base.__name__ for base in getattr(builtins, error).__mro__} - {"Exception", "BaseException", "object"}
    return {error}.union(*(names(base) for base in BASES.get(error, [])))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_docstring_names_what_is_raised(path: Path):
    untold = [
        f"{name} raises {error}"
        for name, function, told in public(TREES[path].body)
        for error in sorted(raised(function))
        if not any(each in told for each in names(error))
    ]
    assert not untold, untold


def test_the_errors_of_many_functions_are_looked_at():
    assert len([error for tree in TREES.values() for _, function, _ in public(tree.body) for error in raised(function)]) > 60
