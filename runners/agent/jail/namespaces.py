"""The jail of namespaces: a minimal file system, with all that is writable in one tmpfs of bounded size.

The first process unshares, mounts that tmpfs (the box) and copies the work folder into it. Its child, the init of the
pid namespace, builds the root in a mount namespace of its own, so that the first process still sees the machine, and
can copy the work folder back when all others are dead.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

import copies  # type: ignore[import-not-found,unused-ignore]
import kernel  # type: ignore[import-not-found,unused-ignore]
from plan import Plan  # type: ignore[import-not-found,unused-ignore]
from seccomp import program  # type: ignore[import-not-found,unused-ignore]

DEVICES = ("null", "zero", "full", "random", "urandom")
WRITABLE_DEVICES = ("null", "full")
"""A mapping of /dev/zero that is shared and writable is memory that no process's RSS shows."""
NETWORKED = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
ROOM_BYTES = 2**20
"""Free in the box even where the work folder is fuller than its bound, so that a command can remove files."""
ROOM_FILES = 256
LEAST_PID_MAX = 512
_BOX = "/.box"
_PARTS = {"work": 0o755, "tmp": 0o1777, "shm": 0o1777}
_NO_DEVICES = kernel.MS_NOSUID | kernel.MS_NODEV
_REMOUNT, _READ_ONLY = 32, 1
_OF_NETWORK = {
    "core/somaxconn": "16",
    "ipv4/tcp_rmem": "4096 65536 131072",
    "ipv4/tcp_wmem": "4096 16384 65536",
}
"""Bounds of a socket's memory, and of connections that nobody accepts: they have no descriptor."""
_OF_USER = {"max_inotify_watches": "4096", "max_inotify_instances": "64", "max_fanotify_groups": "0"}


