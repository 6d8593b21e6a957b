"""Runs one command confined: `python -I -S main.py PLAN COMMAND …`, PLAN being the JSON that `sandbox.py` makes.

Two modes. `namespaces`: a minimal file system, a pid namespace, no network. `landlock`: the kernel's file rules and a
filter on sockets, for systems that refuse namespaces. Processes that the command leaves behind are killed when it ends,
on SIGTERM, and when the parent dies. The plan's descriptor `report` gets one JSON object at the end: `refused` (the
command was not run, and why), `left` (paths that were not copied back), `lost` (why copying back failed).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[3]))  # for flowmesh.files
import kernel  # type: ignore[import-not-found,unused-ignore]
import namespaces  # type: ignore[import-not-found,unused-ignore]
from plan import Plan, PlanRefused, parse  # type: ignore[import-not-found,unused-ignore]

EXIT_NOT_CONFINED = 97
"""The jail could not be built; the command was not run."""
NOT_RUN = (OSError, ValueError, OverflowError)


def main() -> int:
    if len(sys.argv) < 3 or not sys.argv[2]:
        return _refuse(-1, "expected a plan and a command")
    try:
        plan = parse(sys.argv[1])
    except PlanRefused as error:
        return _refuse(-1, str(error))
    return _run(plan, sys.argv[2:])


def _run(plan: Plan, command: list[str]) -> int:
    parent = os.getppid()
    os.setsid()
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return EXIT_NOT_CONFINED
    box, child = None, 0
    try:
        if plan.report >= 0:
            os.set_inheritable(plan.report, False)
        for folder in plan.cgroups:
            Path(folder, "cgroup.procs").write_text("0")
        kernel.become_subreaper()
        if plan.mode == "namespaces":
            box = namespaces.Box(plan)
        else:
            _check_landlock()
            kernel.undumpable()
        child = _fork(plan, command, box)
    except NOT_RUN as error:
        return _refuse(plan.report, getattr(error, "strerror", None) or str(error))
    signal.signal(signal.SIGTERM, lambda *_: _kill(child))
    status = namespaces.reap_until(child)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows has bounds, and the number may be another process's
    _kill_descendants()
    report: dict[str, Any] = {}
    if box is not None:
        try:
            report["left"] = box.copy_back()
        except (OSError, RecursionError) as error:
            report["lost"] = str(error)
    _report(plan.report, report)
    return status


def _fork(plan: Plan, command: list[str], box: namespaces.Box | None) -> int:
    """Start the command, in namespaces below an init process.

    Raises:
        OSError: the jail could not be built, or the program cannot be executed.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = EXIT_NOT_CONFINED
        try:
            os.close(ready)
            kernel.die_with_parent(signal.SIGKILL)
            with contextlib.suppress(OSError):  # the kernel shall kill the command for memory, not who copies back
                Path("/proc/self/oom_score_adj").write_text("1000")
            status = _confine(plan, command, box, tell)
        except NOT_RUN as error:
            with contextlib.suppress(OSError):
                os.write(tell, str(error).encode(errors="replace"))
        os._exit(status)
    os.close(tell)
    with os.fdopen(ready, "rb") as file:
        trouble = file.read()
    if trouble:
        os.waitpid(child, 0)
        raise OSError(1, trouble.decode(errors="replace"))
    return child


def _confine(plan: Plan, command: list[str], box: namespaces.Box | None, tell: int) -> int:
    os.set_inheritable(tell, False)
    if box is None:
        _confine_by_rules(plan)
        _execute(plan, command, tell)
    namespaces.enter(plan, box)
    child = os.fork()
    if child == 0:
        _execute(plan, command, tell)
    os.close(tell)
    return namespaces.reap_until(child)


def _confine_by_rules(plan: Plan) -> None:
    os.setpgid(0, 0)  # its own group: ours is killed as a whole
    confined = kernel.landlock_version() >= kernel.LANDLOCK_OF_SIGNALS
    kernel.forbid_new_privileges()
    kernel.drop_capabilities()
    readable = [*plan.readable, *(f"/dev/{name}" for name in namespaces.DEVICES)]
    writable = [plan.work_dir, *(f"/dev/{name}" for name in namespaces.WRITABLE_DEVICES)]
    kernel.landlock(readable, writable, network=plan.network)
    families = namespaces.NETWORKED if plan.network else ()
    kernel.filter_calls(namespaces.program(families, shares_machine=True, signals_confined=confined))


def _check_landlock() -> None:
    version = kernel.landlock_version()
    if version < kernel.LANDLOCK_NEEDED:
        had = f"version {version} of Landlock" if version else "no Landlock"
        raise OSError(38, f"this kernel has {had}; version {kernel.LANDLOCK_NEEDED} (Linux 6.2) is needed")


def _execute(plan: Plan, command: list[str], tell: int) -> NoReturn:
    """Execute the command. `tell` is closed by a successful exec."""
    try:
        os.chdir(plan.work_dir)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for name, value in plan.limits.items():
            _limit(getattr(resource, name), value)
        _bound_tasks(plan)
        os.execvpe(command[0], command, plan.env)
    except NOT_RUN as error:
        os.write(tell, f"{command[0]}: {getattr(error, 'strerror', None) or error}".encode(errors="replace"))
    os._exit(EXIT_NOT_CONFINED)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (bound, bound))


def _bound_tasks(plan: Plan) -> None:
    """Limit processes and threads (not for root): of the namespace, else on top of the user's present ones."""
    if plan.mode == "landlock":
        _limit(resource.RLIMIT_NPROC, plan.tasks_of_user + plan.tasks)
    elif kernel.release() >= (5, 14):  # before, it counted all of the user's on the machine
        _limit(resource.RLIMIT_NPROC, plan.tasks)


def _kill(child: int) -> None:
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)


def _kill_descendants() -> None:
    """Kill all descendants. Orphans become our children, as we are their subreaper, so none escapes.

    Whole process groups are killed, which also ends one that forks faster than we can scan.
    """
    own = os.getpgrp()
    while True:
        for pid, group in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL) if group != own else os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _descendants(root: int) -> list[tuple[int, int]]:
    """Each with its process group."""
    groups: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        groups[int(name)] = int(fields[2])
        children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += [(pid, groups[pid]) for pid in below]
        todo += below
    return found


def _report(descriptor: int, content: dict[str, Any]) -> None:
    if descriptor >= 0:
        with contextlib.suppress(OSError):
            os.write(descriptor, json.dumps(content).encode(errors="replace"))


def _refuse(descriptor: int, why: str) -> int:
    _report(descriptor, {"refused": why})
    print(f"jail: {why}", file=sys.stderr)  # noqa: T201 - for who runs it by hand
    return EXIT_NOT_CONFINED


if __name__ == "__main__":
    sys.exit(main())
