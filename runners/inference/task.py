"""An inference task's sections as frozen structs, and the checks across fields.

Field names are those of docs/tasks.md, "inference". Null means absent.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context
from runners.data.openai_batch import TYPE, OpenAIBatch
from runners.data.sources import SECTIONS, check_data
from runners.fields import Faults, check_spec
from runners.gang import asks_for_nodes
from runners.inference.export import read_export
from runners.inference.options import EngineName, InferenceOptions, Sampling, sampling_of, system_prompt_of
from runners.inference.reasoning import check_parser
from runners.models.spec import Adapter, Checkpoint, CheckpointLoad, ModelSource, Section
from runners.rows.resume import check_resume

OWN_FIELDS = ("model", "data", "inference", "postprocess", "checkpoint", "engine", "enforce_cpu", "resume")

Dtype = Literal["auto", "float16", "bfloat16", "float32", "fp16", "half", "bf16", "fp32", "float"]
DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
SHARED = ("dtype", "trust_remote_code")
"""Options of both engines: each takes them from the other's section if its own does not set them."""


SOURCES: dict[str, type[Any]] = {**SECTIONS, TYPE: OpenAIBatch}
"""The data sources, by type."""
OF_NODES = ("nnodes", "node_rank", "master_addr", "master_port", "distributed_executor_backend")
"""Engine arguments of vLLM that spec.nodes sets."""
ONE_FOR_ALL = frozenset({"n", "logprobs", "json_schema", "system_prompt", "systemPrompt", "chat"})
"""Fields of `spec.inference` that have no place where each line is a request of its own."""


class TransformersOptions(Section, frozen=True):
    """spec.model.transformers"""

    device_map: Literal["auto", "balanced", "cuda", "cpu"] | None = None
    dtype: Dtype | None = None
    trust_remote_code: bool | None = None
    low_cpu_mem_usage: bool | None = None
    """Transformers 5 always loads this way; false is refused."""
    load_in_8bit: bool | None = None
    load_in_4bit: bool | None = None
    use_flash_attention_2: bool | None = None
    attn_implementation: str | None = None
    """Any name that Transformers knows (`eager`, `sdpa`, `flash_attention_2` …)."""


class Model(Section, frozen=True):
    """spec.model"""

    source: ModelSource = ModelSource()
    vllm: dict[str, Any] | None = None
    """Engine arguments, checked by vLLM's own types."""
    transformers: TransformersOptions | None = None
    adapters: tuple[Adapter, ...] | None = None


class InferenceTask(msgspec.Struct, frozen=True, kw_only=True):
    """The document's choice of engine, weights and sampling."""

    model: Model
    checkpoint: CheckpointLoad | None
    sampling: Sampling
    system_prompt: str | None
    chat: bool
    reasoning_parser: str | None = None
    engine: EngineName
    enforce_cpu: bool
    transformers: TransformersOptions
    vllm: dict[str, Any]


def read_document(ctx: Context, spec: dict[str, Any], where: str) -> InferenceTask:
    """The checked sections of `spec`; `data` and `postprocess` are checked, too.

    Raises:
        BadRequest: names all fields that are wrong.
    """
    faults = Faults()
    task = faults.read(lambda: read_task(ctx, spec, where))
    faults.read(lambda: check_data(ctx, spec, where, sources=SOURCES))
    faults.read(lambda: read_export(ctx, spec, where))
    faults.read(lambda: _check_batch(ctx, spec, where))
    faults.read(lambda: check_resume(ctx, spec, where))
    if task is not None:
        faults.read(lambda: _check_nodes(ctx, task))
    faults.check()
    assert task is not None, "else it was a fault"
    return task


def _check_nodes(ctx: Context, task: InferenceTask) -> None:
    """Raises BadRequest for what does not go with spec.nodes."""
    if not asks_for_nodes(ctx.spec):
        return
    if task.engine == "transformers" or task.enforce_cpu:
        field = "enforce_cpu" if task.enforce_cpu else "engine"
        raise BadRequest(f"spec.{field}: only vLLM runs a model over several nodes; leave it out, or spec.nodes")
    for name in OF_NODES:
        if name in task.vllm:
            raise BadRequest(f"spec.model.vllm.{name}: spec.nodes sets it; leave one of them out")
    if task.vllm.get("pipeline_parallel_size", 1) != 1:
        raise BadRequest(
            "spec.model.vllm.pipeline_parallel_size: not tried over several nodes, as vLLM's CPU build cannot do it; "
            "leave it out: each layer is split over all GPUs"
        )
    if task.model.adapters:
        raise BadRequest("spec.model.adapters: do not go with spec.nodes; merge them into the model first")
    data = ctx.spec.get("data")
    if isinstance(data, dict) and data.get("type") == TYPE:
        raise BadRequest("spec.nodes: a batch file is answered on one node; leave it out, or give another data.type")


def _check_batch(ctx: Context, spec: dict[str, Any], where: str) -> None:
    """Raises BadRequest for what does not go with a batch file, whose lines say it."""
    data = spec.get("data")
    if not isinstance(data, dict) or data.get("type") != TYPE:
        return
    faults = Faults()

    def refuse(path: str, remedy: str) -> None:
        raise BadRequest(f"{path}: does not go with data.type {TYPE}; {remedy}")

    options = spec.get("inference")
    for name, value in (options if isinstance(options, dict) else {}).items():
        if value is not None and name in ONE_FOR_ALL:
            faults.read(lambda name=name: refuse(f"{where}.inference.{name}", "each line says it"))  # type: ignore[misc]
    if spec.get("postprocess"):
        faults.read(lambda: refuse(f"{where}.postprocess", "the answers are in output.jsonl"))
    if ctx.merge_children or where != "spec":
        faults.read(lambda: refuse("merge_children", "send it by itself"))
    faults.check()


