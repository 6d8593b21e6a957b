"""What loads code by data needs the operator's word, and a habitual `trust_remote_code` changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runners.api import BadRequest, Context
from runners.models.adapters import load_adapter
from runners.models.code import check_data_only, is_trusted, may_run_code
from runners.models.contents import check_attention
from runners.models.sources import Source, resolve_identifier
from runners.models.spec import Adapter
from tests.kit.paths import PERMITS

MakeContext = Callable[..., Context]
WHERE = "spec.model.transformers.trust_remote_code"


def trusting(make_context: MakeContext, *patterns: str) -> Context:
    return make_context({}, permits=msgspec.structs.replace(PERMITS, trust_remote_code=patterns))


@pytest.fixture
def plain(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "models" / "plain"))


def change(folder: Path, name: str, **fields: Any) -> Path:
    path = folder / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | fields))
    return folder


def source(folder: Path, **fields: Any) -> Source:
    return Source(path=str(folder), revision=None, shown=folder.name, where="spec.model.source.identifier", **fields)


def bring_code(folder: Path, how: str) -> Path:
    match how:
        case "config.json" | "tokenizer_config.json" | "processor_config.json":
            change(folder, how, auto_map={"AutoConfig": "modeling_evil.Evil"})
        case "custom_generate":
            (folder / how).mkdir()
            (folder / how / "generate.py").write_text("raise SystemExit('code ran')")
        case "modules.json":
            (folder / how).write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "modeling_evil.Evil"}]))
    (folder / "modeling_evil.py").write_text("raise SystemExit('code ran')")
    return folder


WAYS = ("config.json", "tokenizer_config.json", "processor_config.json", "custom_generate", "modules.json")


def test_a_model_without_code_is_accepted_and_nothing_changes(make_context: MakeContext, plain: Path) -> None:
    (plain / "convert.py").write_text("raise SystemExit('code ran')")  # nothing names it
    assert may_run_code(trusting(make_context), source(plain), True, WHERE) is False


@pytest.mark.parametrize("how", WAYS)
def test_a_model_with_code_needs_the_operator(make_context: MakeContext, plain: Path, how: str) -> None:
    found = source(bring_code(plain, how))
    with pytest.raises(BadRequest, match=r"tasks\.trust_remote_code") as caught:
        may_run_code(trusting(make_context, "owner/*", "/elsewhere/*"), found, True, WHERE)
    assert str(caught.value).startswith(WHERE)
    assert may_run_code(trusting(make_context, "owner/*"), found, False, WHERE) is False
    for pattern in ("*", f"{plain.parent.resolve()}/*"):
        assert may_run_code(trusting(make_context, pattern), found, True, WHERE) is True


def test_code_of_another_repository_needs_that_ones_name(make_context: MakeContext, plain: Path) -> None:
    change(plain, "config.json", auto_map={"AutoModel": "evil/code--modeling.Evil"})
    with pytest.raises(BadRequest, match="brings code"):
        may_run_code(trusting(make_context, f"{plain.parent.resolve()}/*"), source(plain), True, WHERE)


def test_the_tokenizer_counts_too(make_context: MakeContext, plain: Path, tmp_path: Path) -> None:
    other = bring_code(Path(shutil.copytree(plain, tmp_path / "other")), "tokenizer_config.json")
    with pytest.raises(BadRequest, match="brings code"):
        may_run_code(trusting(make_context), source(plain, tokenizer=str(other)), True, WHERE)


@pytest.mark.parametrize("pattern", ["*", "/*", "task-2/*"])
def test_what_a_task_made_is_never_code(make_context: MakeContext, plain: Path, tmp_path: Path, pattern: str) -> None:
    made = tmp_path / "results" / "task-2" / "final_model"
    shutil.copytree(bring_code(plain, "config.json"), made)
    (tmp_path / "models" / "link").symlink_to(made)
    for folder in (made, tmp_path / "models" / "link"):
        with pytest.raises(BadRequest, match="never code"):
            may_run_code(trusting(make_context, pattern), source(folder), True, WHERE)


def test_a_relative_name_in_results_is_no_hub_id(make_context: MakeContext, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(bring_code(plain, "config.json"), tmp_path / "results" / "nvidia" / "model")
    ctx = trusting(make_context, "nvidia/*")
    found = resolve_identifier(ctx, "nvidia/model", None, "spec.model.source.identifier")
    with pytest.raises(BadRequest, match="never code"):
        may_run_code(ctx, found, True, WHERE)
    assert is_trusted(ctx, "nvidia/other")


@pytest.mark.parametrize("name", ["global_step5", "pytorch_model_fsdp_0", "optimizer_0", "custom_checkpoint_0.pkl"])
def test_a_checkpoint_with_pickles_needs_the_operator(make_context: MakeContext, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run" / "checkpoint-5"
    (folder / name).mkdir(parents=True)
    with pytest.raises(BadRequest, match=r"pickles.*tasks\.trust_remote_code"):
        check_data_only(trusting(make_context), folder, "spec.training.resume_from_path")
    check_data_only(trusting(make_context, f"{tmp_path.resolve()}/run/*"), folder, "spec.training.resume_from_path")


def test_attention_kernels_of_the_hub_are_code(make_context: MakeContext, plain: Path) -> None:
    check_attention(trusting(make_context), "sdpa", "f")
    for name in ("evil/kernel", "evil/kernel@main:fn", "paged|evil/kernel"):
        with pytest.raises(BadRequest, match="code of the hub"):
            check_attention(trusting(make_context, "kernels-community/*"), name, "f")
    check_attention(trusting(make_context, "kernels-community/*"), "kernels-community/flash-attn", "f")
    change(plain, "config.json", attn_implementation="evil/kernel")
    with pytest.raises(BadRequest, match="code of the hub"):
        resolve_identifier(trusting(make_context), str(plain), None, "spec.model.source.identifier")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("model.safetensors.index.json", {"weight_map": {"w": "../../other/model.safetensors"}}),
        ("model.safetensors.index.json", {"weight_map": {"w": "/srv/other/model.safetensors"}}),
        ("config.json", {"transformers_weights": "../x.safetensors"}),
        ("tokenizer_config.json", {"vocab_file": "/etc/shadow"}),
        ("tokenizer_config.json", {"tokenizer_file": "../../x"}),
    ],
)
def test_a_models_files_name_no_files_of_others(
    make_context: MakeContext, plain: Path, name: str, fields: dict[str, Any]
) -> None:
    change(plain, name, **fields)
    with pytest.raises(BadRequest, match="outside of the folder"):
        resolve_identifier(trusting(make_context), str(plain), None, "spec.model.source.identifier")


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
        {"corda_config": {"cache_file": "/tmp/x.pt"}},
    ],
)
def test_an_adapters_configuration_imports_nothing(
    make_context: MakeContext, tmp_path: Path, fields: dict[str, Any]
) -> None:
    (tmp_path / "lora").mkdir()
    change(tmp_path / "lora", "adapter_config.json", peft_type="LORA", r=4, **fields)
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(BadRequest, match="adapter_config"):
        load_adapter(trusting(make_context), Adapter(path=str(tmp_path / "lora")), 0, "spec.model.adapters[0]")


def test_a_tasks_folder_that_is_a_link_outside_is_refused(make_context: MakeContext, tmp_path: Path) -> None:
    ctx = make_context({}, permits=msgspec.structs.replace(PERMITS, read_roots=()))
    (tmp_path / "secret" / "names").mkdir(parents=True)
    (tmp_path / "secret" / "names" / "adapter_config.json").write_text("{}")
    (tmp_path / "results" / "task-2").symlink_to(tmp_path / "secret")
    with pytest.raises(BadRequest, match=r"tasks\.read_roots") as caught:
        load_adapter(ctx, Adapter(task_id="task-2"), 0, "spec.model.adapters[0]")
    assert "names more" in str(caught.value)
    assert "'names" not in str(caught.value)
