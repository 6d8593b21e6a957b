"""Deliveries to S3: every file and the result, in parts where they are large, and again after a kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh.errors import FieldError
from flowmesh.messages.cloud import Keys, S3Access
from flowmesh.messages.job import ArchiveRequest, UploadRequest
from flowmesh.messages.output import S3Destination, read_output
from flowmesh.messages.text import encode_json
from flowmesh.results import delivery, s3_upload
from flowmesh.results.delivery import deliver, read_report, write_job
from flowmesh.results.delivery_state import DeliveryState
from tests.kit.delivery import delivery as job_of
from tests.kit.delivery import outcome, said, target, with_model
from tests.kit.s3_server import KEYS, S3Server, s3_server
from tests.kit.support import until

pytest.importorskip("moto")
OWN = Keys(access_key_id=KEYS["aws_access_key_id"], secret_access_key=KEYS["aws_secret_access_key"])
PART = 5 << 20
"""The least that S3 takes."""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.put("out", {})
        running.put("data", {})
        yield running


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "t-1"
    folder.mkdir()
    return folder


def to(url: str, **fields: Any) -> S3Destination:
    made = read_output({"destination": {"type": "s3", "url": url, **fields}}).destination
    assert isinstance(made, S3Destination)
    return made


def access(server: S3Server, **fields: Any) -> S3Access:
    return S3Access(**{"write": ("s3://out",), "endpoint_url": server.url, "has_keys": True, **fields})


def test_files_archives_and_the_result_become_objects(server: S3Server, out: Path) -> None:
    with_model(out, size=1000)
    (out / "artifacts").mkdir()
    (out / "artifacts" / "ü b?.txt").write_text("artifact")
    (out / "export.jsonl").write_text("rows")
    result = {"jsonl_export": {"path": "export.jsonl"}}
    done = outcome(
        result,
        archives=(ArchiveRequest(folder="final_model"),),
        uploads=(UploadRequest(path="export.jsonl", field="jsonl_export"),),
    )
    job = job_of(
        target(out, to("s3://out/run/"), artifacts=("artifacts/ü b?.txt", "responses.json")), s3=access(server)
    )
    report = deliver(job, done, keys=OWN)
    assert report.ok, report.error
    folder = "run/t-1"
    names = ("export.jsonl", "final_model.tar.gz", "responses.json", "ü b?.txt")
    assert server.keys("out") == [f"{folder}.json", *(f"{folder}/{name}" for name in names)]
    sent = json.loads(server.get("out", f"{folder}.json"))
    assert sent["task_id"] == "t-1"
    assert sent["result"]["final_model_archive_url"] == "s3://out/run/t-1/final_model.tar.gz"
    assert sent["result"]["jsonl_export"]["path"] == "s3://out/run/t-1/export.jsonl"
    assert json.loads(server.get("out", f"{folder}/responses.json")) == said(out) == sent["result"]
    assert server.get("out", f"{folder}/ü b?.txt") == b"artifact"
    assert deliver(job, done, keys=OWN).ok  # over the same objects
    assert len(server.keys("out")) == 5


def large(out: Path, server: S3Server, spool: Path, **fields: Any) -> tuple[Any, bytes]:
    data = os.urandom(2 * PART + 1000)
    (out / "big.bin").write_bytes(data)
    job = job_of(target(out, to("s3://out/large"), artifacts=("big.bin",)), s3=access(server), **fields)
    spool.mkdir(exist_ok=True)
    write_job(job, spool)
    (spool / "outcome.json").write_bytes(encode_json(outcome()))
    return job, data


def test_a_kill_in_mid_upload_leaves_no_object_and_the_next_goes_on(
    server: S3Server, out: Path, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    _, data = large(out, server, spool, bandwidth_bytes_per_sec=8 << 20)
    pid = os.fork()
    if pid == 0:
        os._exit(delivery.main(None, spool, keys=OWN))
    url = "s3://out/large/t-1/big.bin"

    def arrived() -> bool:
        begun = DeliveryState(1, spool, "t-1").multipart(url)
        return begun is not None and bool(begun.etags)

    until(arrived, "a part arrived")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert server.uploads("out") == ["large/t-1/big.bin"]
    assert "large/t-1/big.bin" not in server.keys("out")
    write_job(job_of(target(out, to("s3://out/large"), artifacts=("big.bin",)), s3=access(server)), spool)
    status = (out / "big.bin").stat()
    with (out / "big.bin").open("r+b") as file:  # what has arrived is not read again
        file.write(b"not sent")
    os.utime(out / "big.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert delivery.main(None, spool, keys=OWN) == 0
    assert server.get("out", "large/t-1/big.bin") == data
    assert server.uploads("out") == []
    report = read_report(spool)
    assert report is not None
    assert DeliveryState(1, spool, "t-1").multipart(url) is None
    # Parts that a delivery left which was cancelled do not stay: the next one to the same object removes them.
    server.client.create_multipart_upload(Bucket="out", Key="large/t-1/big.bin")
    server.client.create_multipart_upload(Bucket="out", Key="large/t-1/big.bin.other")
    assert delivery.main(None, spool, keys=OWN, again=True) == 0
    assert server.uploads("out") == ["large/t-1/big.bin.other"]


def test_a_delivery_that_gives_up_aborts_its_parts(server: S3Server, out: Path, tmp_path: Path) -> None:
    job, _ = large(out, server, tmp_path / "spool", bandwidth_bytes_per_sec=6 << 20, total_timeout_s=1.2)
    before = server.uploads("out")
    report = deliver(job, outcome(), keys=OWN, spool=tmp_path / "spool")
    assert not report.ok
    assert "the delivery's time was up" in report.error
    assert server.uploads("out") == before
    assert (out / "responses.json").is_file()


@pytest.mark.parametrize(
    ("url", "fields", "why"),
    [
        ("s3://data/x", {}, "the operator does not allow results there (the node's setting cloud.write)"),
        ("s3://no-such-bucket/x", {"write": ("s3://*",)}, "there is no bucket 'no-such-bucket' at http://127.0.0.1"),
        ("s3://out/x", {"credentials_file": "/nowhere", "has_keys": False}, "cloud.credentials_file: /nowhere cannot"),
        ("s3://out/x", {"endpoint_url": "http://127.0.0.1:9"}, "no connection to http://127.0.0.1:9"),
    ],
)
def test_what_is_refused_and_what_is_tried_again(  # noqa: PLR0917
    server: S3Server, out: Path, tmp_path: Path, url: str, fields: dict[str, Any], why: str
) -> None:
    (out / "a").write_text("a")
    job = job_of(target(out, to(url), artifacts=("a",)), s3=access(server, **fields), ends_to_wait=True)
    keys = OWN if fields.get("has_keys", True) else None
    report = deliver(job, outcome(), keys=keys, spool=tmp_path)
    assert not report.ok
    assert why in report.error
    waits = "credentials" in why or "no connection" in why
    assert (report.again_in_s is not None) is waits
    assert report.origin == ("s3://out" if waits else "")


def test_keys_that_are_refused_are_the_nodes_trouble(server: S3Server, out: Path, tmp_path: Path) -> None:
    (out / "a").write_text("a")
    job = job_of(target(out, to("s3://out/x"), artifacts=("a",)), s3=access(server), ends_to_wait=True)
    wrong = Keys(access_key_id="AKIDWRONG", secret_access_key="hidden-secret")
    with server.checking_keys() as limited:
        report = deliver(job, outcome(), keys=wrong, spool=tmp_path)
        assert report.again_in_s is not None
        assert "S3 refuses the node's credentials (InvalidAccessKeyId)" in report.error
        assert "hidden-secret" not in report.error
        some = Keys(access_key_id=limited["aws_access_key_id"], secret_access_key=limited["aws_secret_access_key"])
        denied = deliver(job, outcome(), keys=some, spool=tmp_path)
        assert "access denied (AccessDenied)" in denied.error
        assert denied.again_in_s is not None
    assert deliver(job, outcome(), keys=OWN, spool=tmp_path).ok


@pytest.mark.parametrize("url", ["https://x/y", "s3://", "s3://b/../x", "s3://a:b@out/x", None])
def test_destinations_that_cannot_be_used(url: str | None) -> None:
    with pytest.raises(FieldError, match=r"^spec.output.destination.url: "):
        to(url)  # type: ignore[arg-type]
