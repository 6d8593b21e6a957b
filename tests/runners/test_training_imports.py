"""The modules of training import each other one way: no circle, not even inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = "runners.training"
FOLDER = Path(__file__).parents[2] / "runners" / "training"


def arrows(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            found.add(str(node.module).split(".")[2])
    return found


def test_no_circle() -> None:
    graph = {path.stem: arrows(path) for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    done: set[str] = set()
    while ready := {name for name, uses in graph.items() if name not in done and uses <= done}:
        done |= ready
    assert graph.keys() - done == set()
