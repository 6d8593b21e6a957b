"""The folder that a program runs in, what lies in it, and the variables by which the program finds its task."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import msgspec

from flowmesh import progress
from flowmesh.messages.text import encode_json
from flowmesh.processes import environ
from runners.api import BadRequest, Context
from runners.command.start import of_gang
from runners.command.task import Program, Source
from runners.data.download import fetch
from runners.data.reading import Refused
from runners.data.unpack import unpack
from runners.models.sources import local_path

WORK = "work"
CHECKPOINTS = "checkpoints"
_FOR_LIBRARIES = ("PYTHONFAULTHANDLER", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


class Workspace(msgspec.Struct, frozen=True):
    folder: Path
    """What `spec.outputs` is relative to, and where the program starts."""
    inputs: Path
    result: Path
    """Where the program may leave its result, as JSON."""
    fifo: Path
    """The pipe for progress."""
    env: dict[str, str]
    """The program's whole environment, but for FLOWMESH_PROGRESS_FD."""


def make(ctx: Context, spec: Program) -> Workspace:
    """Make the folder and fill it.

    Raises:
        BadRequest: a source is not there, may not be read, or is damaged; or the folder is missing.
        RunnerError: a server is unreachable.
        Cancelled: the node asked the task to stop.
    """
    work = ctx.out_dir / WORK
    work.mkdir(exist_ok=True)
    if spec.archive is not None or spec.files:
        ctx.phase("fetch")
    if spec.archive is not None:
        with_archive = _fetched(ctx, spec.archive, "spec.archive")
        unpack(ctx, with_archive, work, spec.archive.archive_format, "spec.archive")
    for name, source in spec.files.items():
        _place(ctx, work, name, source)
    folder = _folder(ctx, spec, work)
    inputs, result, fifo = (ctx.tmp_dir / name for name in ("inputs.json", "result.json", "progress"))
    inputs.write_bytes(encode_json(spec.inputs))
    os.mkfifo(fifo, 0o600)
    checkpoints = ctx.out_dir / CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    env = {
        **own_environment(),
        "FLOWMESH_TASK_ID": ctx.task_id,
        "FLOWMESH_INPUTS": str(inputs),
        "FLOWMESH_RESULT": str(result),
        "FLOWMESH_OUTPUT_DIR": str(ctx.artifacts_dir),
        "FLOWMESH_CHECKPOINT_DIR": str(checkpoints),
        progress.FIFO: str(fifo),
        **of_gang(ctx),
    }
    return Workspace(folder=folder, inputs=inputs, result=result, fifo=fifo, env=env)


def own_environment() -> dict[str, str]:
    """This process's variables without those that the node sets for its own libraries.

    The environment's interpreter comes first in PATH, so that `python` is the one with its packages.
    """
    env = {name: value for name, value in os.environ.items() if is_own(name, value)}
    own = str(Path(sys.executable).parent)
    paths = env.get("PATH", os.defpath).split(os.pathsep)
    return {**env, "PATH": os.pathsep.join([own, *(path for path in paths if path != own)])}


def is_own(name: str, value: str) -> bool:
    """Whether a variable is not one that the node sets for its own libraries."""
    return environ.SERVER.get(name) != value and name not in _FOR_LIBRARIES


def _folder(ctx: Context, spec: Program, work: Path) -> Path:
    if spec.workdir is None:
        return work
    if not spec.workdir.startswith(("/", "~")):
        folder = work / spec.workdir
        if spec.archive is None:
            folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = local_path(ctx, spec.workdir, "spec.workdir")
    if not folder.is_dir():
        raise BadRequest(f"spec.workdir: there is no folder {spec.workdir!r} for this task; give an existing one")
    return folder


def _fetched(ctx: Context, source: Source, where: str) -> Path:
    """The file of a source, on this machine."""
    if source.url is not None:
        return fetch(ctx, source.url, f"{where}.url", headers=source.headers or None).path
    assert source.path is not None, "checked"
    path = local_path(ctx, source.path, f"{where}.path")
    if not path.is_file():
        raise BadRequest(f"{where}.path: there is no file {source.path!r} on this node")
    return path


def _place(ctx: Context, work: Path, name: str, source: str | Source) -> None:
    """Make one of `spec.files`. It replaces a file of that name from the archive."""
    where = f"spec.files.{name}"
    target = work / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if isinstance(source, str):
            target.write_text(source)
        else:
            with ctx.reach.opened(_fetched(ctx, source, where)) as judged:
                shutil.copyfile(judged, target)
    except Refused as error:
        raise BadRequest(f"{where}: {error}") from None
    except (IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError) as error:
        raise BadRequest(f"{where}: a file and a folder cannot have one name ({error.strerror})") from None
