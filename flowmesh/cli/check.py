"""`flowmesh-supervisor --check`: prints the settings, their origins, and the task types the node would offer."""

from __future__ import annotations

import contextlib
import json
import os

from flowmesh.errors import EXIT_OK
from flowmesh.settings.load import Loaded, describe
from flowmesh.settings.paths import results_dir, state_dir
from flowmesh.startup import environments
from flowmesh.startup.state_dir import check_sockets
from flowmesh.tasks.journal_db import JOURNAL_FILE, check_version


def report(loaded: Loaded, *, as_json: bool) -> int:
    """Print the report.

    Raises:
        ConfigError: the settings are valid by themselves, but cannot be used on this machine.
        JournalError: this version cannot use the node's journal.
    """
    catalogue, _ = environments.plan(loaded.settings)
    rows = describe(loaded)
    state = state_dir(loaded.settings, os.environ)
    check_sockets(state, loaded.settings.environments)
    with contextlib.suppress(PermissionError):  # of another user: only the node itself can check it
        check_version(state / JOURNAL_FILE)
    folders = {"results": str(results_dir(loaded.settings)), "state": str(state)}
    if as_json:
        settings = {row.key: {"value": row.value, "origin": row.origin} for row in rows}
        offered = sorted(catalogue.offered)
        print(
            json.dumps(
                {"ok": True, "settings": settings, "task_types": offered, "missing": catalogue.missing, **folders}
            )
        )
        return EXIT_OK
    width = max(len(row.key) for row in rows)
    for row in rows:
        origin = "" if row.origin == "default" else f"   ({row.origin})"
        print(f"{row.key:<{width}}  {row.text}{origin}")
    print(f"\nresults   {folders['results']}\nstate     {folders['state']}")
    print(f"offers    {', '.join(sorted(catalogue.offered))}")
    for name, why in sorted(catalogue.missing.items()):
        print(f"missing   {name}: {why}")
    if loaded.settings.redis.url is None:
        print("note      redis.url is not set: set REDIS_URL, or redis.url in the file, before the node starts")
    print("The settings are valid.")
    return EXIT_OK
