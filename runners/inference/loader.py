"""Loads a task's model with Transformers: dtype, device, attention, quantization, batch limits."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context, MissingDependency
from runners.inference.batches import cache_bytes_per_token
from runners.inference.engine import GpuOutOfMemory
from runners.inference.lora import apply_adapters
from runners.inference.task import DTYPES, InferenceTask, TransformersOptions
from runners.inference.tokens import Texts
from runners.inference.transformers_engine import TransformersEngine
from runners.inference.vision import load_texts, model_class
from runners.inference.vllm_args import Work
from runners.models import weights
from runners.models.adapters import LocalAdapter
from runners.models.code import may_run_code
from runners.models.contents import check_attention
from runners.models.sources import Source, loading

CPU_ROWS = 32
"""The fastest of 8 to 64 with a model of 60 M parameters: more rows evict the CPU's caches."""
GPU_ROWS = 1024
GPU_SHARE = 0.8
"""Share of free memory for the cache; the rest is for activations and fragmentation."""
CPU_SHARE = 0.25
LOGIT_COPIES = 6
"""Float32 rows of vocabulary width that exist at once while a token is picked."""


def load(
    ctx: Context, task: InferenceTask, source: Source, adapters: Sequence[LocalAdapter], *, work: Work | None = None
) -> tuple[TransformersEngine, Texts]:
    """The task's model with its adapters as an engine, with batches that fit the device.

    Raises:
        BadRequest: an adapter does not fit the model; else as `load_model`.
    """
    model, texts = load_model(ctx, task, source, work=work)
    with _device_memory(source):
        model = apply_adapters(model, adapters)
    tokens, rows = budget(model)
    return TransformersEngine(model, texts, batch_tokens=tokens, batch_rows=rows, source=source), texts


def load_model(ctx: Context, task: InferenceTask, source: Source, *, work: Work | None = None) -> tuple[Any, Texts]:
    """The bare model, in evaluation mode, and its tokenizer.

    Raises:
        BadRequest: there is no such model, its checkpoint does not hold its weights, an option does not fit it or
            this node, or the work has images and the model takes none.
        MissingDependency: a library that an option needs is missing.
        GpuOutOfMemory: the model does not fit the device.
        RunnerError: the hub is unreachable.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(max(ctx.threads, 1))
    options = task.transformers
    trust = may_run_code(ctx, source, options.trust_remote_code, "spec.model.transformers.trust_remote_code")
    check_attention(ctx, options.attn_implementation, "spec.model.transformers.attn_implementation")
    arguments = load_arguments(ctx, task)
    with loading(source), _device_memory(source):
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust)
        texts = load_texts(ctx, source, trust, config, work)
        loader = model_class(config, work)
        model = weights.load_model(loader, source, config=config, trust_remote_code=trust, **arguments)
    return model.eval(), texts


def load_arguments(ctx: Context, task: InferenceTask) -> dict[str, Any]:
    """`from_pretrained`'s arguments for the task's options on this node's devices.

    Raises:
        BadRequest: an option is not available here.
        MissingDependency: bitsandbytes is missing.
    """
    options = task.transformers
    dtype = DTYPES.get(options.dtype or "auto", options.dtype or "auto")
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": device_map(ctx, task)}
    if options.attn_implementation is not None:
        _check_attention(options, arguments["device_map"])
        arguments["attn_implementation"] = options.attn_implementation
    if options.load_in_8bit or options.load_in_4bit:
        arguments["quantization_config"] = _quantization(options)
    return arguments


def device_map(ctx: Context, task: InferenceTask) -> str:
    """`from_pretrained`'s `device_map`.

    Raises:
        BadRequest: the task requests a GPU and has none.
    """
    wanted = task.transformers.device_map
    gpus = len(ctx.gpus) if torch.cuda.is_available() and not task.enforce_cpu else 0
    if wanted == "cpu" or task.enforce_cpu:
        return "cpu"
    if gpus == 0:
        if wanted == "cuda":
            raise BadRequest(
                "spec.model.transformers.device_map: 'cuda', but this task has no GPU; use 'auto' or 'cpu'"
            )
        if ctx.gpus:
            ctx.log.warning("this environment's torch sees no GPU; the model runs on the CPU")
        return "cpu"
    if wanted in ("auto", "balanced"):
        return wanted
    return "cuda:0" if wanted == "cuda" or gpus == 1 else "auto"


def budget(model: Any) -> tuple[int, int]:
    """Limits of one batch: tokens in the cache, and rows."""
    config = model.config.get_text_config()
    per_token = cache_bytes_per_token(config, model.dtype.itemsize)
    per_row = LOGIT_COPIES * 4 * (getattr(config, "vocab_size", None) or 0)
    if model.device.type != "cuda":
        free = psutil.virtual_memory().available * CPU_SHARE
        rows = CPU_ROWS
    else:
        free = min(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())) * GPU_SHARE
        rows = GPU_ROWS
    rows = max(min(rows, int(free / 2 // max(per_row, 1))), 1)
    return max(int(free / 2 // per_token), 1), rows


def _quantization(options: TransformersOptions) -> Any:
    field = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependency("bitsandbytes", f"spec.model.transformers.{field}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=bool(options.load_in_8bit), load_in_4bit=bool(options.load_in_4bit))


def _check_attention(options: TransformersOptions, device: str) -> None:
    name = options.attn_implementation or ""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name not in known and "/" not in name:  # with a slash it is a kernel of the hub
        raise BadRequest(f"spec.model.transformers.attn_implementation: no attention {name!r}; {nearest(name, known)}")
    if not name.startswith("flash_attention"):
        return
    field = "use_flash_attention_2" if options.use_flash_attention_2 else "attn_implementation"
    if device == "cpu":
        raise BadRequest(
            f"spec.model.transformers.{field}: flash attention needs a GPU, and this task runs on the CPU; leave it out"
        )
    if DTYPES.get(options.dtype or "", options.dtype) == "float32":
        raise BadRequest(
            f"spec.model.transformers.{field}: flash attention computes in float16 or bfloat16 only, and dtype is "
            "float32; change one of them"
        )
    from transformers import utils

    there: dict[str, Callable[[], bool]] = {
        "flash_attention_2": utils.is_flash_attn_2_available,
        "flash_attention_3": utils.is_flash_attn_3_available,
        "flash_attention_4": utils.is_flash_attn_4_available,
    }
    if name in there and not there[name]():
        library = "flash_attn_interface" if name == "flash_attention_3" else "flash_attn"
        raise MissingDependency(library, f"spec.model.transformers.{field}: {name}")


@contextlib.contextmanager
def _device_memory(source: Source) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuOutOfMemory(
            f"{source.where}: {source.shown!r} does not fit the GPU's memory: {str(error).splitlines()[0]}"
        ) from error
