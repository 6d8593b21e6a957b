"""What loads code by data needs the operator's word: `tasks.trust_remote_code` lists the sources whose code may run.

A model brings code by `auto_map`, `custom_generate` or modules of other packages. Other files act as code when they are
read: pickled states of optimizers, attention kernels. What a task has made is never code for another one.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from runners.api import BadRequest, Context
from runners.models.contents import MODULES, SETTING, hub_trusted, read_json, texts
from runners.models.sources import Source

CONFIGS = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "image_processor_config.json", "generation_config.json",
)  # fmt: skip
"""Files in which Transformers looks for `auto_map`."""
CUSTOM_GENERATE = "custom_generate/generate.py"
_OF_LIBRARY = "sentence_transformers."
_PICKLED = ("global_step*", "pytorch_model_fsdp_[0-9]*", "optimizer_[0-9]*", "custom_checkpoint_*", "*.pkl", "*.pickle")
"""Parts of a trainer's checkpoint that are unpickled whole: of DeepSpeed, of FSDP in parts, of Accelerate."""


def may_run_code(ctx: Context, source: Source, asked: bool | None, where: str) -> bool:
    """`trust_remote_code` for a model's loader. Asked of a model without code of its own, it changes nothing.

    Args:
        asked: what the document says.
        where: its field.

    Raises:
        BadRequest: it is asked for a model with code of its own that the operator does not trust.
    """
    if not asked:
        return False
    places = [source, *([msgspec.structs.replace(source, path=source.tokenizer)] if source.tokenizer else [])]
    brings = False
    for place in places:
        refs = list(code_of(place))
        strange = [owner for ref in refs if (owner := ref.partition("--")[0]) != ref and not hub_trusted(ctx, owner)]
        if is_trusted(ctx, place.path) and not strange:
            brings = True
        elif refs:
            raise BadRequest(
                f"{where}: {source.shown!r} brings code of its own ({refs[0]:.80}); {remedy(ctx, place.path)}"
            )
    return brings


def is_trusted(ctx: Context, path: str) -> bool:
    """Whether code from a hub id or a folder may run. What lies in results or caches may not: tasks write there."""
    if not Path(path).is_dir():
        return hub_trusted(ctx, path)
    real = os.path.realpath(path)
    made = [os.path.realpath(each) for each in (ctx.results_dir, ctx.cache_dir, ctx.out_dir, ctx.tmp_dir)]
    if any(Path(real).is_relative_to(folder) for folder in made):
        return False
    patterns = [each for each in ctx.job.permits.trust_remote_code if each.startswith("/") or each == "*"]
    return any(fnmatch.fnmatchcase(real, pattern) for pattern in patterns)


def remedy(ctx: Context, path: str) -> str:
    """What an error about code says after its colon."""
    real = os.path.realpath(path) if Path(path).is_dir() else path
    if any(Path(real).is_relative_to(os.path.realpath(each)) for each in (ctx.results_dir, ctx.cache_dir, ctx.tmp_dir)):
        return (
            f"what tasks made or downloaded is never code; copy it to a folder that the node's setting {SETTING} lists"
        )
    return f"this node runs it only where its setting {SETTING} lists {real!r}"


def code_of(source: Source) -> Iterator[str]:
    """What of a model's files names code: `auto_map`'s references, `custom_generate`, foreign modules."""
    for name in CONFIGS:
        yield from texts(_json(source, name).get("auto_map"))
    if _file(source, CUSTOM_GENERATE) is not None:
        yield CUSTOM_GENERATE
    modules = _json(source, MODULES, list)
    kinds = [str(each.get("type")) for each in modules if isinstance(each, dict)]
    yield from (kind for kind in kinds if not kind.startswith(_OF_LIBRARY))


def check_data_only(ctx: Context, checkpoint: Path, where: str) -> None:
    """Raises BadRequest for a trainer's checkpoint with pickles, unless the operator trusts its folder."""
    found = sorted(path.name for pattern in _PICKLED for path in checkpoint.glob(pattern))
    if found and not is_trusted(ctx, str(checkpoint)):
        what = f"{found[0]!r} in {checkpoint.name!r} holds pickles, which are code"
        raise BadRequest(f"{where}: {what}; {remedy(ctx, str(checkpoint))}")


def _json(source: Source, name: str, kind: type[Any] = dict) -> Any:
    path = _file(source, name)
    return kind() if path is None else read_json(path, kind)


def _file(source: Source, name: str) -> Path | None:
    """A file of the model: in its folder, or fetched from the hub."""
    if source.is_local:
        path = Path(source.path) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            source.path,
            name,
            revision=source.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:  # no such model: whoever loads it reports it
        return None
    return None if found is None else Path(found)
