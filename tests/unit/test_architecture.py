"""The order of folders and modules: imports form no circle, and the node imports nothing heavy.

Imports for the type checker count like all others: a circle that only `TYPE_CHECKING` hides is a circle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

HEAVY = ("torch", "transformers", "vllm", "trl", "peft", "faiss", "datasets", "numpy", "sentence_transformers",
         "opentelemetry", "botocore", "starlette", "uvicorn", "jinja2")  # fmt: skip

FLOORS = (
    {"page"},
    {"cli"},
    {"supervisor"},
    {"control"},
    {"metrics", "reporting"},
    {"orchestrator", "startup"},
    {"execution"},
    {"pipeline_driver"},
    {"client"},
    {"pipelines"},
    {"results", "tasks", "bus", "node"},
    {"processes"},
    {"settings"},
    {"queue"},
    {"messages", "web"},
    {"validation", "files"},
    {"redaction", "errors", "backoff", "cancellation", "installed", "progress", "__init__"},
)
"""From the top down, by the first part of a module's name below `flowmesh`. A module imports from lower floors and from
its own folder, not from a neighbour on its floor."""

EXECUTION_FLOORS = ({"recovery"}, {"executor"}, {"parts"}, {"launch"}, {"gpu", "delivery"}, {"housekeeping"})
"""The same below `flowmesh/execution`; its other modules are the lowest floor."""

RUNNERS_MAY_IMPORT = (
    "flowmesh.client",
    "flowmesh.errors",
    "flowmesh.queue",
    "flowmesh.files",
    "flowmesh.messages",
    "flowmesh.processes.environ",
    "flowmesh.processes.linux",
    "flowmesh.processes.pipe",
    "flowmesh.processes.threads",
    "flowmesh.progress",
    "flowmesh.validation",
    "flowmesh.redaction",
    "flowmesh.installed",
    "flowmesh.web",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {
    module_name(path): path for folder in ("flowmesh", "runners") for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(path: Path) -> Iterator[str]:
    """This repository's modules that a file imports: at its top, in a function, or under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in MODULES:
                    yield full
                elif node.module in MODULES:
                    yield node.module
                elif f"{node.module}.__init__" in MODULES:
                    yield f"{node.module}.__init__"


GRAPH = {name: sorted(set(imported(path)) - {name}) for name, path in MODULES.items()}


def circle(graph: dict[str, list[str]]) -> list[str]:
    """The modules of one circle, in order; empty if there is none."""
    done: set[str] = set()
    for start in graph:
        path: list[str] = []
        stack = [(start, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                done.add(path.pop())
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name not in done:
                path.append(name)
                stack.append((name, True))
                stack += [(each, False) for each in graph[name]]
    return []


def test_imports_form_no_circle() -> None:
    assert circle(GRAPH) == []


def test_a_circle_would_be_found() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def folder(module: str) -> str:
    return module.split(".")[1]


def test_each_folder_has_its_floor() -> None:
    named = set().union(*FLOORS)
    assert {folder(name) for name in MODULES if name.startswith("flowmesh.")} == named


def test_imports_go_down() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if name.startswith("flowmesh.") and other.startswith("flowmesh.")
        if folder(name) != folder(other) and floor[folder(other)] <= floor[folder(name)]
    ]
    assert wrong == []


def test_imports_go_down_in_execution() -> None:
    """So no part of the executor knows the executor."""
    floor = {name: number for number, names in enumerate(EXECUTION_FLOORS) for name in names}

    def place(module: str) -> str:
        return module.split(".")[2]

    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if name.startswith("flowmesh.execution.") and other.startswith("flowmesh.execution.")
        if place(name) != place(other) and place(other) in floor
        if floor[place(other)] <= floor.get(place(name), len(EXECUTION_FLOORS))
    ]
    assert wrong == []


def test_the_node_names_runners_only_as_strings() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if name.startswith("flowmesh.") and other.startswith("runners.")
    ]
    assert wrong == []


def test_runners_use_only_what_is_shared() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if name.startswith("runners.") and other.startswith("flowmesh.") and not other.startswith(RUNNERS_MAY_IMPORT)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    ["flowmesh.supervisor", "flowmesh.cli.main", "flowmesh.processes.forkserver", "flowmesh.client", "runners.api"],
)
def test_nothing_heavy_is_imported(module: str) -> None:
    program = f"import {module}, sys; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & set(HEAVY)


def test_the_supervisor_keeps_nothing_in_memory_that_only_its_children_need() -> None:
    program = "import flowmesh.supervisor, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & {"tarfile", "http.server", "http.client", "requests"}


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
