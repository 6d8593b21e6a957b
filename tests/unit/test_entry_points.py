"""Strings that name a module, or something in one, as `module:name` or after `-m`: no type checker sees these."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

ENTRY = re.compile(r"(?<![\w./-])((?:flowmesh|runners)(?:\.\w+)+):([A-Za-z_]\w*)")
RUN_AS_MODULE = re.compile(r'-m[",\s]+((?:flowmesh|runners)(?:\.\w+)+)')


def texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if name.endswith((".py", ".toml", ".md", ".service", ".conf"))]
    return {name: (ROOT / name).read_text() for name in names if (ROOT / name).is_file()}


def module_file(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names_in(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Assign():
                found |= {each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.Import() | ast.ImportFrom():
                found |= {alias.asname or alias.name for alias in node.names}
            case _:
                pass
    return found


def test_each_entry_point_exists() -> None:
    checked, wrong = 0, []
    for where, text in texts().items():
        for module, name in ENTRY.findall(text):
            checked += 1
            path = module_file(module)
            if not path.is_file() or name not in names_in(path):
                wrong.append(f"{where}: {module}:{name}")
    assert checked > 20, "the pattern finds the task types and the entry points of children at least"
    assert wrong == []


def test_each_module_that_is_run_exists() -> None:
    found = [(where, module) for where, text in texts().items() for module in RUN_AS_MODULE.findall(text)]
    assert {"flowmesh.processes.forkserver", "flowmesh.cli.supervisor"} <= {module for _, module in found}
    assert [(where, module) for where, module in found if not module_file(module).is_file()] == []
