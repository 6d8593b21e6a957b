"""Arrows go one way, and the node imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "vllm", "trl", "peft", "faiss", "datasets", "numpy", "sentence_transformers")
LAYERS = {
    # what may import what, besides itself, `errors`, `redaction`, the settings and `messages`
    "messages": set(),
    "bus": set(),
    "tasks": set(),
    "processes": set(),
    "node": set(),
    "results": {"processes"},
    "execution": {"bus", "tasks", "processes", "node", "results", "control"},
}
SETTINGS = {f"settings_{part}" for part in ("schema", "types", "sources", "checks", "load", "paths", "addresses")}
COMMON = {"errors", "messages", "redaction", "__init__"} | SETTINGS


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports; those for the type checker only are no arrows."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_arrows_go_one_way(layer: str) -> None:
    for path in files(f"flowmesh/{layer}"):
        for name in imports(path):
            if name.startswith("flowmesh."):
                other = name.split(".")[1]
                allowed = COMMON | LAYERS[layer] | {layer}
                assert other in allowed or name == "flowmesh.__version__", f"{path.relative_to(ROOT)} imports {name}"


def test_the_node_names_runners_only_as_strings() -> None:
    for path in files("flowmesh"):
        assert not {n for n in imports(path) if n.split(".")[0] == "runners"}, path


def test_runners_use_only_messages_and_the_pipe() -> None:
    for path in files("runners"):
        for name in imports(path):
            if name.split(".")[0] == "flowmesh":
                allowed = ("flowmesh.messages", "flowmesh.redaction", "flowmesh.processes.pipe", "flowmesh.processes")
                assert name.startswith(allowed), f"{path.relative_to(ROOT)} imports {name}"
                if name.startswith("flowmesh.processes."):
                    assert name.startswith("flowmesh.processes.pipe"), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    "module", ["flowmesh.supervisor", "flowmesh.cli.main", "flowmesh.processes.forkserver", "runners.api"]
)
def test_nothing_heavy_is_imported(module: str) -> None:
    program = f"import {module}, sys; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & set(HEAVY)


def test_no_machine_or_workplace_is_named() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    banned = ["/work" + "/main", "/work" + "/shared", "/opt" + "/wheels", "/opt" + "/pypi"]
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file():
            text = path.read_text(errors="replace")
            assert not [word for word in banned if word in text], name
