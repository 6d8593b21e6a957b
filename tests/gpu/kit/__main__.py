"""The command: packs wheels, or installs them, runs the session and outlives it. Needs only the standard library.

The session can be killed at any time: this process then ends what it left and says so in the report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from flowmesh.processes import linux
from tests.gpu.kit import tree
from tests.gpu.kit.report import end_early

ROOT = Path(__file__).resolve().parents[3]
WHEELS = "gpu-wheels"
LONGEST_PLACE = 40
END_GRACE_S = 15.0
"""How long the session may take to end its steps and the report after a signal."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together (default 8)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-report"), help="folder of the report (default gpu-report)"
    )
    parser.add_argument("--wheels", type=Path, default=ROOT / WHEELS, help=f"folder of --pack (default {WHEELS})")
    parser.add_argument("--only", metavar="STEP[,STEP]", help="only these steps")
    parser.add_argument("--xid", action="store_true", help="also cause an illegal access and an out of memory")
    parser.add_argument("--dry", action="store_true", help="with a stub of the driver, on the CPU")
    parser.add_argument("--pack", metavar="DIR", type=Path, help="download the wheels for such a machine, then end")
    options = parser.parse_args()
    if options.pack:
        from tests.gpu.kit.pack import pack

        return pack(ROOT, options.pack)
    if options.minutes <= 0:
        parser.error("--minutes: give more than 0")
    return Guard(options).run()


class Guard:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._out = options.out.absolute()
        self._scratch = Path(tempfile.mkdtemp(prefix="fm-gpu-", dir=_short_place()))
        self._session: subprocess.Popen[bytes] | None = None
        self._signal = 0

    def run(self) -> int:
        linux.become_subreaper()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        try:
            status = self._run_session()
        finally:
            left = tree.kill_below(os.getpid())
            shutil.rmtree(self._scratch, ignore_errors=True)
        if left:
            print(f"these processes cannot be ended: {'; '.join(left)}", file=sys.stderr)
            return 1
        return status

    def _run_session(self) -> int:
        options = self._options
        command = [sys.executable, "-m", "tests.gpu.kit.session", "--out", str(self._out)]
        command += ["--scratch", str(self._scratch), "--minutes", str(options.minutes)]
        command += ["--wheels", str(options.wheels.absolute())]
        command += [f"--{name}" for name in ("dry", "xid") if getattr(options, name)]
        command += ["--only", options.only] if options.only else []
        owner = os.getpid()

        def in_child() -> None:
            linux.die_with_parent(signal.SIGTERM)
            if os.getppid() != owner:
                os._exit(1)

        self._session = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self._scratch)},
            start_new_session=True,
            preexec_fn=in_child,  # noqa: PLW1509 - system calls only
        )
        if self._signal:
            self._session.terminate()
        try:
            status = self._wait(self._session)
        except subprocess.TimeoutExpired:
            self._session.kill()
            status = self._session.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with {status}"
        end_early(self._out, f"the session ended {how}")
        return status if 0 <= status < 3 else 1

    def _wait(self, session: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return session.wait(END_GRACE_S)
            except subprocess.TimeoutExpired:
                if self._signal:
                    raise

    def _pass_on(self, number: int, _frame: object) -> None:
        self._signal = number
        if self._session is not None:
            self._session.send_signal(signal.SIGTERM)


def _short_place() -> str:
    """Where temporary files go; /tmp if that path is too long for the nodes' unix sockets."""
    place = tempfile.gettempdir()
    return place if len(place) <= LONGEST_PLACE else "/tmp"


if __name__ == "__main__":
    sys.exit(main())
