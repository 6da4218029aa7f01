"""The runtime reads from top to bottom: a file imports only files that stand before it in the README's list."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_imports_point_one_way() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = readme.partition("top to bottom, once:")[2].partition("A reader of the export")[0]
    order = re.findall(r"[a-z_]+", re.sub(r"\([^)]*\)|\bthen\b", "", listed))
    files = {file.stem: file for file in (ROOT / "runtime").glob("*.py") if not file.stem.startswith(("__", "cli_"))}
    assert sorted(order) == sorted(files)
    backwards = [
        (name, node.module)
        for name, file in files.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipret.")
        for imported in [str(node.module).split(".")[1]]
        if not imported.startswith("cli_") and order.index(imported) > order.index(name)
    ]
    assert not backwards