class Box:
    """The tmpfs, and the work folder's copy in it."""

    def __init__(self, plan: Plan) -> None:
        """Unshare the namespaces and mount the box.

        Raises:
            OSError: this system refuses it, or the work folder cannot be copied.
        """
        self._plan = plan
        uid, gid = os.geteuid(), os.getegid()
        self._real = copies.open_folder(plan.work_dir)
        kernel.dumpable()
        kernel.unshare(
            kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
            | (0 if plan.network else kernel.CLONE_NEWNET)
        )  # fmt: skip
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        kernel.undumpable()
        kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("tmpfs", plan.root, "tmpfs", _NO_DEVICES, "mode=755,size=16m,nr_inodes=16384")
        used, files = copies.usage(self._real) if plan.in_memory else (0, 0)
        size = max(plan.disk_bytes, used + ROOM_BYTES)
        inodes = max(plan.disk_bytes // copies.ENTRY_BYTES, files + ROOM_FILES)
        self.path = plan.root + _BOX
        Path(self.path).mkdir()
        kernel.mount("tmpfs", self.path, "tmpfs", _NO_DEVICES, f"mode=755,size={size},nr_inodes={inodes}")
        for name, mode in _PARTS.items():
            Path(self.path, name).mkdir()
            Path(self.path, name).chmod(mode)
        self._work = copies.open_folder(f"{self.path}/work")
        self._known: copies.Tree = copies.copy_in(self._real, self._work) if plan.in_memory else {}

    def copy_back(self) -> list[str]:
        """Copy the work folder back, after all processes in the jail have ended.

        Returns:
            paths that stayed behind.

        Raises:
            OSError: it could not be copied, for example because the disk is full.
        """
        if not self._plan.in_memory:
            return []
        with copies.scratch(self._real) as scratch:
            back = copies.Back(scratch)
            back.copy(self._work, self._real, self._known)
        return list(back.left)

    def close(self) -> None:
        """Close the folders, in the process that runs the command: one of them leads out of the jail."""
        os.close(self._real)
        os.close(self._work)


def enter(plan: Plan, box: Box) -> None:
    """Confine this process, the init of the new pid namespace: when it exits, the kernel kills all others in it."""
    box.close()
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    _build_root(plan, box.path)
    if not plan.network:
        _raise_loopback()
    kernel.forbid_new_privileges()
    kernel.drop_capabilities()
    if kernel.landlock_version() >= kernel.LANDLOCK_NEEDED:  # one more wall, and devices that are only read
        writable = [plan.work_dir, "/tmp", "/dev/shm", *(f"/dev/{name}" for name in WRITABLE_DEVICES)]
        kernel.landlock(["/"], writable, network=True)
    # With the machine's network, its abstract unix sockets could be reached; without it there are none.
    families = NETWORKED if plan.network else (socket.AF_UNIX, *NETWORKED)
    kernel.filter_calls(program(families, shares_machine=False))


def _build_root(plan: Plan, box: str) -> None:
    """Mount what the command may see below `plan.root`, and pivot to it."""
    root = plan.root
    _bind_part(f"{box}/tmp", f"{root}/tmp")
    Path(f"{root}/dev").mkdir()
    kernel.mount("tmpfs", f"{root}/dev", "tmpfs", _NO_DEVICES, "mode=755,size=65536,nr_inodes=64")
    _bind_part(f"{box}/shm", f"{root}/dev/shm")
    for path in plan.readable:
        _show(root, path)
    for device in DEVICES:
        Path(f"{root}/dev/{device}").touch()
        kernel.mount(f"/dev/{device}", f"{root}/dev/{device}", None, kernel.MS_BIND)
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                         ("stderr", "/proc/self/fd/2")):  # fmt: skip
        Path(f"{root}/dev/{link}").symlink_to(target)
    _remount(f"{root}/dev", _READ_ONLY)
    if plan.in_memory:
        _bind_part(f"{box}/work", root + plan.work_dir)
    else:
        _bind_part(plan.work_dir, root + plan.work_dir)
        kernel.without_set_id(root + plan.work_dir)
    Path(root, "proc").mkdir(exist_ok=True)
    with contextlib.suppress(OSError):  # some containers refuse it; then the command has no /proc
        kernel.mount("proc", f"{root}/proc", "proc", _NO_DEVICES | kernel.MS_NOEXEC)
        _set_bounds(f"{root}/proc", plan)
        kernel.make_read_only(f"{root}/proc")  # root could write the machine's settings there without any capability
    kernel.unmount(box)
    Path(box).rmdir()
    old = Path(root, ".old")
    old.mkdir()
    kernel.pivot_root(root, str(old))
    os.chdir("/")
    kernel.unmount("/.old")
    Path("/.old").rmdir()
    _remount("/", _READ_ONLY)


def _bind_part(source: str, target: str) -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    kernel.mount(source, target, None, kernel.MS_BIND)


def _remount(target: str, flags: int) -> None:
    kernel.mount("tmpfs", target, None, _REMOUNT | kernel.MS_BIND | _NO_DEVICES | flags)


def _set_bounds(proc: str, plan: Plan) -> None:
    """Bounds of the namespaces. They hold for root, too, to whom resource limits like RLIMIT_NPROC do not apply."""
    bounds = {f"user/{name}": value for name, value in _OF_USER.items()}
    if not plan.network:
        bounds |= {f"net/{name}": value for name, value in _OF_NETWORK.items()}
    if kernel.release() >= (6, 14):  # before, it was the whole machine's
        bounds["kernel/pid_max"] = str(max(plan.tasks, LEAST_PID_MAX))
    for name, value in bounds.items():
        with contextlib.suppress(OSError):  # not on this kernel, or not per namespace
            Path(proc, "sys", name).write_text(value)


def _show(root: str, path: str) -> None:
    """Bind a file or folder read-only to the same path in the new root; a link to a folder is recreated as a link."""
    source, target = Path(path), Path(root + path)
    if source.is_symlink() and source.is_dir():
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
    kernel.make_read_only(str(target))


def _raise_loopback() -> None:
    """Bring up the namespace's own loopback interface."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def reap_until(child: int) -> int:
    """Reap processes until `child` exits; its status as in a shell."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
