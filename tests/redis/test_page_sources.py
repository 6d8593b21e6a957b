"""What the page asks of Redis: nothing stays open when nobody looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh.messages.page import Note
from flowmesh.page import sources
from tests.kit.support import RedisServer, until


@pytest.mark.redis
def test_the_fleets_connection_is_closed_when_nobody_looks(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNUSED_S", 0.2)
    found = sources.Sources(Note(state_dir=str(tmp_path), host="127.0.0.1", port=1), redis_server.url)
    client = redis_server.client()
    alone = len(client.client_list())
    assert found.fleet().of == "deployment"
    assert len(client.client_list()) > alone
    until(lambda: len(client.client_list()) == alone, "its connections are closed")
    monkeypatch.setattr(sources, "FRESH_S", 0.0)
    assert found.fleet().of == "deployment"
