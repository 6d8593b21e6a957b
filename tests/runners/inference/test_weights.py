"""Adapters and checkpoints: from a path, a task or a URL, at run time or merged, scaled; on Transformers."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the extra 'inference'")
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ViTConfig

from runners.api import BadRequest
from runners.inference.lora import check_fit
from runners.inference.runner import InferenceRunner
from runners.models.adapters import LocalAdapter
from tests.kit.file_server import Served, Server
from tests.kit.inference_specs import outputs, spec_of
from tests.kit.tiny_models import write_tiny_lora

PROMPTS = ["a task starts", "the queue waits for the next batch and then", "a slot"]


@pytest.fixture(scope="module")
def loras(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("lora") / f"lora-{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        write_tiny_lora(tiny_llama, folder, seed=10 + i, rank=4 + 4 * i)
    return folders


@pytest.fixture
def server() -> Iterator[Server]:
    with Server().running() as running:
        yield running


def run(make_context: Any, spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return InferenceRunner().run(make_context(spec, **fields))


def with_adapters(model: Path, adapters: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    spec = spec_of(model, PROMPTS, **changes)
    spec["model"]["adapters"] = adapters
    return spec


def by_peft(model: Path, lora: Path, scale: float = 1.0) -> list[str]:
    """What PEFT itself answers, with its own way of scaling."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), lora)
    for module in peft.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = peft.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(ids, skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("apply", ["runtime", "merge", None])
@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0])
def test_a_lora_answers_as_peft_does(tiny_llama, loras, make_context, apply: str | None, scale: float) -> None:
    adapter = {"type": "lora", "path": str(loras[0]), "scale": scale, "apply": apply}
    answers = outputs(run(make_context, with_adapters(tiny_llama, [adapter])))
    assert answers == by_peft(tiny_llama, loras[0], scale)
    assert answers != outputs(run(make_context, spec_of(tiny_llama, PROMPTS)))


def test_scale_zero_is_the_base_model(tiny_llama, loras, make_context) -> None:
    adapter = {"path": str(loras[0]), "scale": 0}
    base = outputs(run(make_context, spec_of(tiny_llama, PROMPTS)))
    assert outputs(run(make_context, with_adapters(tiny_llama, [adapter]))) == base


def test_requests_go_to_their_adapter(tiny_llama, loras, make_context) -> None:
    adapters = [{"name": "one", "path": str(loras[0])}, {"name": "two", "path": str(loras[1])}]
    spec = with_adapters(tiny_llama, adapters)
    spec["data"]["metadata"] = [{"adapter": "one"}, {"adapter": "base"}, {"adapter": "two"}]
    answers = outputs(run(make_context, spec))
    base = outputs(run(make_context, spec_of(tiny_llama, PROMPTS)))
    assert answers == [by_peft(tiny_llama, loras[0])[0], base[1], by_peft(tiny_llama, loras[1])[2]]
    spec["data"]["metadata"] = [{"adapter": "one"}, {"adapter": "towel"}, {"adapter": "two"}]
    with pytest.raises(BadRequest, match=r"spec\.data\.items\[1\]: there are several runtime adapters \(one, two\)"):
        run(make_context, spec)


def test_merged_and_runtime_adapters_add_up(tiny_llama, loras, make_context) -> None:
    adapters = [{"path": str(loras[0]), "apply": "merge"}, {"path": str(loras[1]), "apply": "runtime"}]
    both = outputs(run(make_context, with_adapters(tiny_llama, adapters)))
    merged = outputs(run(make_context, with_adapters(tiny_llama, [{**each, "apply": "merge"} for each in adapters])))
    assert both == merged
    assert both not in (by_peft(tiny_llama, loras[0]), by_peft(tiny_llama, loras[1]))


def packed(folder: Path, target: Path, kind: str, top: str) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(target, "w") as pack:
            for each in folder.iterdir():
                pack.write(each, f"{top}/{each.name}")
    else:
        with tarfile.open(target, f"w:{kind}") as tar:
            tar.add(folder, top)
    return target


