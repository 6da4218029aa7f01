"""Docstrings describe the parameters that there are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [file for folder in ("runtime", "export", "training") for file in sorted((ROOT / folder).rglob("*.py"))]


def described(docstring: str) -> list[str]:
    """The names in the section Args."""
    section = re.search(r"^Args:\n((?:    .*(?:\n|$)|\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^    (\S[^:\n]*):", section[1], re.MULTILINE) if section else []
    return [name.strip().lstrip("*") for entry in entries for name in entry.split(",")]


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """Those of a function, of a class's __init__, or the fields of a class without one."""
    if isinstance(node, ast.ClassDef):
        init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
        if init is None:
            return {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
        node = init
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in every if argument is not None}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_args_are_the_parameters(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            unknown = set(described(ast.get_docstring(node) or "")) - parameters(node)
            assert not unknown, f"{node.name} line {node.lineno}"
