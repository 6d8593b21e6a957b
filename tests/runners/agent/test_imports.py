"""The agent's modules use only what their libraries offer: no module or name with a leading underscore."""

from __future__ import annotations

import ast

from tests.kit.paths import ROOT

FOLDER = ROOT / "runners" / "agent"


def test_no_private_part_of_a_library_is_imported() -> None:
    private = []
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            private += [
                f"{path.name}: {name}" for name in names if any(part.startswith("_") for part in name.split("."))
            ]
    assert private == []
