"""`flowmesh run` with the node's peer side in the node's place: `python -m tests.kit.fake_run FILE… [key=value…]`."""

import json
import sys

from flowmesh.cli import documents
from flowmesh.cli.local import LocalOptions
from flowmesh.cli.main import guarded
from flowmesh.cli.run import run_all


def main():
    files = [each for each in sys.argv[1:] if "=" not in each]
    options = {name: json.loads(value) for name, value in (each.split("=", 1) for each in sys.argv[1:] if "=" in each)}
    local = LocalOptions(
        results_dir=options.pop("results_dir", None), program=(sys.executable, "-m", "tests.kit.fake_node")
    )
    task_id = options.pop("task_id", None)
    sys.exit(guarded(lambda: run_all([documents.load(each, task_id) for each in files], local, **options)))


if __name__ == "__main__":
    main()