def test_adapters_from_tasks_urls_and_archives(tiny_llama, loras, make_context, tmp_path, server) -> None:
    expected = by_peft(tiny_llama, loras[0])
    results = tmp_path / "results"
    for name in ("final_lora", "final_model"):
        target = results / f"made-{name}" / name
        target.parent.mkdir(parents=True)
        target.symlink_to(loras[0])
    archive = packed(loras[0], tmp_path / "lora.tar.gz", "gz", "nested/final_lora")
    server.files["lora"] = Served(packed(loras[0], tmp_path / "lora.zip", "zip", "x").read_bytes(), token="Bearer x")
    sources = [
        {"taskId": "made-final_lora"},
        {"taskId": "made-final_model"},
        {"path": str(archive)},
        {"url": server.url("lora"), "headers": {"Authorization": "Bearer x"}},
        {"url": server.url("lora"), "headers": {"Authorization": "Bearer x"}, "archive_format": "zip"},
    ]
    for source in sources:
        assert outputs(run(make_context, with_adapters(tiny_llama, [source]), task_id=f"t{id(source)}")) == expected


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({}, r"adapters\[0\]: needs a `path`, a `url` or a `taskId`"),
        ({"path": "/no/such"}, r"adapters\[0\]\.path: there is no '/no/such' on this node"),
        ({"taskId": "nobody"}, r"adapters\[0\]\.taskId: this node has no results of task 'nobody'"),
        ({"taskId": "../x"}, r"adapters\[0\]\.taskId: invalid task id '\.\./x'"),
        ({"path": "MODEL"}, r"adapters\[0\]\.path: no adapter there: no folder in it has a adapter_config\.json"),
        ({"path": "x", "scale": "big"}, r"adapters\[0\]\.scale"),
        ({"path": "x", "type": "ia3"}, r"adapters\[0\]\.type"),
        ({"path": "x", "aply": "merge"}, r"adapters\[0\]\.aply: unknown field; did you mean 'apply'"),
    ],
)
def test_bad_adapters(tiny_llama, make_context, adapter: dict[str, Any], message: str) -> None:
    adapter = {name: str(tiny_llama) if value == "MODEL" else value for name, value in adapter.items()}
    with pytest.raises(BadRequest, match=r"^spec\.model\." + message):
        run(make_context, with_adapters(tiny_llama, [adapter]))


def test_an_adapter_for_another_model(tiny_llama, make_context, tmp_path) -> None:
    from runners.models.builtin import write_tiny_llama

    wide = tmp_path / "wide"
    wide.mkdir()
    write_tiny_llama(wide, hidden_size=64)
    write_tiny_lora(wide, tmp_path / "lora")
    for apply in ("runtime", "merge"):
        spec = with_adapters(tiny_llama, [{"path": str(tmp_path / "lora"), "apply": apply}])
        with pytest.raises(BadRequest, match=r"^spec\.model\.adapters\[0\]: the adapter does not fit .*size mismatch"):
            run(make_context, spec)


