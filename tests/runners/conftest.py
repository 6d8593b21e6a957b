"""A tiny model made once a session, and contexts to run runners in without a node."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.messages.job import Job
from flowmesh.processes.pipe import Pipe
from runners.api import Context
from tests.kit.paths import PERMITS
from tests.kit.vllm_zygote import Zygote

if "huggingface_hub" in sys.modules and not os.environ.get("HF_HUB_OFFLINE"):
    raise ImportError("a test module of another folder imports huggingface_hub: import it in the test, after this")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test may look for a hub
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a second thread for a tiny model only spins


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random float32 Llama and its tokenizer."""
    pytest.importorskip("transformers", reason="needs the extra 'inference'")
    from runners.models.builtin import write_tiny_llama

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    folder.mkdir()
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tiny_llama: Path) -> tuple[Any, Any]:
    """The same model and its tokenizer as Transformers' documentation shows them: one prompt, no padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache_dir that the session's tasks share, as tasks of one node do."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def forked() -> Iterator[Zygote]:
    """One fork server with vLLM for all tests of a session: importing it takes ten seconds of CPU time."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def make_context(tmp_path: Path, shared_cache: Path) -> Callable[..., Context]:
    """`make_context(spec, pipe=None, children=[…], task_type=…, **job fields)`: a Context as the child makes it.

    `anew=False`: the task goes on from the rows of an earlier one with its id.
    """

    def make(
        spec: dict[str, Any],
        *,
        pipe: Pipe | None = None,
        children: list[dict[str, Any]] | None = None,
        task_id: str = "task-1",
        task_type: str = "inference",
        anew: bool = True,
        **fields: Any,
    ) -> Context:
        out_dir, tmp_dir = tmp_path / "results" / task_id, tmp_path / "tmp" / task_id
        out_dir.mkdir(parents=True, exist_ok=True)
        tmp_dir.mkdir(parents=True, exist_ok=True)
        if anew:
            (out_dir / "rows.jsonl").unlink(missing_ok=True)
        task: dict[str, Any] = {"spec": spec}
        if children is not None:
            task["merge_children"] = children
        settings: dict[str, Any] = {
            "attempt": 1,
            "runner": "tests:none",
            "out_dir": str(out_dir),
            "results_dir": str(tmp_path / "results"),
            "cache_dir": str(shared_cache),
            "tmp_dir": str(tmp_dir),
            "threads": 1,
            "permits": PERMITS,
        }
        job = Job(task_id=task_id, task_type=task_type, task=task, **{**settings, **fields})
        return Context(job, pipe)

    return make
