"""`spec.model.vllm` as vLLM's engine arguments, with the node's defaults and limits."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context
from runners.gang import gang_of
from runners.inference.batches import cache_bytes_per_token
from runners.inference.engine import GpuOutOfMemory
from runners.inference.task import InferenceTask
from runners.inference.vllm_allowed import SETTING, check_allowed

WHERE = "spec.model.vllm"
DEFAULT_UTILIZATION = 0.9
CONTEXT_BYTES = 2**29
"""CUDA's context, allocated before vLLM checks free memory; it refuses to start if a byte is missing."""
NCCL_BYTES = 2**29
"""NCCL's buffers, with several GPUs."""
LEAST_UTILIZATION = 0.05
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
CPU_SHARE = 0.25
CPU_LEAST_BYTES = 64 * 2**20
CPU_MOST_BYTES = 16 * 2**30
CPU_BLOCK_TOKENS = 128
COMPILE_STEPS = 3000
"""Decoding steps above which compiling is assumed to pay. It costs 6 s with a warm cache and 30 s without, measured on
a CPU. The gain depends on model and device; a task can set `enforce_eager`."""
IMAGE_TOKENS = 4096
"""What an image is taken to have, where the work is estimated; few models make more of one."""
BATCH_ROWS = 256
"""Sequences that vLLM decodes at once by default."""

