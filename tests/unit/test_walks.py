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
ALLOWED = {
    ("flowmesh/cli/examples.py", "rglob"): "the package's own examples",
    ("runners/agent/config_files.py", "os.walk"): "the operator's agents folder; links are wanted (a ConfigMap)",
    ("runners/agent/sandbox.py", "tempfile.TemporaryDirectory"): "a mount point: what is in it is in another namespace",
    ("runners/data/patterns.py", "glob.iglob"): "one level for each part of a pattern, as `**` is not given to it",
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
