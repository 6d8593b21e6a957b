"""What exists before a task's child is forked: its folders, its job file, and the fork request. Called in a thread."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from flowmesh.execution.housekeeping.removal import remove_tree
from flowmesh.execution.launch.outputs import empty_outputs
from flowmesh.execution.launch.spool import PRIVATE
from flowmesh.execution.layout import OOM_SCORE_ADJ, Layout
from flowmesh.execution.run import Run
from flowmesh.files.beneath import FOLDER
from flowmesh.files.safe_folder import open_folder
from flowmesh.messages import trace
from flowmesh.messages.job import JOB_FILE, Job
from flowmesh.messages.text import encode_json
from flowmesh.processes import environ, shm
from flowmesh.processes.limits import Limits
from flowmesh.processes.protocol import Fork
from flowmesh.results.job import file_url_template

TASK_ENTRY = "runners.child:main"
Others = Callable[[], Iterable[Path]]
"""Folders inside a task's folder that stay when its outputs are removed."""


def prepare(layout: Layout, run: Run, others: Iterable[Path] = ()) -> Fork:
    """Make the attempt's folders and write its job. Blocks.

    Args:
        others: folders of other tasks inside the task's folder, which stay when its outputs are removed.

    Returns:
        the request for its fork server.

    Raises:
        OSError: a folder cannot be made or written, or was replaced by a link since the task was accepted.
    """
    accepted, children = run.accepted, run.accepted.children
    spool, tmp, out_dir = layout.spool(run.attempt), layout.tmp(run.attempt), Path(accepted.target.out_dir)
    for folder in (spool, tmp):
        try:
            folder.mkdir(mode=PRIVATE)
        except FileExistsError:  # an earlier supervisor died while it launched the task
            remove_tree(folder)
            folder.mkdir(mode=PRIVATE)
    logs = out_dir / "logs"

    def stay() -> list[Path]:
        return [*others, *(each.resolve() for each in (layout.results_dir, layout.state_dir, layout.work_dir))]

    _prepare_out_dir(layout, out_dir, stay, accepted.type.continues_from)
    for child in children:
        _empty_child(Path(child.out_dir), stay)
    gpus = run.gpus
    threads = run.slot.plan.threads
    job = Job(
        attempt=run.attempt,
        task_id=run.task_id,
        task_type=accepted.type.name,
        runner=accepted.type.runner,
        extra=accepted.type.extra,
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
        permits=layout.permits,
        gateway=layout.gateway,
        served=run.served,
        gang=None if run.recorded is None else run.recorded.gang,
    )
    (spool / JOB_FILE).write_bytes(encode_json(job))
    # Last: from now on another task of that user could put a link where we write.
    for given in (spool / JOB_FILE, spool, tmp):
        layout.give(given)
    private_shm = not accepted.type.is_light and not shm.would_hide(
        layout.state_dir, layout.work_dir, out_dir, *(each.out_dir for each in children)
    )
    return Fork(
        attempt=run.attempt,
        target=TASK_ENTRY,
        spool=str(spool),
        cwd=str(layout.work_dir),
        stdout=str(logs / "stdout.log"),
        stderr=str(logs / "stderr.log"),
        env=environ.for_task(
            layout.task_env,
            task_env={**_trace_env(run, layout), **accepted.spec.env},
            tmp_dir=str(tmp),
            threads=threads,
            gpus=gpus,
            mark=layout.mark_of(run.attempt),
        ),
        limits=task_limits(layout, cpus=run.slot.plan.cpus, private_shm=private_shm),
        threads=threads,
        task_id=run.task_id,
    )


def task_limits(layout: Layout, *, cpus: tuple[int, ...] = (), private_shm: bool) -> Limits:
    """What the node's settings give each task.

    Args:
        cpus: empty: any.
        private_shm: whether it may have a /dev/shm of its own, where the settings give one.
    """
    processes, owner = layout.processes, layout.owner
    return Limits(
        memory_max_bytes=processes.task_memory_max_bytes,
        pids_max=processes.task_pids_max,
        cpus=cpus or None,
        oom_score_adj=OOM_SCORE_ADJ,
        nice=processes.task_nice,
        umask=layout.umask,
        uid=None if owner is None else owner.uid,
        gid=None if owner is None else owner.gid,
        groups=() if owner is None else owner.groups,
        private_shm=processes.private_shm and private_shm,
    )


def _empty_child(out_dir: Path, others: Others) -> None:
    """Of a merged child; its folder is made when it has a result."""
    try:
        folder = open_folder(out_dir)
    except FileNotFoundError:
        return
    try:
        empty_outputs(folder, out_dir, others)
    finally:
        os.close(folder)


def _prepare_out_dir(layout: Layout, out_dir: Path, others: Others, stays: Iterable[str]) -> None:
    """By descriptors: the parent folders may belong to another task, which can put links there at any time."""
    held: list[int] = []
    try:
        held.append(whole := open_folder(out_dir, make=True))
        empty_outputs(whole, out_dir, others, stays)
        held.append(_open_part(whole, out_dir / "logs"))
        held.append(_open_part(whole, out_dir / "artifacts"))
        for folder in held:
            layout.give(folder)
    finally:
        for folder in held:
            os.close(folder)


def _open_part(whole: int, path: Path) -> int:
    """Open a folder inside the task's folder; made if it is missing, or if an earlier attempt left a link instead."""
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


def _trace_env(run: Run, layout: Layout) -> dict[str, str]:
    """The task's span for libraries in it; where the node sends none, the span that the task belongs to."""
    parent, _ = run.accepted.message.parent
    own = trace.of_task(layout.mark_of(run.attempt), parent) if layout.traces else parent
    return {} if own is None else own.env