OWNED = {
    "model": "it comes from spec.model.source",
    "tokenizer": "it comes from spec.model.source",
    "revision": "set spec.model.source.revision",
    "tokenizer_revision": "set spec.model.source.revision",
    "hf_config_path": "it comes from spec.model.source",
    "served_model_name": "set spec.serve.served_model_name in a task of the type serve",
    "runner": "inference always generates",
    "convert": "inference always generates",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "data_parallel_size": "run one task a replica",
    "seed": "set spec.inference.seed, or that of a request to a served model",
    "disable_log_stats": "the node measures",
}
"""Arguments that only the node sets, and where the task sets them instead."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Upper bounds of a task's work."""

    prompts: int
    prompt_bytes: int
    new_tokens: int
    """Per answer."""
    copies: int
    images: int = 0
    images_of_one: int = 0
    """The most that one prompt has."""
    image_where: str | None = None
    """The first prompt with an image, by whose name a model without vision is refused; None: there is none, or only
    that prompt is to be refused."""

    @property
    def steps(self) -> int:
        """Decoding steps, at vLLM's default batch."""
        return -(-self.prompts * self.copies // BATCH_ROWS) * self.new_tokens

    @property
    def tokens(self) -> int:
        """Tokens in the cache if all ran at once. Upper bound: a token has at least one byte."""
        images = self.images * IMAGE_TOKENS
        return self.prompt_bytes + images + self.prompts * self.copies * (self.new_tokens + CPU_BLOCK_TOKENS)


def check_names(options: dict[str, Any], known: Sequence[str]) -> None:
    """Raises BadRequest for an argument that vLLM does not have, or that only the node sets."""
    for name in options:
        if name in OWNED:
            raise BadRequest(f"{WHERE}.{name}: not for the task to set; {OWNED[name]}")
        if name not in known:
            hint = nearest(name, list(known))
            hint = hint if hint.startswith("did you mean") else "vLLM has no such engine argument"
            raise BadRequest(f"{WHERE}.{name}: unknown engine argument; {hint}")


def engine_arguments(
    ctx: Context, task: InferenceTask, config: Any, *, work: Work, adapter_ranks: Sequence[int]
) -> dict[str, Any]:
    """`LLM`'s arguments besides the model.

    Args:
        config: the model's Transformers configuration.
        adapter_ranks: ranks of the runtime adapters.

    Raises:
        BadRequest: an argument does not exist, or does not fit this node or model.
        GpuOutOfMemory: the GPUs are full.
    """
    from vllm.engine.arg_utils import EngineArgs

    options = dict(task.vllm)
    check_names(options, [field.name for field in dataclasses.fields(EngineArgs)])
    check_folder(ctx, options)
    check_allowed(ctx, {name: value for name, value in options.items() if name != "download_dir"}, WHERE)
    on_gpu = bool(ctx.gpus)
    text_config = config.get_text_config()
    options["tensor_parallel_size"] = tensor_parallel(ctx, options, text_config)
    options.setdefault("max_model_len", -1)  # as long as the model and the memory allow
    options.setdefault("enable_prefix_caching", True)
    options.setdefault("enforce_eager", work.steps < COMPILE_STEPS)
    if on_gpu:
        options["gpu_memory_utilization"] = utilization(ctx, options)
    else:
        if options.pop("gpu_memory_utilization", None) is not None:
            ctx.log.warning("%s.gpu_memory_utilization was not used: this task has no GPU", WHERE)
        if "kv_cache_memory_bytes" not in options:
            # vLLM's own default is a share of the host's memory, and allocating it takes seconds.
            per_token = cache_bytes_per_token(text_config, 4)
            options["kv_cache_memory_bytes"] = cpu_cache_bytes(work, per_token, psutil.virtual_memory().available)
    if task.sampling.json_schema is not None:
        # Unlimited white space could fill the whole answer. Two grammar libraries can forbid it; this one supports more
        # of JSON Schema.
        options.setdefault("structured_outputs_config", {"backend": "guidance", "disable_any_whitespace": True})
    if work.images:
        image_limit(options, work.images_of_one)
    if adapter_ranks:
        options["enable_lora"] = True
        options.setdefault("max_loras", len(adapter_ranks))
        options.setdefault("max_lora_rank", lora_rank(max(adapter_ranks)))
    return options


def image_limit(options: dict[str, Any], needed: int) -> None:
    """Set `limit_mm_per_prompt` to what the task has: vLLM reserves memory for what it allows.

    Args:
        needed: the most images that a prompt has.

    Raises:
        BadRequest: the task's own arguments allow fewer.
    """
    if options.get("language_model_only"):
        raise BadRequest(f"{WHERE}.language_model_only: excludes images, and spec.data has some; leave it out")
    given = options.get("limit_mm_per_prompt")
    if given is None:
        options["limit_mm_per_prompt"] = {"image": needed, "video": 0, "audio": 0}
        return
    allowed = given.get("image", 999) if isinstance(given, dict) else None
    allowed = allowed.get("count", 999) if isinstance(allowed, dict) else allowed
    if not isinstance(allowed, int) or allowed < needed:
        raise BadRequest(f"{WHERE}.limit_mm_per_prompt: a prompt has {needed} images; raise `image`, or leave it out")


def check_folder(ctx: Context, options: dict[str, Any]) -> None:
    """`download_dir`: where tasks may write, or wherever the operator allows it.

    Raises:
        BadRequest: it lies elsewhere.
    """
    folder, where = options.get("download_dir"), f"{WHERE}.download_dir"
    if folder is None or any(fnmatch.fnmatchcase("download_dir", each) for each in ctx.job.permits.vllm_arguments):
        return
    if not isinstance(folder, str):
        raise BadRequest(f"{where}: expected a path (found {type(folder).__name__})")
    real = Path(os.path.expanduser(folder)).resolve()  # noqa: PTH111 - Path's raises for an unknown user
    own = (ctx.out_dir, ctx.tmp_dir, *map(Path, ctx.job.permits.caches))
    if not any(real.is_relative_to(each.resolve()) for each in own):
        raise BadRequest(
            f"{where}: lies outside of the task's folder and the hub's caches; leave it out, or have the node's "
            f"setting {SETTING} list 'download_dir'"
        )


def tensor_parallel(ctx: Context, options: dict[str, Any], config: Any) -> int:
    """`tensor_parallel_size`: the task's, else its number of GPUs, lowered to a divisor of the model's heads.

    Raises:
        BadRequest: more than the task's GPUs, or not a divisor of the heads.
    """
    where = f"{WHERE}.tensor_parallel_size"
    gpus, nodes = len(ctx.gpus), nodes_of(ctx)
    pipeline = options.get("pipeline_parallel_size", 1)
    asked = options.get("tensor_parallel_size")
    for name, value in (("tensor_parallel_size", asked), ("pipeline_parallel_size", pipeline)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise BadRequest(f"{WHERE}.{name}: expected a number of GPUs >= 1 (found {value!r})")
    if asked is None:
        most = max(_gpu_count(ctx, gpus) // pipeline, 1)
        fits = (size for size in range(nodes * most, 0, -1) if size % nodes == 0 and divides(config, size))
        if (found := next(fits, None)) is None:
            heads, kv_heads = _heads(config)
            raise BadRequest(
                f"spec.nodes: the model's {heads} attention heads ({kv_heads} for keys) do not divide by {nodes} nodes"
            )
        return found
    if asked % nodes:
        raise BadRequest(f"{where}: {asked} does not divide by {nodes} nodes; leave it out to have it chosen")
    if asked * pipeline > nodes * max(gpus, 1):
        has = f"{gpus} GPUs" if gpus else "no GPU"
        has += f" on each of {nodes} nodes" if nodes > 1 else ""
        raise BadRequest(f"{where}: {asked} × pipeline {pipeline} needs {asked * pipeline} GPUs; this task has {has}")
    if not divides(config, asked):
        heads, kv_heads = _heads(config)
        raise BadRequest(
            f"{where}: the model's {heads} attention heads ({kv_heads} for keys) do not divide by {asked}; leave it "
            "out to have it chosen"
        )
    return int(asked)


def nodes_of(ctx: Context) -> int:
    gang = gang_of(ctx)
    return 1 if gang is None else gang.size


def divides(config: Any, size: int) -> bool:
    """Whether a model's heads can be split over `size` GPUs. Key-value heads are replicated if there are fewer."""
    heads, kv_heads = _heads(config)
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _heads(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_attention_heads", None) or 1
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _gpu_count(ctx: Context, gpus: int) -> int:
    """The task's GPUs, limited by `resources.hardware.gpu.count` in case the node has not done so."""
    asked: Any = ctx.spec
    for name in ("resources", "hardware", "gpu", "count"):
        asked = asked.get(name) if isinstance(asked, dict) else None
    try:
        return min(gpus, max(int(asked), 1)) if asked is not None else gpus
    except (TypeError, ValueError):
        raise BadRequest(f"spec.resources.hardware.gpu.count: expected a number (found {asked!r})") from None


def utilization(ctx: Context, options: dict[str, Any]) -> float:
    """`gpu_memory_utilization`: the task's or the default, lowered with a warning to what is free.

    Raises:
        BadRequest: not in 0 < x <= 1.
        GpuOutOfMemory: almost nothing is free.
    """
    asked = options.get("gpu_memory_utilization", DEFAULT_UTILIZATION)
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 < asked <= 1:
        raise BadRequest(f"{WHERE}.gpu_memory_utilization: expected a share, 0 < x <= 1 (found {asked!r})")
    world = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    used = ctx.gpus[: world // nodes_of(ctx)]
    kept_bytes = CONTEXT_BYTES + (NCCL_BYTES if len(used) > 1 else 0)
    fits = fit_utilization(float(asked), gpu_memory(used), kept_bytes)
    if fits < LEAST_UTILIZATION:
        raise GpuOutOfMemory("the GPU's memory is full: almost none of it is free for the model")
    if fits < asked:
        ctx.log.warning("gpu_memory_utilization lowered asked=%s free=%s", asked, fits)
    return fits


def fit_utilization(asked: float, memory: Sequence[tuple[int, int]], kept_bytes: int) -> float:
    """The largest share, at most `asked`, that is free on every device.

    Args:
        memory: (free, total) bytes of each device.
        kept_bytes: memory of each that vLLM cannot use.
    """
    free = min(((free_bytes - kept_bytes) / total_bytes for free_bytes, total_bytes in memory), default=1.0)
    return asked if asked <= free else max(int(free * 1000) / 1000, 0.0)


def gpu_memory(uuids: Sequence[str]) -> list[tuple[int, int]]:
    """(free, total) bytes of each GPU, from NVML: torch would create a CUDA context."""
    import pynvml

    pynvml.nvmlInit()
    try:
        memory = [pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids]
        return [(int(each.free), int(each.total)) for each in memory]
    finally:
        pynvml.nvmlShutdown()


def cpu_cache_bytes(work: Work, bytes_per_token: int, available_bytes: int) -> int:
    """Size of the key-value cache on the CPU: what the work can use, within a share of available memory."""
    most = max(min(int(available_bytes * CPU_SHARE), CPU_MOST_BYTES), CPU_LEAST_BYTES)
    return min(max(work.tokens * bytes_per_token * 5 // 4, CPU_LEAST_BYTES), most)


def lora_rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM that admits `rank`.

    Raises:
        BadRequest: none does.
    """
    for each in LORA_RANKS:
        if rank <= each:
            return each
    raise BadRequest(
        f"spec.model.adapters: an adapter has rank {rank}; vLLM takes {LORA_RANKS[-1]} at run time; "
        "set apply to 'merge'"
    )
