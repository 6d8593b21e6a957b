"""Where two runs differ: outputs by item, numbers within a tolerance, and nothing that no two runs share."""

from __future__ import annotations

import pytest

from flowmesh.cli.replay import document_of, stop_after
from flowmesh.cli.replay_diff import differences, items_of, lines, renamed
from flowmesh.errors import FieldError
from flowmesh.tasks.history import Detail, Entry, Found


def found(**detail: object) -> Found:
    entry = Entry(task_id="t", verdict="ok", finished_at="2026", wall_s=1.0, tokens=5)
    return Found(entry=entry, detail=Detail(**detail))  # type: ignore[arg-type]


def test_outputs_are_compared_by_item_and_numbers_within_a_tolerance() -> None:
    before = {"items": [{"output": "a"}, {"output": "b"}], "usage": {"latency_sec": 1}, "metrics": {"loss": 2.0}}
    now = {"items": [{"output": "a"}, {"output": "c"}, {"output": "d"}], "usage": {"latency_sec": 9}}
    now["metrics"] = {"loss": 2.0001}
    got = list(differences(before, now))
    assert [each.field for each in got] == ["items[1].output", "items[2]"]
    assert items_of(got) == ["items[1]", "items[2]"]
    assert next(iter(differences({"loss": 2.0}, {"loss": 2.1}))).field == "loss"
    assert list(differences({"ok": True}, {"ok": 1.0})) == []


def test_two_runs_of_a_failed_task_and_of_a_training_do_not_differ() -> None:
    def result(task_id: str, stamp: str, peak: int) -> dict[str, object]:
        return {
            "task_id": task_id,
            "error": f"{task_id}: no",
            "log_tail": [f"{stamp} ERROR no"],
            "output": f"/r/{task_id}/x",
            "metrics": {"peak_host_bytes": peak, "joules": peak, "loss_history": [{"step": 1, "loss": 2.5}]},
        }

    before, now = result("t", "10:00", 1), renamed(result("replay-t-1", "11:00", 2), {"replay-t-1": "t"})
    assert list(differences(before, now)) == []
    assert "outputs   no difference" in list(lines(found(), found(), (before, now), until=None))
    paths = [{"outputs": [{"path": path}]} for path in ("model/a", "model/b")]
    assert [each.field for each in differences(*paths)] == ["outputs[0].path"]
    assert "the second run has no result" in "\n".join(lines(found(), found(), ({}, None), until=None))


def test_what_is_printed() -> None:
    before = found(versions={"torch": "2.1", "peft": "1"}, phases={"load": 1.0}, gpus={"GPU-1": "H100"})
    now = found(versions={"torch": "2.2"}, phases={"load": 2.0})
    text = "\n".join(lines(before, now, ({"x": 1}, {"x": 2}), until=None))
    for part in ("ok, as before", "x: 1 -> 2", "torch: 2.1 -> 2.2", "H100 -> none", "load", "2.0 s"):
        assert part in text
    assert "peft" not in text, "the second run may have ended before it imported it"
    assert "not compared" in "\n".join(lines(before, now, (None, {}), until=None))
    assert "stopped   after load" in "\n".join(lines(before, now, ({}, {}), until="load"))


def test_hidden_secrets_must_be_given_and_go_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"urls": [{"a": "[hidden]"}], "output": {"destination": {"headers": {"x": "[hidden]"}}}}
    task = found(document={"spec": spec}, hidden=("spec.urls[0].a", "spec.output.destination.headers.x"))
    with pytest.raises(FieldError, match=r"--secret spec.urls\[0\].a=VARIABLE"):
        document_of(task, {})
    monkeypatch.setenv("OPENS", "sesame")
    document = document_of(task, {"spec.urls[0].a": "OPENS"})
    assert document["spec"] == {"urls": [{"a": "sesame"}], "output": {}}, "and it is delivered nowhere"
    with pytest.raises(FieldError, match="no secret is hidden"):
        document_of(task, {"spec.none": "OPENS", "spec.urls[0].a": "OPENS"})
    with pytest.raises(FieldError, match="not kept whole"):
        document_of(found(document={}, whole=False), {})


def test_a_phase_to_stop_after_is_one_that_the_task_had(capsys: pytest.CaptureFixture[str]) -> None:
    before = found(phases={"fetch": 0.1, "load": 1.0, "save": 0.1})
    assert stop_after("load", before) == "load"
    assert stop_after(None, before) is None
    assert stop_after("save", before) is None
    assert "save is its last phase: it runs to its end" in capsys.readouterr().err
    with pytest.raises(FieldError, match=r"no phase 'lode'; it had: fetch, load, save"):
        stop_after("lode", before)
    with pytest.raises(FieldError, match="entered no phase; leave --until out"):
        stop_after("load", found())