def test_models_that_cannot_be_made_without_their_weights_are_not_compared(
    tiny_llama, make_context, tmp_path, caplog
) -> None:
    """vLLM runs models whose code comes with them, and others that are no language models to Transformers."""
    write_tiny_lora(tiny_llama, tmp_path)
    adapter = LocalAdapter(name="mine", folder=tmp_path, rank=4, apply="runtime", where="spec.model.adapters[0]")
    check_fit(make_context({}), adapter, ViTConfig(), trust_remote_code=False)
    assert "not checked whether mine fits" in caplog.text
    unlike = AutoConfig.from_pretrained(tiny_llama, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(BadRequest, match=r"spec\.model\.adapters\[0\]: the adapter does not fit the model"):
        check_fit(make_context({}), adapter, unlike, trust_remote_code=False)


def test_what_is_no_lora(tiny_llama, make_context, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(BadRequest, match=r"adapters\[0\]\.path: an adapter of type 'IA3'; only LORA"):
        run(make_context, with_adapters(tiny_llama, [{"path": str(tmp_path)}]))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(BadRequest, match=r"adapters\[0\]\.path: the adapter has no weights"):
        run(make_context, with_adapters(tiny_llama, [{"path": str(tmp_path)}]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not the tiny one."""
    from runners.models.builtin import write_tiny_llama

    folder = tmp_path_factory.mktemp("trained")
    write_tiny_llama(folder, seed=5)
    return folder


def with_checkpoint(load: dict[str, Any], identifier: Path | None = None) -> dict[str, Any]:
    spec = spec_of("x", PROMPTS)
    spec["model"]["source"] = {} if identifier is None else {"identifier": str(identifier)}
    spec["checkpoint"] = {"load": load}
    return spec


def test_checkpoints_from_everywhere(trained, tiny_llama, make_context, tmp_path, server) -> None:
    expected = outputs(run(make_context, spec_of(trained, PROMPTS)))
    made = tmp_path / "results" / "made"
    made.mkdir(parents=True)
    (made / "final_model").symlink_to(trained)
    steps = tmp_path / "steps"
    (steps / "checkpoint-2").mkdir(parents=True)
    (steps / "checkpoint-10").symlink_to(trained)
    (steps / "checkpoint-2" / "config.json").write_text("{}")
    archive = packed(trained, tmp_path / "model.tar.xz", "xz", "final_model")
    (made / "artifacts").mkdir()
    (made / "artifacts" / "kept.tar.xz").symlink_to(archive)
    server.files["model"] = Served(archive.read_bytes())
    server.files["api/v1/results/far/files/final_model.tar.gz"] = Served(archive.read_bytes())
    server.files["api/v1/results/far/files/other.tar"] = Served(archive.read_bytes())
    loads: list[dict[str, Any]] = [
        {"type": "local", "path": str(trained)},
        {"path": str(steps)},
        {"path": str(archive), "archive_format": "tar.xz"},
        {"uri": f"file://{trained}"},
        {"taskId": "made"},
        {"task_id": "made", "subdir": "final_model"},
        {"task_id": "made", "filename": "kept.tar.xz"},
        {"type": "http", "url": server.url("model"), "timeoutSec": 10},
        {"uri": server.url("model"), "subdir": "final_model"},
        {"path": "/no/such", "url": server.url("model")},
        {"taskId": "far", "base_url": server.url("")},
        {"task_id": "far", "filename": "other.tar", "base_url": server.url("api/v1/results")},
    ]
    for i, load in enumerate(loads):
        context = make_context(with_checkpoint(load, tiny_llama), task_id=f"task-{i}")
        assert outputs(InferenceRunner().run(context)) == expected, load
    template = server.url("api/v1/results/me/files/{name}")
    context = make_context(with_checkpoint({"taskId": "far"}), task_id="me", file_url=template)
    result = InferenceRunner().run(context)
    assert outputs(result) == expected
    assert result["model"] == "far"


def test_a_checkpoint_without_tokenizer_takes_the_models(trained, tiny_llama, make_context, tmp_path) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).symlink_to(trained / name)
    expected = outputs(run(make_context, spec_of(trained, PROMPTS)))
    assert outputs(run(make_context, with_checkpoint({"path": str(tmp_path)}, tiny_llama))) == expected
    with pytest.raises(BadRequest, match=r"spec\.checkpoint\.load\.path: .* cannot be loaded"):
        run(make_context, with_checkpoint({"path": str(tmp_path)}))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({}, r"needs a `path`, a `url` or a `taskId`"),
        ({"path": "/no/such"}, r"\.path: there is no '/no/such' on this node"),
        ({"taskId": "nobody"}, r"\.taskId: this node has no results of task 'nobody'"),
        ({"task_id": "a", "taskId": "b"}, r"\.task_id: differs from"),
        ({"type": "http"}, r"\.url: missing; type 'http' needs one"),
        ({"path": "HERE", "subdir": ".."}, r"\.subdir: '\.\.' leads out of the checkpoint"),
        ({"path": "HERE", "subdir": "x"}, r"\.subdir: no folder 'x' in the checkpoint; folders: empty"),
        ({"path": "HERE", "subdir": "empty"}, r"\.subdir: no model there: no folder in it has a config\.json"),
        ({"path": "HERE/file"}, r"\.path: .* is a file and no archive"),
        ({"path": "HERE/file", "archive_format": "zip"}, r"\.path: not a sound zip archive"),
        ({"url": "http://127.0.0.1:9/x", "archive_format": "none"}, r"\.url: a URL has to be an archive"),
        ({"pth": "x"}, r"\.pth: unknown field; did you mean 'path'"),
    ],
)
def test_bad_checkpoints(make_context, tmp_path, load: dict[str, Any], message: str) -> None:
    here = tmp_path / "here"
    (here / "empty").mkdir(parents=True)
    (here / "file").write_text("x")
    load = {name: value.replace("HERE", str(here)) for name, value in load.items()}
    with pytest.raises(BadRequest, match=rf"^spec\.checkpoint\.load(\.\w+)*:? ?.*{message.removeprefix('^')}"):
        run(make_context, with_checkpoint(load))


def test_several_models_in_one_archive(trained, make_context, tmp_path) -> None:
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        tar.add(trained, "one")
        tar.add(trained, "two")
    with pytest.raises(BadRequest, match=r"several folders with config\.json: one, two; name one"):
        run(make_context, with_checkpoint({"path": str(tmp_path / "two.tar")}))
    result = run(make_context, with_checkpoint({"path": str(tmp_path / "two.tar"), "subdir": "two"}), task_id="other")
    assert outputs(result) == outputs(run(make_context, spec_of(trained, PROMPTS)))
    assert torch.is_inference_mode_enabled() is False
