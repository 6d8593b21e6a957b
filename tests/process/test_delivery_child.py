"""The delivery's own process: driven by files, killed and run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import pytest

from flowmesh.messages.job import Outcome, UploadRequest
from flowmesh.processes.pipe import Finished, Frame, Hello, Phase, Pipe, Progress
from flowmesh.results.delivery import deliver, main, read_report, write_job
from flowmesh.results.job import DeliveryJob
from flowmesh.settings.schema import ArchiveSettings
from tests.kit.delivery import (
    checksum,
    delivery,
    http,
    outcome,
    said,
    target,
    trained,
    with_model,
)
from tests.kit.http_server import Answer, Reset, Server, Stall
from tests.kit.support import until

CHILD = (
    "import socket, sys\n"
    "from pathlib import Path\n"
    "from flowmesh.processes.pipe import Pipe\n"
    "from flowmesh.results.delivery import main\n"
    "fd, spool, token = sys.argv[1:]\n"
    "pipe = Pipe(socket.socket(fileno=int(fd))) if fd != '-' else None\n"
    "heavy = {'torch', 'numpy', 'requests', 'redis', 'asyncio', 'psutil'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "sys.exit(main(pipe, Path(spool), token or None))\n"
)


def start(spool: Path, pipe: Pipe | None = None, token: str = "") -> subprocess.Popen[bytes]:
    fd = pipe.fileno() if pipe is not None else None
    command = [sys.executable, "-c", CHILD, "-" if fd is None else str(fd), str(spool), token]
    return subprocess.Popen(command, pass_fds=() if fd is None else (fd,), stderr=subprocess.PIPE)


def prepare(spool: Path, job: DeliveryJob, ran: Outcome) -> None:
    write_job(job, spool)
    (spool / "outcome.json").write_bytes(msgspec.json.encode(ran))


def test_the_child_tells_its_progress_and_leaves_its_report(out: Path, spool: Path) -> None:
    with_model(out)
    with Server() as server:
        prepare(spool, delivery(target(out, http(server.url)), orchestrator_url=server.url), trained())
        near, far = Pipe.pair()
        process = start(spool, far, token="n0de-token")
        far.close()
        frames: list[Frame] = []
        while near.wait(20):
            try:
                frame = near.poll()
            except EOFError:
                break
            assert frame is not None
            frames.append(frame)
        near.close()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert all(r.headers["authorization"] == "Bearer n0de-token" for r in server.received)
    kinds = [type(frame) for frame in frames]
    assert kinds[0] is Hello
    assert kinds[-1] is Finished
    assert Phase("archive") in frames
    assert Phase("upload") in frames
    assert Progress in kinds
    report = read_report(spool)
    assert report is not None
    assert report.ok
    assert (spool / "delivery.json").stat().st_mode & 0o077 == 0
    assert b"n0de-token" not in b"".join(p.read_bytes() for p in [*spool.iterdir(), out / "responses.json"])


def test_killed_in_mid_upload_it_goes_on_where_it_was(out: Path, spool: Path) -> None:
    with_model(out)
    (out / "then.txt").write_text("then")
    with Server(Answer(), Stall(100_000)) as server:
        ran = msgspec.structs.replace(trained(), uploads=(UploadRequest(path="then.txt", field="then"),))
        prepare(spool, delivery(target(out, http(server.url, timeoutSec=60))), ran)
        # the archive arrives, the file after it stalls
        process = start(spool)
        until(lambda: len(server.requests) == 2, "the second request")
        archive = (out / "final_model.tar.gz").stat()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert read_report(spool) is None
        assert said(out)["training_successful"] is True  # the computed result is not lost
        again = start(spool)
        _, errors = again.communicate(timeout=30)
        assert again.returncode == 0, errors
        assert [r.file_name for r in server.received] == ["final_model.tar.gz", "then.txt", None]
        assert (out / "final_model.tar.gz").stat().st_mtime_ns == archive.st_mtime_ns
        assert server.results()[0]["final_model_archive_uploaded"] is True
        assert server.results()[0]["then"]["uploaded"] is True


def test_killed_while_it_packs_it_packs_again(out: Path, spool: Path, tmp_path: Path) -> None:
    model = with_model(out)
    slow = tmp_path / "slow-pigz"
    slow.write_text("#!/bin/sh\nhead -c 2000000 | pigz -c\nwhile [ -e /proc/$PPID/fd ]; do sleep 0.05; done\n")
    slow.chmod(0o755)
    with Server() as server:
        job = delivery(target(out, http(server.url)), archive=ArchiveSettings(pigz_bin=str(slow)))
        prepare(spool, job, trained())
        process = start(spool)
        partial = out / "final_model.tar.gz.partial"
        until(lambda: partial.exists() and partial.stat().st_size > 0, "the archive grows")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert partial.exists()
        assert not (out / "final_model.tar.gz").exists()
        prepare(spool, delivery(target(out, http(server.url))), trained())
        assert main(None, spool) == 0
        assert server.files()["final_model.tar.gz"].file_sha256 == checksum(out / "final_model.tar.gz")
    assert not partial.exists()
    with tarfile.open(out / "final_model.tar.gz") as tar:
        assert tar.getmember("final_model/weights.bin").size == (model / "weights.bin").stat().st_size


def test_killed_after_the_cleanup_it_still_ends_well(out: Path, spool: Path) -> None:
    with_model(out)
    with Server() as server:
        job = delivery(target(out, http(server.url), artifacts=("final_model",)), cleanup_after_upload=True)
        prepare(spool, job, trained())
        assert main(None, spool) == 0
        (spool / "delivered.json").unlink()  # as if it had been killed just before writing this
        assert main(None, spool) == 0
        assert len(server.received) == 2
        assert said(out)["final_model_archive_uploaded"] is True
        report = read_report(spool)
        assert report is not None
        assert report.urls == (f"{server.url}/t-1/files/final_model.tar.gz",)


def test_an_archive_of_an_earlier_attempt_is_not_taken_for_this_ones(out: Path, spool: Path) -> None:
    with_model(out)
    (out / "final_model.tar.gz").write_bytes(b"of an earlier attempt")
    with Server() as server:
        prepare(spool, delivery(target(out, http(server.url))), trained())
        assert main(None, spool) == 0
        first = server.files()["final_model.tar.gz"]
        assert first.file_size > 1000
        (out / "final_model" / "weights.bin").write_bytes(b"other weights")
        prepare(spool, delivery(target(out, http(server.url)), attempt=2), trained())
        (spool / "delivered.json").unlink()
        assert main(None, spool) == 0
        assert server.files()["final_model.tar.gz"].file_sha256 != first.file_sha256


def test_done_is_done_unless_asked_to_send_again(out: Path, spool: Path) -> None:
    with Server(Answer(403)) as server:
        prepare(spool, delivery(target(out, http(server.url))), outcome())
        assert main(None, spool) == 1
        report = read_report(spool)
        assert report is not None
        assert not report.ok
        assert main(None, spool) == 0  # a failed delivery is tried again when the child is started again
        assert main(None, spool) == 0
        assert len(server.received) == 1
        assert main(None, spool, again=True) == 0
        assert len(server.received) == 2


def test_two_children_of_one_spool_deliver_once(out: Path, spool: Path) -> None:
    with_model(out)
    with Server(Reset(1000)) as server:
        prepare(spool, delivery(target(out, http(server.url))), trained())
        both = [start(spool), start(spool)]
        for process in both:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        assert [r.file_name for r in server.received] == ["final_model.tar.gz", None]


def test_it_goes_on_without_the_node(out: Path, spool: Path) -> None:
    with_model(out)
    with Server() as server:
        prepare(spool, delivery(target(out, http(server.url))), trained())
        near, far = Pipe.pair()
        process = start(spool, far)
        far.close()
        near.close()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert len(server.received) == 2


def test_a_broken_job_is_a_report(spool: Path, out: Path) -> None:
    prepare(spool, delivery(target(out)), outcome())
    (spool / "outcome.json").write_text("{")
    assert main(None, spool) == 1
    report = read_report(spool)
    assert report is not None
    assert "internal error in the delivery: DecodeError" in report.error


@pytest.mark.parametrize("name", ["delivered.json", "delivery_state.json", "outcome.json", "delivery.json"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "garbage"])
def test_the_child_reads_nothing_but_files(out: Path, spool: Path, name: str, kind: str) -> None:
    with Server() as server:
        prepare(spool, delivery(target(out, http(server.url))), outcome())
        path = spool / name
        path.unlink(missing_ok=True)
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "link":
                path.symlink_to(out / "responses.json")
            case "folder":
                path.mkdir()
            case _:
                path.write_bytes(b'{"ok": "\xff"}')
        process = start(spool)
        process.communicate(timeout=20)
        report = read_report(spool)
        if name == "delivery_state.json" or (name == "delivered.json" and kind != "folder"):
            assert (process.returncode, report and report.ok) == (0, True)
            assert len(server.results()) == 1
        else:
            assert process.returncode != 0
            assert report is None or not report.ok
            assert (server.results() == []) == (name != "delivered.json")


def test_the_result_arrives_byte_for_byte(out: Path) -> None:
    text = "".join(chr(c) for c in (*range(1, 0x250), 0x2028, 0x1F600)) * 500
    with Server() as server:
        assert deliver(delivery(target(out, http(server.url))), outcome({"text": text})).ok
        (result,) = server.results()
    assert result["text"] == text
    assert said(out)["text"] == text
