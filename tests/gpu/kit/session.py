"""The session: installs what is missing, gives each step its seconds, kills one that hangs with all its processes.

The steps run one after another in a worker process. After a hang or a crash a new worker does the remaining ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flowmesh.processes import linux
from tests.gpu.kit import budget, smi, tree
from tests.gpu.kit.install import SetUpError, install
from tests.gpu.kit.report import Report, Row, Status

ROOT = Path(__file__).resolve().parents[3]
GRACE_S = 5.0
"""How long after its time a step may take to end by itself, or a quarter of its time."""
STACKS_S = 0.5
END_S = 5.0
"""Kept of the minutes for the report."""
LOG_TAIL = 3000


class Ended(Exception):
    """Raised by a signal: the run ends here."""


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--out", "--scratch", "--wheels"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--xid", action="store_true")
    options = parser.parse_args()
    try:
        return Session(options).run()
    finally:
        shutil.rmtree(options.scratch, ignore_errors=True)  # the guard may have been killed


class Session:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._ends_at = time.monotonic() + options.minutes * 60 - END_S
        self._report = Report(options.out, {"minutes": options.minutes, "dry": options.dry, "xid": options.xid})
        self._env = dict(os.environ)
        self._worker: Worker | None = None

    def run(self) -> int:
        linux.become_subreaper()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
        try:
            self._prepare()
            self._run_steps()
        except Ended as ended:
            self._stop_worker()
            self._report.end("ended early", str(ended))
            return 1
        except SetUpError as error:
            self._add("install", "the run can begin", Status.FAILED, why=str(error))
            self._report.end("ended early", "it could not begin")
            return 1
        left = self._stop_worker()
        if left:
            self._add("end", "no process is left", Status.FAILED, why="\n".join(left))
        self._report.end("finished")
        self._tell(f"{self._options.out / 'report.md'}: {'all right' if self._report.passed else 'NOT all right'}")
        return 0 if self._report.passed else 1

    def _prepare(self) -> None:
        self._report.doing("install")
        options = self._options
        if not options.dry or options.wheels.is_dir():
            site = options.scratch / "site"
            what = install(ROOT, options.wheels, site)
            self._add("install", "wheels installed into a folder of their own", Status.NOTED, value=what)
            sys.path.insert(1, str(site))
            self._env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(site), self._env.get("PYTHONPATH", "")])
        if options.dry:
            if not (shutil.which("cc") or shutil.which("gcc")):
                raise SetUpError("--dry needs a C compiler for the stub of NVIDIA's library")
            from tests.gpu.kit import dry

            self._env |= dry.prepare(options.scratch)
            os.environ["PATH"] = self._env["PATH"]
        self._env["HF_HUB_OFFLINE"] = "1"

    def _run_steps(self) -> None:
        worker = self._start_worker()
        self._report.head["machine"] |= worker.machine
        shares = worker.shares
        wanted = self._options.only.split(",") if self._options.only else [share.name for share in shares]
        if unknown := set(wanted) - {share.name for share in shares}:
            known = ", ".join(share.name for share in shares)
            self._add("plan", "--only", Status.FAILED, why=f"unknown: {', '.join(unknown)}; there are: {known}")
        postponed = self._run_in_order([share for share in shares if share.name in wanted])
        for share in self._run_in_order(postponed):  # the others may have taken less than they asked for
            left_s = max(0.0, self._ends_at - time.monotonic())
            why = f"no time: it needs {share.least_s:.0f} s, and {left_s:.0f} s were left"
            self._add(share.name, "the whole step", Status.SKIPPED, why=why)

    def _run_in_order(self, shares: list[budget.Share]) -> list[budget.Share]:
        """Run those for which there is time, and return the others."""
        postponed = []
        for at, share in enumerate(shares):
            if seconds := budget.seconds_for(share, shares[at + 1 :], self._ends_at - time.monotonic()):
                self._run_step(share.name, seconds)
            else:
                postponed.append(share)
        return postponed

    def _run_step(self, name: str, seconds: float) -> None:
        self._report.doing(name)
        self._tell(f"{name}: at most {seconds:.0f} s")
        worker = self._worker or self._start_worker()
        began = time.monotonic()
        outcome = worker.run(name, seconds, self._take)
        if outcome is None:
            self._tell(f"{name}: done in {time.monotonic() - began:.1f} s")
            return
        stacks = worker.stacks() if worker.process.poll() is None else ""
        evidence = {
            "where it hung" if stacks else "the worker's log": stacks or _tail(self._options.out / "kit.log"),
            "nodes' log": _tail(self._options.out / "node.log"),
            "nvidia-smi": smi.readings(),
        }
        left = self._stop_worker()
        if left:
            evidence["processes that SIGKILL does not end"] = "\n".join(left)
        self._add(name, "the whole step", Status.FAILED, why=outcome, evidence=evidence)

    def _start_worker(self) -> Worker:
        self._worker = Worker(self._options, self._env)
        return self._worker

    def _stop_worker(self) -> list[str]:
        """End it with everything below this process; returns what is left."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        return tree.kill_below(os.getpid())

    def _take(self, frame: dict[str, Any]) -> None:
        if "machine" in frame:
            self._report.head["machine"] |= frame["machine"]
            self._report.write()
        else:
            row = frame["row"]
            self._add(row.pop("step"), row.pop("what"), Status(row.pop("status")), **row)

    def _add(self, step: str, what: str, status: Status, **more: Any) -> None:
        row = Row(step=step, what=what, status=status, **more)
        self._report.add(row)
        parts = [row.value, row.against and f"against {row.against}", row.aim and f"aim: {row.aim}", row.why]
        self._tell(f"  {status.value:8}{what}: {'; '.join(filter(None, parts))}"[:400])

    @staticmethod
    def _tell(line: str) -> None:
        print(line, flush=True)


