"""Where the repository is, for tests that read its files or start programs in it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from flowmesh.messages.job import Permits

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
CONF = ROOT / "conf"
PERMITS = Permits(read_roots=(tempfile.gettempdir(), str(ROOT), "/no*"), local_hosts=("*",))
"""What the tests' nodes allow: their files lie in both folders (in /no/such lies nothing), and their servers listen on
loopback."""
