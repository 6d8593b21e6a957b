"""`trust_remote_code` on real loaders: code runs only with the operator's word, and setting it by habit is harmless."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
from runners.api import BadRequest, Context
from runners.inference.runner import InferenceRunner
from tests.kit.inference_specs import change, spec_of
from tests.kit.paths import PERMITS

MakeContext = Callable[..., Context]
FIELD = "model.transformers.trust_remote_code"


def run(make_context: MakeContext, spec: dict[str, Any], *trusted: str) -> dict[str, Any]:
    permits = msgspec.structs.replace(PERMITS, trust_remote_code=trusted)
    return InferenceRunner().run(make_context(spec, permits=permits))


@pytest.fixture
def with_code(tiny_llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model of a type that only its own code knows, and the file that the code makes."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "models" / "own-code"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
    )
    return folder, tmp_path / "ran"


def test_the_habit_changes_nothing(make_context: MakeContext, tiny_llama: Path) -> None:
    spec = spec_of(tiny_llama, ["a task"])
    plain = run(make_context, spec)
    assert run(make_context, change(spec, FIELD, True))["items"] == plain["items"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_models_code_does_not_run_by_itself(
    make_context: MakeContext, with_code: tuple[Path, Path], asked: bool
) -> None:
    folder, ran = with_code
    with pytest.raises(BadRequest) as caught:
        run(make_context, change(spec_of(folder, ["a"]), FIELD, asked), "someone/*")
    assert not ran.exists()
    assert ("tasks.trust_remote_code" in str(caught.value)) is asked


def test_the_operator_lets_it_run(make_context: MakeContext, with_code: tuple[Path, Path]) -> None:
    folder, ran = with_code
    with pytest.raises(BadRequest):  # the class for text generation is not there
        run(make_context, change(spec_of(folder, ["a"]), FIELD, True), f"{folder.parent}/*")
    assert ran.exists()


def test_an_attention_of_the_hub_is_refused(make_context: MakeContext, tiny_llama: Path) -> None:
    spec = change(spec_of(tiny_llama, ["a"]), "model.transformers.attn_implementation", "evil/kernel")
    with pytest.raises(BadRequest, match=r"attn_implementation: 'evil/kernel' is code of the hub"):
        run(make_context, spec)


def test_a_model_with_a_link_to_a_secret_is_refused(
    make_context: MakeContext, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "results" / "task-2" / "final_model"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/proc/self/environ")
    for spec in (
        spec_of(folder, ["a"]),
        {**spec_of(tiny_llama, ["a"]), "checkpoint": {"load": {"taskId": "task-2"}}},
        {**spec_of(tiny_llama, ["a"]), "checkpoint": {"load": {"path": str(folder)}}},
    ):
        with pytest.raises(BadRequest, match=r"tokenizer\.json.*(tasks\.read_roots|no task may read)"):
            run(make_context, spec)
