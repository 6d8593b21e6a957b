"""Where a run starts: the model, other weights, or a trainer's checkpoint; and which checkpoints are complete.

A process killed while writing leaves an incomplete checkpoint. It is skipped with a warning for the one before it.
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from runners.api import BadRequest, Context, RunnerError
from runners.models.adapters import CONFIG, base_of, warn_other_base
from runners.models.checkpoints import Loaded
from runners.models.code import check_data_only
from runners.models.files import find_root
from runners.models.sources import Source, check_model_folder, local_folder, local_path, resolve_identifier
from runners.training.nodes import task_folder
from runners.training.plan import Plan

STATE_FILE = "trainer_state.json"
FSDP_WEIGHTS = "pytorch_model_fsdp.bin"
"""Accelerate's full copy of a model sharded by FSDP. The optimizer's state beside it has another name, too."""
ZERO_PARTS = "global_step*/*zero_pp_rank_*_optim_states.pt"
"""DeepSpeed's files of the optimizer's state, one for each rank that wrote it."""
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from."""

    weights: Source
    """The model before this run; also the reference model of dpo, kto, grpo, rloo and ppo."""
    adapter: Path | None = None
    """A LoRA adapter to continue (or, where all weights are trained, to merge first)."""
    resume: Path | None = None
    """A trainer's checkpoint: continue at its step, with its optimizer state."""


def start_of(plan: Plan, ctx: Context, loaded: Loaded | None) -> Start:
    """Where this run starts.

    The task's own checkpoints come first: they exist only after an earlier attempt. Then `resume_from_path`,
    then `checkpoint.load`, then `model.source`.

    Args:
        loaded: what `checkpoint.load` came to.

    Raises:
        BadRequest: what the task names is no model and no checkpoint.
    """
    resume: Path | None = None
    adapter: Path | None = None
    weights: Source | None = None
    if own := last_whole(task_folder(ctx) / "checkpoints", ctx):
        resume = own
        ctx.log.info("resuming an earlier attempt checkpoint=%s", own.name)
    elif plan.training.resume_from_path is not None:
        where = "spec.training.resume_from_path"
        named = plan.training.resume_from_path
        resume = _checkpoint_at(local_path(ctx, named, where), ctx, where)
        check_data_only(ctx, local_folder(ctx, resume, named, where), where)
    if loaded is not None:
        folder = local_folder(ctx, contents(loaded), loaded.shown, loaded.where)
        if _is_trainers(folder):
            if resume is None:
                resume = _checkpoint_at(folder, ctx, loaded.where)
                check_data_only(ctx, resume, loaded.where)
        elif (folder / "adapter_config.json").is_file():
            adapter = folder
        else:
            check_model_folder(folder, loaded.where)
            weights = Source(path=str(folder), revision=None, shown=loaded.shown, where=loaded.where)
    if resume is not None:
        _check_fits(resume, plan)
    for given in (resume, adapter):
        if given is not None and plan.lora is not None:
            _check_lora(given, plan, ctx)
    base = weights or _source(plan, ctx, resume)
    for given in (resume, adapter):
        if given is not None and (given / CONFIG).is_file():
            warn_other_base(ctx, given.name, base_of(json.loads((given / CONFIG).read_text())), base)
    return Start(weights=base, adapter=adapter, resume=resume)


def _source(plan: Plan, ctx: Context, resume: Path | None) -> Source:
    source = plan.model.source
    where = "spec.model.source"
    if source is not None:
        return resolve_identifier(ctx, source.identifier, source.revision, f"{where}.identifier")
    if resume is not None and not plan.kind.reference and (resume / "config.json").is_file():
        return Source(path=str(resume), revision=None, shown=resume.name, where=where)
    needs = f"; {plan.kind.task_type} compares with it" if resume is not None and plan.kind.reference else ""
    raise BadRequest(f"{where}: missing; give {{type: huggingface, identifier: …}}{needs}")


def contents(loaded: Loaded) -> Path:
    """The part of a folder to continue from: a task's result, else its checkpoints, else an archive's top folder.

    Raises:
        BadRequest: there is nothing of the kind.
    """
    folder = loaded.folder
    for candidate in (folder, folder / "final_lora", folder / "final_model", folder / "checkpoints"):
        if _is_trainers(candidate) or any(
            (candidate / name).is_file() for name in ("adapter_config.json", "config.json")
        ):
            return candidate
    try:
        return find_root(folder, "adapter_config.json", "adapter", loaded.where)
    except BadRequest:
        return find_root(folder, "config.json", "model", loaded.where)


