"""Where an attempt's files lie, and what is written before its child exists and read after it is gone."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from flowmesh.errors import ConfigError, ProtocolError
from flowmesh.execution.run import Run
from flowmesh.messages.job import (
    JOB_FILE,
    MAX_OUTCOME_BYTES,
    OUTCOME_FILE,
    ArchiveRequest,
    Fault,
    Job,
    Outcome,
    UploadRequest,
)
from flowmesh.processes import environ, shm
from flowmesh.processes.limits import Limits
from flowmesh.processes.linux import FOLDER, open_folder
from flowmesh.processes.protocol import Fork
from flowmesh.results.files import read_regular
from flowmesh.results.job import file_url_template
from flowmesh.settings_schema import ProcessesSettings
from flowmesh.tasks.types import LIGHT

SMALL_BYTES = 64 * 1024
BASELINE_FILE = "gpus.json"
"""In the attempt's spool: its GPUs' baselines, for a supervisor that adopts the task."""
_OF_A_RUN = frozenset({JOB_FILE, OUTCOME_FILE, BASELINE_FILE})
"""What lies in an attempt's spool before it is delivered."""
TASK_ENTRY = "runners.child:main"
_PRIVATE = 0o700
OOM_SCORE_ADJ = 500
"""A task dies of memory before its node does."""


class Owner(msgspec.Struct, frozen=True):
    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str

    @classmethod
    def named(cls, name: str) -> Owner:
        """The user of that name.

        Raises:
            ConfigError: there is none, or we may not become it.
        """
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            raise ConfigError(f"processes.task_user: there is no user {name!r} on this machine") from None
        if os.geteuid() not in (0, found.pw_uid):
            raise ConfigError(f"processes.task_user: only root can run tasks as {name!r}; leave it out, or run as root")
        groups = tuple(os.getgrouplist(name, found.pw_gid))
        return cls(found.pw_uid, found.pw_gid, groups, name, found.pw_dir)


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The node's folders."""

    state_dir: Path
    results_dir: Path
    work_dir: Path
    """Where tasks start: relative paths in their documents are relative to it."""
    mark: str
    """This node's own word in the environment of everything that its tasks execute."""
    base_env: dict[str, str]
    cgroup: Path | None
    processes: ProcessesSettings
    limits: dict[str, Any] = {}
    """[runners]: what runners obey."""
    owner: Owner | None = None
    """Who tasks run as, where that is not the node's own user."""

    @property
    def run_dir(self) -> Path:
        return self.state_dir / "run"

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "log"

    @property
    def cache_dir(self) -> Path:
        return self.state_dir / "cache"

    def spool(self, attempt: int) -> Path:
        """What passes between the node and the attempt's children."""
        return self.state_dir / "spool" / str(attempt)

    def tmp(self, attempt: int) -> Path:
        """The attempt's TMPDIR. Short: sockets are made below it, and their paths are bounded."""
        return self.state_dir / "tmp" / str(attempt)

    def mark_of(self, attempt: int) -> str:
        return f"{self.mark}:{attempt}"


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """An Outcome without its result, which may be large and is not the supervisor's business."""

    attempt: int
    ok: bool
    fault: Fault | None = None
    message: str = ""
    detail: str = ""
    archives: tuple[ArchiveRequest, ...] = ()
    uploads: tuple[UploadRequest, ...] = ()
    phases: dict[str, float] = {}


_head_decoder = msgspec.json.Decoder(_Head)
_outcome_decoder = msgspec.json.Decoder(Outcome)


def prepare(layout: Layout, run: Run) -> Fork:
    """Make the attempt's folders and its job, and say how its child is to be made.

    Raises:
        OSError: a folder cannot be made or written, or is not where it was when the task was accepted.
    """
    accepted, children = run.accepted, run.accepted.children
    spool, tmp, out_dir = layout.spool(run.attempt), layout.tmp(run.attempt), Path(accepted.target.out_dir)
    for folder in (spool, tmp):
        try:
            folder.mkdir(mode=_PRIVATE)
        except FileExistsError:  # launched before, by a supervisor that died over it
            remove_tree(folder)
            folder.mkdir(mode=_PRIVATE)
    logs = out_dir / "logs"
    _prepare_out_dir(layout, out_dir)
    gpus = run.gpus
    threads = run.slot.plan.threads
    job = Job(
        attempt=run.attempt,
        task_id=run.task_id,
        task_type=accepted.type.name,
        runner=accepted.type.runner,
        task=accepted.task,
        out_dir=str(out_dir),
        results_dir=str(layout.results_dir),
        cache_dir=str(layout.cache_dir),
        tmp_dir=str(tmp),
        gpus=gpus,
        threads=threads,
        delivers_http=accepted.delivers_http,
        file_url=file_url_template(accepted.output, run.task_id),
        child_dirs={child.task_id: child.out_dir for child in children},
        limits=layout.limits,
    )
    (spool / JOB_FILE).write_bytes(msgspec.json.encode(job))
    for folder in (spool, tmp):  # only now: another task of that user could have put a link where we write
        give(layout, folder)
    wants = layout.processes
    return Fork(
        attempt=run.attempt,
        target=TASK_ENTRY,
        spool=str(spool),
        cwd=str(layout.work_dir),
        stdout=str(logs / "stdout.log"),
        stderr=str(logs / "stderr.log"),
        env=environ.for_task(
            _own_home(layout),
            task_env=accepted.spec.env,
            tmp_dir=str(tmp),
            threads=threads,
            gpus=gpus,
            mark=layout.mark_of(run.attempt),
        ),
        limits=Limits(
            memory_max_bytes=wants.task_memory_max_bytes,
            pids_max=wants.task_pids_max,
            cpus=run.slot.plan.cpus or None,
            oom_score_adj=OOM_SCORE_ADJ,
            nice=wants.task_nice,
            uid=None if layout.owner is None else layout.owner.uid,
            gid=None if layout.owner is None else layout.owner.gid,
            groups=() if layout.owner is None else layout.owner.groups,
            private_shm=wants.private_shm
            and accepted.type.environment != LIGHT
            and not shm.would_hide(layout.state_dir, layout.work_dir, out_dir, *(each.out_dir for each in children)),
        ),
        threads=threads,
    )


