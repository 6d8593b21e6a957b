"""Runs one command confined: `python -I -S main.py PLAN COMMAND …`, PLAN being the JSON that `sandbox.py` makes.

Two modes. `namespaces`: a minimal file system, a pid namespace, no network. `landlock`: the kernel's file rules and a
filter on sockets, for systems that refuse namespaces. Processes that the command leaves behind are killed when it ends,
on SIGTERM, and when the parent dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kernel  # type: ignore[import-not-found,unused-ignore]
import seccomp  # type: ignore[import-not-found,unused-ignore]

EXIT_NOT_CONFINED = 97
"""The jail could not be built; the command was not run."""
DEVICES = ("null", "zero", "full", "random", "urandom")
TMP_BYTES = 256 * 2**20
LEAST_PID_MAX = 512
NETWORKED = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)


def main() -> int:
    plan, command = json.loads(sys.argv[1]), sys.argv[2:]
    parent = os.getppid()
    os.setsid()
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return EXIT_NOT_CONFINED
    try:
        kernel.become_subreaper()
        child = (_start_in_namespaces if plan["mode"] == "namespaces" else _start_under_landlock)(plan, command)
    except OSError as error:
        return _refuse(error)
    signal.signal(signal.SIGTERM, lambda *_: _leave(child, 128 + signal.SIGTERM))
    status = _wait_for(child)
    _kill_descendants()
    return status


def _start_in_namespaces(plan: dict[str, Any], command: list[str]) -> int:
    uid, gid = os.geteuid(), os.getegid()
    kernel.dumpable()
    flags = kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    kernel.unshare(flags | (0 if plan["network"] else kernel.CLONE_NEWNET))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        _be_init(plan, command, tell)
    os.close(tell)
    with os.fdopen(ready, "rb") as file:
        trouble = file.read()
    if trouble:
        os.waitpid(child, 0)
        raise OSError(1, trouble.decode(errors="replace"))
    return child


def _be_init(plan: dict[str, Any], command: list[str], tell: int) -> NoReturn:
    """The init process of the new pid namespace: when it exits, the kernel kills all others in it."""
    kernel.die_with_parent(signal.SIGKILL)
    status = EXIT_NOT_CONFINED
    try:
        _build_root(plan)
        if not plan["network"]:
            _raise_loopback()
        kernel.forbid_new_privileges()
        kernel.drop_capabilities()
        # With the machine's network, its abstract unix sockets could be reached; without it there are none.
        families = NETWORKED if plan["network"] else (socket.AF_UNIX, *NETWORKED)
        kernel.filter_calls(seccomp.program(families, shares_machine=False))
        os.set_inheritable(tell, False)
        child = os.fork()
        if child == 0:
            _execute(plan, command, tell)
        os.close(tell)
        status = _wait_for(child)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(tell, str(error).encode())
    os._exit(status)


def _build_root(plan: dict[str, Any]) -> None:
    """Mount what the command may see below `plan["root"]`, and pivot to it."""
    root = plan["root"]
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=16m")
    for name, size in (("/tmp", TMP_BYTES), ("/dev", 2**16), ("/dev/shm", TMP_BYTES)):
        Path(root + name).mkdir(parents=True)
        kernel.mount("tmpfs", root + name, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"mode=1777,size={size}")
    for path in plan["readable"]:
        _show(root, path, writable=False)
    for device in DEVICES:
        _bind_device(root, f"/dev/{device}")
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                         ("stderr", "/proc/self/fd/2")):  # fmt: skip
        Path(f"{root}/dev/{link}").symlink_to(target)
    _show(root, plan["work_dir"], writable=True)
    Path(root, "proc").mkdir(exist_ok=True)
    with contextlib.suppress(OSError):  # some containers refuse it; then the command has no /proc
        kernel.mount("proc", f"{root}/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
        _bound_pids(f"{root}/proc", plan["tasks"])
        kernel.make_read_only(f"{root}/proc")  # root could write the machine's settings there without any capability
    old = Path(root, ".old")
    old.mkdir()
    kernel.pivot_root(root, str(old))
    os.chdir("/")
    kernel.unmount("/.old")
    Path("/.old").rmdir()
    kernel.mount("tmpfs", "/", None, 32 | 1 | kernel.MS_BIND | kernel.MS_NOSUID | kernel.MS_NODEV)  # remount, read-only


def _bound_pids(proc: str, most: int) -> None:
    """Limit processes and threads of the namespace. Also for root, to whom RLIMIT_NPROC does not apply."""
    if kernel.release() >= (6, 14):  # before, the setting was machine-wide
        with contextlib.suppress(OSError):
            Path(f"{proc}/sys/kernel/pid_max").write_text(str(max(most, LEAST_PID_MAX)))


def _show(root: str, path: str, *, writable: bool) -> None:
    """Bind a file or folder to the same path in the new root; a link to a folder is recreated as a link."""
    source, target = Path(path), Path(root + path)
    if source.is_symlink() and source.is_dir() and not writable:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(source.readlink())
        return
    if not source.exists():
        return
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(exist_ok=True)
    kernel.mount(path, str(target), None, kernel.MS_BIND | kernel.MS_REC)
    if not writable:
        kernel.make_read_only(str(target))


def _bind_device(root: str, path: str) -> None:
    Path(root + path).touch()
    kernel.mount(path, root + path, None, kernel.MS_BIND)


def _raise_loopback() -> None:
    """Bring up the namespace's own loopback interface."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def _start_under_landlock(plan: dict[str, Any], command: list[str]) -> int:
    version = kernel.landlock_version()
    if version < kernel.LANDLOCK_NEEDED:
        had = f"version {version} of Landlock" if version else "no Landlock"
        raise OSError(38, f"this kernel has {had}; version {kernel.LANDLOCK_NEEDED} (Linux 6.2) is needed")
    confined = version >= kernel.LANDLOCK_OF_SIGNALS
    kernel.undumpable()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.set_inheritable(tell, False)
        kernel.die_with_parent(signal.SIGKILL)
        os.setpgid(0, 0)  # its own group: ours is killed as a whole
        try:
            kernel.forbid_new_privileges()
            kernel.drop_capabilities()
            devices = [f"/dev/{name}" for name in DEVICES]
            kernel.landlock(plan["readable"], [plan["work_dir"], *devices], network=plan["network"])
            families = NETWORKED if plan["network"] else ()
            kernel.filter_calls(seccomp.program(families, shares_machine=True, signals_confined=confined))
            _execute(plan, command, tell)
        except OSError as error:
            os.write(tell, str(error).encode())
            os._exit(EXIT_NOT_CONFINED)
    os.close(tell)
    with os.fdopen(ready, "rb") as file:
        trouble = file.read()
    if trouble:
        os.waitpid(child, 0)
        raise OSError(1, trouble.decode(errors="replace"))
    return child


