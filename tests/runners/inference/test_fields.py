"""No field of an inference document is silently ignored: each changes what runs, or is refused by its name."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
from runners.api import BadRequest, RunnerError
from runners.data import download, files, graph, hub, lists, shard
from runners.inference import export, options, task
from runners.inference.engines import choose
from runners.inference.loader import load_arguments
from runners.inference.runner import find_source, read_part
from runners.inference.task import read_task
from runners.models import spec as model_spec
from runners.models.adapters import load_adapters
from tests.kit.inference_specs import change
from tests.kit.tiny_models import write_tiny_lora

NO_SERVER = "http://127.0.0.1:9/x"
LISTED = {"type": "list", "items": ["a", "b"]}
ADAPTED = {"model.adapters": [{"path": "LORA"}]}
NOT_HERE = {"model.adapters": [{"path": "/no/such"}]}
EXPORTED = {"postprocess.jsonl_export": {"fields": {"a": {"from": "metadata", "key": "x", "default": 1}}},
            "data.metadata": [{"x": None}, {"x": 2}]}  # fmt: skip
ROWS_FILE = {"data": {"type": "jsonl", "path": "ROWS"}}
DATASET = {"data": {"type": "dataset", "url": "ROWS"}}
GRAPH = {
    "data": {
        "type": "graph_template",
        "template": {"name": "two_column_briefing", "columns": [{"label": "l", "expr": "one.result.x"}]},
    },
    "_upstreamResults": {"one": {"x": "first", "y": None}},
}
EMPTY = {**GRAPH, "data.template.columns": [{"label": "l", "expr": "one.y"}]}
NODE = {**GRAPH, "data.template.columns": [{"label": "l", "node": "one", "path": "x"}]}
STORED = {"checkpoint.load": {"path": "MODEL"}}
OF_TASK = {"checkpoint.load": {"taskId": "made"}}

ROWS: list[tuple[str, Any, Any, dict[str, Any]]] = [
    # field, a value that means something, one that does not, what else the document says
    ("inference.temperature", 0.2, "hot", {}),
    ("inference.top_p", 0.5, 1.5, {}),
    ("inference.top_k", 3, -2, {}),
    ("inference.max_tokens", 3, 0, {}),
    ("inference.max_new_tokens", 3, 1.5, {"inference.max_tokens": 9}),
    ("inference.presence_penalty", 0.5, 3, {}),
    ("inference.frequency_penalty", 0.5, -3, {}),
    ("inference.repetition_penalty", 1.5, 0, {}),
    ("inference.stop", ["x"], [1], {}),
    ("inference.stop_token_ids", [3], [-1], {}),
    ("inference.min_tokens", 3, -1, {}),
    ("inference.ignore_eos", True, "yes", {}),
    ("inference.bad_words", ["x"], [1], {}),
    ("inference.logit_bias", {"3": 1.5}, {"3": 200}, {}),
    ("inference.do_sample", False, "no", {}),
    ("inference.system_prompt", "be brief", 1, {}),
    ("inference.systemPrompt", "be brief", 1, {}),
    ("inference.seed", 1, -1, {}),
    ("inference.n", 2, 0, {}),
    ("inference.logprobs", 2, 99, {}),
    ("inference.chat", True, "yes", {}),
    ("inference.reasoning_parser", "think", 7, {}),
    ("inference.json_schema", {"type": "object"}, 7, {}),
    ("inference.engine", "transformers", "tgi", {}),
    ("inference.enforce_cpu", True, 1, {}),
    ("model.source.type", "huggingface", "modelscope", {}),
    ("model.source.identifier", "/no/such", "", {}),
    ("model.source.revision", "v2", 1, {}),
    ("model.transformers.device_map", "cuda", "tpu", {}),
    ("model.transformers.dtype", "bf16", "int3", {}),
    ("model.source.trust_remote_code", True, "yes", {}),
    ("model.transformers.trust_remote_code", True, "yes", {}),
    ("model.transformers.low_cpu_mem_usage", False, 2, {}),
    ("model.transformers.load_in_8bit", True, "yes", {}),
    ("model.transformers.load_in_4bit", True, "yes", {}),
    ("model.transformers.use_flash_attention_2", True, "yes", {}),
    ("model.transformers.attn_implementation", "eager", "egaer", {}),
    ("model.vllm.dtype", "half", "int3", {}),
    ("model.vllm.trust_remote_code", True, ..., {}),
    ("model.adapters.0.type", "lora", "ia3", ADAPTED),
    ("model.adapters.0.name", "mine", 3, ADAPTED),
    ("model.adapters.0.id", 7, 0, ADAPTED),
    ("model.adapters.0.path", "/no/such", 1, ADAPTED),
    ("model.adapters.0.url", NO_SERVER, 1, NOT_HERE),
    ("model.adapters.0.taskId", "x", 1, NOT_HERE),
    ("model.adapters.0.headers", {"a": "b"}, {"a": 1}, ADAPTED),
    ("model.adapters.0.timeoutSec", 3, 0, ADAPTED),
    ("model.adapters.0.archive_format", "zip", "rar", {"model.adapters": [{"path": "TAR"}]}),
    ("model.adapters.0.scale", 0.5, "big", ADAPTED),
    ("model.adapters.0.apply", "merge", "both", ADAPTED),
    ("checkpoint.load.type", "http", "s3", STORED),
    ("checkpoint.load.type", "local", "s3", {"checkpoint.load": {"url": NO_SERVER}}),
    ("checkpoint.load.path", "/no/such", 1, STORED),
    ("checkpoint.load.uri", "/no/such", 1, STORED),
    ("checkpoint.load.url", "ftp://x", 1, {"checkpoint.load": {}}),
    ("checkpoint.load.taskId", "made", 1, {"checkpoint.load": {}}),
    ("checkpoint.load.task_id", "made", 1, {"checkpoint.load": {}}),
    ("checkpoint.load.filename", "other.tar", 1, OF_TASK),
    ("checkpoint.load.filename", "model.tar", 1, STORED),
    ("checkpoint.load.base_url", "ftp://x", 1, {"checkpoint.load": {"taskId": "nobody"}}),
    ("checkpoint.load.base_url", NO_SERVER, 1, STORED),
    ("checkpoint.load.headers", {"a": "b"}, {"a": 1}, STORED),
    ("checkpoint.load.timeoutSec", 3, 0, STORED),
    ("checkpoint.load.archive_format", "zip", "rar", {"checkpoint.load": {"path": "TAR"}}),
    ("checkpoint.load.subdir", "deeper", 1, STORED),
    ("data.type", "lists", 1, {}),
    ("data.items", ["c"], "c", {}),
    ("data.metadata", [{"x": 1}, None], [1], {}),
    ("data.items_metadata", [{"x": 1}, None], [1], {}),
    ("data.path", "/no/such", 1, ROWS_FILE),
    ("data.url", NO_SERVER, 1, ROWS_FILE),
    ("data.headers", {"a": "b"}, {"a": 1}, ROWS_FILE),
    ("data.timeoutSec", 3, 0, ROWS_FILE),
    ("data.column", "other", 1, ROWS_FILE),
    ("data.image_column", "other", 1, ROWS_FILE),
    ("data.metadata_columns", ["other"], "other", ROWS_FILE),
    ("data.metadata_include_all", True, "yes", ROWS_FILE),
    ("data.url", "/no/such", "", DATASET),
    ("data.name", "main", 1, DATASET),
    ("data.split", "train[:1]", 1, DATASET),
    ("data.revision", "v2", 1, DATASET),
    ("data.column", "other", 1, DATASET),
    ("data.shuffle", True, "yes", DATASET),
    ("data.seed", 7, -1, {**DATASET, "data.shuffle": True}),
    ("data.buffer_size", 2, 0, {**DATASET, "data.shuffle": True}),
    ("data.metadata_columns", {"other": "o"}, 1, DATASET),
    ("data.metadata_include_all", True, "yes", DATASET),
    ("data.template.name", "other", 1, GRAPH),
    ("data.template.text", "{col0_value}", 1, GRAPH),
    ("data.template.append_system_prompt", True, "yes", {**GRAPH, "inference.system_prompt": "be brief"}),
    ("data.template.options.role", "a judge", 1, GRAPH),
    ("data.template.options.intro", "Compare.", 1, GRAPH),
    ("data.template.options.closing", "Decide.", 1, GRAPH),
    ("data.template.columns.0.label", "m", 1, GRAPH),
    ("data.template.columns.0.expr", "one.result", 1, GRAPH),
    ("data.template.columns.0.default", "-", ..., EMPTY),
    ("data.template.columns.0.node", "two", 1, NODE),
    ("data.template.columns.0.path", "y", 1, NODE),
    ("shard.index", 1, -1, {"shard": {"index": 0, "total": 2}}),
    ("shard.total", 1, 0, {"shard": {"index": 0, "total": 2}}),
    ("shard.contiguous", False, "no", {"shard": {"index": 0, "total": 2}, "data.items": ["a", "b", "c", "d"]}),
    ("postprocess.jsonl_export.path", "x.jsonl", 1, EXPORTED),
    ("postprocess.jsonl_export.fields", {"b": "prompt"}, [1], EXPORTED),
    ("postprocess.jsonl_export.required_fields", ["nothing"], "a", EXPORTED),
    ("postprocess.jsonl_export.fields.a.from", "item", "items", EXPORTED),
    ("postprocess.jsonl_export.fields.a.key", "y", 1, EXPORTED),
    ("postprocess.jsonl_export.fields.a.value", 3, ..., EXPORTED),
    ("postprocess.jsonl_export.fields.a.fallback", "prompt", ..., EXPORTED),
    ("postprocess.jsonl_export.fields.a.default", 3, ..., EXPORTED),
    ("engine", "transformers", "tgi", {}),
    ("enforce_cpu", True, "yes", {}),
]  # fmt: skip
ONE_VALUE = {"data.trust_remote_code", "model.source.type", "model.adapters.0.type", "data.type"}
"""The only value there is means what leaving it out means; of trust_remote_code the log says so."""

SECTIONS: list[tuple[str, type[msgspec.Struct]]] = [
    ("inference", options.InferenceOptions),
    ("model.source", model_spec.ModelSource),
    ("model.transformers", task.TransformersOptions),
    ("model.adapters.0", model_spec.Adapter),
    ("checkpoint.load", model_spec.CheckpointLoad),
    ("data", lists.ListData),
    ("data", files.FileData),
    ("data", hub.HubData),
    ("data.template", graph.Template),
    ("data.template.options", graph.Options),
    ("data.template.columns.0", graph.Column),
    ("shard", shard.Shard),
    ("postprocess.jsonl_export", export.JsonlExport),
    ("postprocess.jsonl_export.fields.a", export.Field),
]


def test_every_field_there_is_has_its_row() -> None:
    rows = {path for path, *_ in ROWS} | ONE_VALUE
    parents = {path.rpartition(".")[0] for path in rows}
    for section, struct in SECTIONS:
        for field in msgspec.structs.fields(struct):
            path = f"{section}.{field.encode_name}"
            assert path in rows or path in parents or f"{path}.0" in parents, path


@pytest.fixture(scope="module")
def places(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that rows name."""
    folder = tmp_path_factory.mktemp("places")
    write_tiny_lora(tiny_llama, folder / "lora", seed=1, rank=4)
    rows = [{"text": f"row {i}", "other": i} for i in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tarfile.open(folder / "lora.tar", "w") as tar:
        tar.add(folder / "lora", "x")
    return {
        "ROWS": str(folder / "rows.jsonl"),
        "LORA": str(folder / "lora"),
        "TAR": str(folder / "lora.tar"),
        "MODEL": str(tiny_llama),
    }


def put(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`change`, which also goes into lists."""
    parent, _, last = path.rpartition(".")
    if ".0" not in parent:
        return change(document, path, value)
    head = parent.removesuffix(".0")
    at: Any = document
    for name in head.split("."):
        at = at[name]
    return change(document, head, [{**at[0], last: value}, *at[1:]])


def written(document: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    text = json.dumps(document)
    for name, place in places.items():
        text = text.replace(f'"{name}"', json.dumps(place))
    return json.loads(text)


def observed(context: Any) -> dict[str, Any]:
    """Everything that the document decides, short of running the model."""
    spec = context.spec
    read = read_task(context, spec)
    part = read_part(context, read, spec, "spec", task_id=None, folder=context.out_dir)
    exported = None
    if part.export is not None:
        items = [
            {"index": i, "prompt": prompt, "output": "o", "finish_reason": "stop", "metadata": part.items.metadata[i]}
            for i, prompt in enumerate(part.shown)
        ]
        told = part.export.write(context, context.out_dir, items, None)
        exported = (told["relative_path"], Path(told["path"]).read_text())
    source = find_source(context, read)
    if choose(context, read) == "transformers" and read.sampling.json_schema is not None:
        raise BadRequest("spec.inference.json_schema: only vLLM")
    return {
        "sampling": read.sampling,
        "engine": (read.engine, read.enforce_cpu),
        "trust": (read.transformers.trust_remote_code, read.vllm.get("trust_remote_code")),
        "arguments": load_arguments(context, read),
        "parser": part.parser,
        "prompts": (part.asked, part.items.metadata),
        "source": (source.shown, source.where, source.revision),
        "export": exported,
        "adapters": [
            (each.name, each.apply, json.loads((each.folder / "adapter_config.json").read_text()))
            for each in load_adapters(context, read.model.adapters)
        ],
    }


@pytest.mark.parametrize(("path", "value", "wrong", "more"), ROWS)
def test_a_field_has_its_effect_or_is_refused(
    places, tmp_path, make_context, monkeypatch, *, path: str, value: Any, wrong: Any, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    if more.get("data", {}).get("type") == "dataset":
        pytest.importorskip("datasets", reason="needs the extra 'training'")
    made = tmp_path / "results" / "made"
    made.mkdir(parents=True)
    (made / "final_model").symlink_to(places["MODEL"])
    document: dict[str, Any] = {"model": {"source": {"identifier": places["MODEL"]}}, "data": LISTED}
    for name, what in more.items():
        document = change(document, name, what)
    document = written(document, places)

    def outcome(number: int, spec: dict[str, Any]) -> Any:
        try:
            return observed(make_context(spec, task_id=f"t{number}"))
        except RunnerError as error:
            return str(error)

    before, after = outcome(1, document), outcome(2, put(document, path, value))
    if path not in ONE_VALUE:
        assert after != before
    if isinstance(after, str) and isinstance(before, dict):
        assert "spec." in after
    if wrong is not ...:
        refusal = outcome(3, put(document, path, wrong))
        assert isinstance(refusal, str)
        assert path.rsplit(".", maxsplit=1)[-1] in refusal
