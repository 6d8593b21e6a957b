"""Deliveries that fail, in part or as a whole: what arrived stays, what failed is reported."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from flowmesh.results.delivery import deliver
from tests.kit.delivery import (
    checksum,
    delivery,
    http,
    manifest,
    outcome,
    said,
    target,
    trained,
    with_model,
)
from tests.kit.http_server import Answer, Server

LEFT = "not all of checkpoints could be removed after its upload: checkpoints/checkpoint-5: something is mounted there"


def test_a_refusal_leaves_everything_on_disk_and_tells_the_servers_word(out: Path) -> None:
    with_model(out)
    with Server(Answer(507), Answer(403, b"quota of k3y-secret exceeded")) as server:
        job = delivery(target(out, http(server.url, headers={"X-Key": "k3y-secret"})), cleanup_after_upload=True)
        report = deliver(job, trained())
        assert server.received == []
    assert not report.ok
    assert report.status == 403
    assert "403" in report.error
    assert "quota of [hidden] exceeded" in report.error
    assert (out / "final_model" / "weights.bin").exists()
    assert (out / "checkpoints").exists()
    assert said(out)["final_model_archive_uploaded"] is False
    assert "final_model_archive_url" not in said(out)
    assert manifest(out)["responses.json"]["sha256"] == checksum(out / "responses.json")
    assert manifest(out)["final_model.tar.gz"]["status"] == "present"


def test_a_result_that_is_refused_is_a_failed_delivery(out: Path) -> None:
    with Server(Answer(422, b"no")) as server:
        report = deliver(delivery(target(out, http(server.url))), outcome())
        assert server.received == []
    assert (report.ok, report.status) == (False, 422)
    assert said(out) == {"ok": True}


def test_after_a_success_the_model_may_go(out: Path) -> None:
    with_model(out)
    (out / "keep.txt").write_text("x")
    with Server() as server:
        report = deliver(delivery(target(out, http(server.url)), cleanup_after_upload=True), trained())
        assert report.ok
        assert set(server.files()) == {"final_model.tar.gz"}
    assert sorted(p.name for p in out.iterdir()) == ["keep.txt", "logs", "manifest.json", "responses.json"]
    assert "final_model.tar.gz" not in manifest(out)
    assert said(out)["final_model_archive_uploaded"] is True


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_what_cannot_be_removed_after_the_upload_is_told_and_no_failure(out: Path) -> None:
    with_model(out)
    busy = out / "checkpoints" / "checkpoint-5"
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(busy)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this system does not allow mounting a tmpfs")
    try:
        with Server() as server:
            report = deliver(delivery(target(out, http(server.url)), cleanup_after_upload=True), trained())
            assert report.ok, report
            assert len(server.received) == 2
    finally:
        subprocess.run(["umount", "-l", str(busy)], check=True)
    assert not (out / "final_model").exists()
    assert LEFT in report.notes


def test_a_model_that_was_not_sent_is_never_dropped(out: Path) -> None:
    with_model(out)
    job = delivery(target(out), cleanup_after_upload=True)
    assert deliver(job, trained()).ok
    assert (out / "final_model" / "weights.bin").exists()
    assert not (out / "final_model.tar.gz").exists()
    with Server() as server:
        assert deliver(delivery(target(out, http(server.url)), cleanup_after_upload=True), outcome()).ok
    assert (out / "final_model" / "weights.bin").exists()
    assert (out / "checkpoints").exists()