def _is_trainers(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() or any(steps(folder))


def _checkpoint_at(path: Path, ctx: Context, where: str) -> Path:
    """`path` itself where it is a checkpoint, else the last complete one in it or in its checkpoints/."""
    if not path.is_dir():
        raise BadRequest(f"{where}: there is no folder {str(path)!r} on this node")
    if (path / STATE_FILE).is_file() or _NAME.fullmatch(path.name):
        if reason := torn(path):
            raise BadRequest(f"{where}: {str(path)!r} is no whole checkpoint: {reason}")
        return path
    for folder in (path, path / "checkpoints"):
        if found := last_whole(folder, ctx):
            return found
    raise BadRequest(f"{where}: {str(path)!r} holds no whole checkpoint-N folder")


def _check_fits(resume: Path, plan: Plan) -> None:
    """Raises BadRequest unless checkpoint and task agree on LoRA or full training."""
    is_adapter = (resume / "adapter_config.json").is_file()
    if is_adapter and plan.lora is None:
        raise BadRequest(f"spec.lora: {resume.name} is a LoRA run's checkpoint; this task trains all weights")
    if plan.lora is not None and (resume / "config.json").is_file() and not is_adapter:
        raise BadRequest(f"spec.lora: {resume.name} is the checkpoint of a run that trained all weights")


_LORA = {"r": "r", "alpha": "lora_alpha", "bias": "bias", "use_rslora": "use_rslora"}


def _check_lora(folder: Path, plan: Plan, ctx: Context) -> None:
    """Raises BadRequest where spec.lora contradicts the adapter to continue."""
    try:
        there = json.loads((folder / CONFIG).read_text())
        if not isinstance(there, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise BadRequest(f"spec.checkpoint.load: {folder.name}/{CONFIG}: {error}") from None
    for name, value in ((name, getattr(plan.lora, name)) for name in ctx.spec.get("lora") or {} if name in _LORA):
        if there.get(_LORA[name], value) != value:
            has = there[_LORA[name]]
            raise BadRequest(f"spec.lora.{name}: {value!r}, but the adapter in {folder.name} has {has!r}; leave it out")


def last_whole(folder: Path, ctx: Context) -> Path | None:
    """The latest complete checkpoint-N in `folder`. Later incomplete ones are skipped with a warning."""
    for _, path in sorted(steps(folder), reverse=True):
        reason = torn(path)
        if not reason:
            return path
        ctx.log.warning("skipped incomplete %s: %s", path.name, reason)
    return None


def step_of(checkpoint: Path) -> int:
    """The step after which `checkpoint` was written."""
    return int(json.loads((checkpoint / STATE_FILE).read_text())["global_step"])


def check_world(checkpoint: Path, world: int) -> None:
    """Raises RunnerError where a checkpoint can only be continued by as many ranks as have written it."""
    parts = len(list(checkpoint.glob(ZERO_PARTS)))
    if parts not in (0, world):
        raise RunnerError(
            f"spec.training.deepspeed: {checkpoint.name} was written by {parts} ranks, and this run has {world}: ZeRO "
            "cannot divide it again; run it on as many nodes and GPUs, or under another task id"
        )


def steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in found if match]


def torn(folder: Path) -> str:
    """Why `folder` is incomplete; empty where it is complete. Reads headers and sizes, not the weights."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        step = int(state["global_step"])
    except FileNotFoundError:
        return f"no {STATE_FILE}"
    except OSError as error:
        return f"{STATE_FILE}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{STATE_FILE}: not a trainer's state"
    match = _NAME.fullmatch(folder.name)
    if match and int(match[1]) != step:
        return f"{STATE_FILE} says step {step}"
    if any(folder.glob("global_step*")) or (folder / "pytorch_model_fsdp_0").is_dir():
        return ""  # DeepSpeed's layout, or FSDP's with a part for each rank: their loaders check them
    return _torn_weights(folder) or _torn_archives(folder)


def _torn_weights(folder: Path) -> str:
    names = ["adapter_model.safetensors"] if (folder / "adapter_config.json").is_file() else ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            return f"{index.name}: not an index of weights"
    for name in names:
        if reason := _torn_safetensors(folder / name):
            return f"{name}: {reason}"
    return ""


def _torn_safetensors(path: Path) -> str:
    """Compares a safetensors file's size with its header (format: 8 bytes of length, JSON, then the data)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length < 2**27 else b""
        ends = [entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"]
    except FileNotFoundError:
        return "missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return "its header cannot be read"
    wanted, size = 8 + length + max(ends, default=0), path.stat().st_size
    return "" if size == wanted else f"{size} of {wanted} bytes"


def _torn_archives(folder: Path) -> str:
    """torch saves zip files, whose directory is written last: an incomplete file has none."""
    sharded = (folder / FSDP_WEIGHTS).is_file()
    for name in ("optimizer.bin" if sharded else "optimizer.pt", "scheduler.pt"):
        if not (folder / name).is_file():
            return f"no {name}"
    for path in [*folder.glob("*.pt"), *folder.glob("*.bin"), *folder.glob("rng_state*.pth")]:
        if not zipfile.is_zipfile(path):
            return f"{path.name} ends early"
    if not any(folder.glob("rng_state*.pth")):
        return "no rng_state.pth"
    return ""