class Worker:
    """The process that runs the steps, and the two pipes to it."""

    def __init__(self, options: argparse.Namespace, env: dict[str, str]) -> None:
        self._stacks = options.scratch / "stacks"
        self._stacks.write_text("")
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        command = [sys.executable, "-m", "tests.gpu.kit.worker", str(to_read), str(from_write), str(self._stacks)]
        command += [str(options.out), str(options.scratch), str(int(options.dry)), str(int(options.xid))]
        owner = os.getpid()

        def in_child() -> None:
            linux.die_with_parent(signal.SIGKILL)
            if os.getppid() != owner:
                os._exit(1)

        with open(options.out / "kit.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(to_read, from_write),
                start_new_session=True,
                preexec_fn=in_child,  # noqa: PLW1509 - system calls only
            )
        os.close(to_read)
        os.close(from_write)
        self._to = to_write
        self._from = from_read
        self._buffer = b""
        first = self._frame(time.monotonic() + 60)
        if first is None:
            raise Ended(f"the worker did not start; {_tail(options.out / 'kit.log', 600)}")
        self.machine: dict[str, str] = first["machine"]
        self.shares = [budget.Share(**share) for share in first["shares"]]

    def run(self, name: str, seconds: float, take: Any) -> str | None:
        """Run one step. Returns what went wrong with the process itself; None where it ended the step."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._to, json.dumps({"step": name, "seconds": seconds}).encode() + b"\n")
        deadline = time.monotonic() + seconds + min(GRACE_S, seconds / 4)
        while True:
            frame = self._frame(deadline)
            if frame is None:
                if time.monotonic() >= deadline:
                    return f"it did not end within {seconds:.0f} s: killed with all its processes"
                status = self.process.wait()
                word = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                return f"the process that ran it ended with {word}"
            if "end" in frame:
                return None
            take(frame)

    def stacks(self) -> str:
        """Where all its threads are."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_S)
        return _tail(self._stacks)

    def close(self) -> None:
        for fd in (self._to, self._from):
            with contextlib.suppress(OSError):
                os.close(fd)

    def _frame(self, deadline: float) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                return None
            data = os.read(self._from, 1 << 16)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))


def _end(number: int, _frame: object) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise Ended(f"stopped by {signal.Signals(number).name}")


def _tail(path: Path, characters: int = LOG_TAIL) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - characters))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
