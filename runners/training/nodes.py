"""The folder that the members of a training on several nodes share.

The first member's folder is the task's. Where all members see it (one RESULTS_DIR), all ranks write there, as a group
on one node does. Else each member has a folder of its own, and only the first one's has checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from runners.api import Context, RunnerError
from runners.gang import gang_of
from runners.training.progress import Agreement
from runners.training.ranks import Place

MARK = ".group"
"""A file in the task's folder that names the group whose ranks look for it."""


def task_folder(ctx: Context) -> Path:
    """The folder of the first member, which another one sees where the nodes share RESULTS_DIR."""
    gang = gang_of(ctx)
    if gang is None or gang.rank == 0 or ctx.out_dir.name != ctx.task_id:
        return ctx.out_dir
    return ctx.out_dir.with_name(gang.task_id)


def share_folder(ctx: Context, place: Place, agree: Agreement) -> bool:
    """Have all ranks of a gang write into the task's folder, if all of them see it. A collective.

    Returns:
        whether they do.
    """
    gang, folder = gang_of(ctx), task_folder(ctx)
    assert gang is not None, "the caller has looked"
    if place.leads:
        (folder / MARK).write_text(gang.rdzv_id)
    agree(0)  # it is written
    unseen = agree(int(not _is_marked(folder, gang.rdzv_id)))
    if place.leads:
        (folder / MARK).unlink()
    if unseen:
        return False
    ctx.out_dir = folder
    return True


def _is_marked(folder: Path, name: str) -> bool:
    try:
        return (folder / MARK).read_text() == name
    except OSError:
        return False


def check_shared(sharding: str, *, shared: bool) -> None:
    """Raises RunnerError where ranks on several nodes would each write a part of a checkpoint, and share no folder.

    Args:
        sharding: its name.
    """
    if not shared and sharding.startswith(("deepspeed", "fsdp")):
        raise RunnerError(
            f"spec.nodes: {sharding} writes a part of each checkpoint on each node, and the nodes do not share "
            "RESULTS_DIR; share it, or set training.auto_deepspeed to false"
        )