def read_task(ctx: Context, spec: dict[str, Any], where: str = "spec") -> InferenceTask:
    """The checked sections of `spec` that this runner owns.

    Raises:
        BadRequest: names all fields that are wrong.
    """
    faults = Faults()
    faults.read(lambda: check_spec(ctx, spec, where, OWN_FIELDS, {"inference": InferenceOptions}))
    spec_model = faults.read(lambda: ctx.check(spec.get("model") or {}, Model, f"{where}.model"))
    checkpoint = faults.read(lambda: ctx.check(spec.get("checkpoint") or {}, Checkpoint, f"{where}.checkpoint"))
    options = faults.read(lambda: ctx.check(spec.get("inference") or {}, InferenceOptions, f"{where}.inference"))
    model, options = spec_model or Model(), options or InferenceOptions()
    if spec_model is not None and checkpoint is not None and checkpoint.load is None:
        faults.read(lambda: _check_identifier(model, where))
    choice = faults.read(lambda: _choice(ctx, spec, options, where))
    sampling = faults.read(lambda: sampling_of(options, f"{where}.inference"))
    system_prompt = faults.read(lambda: system_prompt_of(options, f"{where}.inference"))
    transformers = faults.read(lambda: _transformers_options(model, where))
    vllm = faults.read(lambda: _vllm_options(model, where))
    if choice is not None:
        chosen = "transformers" if choice.enforce_cpu else choice.engine or "auto"
        faults.read(lambda: check_parser(options.reasoning_parser, chosen, f"{where}.inference.reasoning_parser"))
    faults.check()
    if not (checkpoint and choice and sampling and transformers) or vllm is None:
        raise AssertionError("a part that is missing was a fault")
    return InferenceTask(
        model=model,
        checkpoint=checkpoint.load,
        sampling=sampling,
        system_prompt=system_prompt,
        chat=bool(options.chat),
        reasoning_parser=options.reasoning_parser,
        engine=choice.engine or "auto",
        enforce_cpu=bool(choice.enforce_cpu),
        transformers=transformers,
        vllm=vllm,
    )


class _Choice(Section, frozen=True):
    engine: EngineName | None = None
    enforce_cpu: bool | None = None


def _choice(ctx: Context, spec: dict[str, Any], options: InferenceOptions, where: str) -> _Choice:
    outer = ctx.check({name: spec[name] for name in ("engine", "enforce_cpu") if name in spec}, _Choice, where)
    engine = _either(outer.engine, options.engine, "engine", where)
    enforce_cpu = _either(outer.enforce_cpu, options.enforce_cpu, "enforce_cpu", where)
    if enforce_cpu and engine == "vllm":
        raise BadRequest(f"{where}.engine: 'vllm' and enforce_cpu exclude each other; leave one out")
    return _Choice(engine=engine, enforce_cpu=enforce_cpu)


def _check_identifier(model: Model, where: str) -> None:
    if model.source.identifier is None:
        raise BadRequest(
            f"{where}.model.source.identifier: missing; give a hub id, a local folder or 'builtin:tiny-llama'"
        )


def _either(outer: Any, inner: Any, name: str, where: str) -> Any:
    """A field that is allowed both in `spec` and in `spec.inference`."""
    if outer is not None and inner is not None and outer != inner:
        raise BadRequest(f"{where}.{name}: {outer!r}, but {where}.inference.{name} says {inner!r}; give one of them")
    return inner if outer is None else outer


def _transformers_options(model: Model, where: str) -> TransformersOptions:
    options = model.transformers or TransformersOptions()
    if options.load_in_4bit and options.load_in_8bit:
        raise BadRequest(f"{where}.model.transformers.load_in_4bit: excludes load_in_8bit; set one of them")
    if options.low_cpu_mem_usage is False:
        raise BadRequest(
            f"{where}.model.transformers.low_cpu_mem_usage: false is not possible: "
            "Transformers 5 always loads weights one by one; leave it out"
        )
    attention = "flash_attention_2" if options.use_flash_attention_2 else None
    if attention and options.attn_implementation not in (None, attention):
        raise BadRequest(
            f"{where}.model.transformers.attn_implementation: {options.attn_implementation!r} "
            "contradicts use_flash_attention_2; give one of them"
        )
    changes: dict[str, Any] = {"attn_implementation": attention or options.attn_implementation}
    shared = model.vllm or {}  # so that a document written for vLLM loads the same weights
    if options.dtype is None and shared.get("dtype") in (*DTYPES, *DTYPES.values()):
        changes["dtype"] = shared["dtype"]
    if options.trust_remote_code is None:
        changes["trust_remote_code"] = _first(shared.get("trust_remote_code"), model.source.trust_remote_code)
    return msgspec.structs.replace(options, **changes)


def _vllm_options(model: Model, where: str) -> dict[str, Any]:
    options = {name: value for name, value in (model.vllm or {}).items() if value is not None}
    shared = model.transformers
    if "dtype" in options:
        if options["dtype"] not in get_args(Dtype):
            known = nearest(str(options["dtype"]), list(get_args(Dtype)))
            raise BadRequest(f"{where}.model.vllm.dtype: unknown dtype {options['dtype']!r}; {known}")
        options["dtype"] = DTYPES.get(options["dtype"], options["dtype"])
    elif shared is not None and shared.dtype is not None:
        options["dtype"] = DTYPES.get(shared.dtype, shared.dtype)
    own = None if shared is None else shared.trust_remote_code
    if _first(own, model.source.trust_remote_code) and "trust_remote_code" not in options:
        options["trust_remote_code"] = True
    return options


def _first(*given: Any) -> bool | None:
    """The first value that is given."""
    return next((value is True for value in given if value is not None), None)
