"""Downloads against a real server: resumed, checked, cached, evicted, shared."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.processes.pipe import Cancel, Pipe
from runners.api import BadRequest, Cancelled, RunnerError
from runners.data import cache, download
from runners.data.download import fetch
from tests.kit.file_server import Served, Server

BODY = os.urandom(300_000)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server().running() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch) -> None:
    """Each test is a process of its own to the cache, and waits briefly."""
    monkeypatch.setattr(cache, "_held", {})
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)


def let_go() -> None:
    """What the end of a process does."""
    for lock in cache._held.values():
        lock.close()
    cache._held.clear()


@pytest.fixture
def ctx(make_context, tmp_path):
    return make_context({}, cache_dir=str(tmp_path / "cache"))


def test_a_file_comes_whole_and_is_asked_for_again_by_etag(server, ctx) -> None:
    server.files["a"] = Served(BODY)
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    assert [status for _, _, status in server.requests] == [200, 304]
    server.files["a"] = Served(b"new", etag='"2"')
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == b"new"


def test_last_modified_does_where_there_is_no_etag(server, ctx) -> None:
    server.files["a"] = Served(BODY, etag=None, modified=True)
    for _ in range(2):
        assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    assert [status for _, _, status in server.requests] == [200, 304]


def test_nothing_to_go_by_is_fetched_anew(server, ctx) -> None:
    server.files["a"] = Served(BODY, etag=None)
    fetch(ctx, server.url("a"), "here")
    server.files["a"] = Served(b"other", etag=None)
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == b"other"


def test_a_broken_connection_is_taken_up_where_it_broke(server, ctx) -> None:
    server.files["a"] = Served(BODY, cut_after=[100_000, 50_000])
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    statuses = [status for _, _, status in server.requests]
    assert statuses == [200, 206, 206]
    assert int(server.requests[1][1]["range"].removeprefix("bytes=").rstrip("-")) > 0


def test_a_file_that_changed_between_two_attempts_is_not_mixed(server, ctx) -> None:
    old, new = b"o" * 200_000, b"n" * 200_000
    server.files["a"] = Served(old, cut_after=[120_000] * download.ATTEMPTS, ranges=False)
    with pytest.raises(RunnerError, match=r"here: .* could not be downloaded: the connection broke off"):
        fetch(ctx, server.url("a"), "here")
    server.files["a"] = Served(new, etag='"2"')
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == new


def test_a_later_task_takes_up_what_an_earlier_one_left(server, ctx) -> None:
    server.files["a"] = Served(BODY, cut_after=[30_000] * download.ATTEMPTS)
    with pytest.raises(RunnerError):
        fetch(ctx, server.url("a"), "here")
    server.requests.clear()
    server.files["a"].cut_after = []
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    assert [status for _, _, status in server.requests] == [206]


def test_a_task_that_ended_just_before_its_file_was_whole_costs_the_next_one_nothing(server, ctx) -> None:
    """The server answers 416 then: there is nothing behind what is there. It must not do so for good."""
    server.files["a"] = Served(BODY)
    entry = cache.Entry(ctx, server.url("a"), {})
    with entry:
        entry.part.write_bytes(BODY)
        cache.write_meta(entry.part_meta, cache.Meta(url="", file="", size_bytes=len(BODY), etag='"1"'))
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    assert [status for _, _, status in server.requests] == [416]
    with entry:
        entry.part.write_bytes(BODY + b"more than there is")
        cache.write_meta(entry.part_meta, cache.Meta(url="", file="", size_bytes=len(BODY), etag='"1"'))
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    assert [status for _, _, status in server.requests] == [416, 416, 304]


def test_the_bytes_of_an_older_file_never_stand_under_a_newer_ones_name(server, ctx, tmp_path) -> None:
    """Whenever a task ends: what part.json promises is what `part` holds. Here it cannot be opened for writing."""
    busy = tmp_path / "sleep"
    shutil.copy(shutil.which("sleep") or "", busy)
    entry = cache.Entry(ctx, server.url("a"), {})
    with entry:
        entry.part.symlink_to(busy)
        cache.write_meta(entry.part_meta, cache.Meta(url="", file="", size_bytes=0, etag='"1"'))
    server.files["a"] = Served(BODY, etag='"2"')
    with subprocess.Popen([busy, "60"]) as running:
        with pytest.raises(OSError, match="Text file busy"):
            fetch(ctx, server.url("a"), "here")
        running.kill()
    assert cache.read_meta(entry.part_meta).etag == '"1"'
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY


def test_attempts_that_get_on_are_not_counted(server, ctx, monkeypatch) -> None:
    monkeypatch.setattr(download, "PROGRESS_BYTES", 20_000)
    server.files["a"] = Served(BODY, cut_after=[25_000] * (2 * download.ATTEMPTS - 1))
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY


def test_a_wrong_length_is_found_out(server, ctx) -> None:
    server.files["a"] = Served(BODY, etag=None, length=len(BODY) + 5)
    with pytest.raises(RunnerError, match=r"here: .* could not be downloaded: the connection broke off"):
        fetch(ctx, server.url("a"), "here")
    assert not list(ctx.cache_dir.rglob("file-*"))


def test_a_file_that_was_packed_for_the_way_is_unpacked_and_never_resumed(server, ctx) -> None:
    server.files["a"] = Served(gzip.compress(BODY), encoding="gzip", cut_after=[100_000])
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY
    assert [status for _, _, status in server.requests] == [200, 200, 304]


def test_a_full_disk_is_not_kept_full(server, ctx) -> None:
    server.files["a"] = Served(BODY)
    entry = cache.Entry(ctx, server.url("a"), {})
    with entry:
        entry.part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        fetch(ctx, server.url("a"), "here")
    assert not entry.part.is_symlink()
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY


def test_room_is_made_before_a_file_comes(server, make_context, tmp_path) -> None:
    tight = make_context({}, cache_dir=str(tmp_path / "cache"), limits={"cache_max_bytes": 400_000})
    server.files["old"] = Served(BODY)
    old = fetch(tight, server.url("old"), "here").path
    let_go()
    server.files["new"] = Served(BODY, cut_after=[0] * download.ATTEMPTS)
    with pytest.raises(RunnerError):
        fetch(tight, server.url("new"), "here")
    assert not old.exists()


def test_a_lock_of_a_folder_that_was_deleted_meanwhile_is_none(ctx) -> None:
    entry = cache.Entry(ctx, "http://h/x", {})
    with entry:
        pass
    stale = cache.Lock(entry.folder / "fetch.lock")
    assert stale.is_of(entry.folder / "fetch.lock")
    (entry.folder / "fetch.lock").unlink()
    assert not stale.is_of(entry.folder / "fetch.lock")
    with cache.Entry(ctx, "http://h/x", {}):
        assert not stale.is_of(entry.folder / "fetch.lock")
    stale.close()


def test_a_server_that_is_busy_is_asked_again(server, ctx) -> None:
    server.files["a"] = Served(BODY, statuses=[503, 429])
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == BODY


@pytest.mark.parametrize(("status", "kind"), [(403, BadRequest), (410, BadRequest), (501, RunnerError)])
def test_a_refusal_is_told_at_once(server, ctx, status: int, kind: type[Exception]) -> None:
    server.files["a"] = Served(BODY, statuses=[status])
    with pytest.raises(kind, match=rf"spec\.x\.url: the server answered {status}") as caught:
        fetch(ctx, server.url("a?token=secret"), "spec.x.url")
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


def test_missing_file_and_missing_server(server, ctx) -> None:
    with pytest.raises(BadRequest, match=r"here: the server answered 404"):
        fetch(ctx, server.url("nothing"), "here")
    with pytest.raises(RunnerError, match=r"here: .* could not be downloaded: no connection to the server"):
        fetch(ctx, "http://127.0.0.1:9/x", "here")


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/x", "http:///x", "/etc/passwd", "gopher://x", "http://[::1", "http://h:99999/x",
     "http://h:port/x", "http://\u2100.example/x"],
)  # fmt: skip
def test_only_http(ctx, url: str) -> None:
    with pytest.raises(BadRequest, match=r"here: .* is not an? (http or https )?URL"):
        fetch(ctx, url, "here")


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"X Y": "a"}, {"X": "€"}, {"": "a"}])
def test_headers_that_cannot_be_sent_are_told_at_once(server, ctx, headers: dict[str, str]) -> None:
    with pytest.raises(BadRequest, match=r"^here: the header '.*' cannot be sent"):
        fetch(ctx, server.url("a"), "here", headers=headers)
    assert server.requests == []


def test_headers_are_sent_and_separate_what_they_open(server, ctx) -> None:
    server.files["a"] = Served(BODY, token="Bearer one")
    fetch(ctx, server.url("a"), "here", headers={"Authorization": "Bearer one"})
    with pytest.raises(BadRequest, match="401"):
        fetch(ctx, server.url("a"), "here", headers={"Authorization": "Bearer two"})
    with pytest.raises(BadRequest, match="401"):
        fetch(ctx, server.url("a"), "here")


def test_what_is_unused_longest_goes_first_and_what_is_used_stays(server, make_context, tmp_path) -> None:
    roomy = make_context({}, cache_dir=str(tmp_path / "cache"))
    paths = {}
    for i, name in enumerate("abc"):
        server.files[name] = Served(name.encode() * 100_000)
        paths[name] = fetch(roomy, server.url(name), "here").path
        os.utime(paths[name].parent, (1000 + i, 1000 + i))
    tight = make_context({}, cache_dir=str(tmp_path / "cache"), limits={"cache_max_bytes": 250_000})
    server.files["d"] = Served(b"d")
    fetch(tight, server.url("d"), "here")
    assert all(path.exists() for path in paths.values()), "all of them are in use"
    let_go()
    fetch(tight, server.url("b"), "here")
    assert {name: path.exists() for name, path in paths.items()} == {"a": False, "b": True, "c": True}
    assert fetch(roomy, server.url("a"), "here").path.read_bytes() == b"a" * 100_000


def test_what_libraries_keep_counts_and_goes_too(server, make_context, tmp_path) -> None:
    tight = make_context({}, cache_dir=str(tmp_path / "cache"), limits={"cache_max_bytes": 250_000})
    kept = [cache.library_folder(tight, cache.DATASETS, name) for name in "ab"]
    kept.append(cache.library_folder(tight, cache.COMPILED, ""))
    for i, folder in enumerate(kept):
        (folder / "deep").mkdir()
        (folder / "deep" / "rows.arrow").write_bytes(b"x" * 100_000)
        os.utime(folder, (1000 + i, 1000 + i))
    server.files["c"] = Served(b"c")
    fetch(tight, server.url("c"), "here")
    assert all(folder.is_dir() for folder in kept), "all of them are in use"
    let_go()
    assert cache.library_folder(tight, cache.DATASETS, "b") == kept[1]
    assert [folder.is_dir() for folder in kept] == [False, True, True]
    assert (kept[1] / "deep" / "rows.arrow").stat().st_size == 100_000
    assert cache.library_folder(tight, cache.DATASETS, "a") == kept[0]
    assert [each.name for each in kept[0].iterdir()] == ["use.lock"]


def test_an_old_version_in_use_outlives_the_new_one(server, ctx, make_context, tmp_path) -> None:
    server.files["a"] = Served(b"old")
    old = fetch(ctx, server.url("a"), "here").path
    server.files["a"] = Served(b"new", etag='"2"')
    assert fetch(ctx, server.url("a"), "here").path.read_bytes() == b"new"
    assert old.read_bytes() == b"old"
    let_go()
    server.files["a"] = Served(b"newest", etag='"3"')
    fetch(ctx, server.url("a"), "here")
    assert not old.exists()


def _fetch_in_process(make, url: str, queue) -> None:
    path = fetch(make(), url, "here").path
    queue.put((hashlib.sha256(path.read_bytes()).hexdigest(), str(path)))


def test_many_processes_at_once_download_once(server, make_context, tmp_path) -> None:
    server.files["a"] = Served(BODY)
    forking = multiprocessing.get_context("fork")
    queue = forking.Queue()
    make = lambda: make_context({}, cache_dir=str(tmp_path / "cache"))  # noqa: E731
    processes = [
        forking.Process(target=_fetch_in_process, args=(make, server.url("a"), queue), daemon=True) for _ in range(6)
    ]
    for process in processes:
        process.start()
    answers = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert [digest for digest, _ in answers] == [hashlib.sha256(BODY).hexdigest()]
    assert sorted(status for _, _, status in server.requests) == [200] + [304] * 5


def test_a_cancel_ends_a_download(server, make_context, tmp_path) -> None:
    near, far = Pipe.pair()
    context = make_context({}, pipe=near, cache_dir=str(tmp_path / "cache"))
    server.files["a"] = Served(BODY)
    far.send(Cancel("no more"))
    with pytest.raises(Cancelled, match="no more"):
        fetch(context, server.url("a"), "here")
    near.close()
    far.close()


def test_what_is_made_from_a_file_is_made_once_and_only_whole(server, ctx) -> None:
    server.files["a"] = Served(BODY)
    fetched = fetch(ctx, server.url("a"), "here")
    made = []

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError

    def make(folder: Path) -> None:
        made.append(list(folder.iterdir()))
        (folder / "whole").write_text("x")

    with pytest.raises(ValueError, match=r"^$"):
        fetched.derived("d", fail)
    for _ in range(2):
        assert [each.name for each in fetched.derived("d", make).iterdir()] == ["whole"]
    assert made == [[]]
