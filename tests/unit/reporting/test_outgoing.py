"""A message that cannot be built costs no task its end."""

from __future__ import annotations

from flowmesh.reporting.outgoing import Outgoing
from flowmesh.settings.schema import NotifySettings, OtelSettings, Settings
from flowmesh.tasks.history import Detail, Entry, Found

SETTINGS = Settings(
    notify=NotifySettings(url=("http://127.0.0.1:1/a", "http://127.0.0.1:1/b"), events=("failed",)),
    otel=OtelSettings(endpoint="http://127.0.0.1:1"),
)
AT = "2026-01-01T00:00:00+00:00"


def ended(verdict: str, finished_at: str = AT, **detail: object) -> Found:
    entry = Entry(task_id="t", worker_id="w", attempt=7, verdict=verdict, received_at=AT, finished_at=finished_at)
    return Found(entry=entry, detail=Detail(**detail))


def test_each_receiver_gets_what_it_wants() -> None:
    outgoing = Outgoing(SETTINGS, {}, "n1")
    lanes = [lane.name for lane in outgoing.lanes()]
    assert len(lanes) == 2 + outgoing.traces
    assert [each.lane for each in outgoing.of_end(ended("crash"))] == lanes
    assert [each.lane for each in outgoing.of_end(ended("ok"))] == lanes[2:], "successes are not told by default"
    first, second, *_ = outgoing.of_end(ended("crash"))
    assert first.id == second.id
    assert outgoing.of_end(ended("crash"))[0].id != first.id


def test_what_cannot_be_built_is_left_out() -> None:
    outgoing = Outgoing(SETTINGS, {}, "n1")
    broken = ended("crash", marks={"running": float("nan")})
    assert isinstance(outgoing.of_end(broken), list)
    assert Outgoing(Settings(notify=NotifySettings()), {}, "n1").of_end(broken) == []