def _execute(plan: dict[str, Any], command: list[str], tell: int) -> NoReturn:
    """Execute the command. `tell` is closed by a successful exec."""
    os.chdir(plan["work_dir"])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for name, value in plan["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))
    _bound_tasks(plan)
    try:
        os.execvpe(command[0], command, plan["env"])
    except OSError as error:
        os.write(tell, f"{command[0]}: {error.strerror}".encode())
        os._exit(EXIT_NOT_CONFINED)


def _bound_tasks(plan: dict[str, Any]) -> None:
    """Limit processes and threads (not for root): of the namespace, else on top of the user's present ones."""
    there = 0
    if plan["mode"] == "namespaces":
        if kernel.release() < (5, 14):  # before, it counted all of the user's on the machine
            return
    else:
        there = plan["tasks_of_user"]
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    most = there + plan["tasks"]
    bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (bound, bound))


def _wait_for(child: int) -> int:
    """Reap processes until `child` exits; its status as in a shell."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _leave(child: int, status: int) -> NoReturn:
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    _kill_descendants()
    os._exit(status)


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


def _refuse(error: OSError) -> int:
    print(f"jail: {error.strerror or error}", file=sys.stderr)  # noqa: T201 - the supervisor reads stderr
    return EXIT_NOT_CONFINED


if __name__ == "__main__":
    sys.exit(main())
