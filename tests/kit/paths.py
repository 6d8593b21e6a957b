"""Where the repository is, for tests that read its files or start programs in it."""

from __future__ import annotations

from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
CONF = ROOT / "conf"
