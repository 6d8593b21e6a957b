"""Folders that tasks or downloads wrote are walked by `flowmesh.files` only: a bare walk needs its reason here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BARE = {
    "os.walk",
    "os.fwalk",
    "os.removedirs",
    "shutil.rmtree",
    "shutil.copytree",
    "shutil.move",
    "shutil.make_archive",
    "shutil.unpack_archive",
    "glob.glob",
    "glob.iglob",
    "tempfile.TemporaryDirectory",
}
METHODS = {"rglob", "extractall"}
LISTINGS = {"scandir", "listdir", "iterdir"}
ALLOWED = {
    ("flowmesh/cli/examples.py", "rglob"): "the package's own examples",
    ("runners/agent/config_files.py", "os.walk"): "the operator's agents folder; links are wanted (a ConfigMap)",
    ("runners/agent/sandbox.py", "tempfile.TemporaryDirectory"): "a mount point: what is in it is in another namespace",
    ("runners/data/patterns.py", "glob.iglob"): "one level for each part of a pattern, as `**` is not given to it",
}
LOOPS = {
    ("flowmesh/execution/housekeeping/stack_dump.py", "save"): "processes in /proc",
    ("flowmesh/execution/recovery.py", "_left_folders"): "one level, which only the node writes; renamed, not entered",
    ("flowmesh/processes/shm.py", "_used"): "processes in /proc",
    ("runners/ahead.py", "files_of"): "two levels; each file is judged when it is read, and nothing is changed",
    ("runners/agent/jail/copies.py", "copy_in"): "beneath an opened folder, at most DEEPEST deep; no link, no mount",
    ("runners/agent/jail/copies.py", "usage"): "beneath an opened folder, at most DEEPEST deep; no link, no mount",
    ("runners/agent/jail/main.py", "_kill_descendants"): "processes in /proc",
    ("runners/agent/usage.py", "_links"): "processes in /proc",
    ("runners/agent/usage.py", "descendants"): "processes in /proc",
    ("runners/command/script.py", "not_alike"): "one level of each folder that Python imports from",
    ("runners/data/reading.py", "check_folder"): "follows links on purpose, and judges where each leads",
    ("runners/models/files.py", "_levels"): "DEPTH levels, no link; nothing is changed",
}


def calls(path: Path) -> Iterator[str]:
    """The bare walks that a module calls, by what it imported them as."""
    tree = ast.parse(path.read_text())
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if f"{module}.{name}" in BARE:
                yield f"{module}.{name}"
            case ast.Attribute(attr=name) if name in METHODS:
                yield name
            case ast.Name(id=name) if names.get(name) in BARE:
                yield names[name]
            case ast.Call(func=ast.Attribute(attr="glob"), args=[ast.Constant(value=str(text)), *_]) if "**" in text:
                yield "rglob"
            case ast.List(elts=[ast.Constant(value="rm" | "cp" | "mv" | "find" | "du"), *_]):
                yield "a program that walks"
            case _:
                pass


def loops(path: Path) -> Iterator[str]:
    """The functions of a module that list folders again and again: in a loop, or by calling themselves."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    listing = {each.name for each in functions if called(each) & LISTINGS} | LISTINGS
    for each in functions:
        repeated: set[str] = set()
        for node in ast.walk(each):
            if isinstance(node, ast.While):
                repeated |= called(node)
            elif isinstance(node, ast.For):
                repeated |= {name for inner in node.body for name in called(inner)}
        if repeated & listing or (called(each) & listing and each.name in called(each)):
            yield each.name


def called(node: ast.AST) -> set[str]:
    """Names of what is called in it, without what they are an attribute of."""
    found = set()
    for call in ast.walk(node):
        match call:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                found.add(name)
            case _:
                pass
    return found


def test_no_bare_loop_over_what_folders_hold() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for top in ("flowmesh", "runners")
        for path in (ROOT / top).rglob("*.py")
        if path.parent != ROOT / "flowmesh" / "files"
        for name in loops(path)
    }
    assert found - LOOPS.keys() == set(), "use flowmesh.files (walk, removal, folder), or give the reason here"
    assert LOOPS.keys() - found == set(), "these are gone: remove them here"


def test_no_bare_walk_of_a_folder_that_a_task_may_have_written() -> None:
    found = {
        (str(path.relative_to(ROOT)), call)
        for top in ("flowmesh", "runners")
        for path in (ROOT / top).rglob("*.py")
        for call in calls(path)
    }
    assert found - ALLOWED.keys() == set(), "use flowmesh.files (walk, removal, folder), or give the reason here"
    assert ALLOWED.keys() - found == set(), "these are gone: remove them here"


def test_each_kind_of_bare_walk_is_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "import os, shutil, glob\nfrom shutil import rmtree as away\nfrom tempfile import TemporaryDirectory\n"
        "os.walk('a'); shutil.copytree('a', 'b'); away('a'); glob.glob('a'); TemporaryDirectory()\n"
        "each.rglob('*'); each.glob('**/*.py'); pack.extractall('a'); run(['rm', '-rf', each])\n"
    )
    wanted = ["os.walk", "shutil.copytree", "shutil.rmtree", "glob.glob", "tempfile.TemporaryDirectory"]
    assert sorted(calls(module)) == sorted([*wanted, "rglob", "rglob", "extractall", "a program that walks"])


def test_each_kind_of_loop_is_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "def names(at):\n    return os.listdir(at)\n"
        "def one(at):\n    for each in at.iterdir():\n        print(each)\n"
        "def queue(at):\n    while at:\n        at += names(at.pop())\n"
        "def levels(at):\n    for _ in range(3):\n        at = [each for one in at for each in one.iterdir()]\n"
        "def recursion(at):\n    for each in os.scandir(at):\n        recursion(each)\n"
    )
    assert list(loops(module)) == ["queue", "levels", "recursion"]