def _prepare_out_dir(layout: Layout, out_dir: Path) -> None:
    """By descriptors: its parents may be another task's, who puts links there whenever it likes."""
    held: list[int] = []
    try:
        held.append(whole := open_folder(out_dir, make=True))
        held.append(logs := _open_part(whole, out_dir / "logs"))
        held.append(_open_part(whole, out_dir / "artifacts"))
        for folder, name in ((whole, "responses.json"), (logs, "stdout.log"), (logs, "stderr.log")):
            with contextlib.suppress(FileNotFoundError):  # an earlier attempt's
                os.unlink(name, dir_fd=folder)
        for folder in held:
            give(layout, folder)
    finally:
        for folder in held:
            os.close(folder)


def _open_part(whole: int, path: Path) -> int:
    """A folder in the task's own, made where there is none, or only a link that an earlier attempt left."""
    try:
        try:
            os.mkdir(path.name, dir_fd=whole)
        except FileExistsError:
            if stat.S_ISLNK(os.stat(path.name, dir_fd=whole, follow_symlinks=False).st_mode):
                os.unlink(path.name, dir_fd=whole)
                os.mkdir(path.name, dir_fd=whole)
        return os.open(path.name, FOLDER, dir_fd=whole)
    except OSError as error:
        error.filename = str(path)
        raise


def _own_home(layout: Layout) -> dict[str, str]:
    owner = layout.owner
    if owner is None:
        return layout.base_env
    return {**layout.base_env, "HOME": owner.home, "USER": owner.name, "LOGNAME": owner.name}


def give(layout: Layout, folder: Path | int) -> None:
    """Let the user that tasks run as write there.

    Args:
        folder: one that no task could have replaced, or its descriptor.
    """
    if layout.owner is not None:
        os.chown(folder, layout.owner.uid, layout.owner.gid)


def taken_back(layout: Layout, attempt: int) -> bool:
    """Have the spool folder be the node's alone again. False where the task has left there what is none of its.

    Quick enough for the loop.
    """
    spool = layout.spool(attempt)
    try:
        status = spool.lstat()
        if not stat.S_ISDIR(status.st_mode):
            remove_tree(spool)
            return True
        if status.st_uid != os.geteuid():
            os.chown(spool, os.geteuid(), os.getegid(), follow_symlinks=False)
        if stat.S_IMODE(status.st_mode) != _PRIVATE:
            spool.chmod(_PRIVATE)
        with os.scandir(spool) as entries:
            return all(entry.name in _OF_A_RUN for entry in entries)
    except FileNotFoundError:  # it was never launched
        return True
    except OSError as error:
        logger.bind(path=str(spool)).warning("a task's spool folder could not be taken back: {}", error)
        return False


def remove_strays(spool: Path) -> None:
    """Remove what would be taken for a note of the node's, or of its delivery child's. The rest of the end goes on."""
    try:
        for path in list(spool.iterdir()):
            if path.name not in _OF_A_RUN:
                remove_tree(path)
    except OSError as error:
        logger.bind(path=str(spool)).warning("what a task left in its spool folder stays there: {}", error)


def outcome_is_small(spool: Path) -> bool:
    try:
        return (spool / OUTCOME_FILE).lstat().st_size <= SMALL_BYTES
    except OSError:
        return True


def read_outcome(spool: Path, limit_bytes: int = MAX_OUTCOME_BYTES) -> Outcome | None:
    """What the child left (of a large one without its result); None where it left nothing.

    Raises:
        ProtocolError: what it left is no outcome, or over the limit.
    """
    try:
        data = read_regular(spool / OUTCOME_FILE, limit_bytes)
        if len(data) <= SMALL_BYTES:
            return _outcome_decoder.decode(data)
        head = _head_decoder.decode(data)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the child's {OUTCOME_FILE} cannot be read: {error}") from error
    return Outcome(**{field: getattr(head, field) for field in head.__struct_fields__})


def usage(run: Run) -> dict[str, Any]:
    """What the run used, as far as the kernel counts it for its first process and those that it waited for."""
    if run.exit is None:
        return {}
    return {
        "cpu_seconds": round(run.exit.user_cpu_s + run.exit.system_cpu_s, 6),
        "peak_rss_bytes": run.exit.peak_rss_bytes,
        "processes_swept": run.exit.swept,
        "gone_ms": run.exit.gone_ms,
    }


def removed_empty(path: Path, but: Iterable[str] = ()) -> bool:
    """Remove a folder that holds nothing but these small files; False where it holds more, and the files may be gone.

    Quick enough for the loop.
    """
    try:
        for name in but:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}/{name}")  # noqa: PTH108
        os.rmdir(path)  # noqa: PTH106
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def remove_tree(path: Path) -> None:
    """Remove a folder of ours with all that a task left in it. What cannot be removed is told, and left."""

    def tell(_function: object, name: str, _info: object) -> None:
        if not os.path.lexists(name):
            return
        logger.bind(path=name).warning("could not be removed")

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=tell)
    else:  # rmtree would open a pipe, and wait
        path.unlink(missing_ok=True)
