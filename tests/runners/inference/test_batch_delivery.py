"""Under HTTP delivery, the answers and errors of a batch file arrive, and the result has their URLs."""

from __future__ import annotations

import pytest

from flowmesh.results.delivery import deliver
from tests.kit.batch_files import chat, spec_of, write
from tests.kit.delivery import delivery, http, outcome, target
from tests.kit.results_server import ResultsServer

pytest.importorskip("transformers", reason="needs the extra 'inference'")
from runners.inference.runner import InferenceRunner


def test_answers_and_errors_are_uploaded(tiny_llama, make_context, tmp_path) -> None:
    file = write(tmp_path / "batch.jsonl", chat("a", max_tokens=2), chat("b", model="gpt-9"))
    context = make_context(spec_of(tiny_llama, file), delivers_http=True)
    result = InferenceRunner().run(context)
    (tmp_path / "server").mkdir()
    with ResultsServer(tmp_path / "server") as server:
        task = target(context.out_dir, http(f"{server.origin}/api/v1/results"), task_id="task-1")
        report = deliver(delivery(task), outcome(result, uploads=tuple(context.uploads)))
        assert report.ok, report.error
        for field, name in (("output_file", "output.jsonl"), ("error_file", "errors.jsonl")):
            url = f"{server.origin}/api/v1/results/task-1/files/{name}"
            assert (server.folder / "task-1" / name).read_bytes() == (context.artifacts_dir / name).read_bytes()
            assert server.results["task-1"][field]["url"] == server.results["task-1"][field]["path"] == url
