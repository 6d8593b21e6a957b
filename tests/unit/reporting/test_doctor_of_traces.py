"""What `flowmesh doctor` says about traces: whether the collector can be reached and its headers be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh.cli.findings import Level
from flowmesh.cli.notify import check
from flowmesh.reporting.spans import ENDPOINTS, wanted
from flowmesh.settings.schema import OtelSettings, Settings
from tests.kit.http_server import Server

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINTS, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_no_collector_is_no_finding() -> None:
    assert list(check(Settings())) == []


def test_a_collector_that_listens_and_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = tmp_path / "headers"
    headers.write_text("Authorization: Bearer secret-of-the-collector\n\nX-Tenant: 7\n")
    with Server() as server:
        url = server.url
        (found,) = check(Settings(otel=OtelSettings(endpoint=url, headers_file=str(headers))))
        assert (found.area, found.level) == ("traces", Level.OK)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        assert [each.level for each in check(Settings())] == [Level.OK]
        assert server.requests == [], "nothing is sent"
    assert [each.level for each in check(Settings())] == [Level.BROKEN]
    headers.write_text("secret-without-a-name\n")
    (found,) = check(Settings(otel=OtelSettings(headers_file=str(headers))))
    assert found.level is Level.BROKEN
    assert "line 1" in found.text
    assert "secret-without" not in found.text


def test_opentelemetrys_own_switches() -> None:
    here = OtelSettings(endpoint="http://127.0.0.1:4318")
    assert wanted(here, {})
    assert wanted(OtelSettings(), {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/v1/traces"})
    assert not wanted(OtelSettings(), {})
    assert not wanted(here, {"OTEL_SDK_DISABLED": "TRUE"})
    assert not wanted(here, {"OTEL_TRACES_EXPORTER": "none"})
