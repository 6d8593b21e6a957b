"""Small wheels, written on the spot."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path


def write_wheel(
    folder: Path, name: str, version: str, *, needs: tuple[str, ...] = (), files: Mapping[str, str] | None = None
) -> Path:
    """
    Args:
        needs: its requirements.
        files: what it installs, text by path; None: a package of its name.
    """
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in needs]
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in (files or {f"{name}/__init__.py": ""}).items():
            archive.writestr(each, text)
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path
