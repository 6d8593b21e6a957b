"""Archives that strangers made: every listed format, and everything that must not come out of one."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runners.api import BadRequest
from runners.data.unpack import unpack

GOOD = {"model/config.json": b"{}", "model/deep/er/weights.bin": bytes(range(256)) * 5000, "readme": b"hi"}


def tar_of(path: Path, mode: str, members: list[tarfile.TarInfo], bodies: dict[str, bytes] | None = None) -> None:
    with tarfile.open(path, mode) as tar:
        for member in members:
            body = (bodies or {}).get(member.name) if member.isreg() else None
            if body is not None:
                member.size = len(body)
            tar.addfile(member, io.BytesIO(body or b""))


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ("tar", "w:"),
        ("tar.gz", "w:gz"),
        ("tgz", "w:gz"),
        ("tar.bz2", "w:bz2"),
        ("tar.xz", "w:xz"),
        ("auto", "w:"),
        ("auto", "w:gz"),
        ("auto", "w:bz2"),
        ("auto", "w:xz"),
    ],
)
def test_every_kind_of_tar(make_context, tmp_path, given: str, mode: str) -> None:
    archive, target = tmp_path / "archive", tmp_path / "out"
    target.mkdir()
    tar_of(archive, mode, [info(name) for name in GOOD], GOOD)
    unpack(make_context({}), archive, target, given, "here")
    assert {name: (target / name).read_bytes() for name in GOOD} == GOOD


@pytest.mark.parametrize("given", ["zip", "auto"])
def test_zip(make_context, tmp_path, given: str) -> None:
    archive, target = tmp_path / "archive", tmp_path / "out"
    target.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.mkdir("model")
        for name, body in GOOD.items():
            pack.writestr(name, body)
    unpack(make_context({}), archive, target, given, "here")
    assert {name: (target / name).read_bytes() for name in GOOD} == GOOD


def test_links_that_stay_inside_work(make_context, tmp_path) -> None:
    archive, target = tmp_path / "archive", tmp_path / "out"
    target.mkdir()
    members = [
        info("model/latest", tarfile.SYMTYPE, "../blobs/one"),
        info("blobs/one"),
        info("hard/copy", tarfile.LNKTYPE, "blobs/one"),
    ]
    tar_of(archive, "w:gz", members, {"blobs/one": b"1"})
    unpack(make_context({}), archive, target, "auto", "here")
    target.rename(tmp_path / "moved")
    for name in ("model/latest", "hard/copy"):
        assert (tmp_path / "moved" / name).read_bytes() == b"1"


EVIL: dict[str, list[tarfile.TarInfo]] = {
    "absolute": [info("/tmp/evil")],
    "dotdot": [info("a/../../evil")],
    "backslash": [info("..\\evil")],
    "links in a circle": [info("a", tarfile.SYMTYPE, "b"), info("b", tarfile.SYMTYPE, "a")],
    "a link to nothing": [info("a", tarfile.SYMTYPE, "")],
    "link out": [info("a", tarfile.SYMTYPE, "../../evil")],
    "absolute link": [info("a", tarfile.SYMTYPE, "/etc/passwd")],
    "hard link out": [info("a", tarfile.LNKTYPE, "../evil")],
    "write through a link": [info("a", tarfile.SYMTYPE, "."), info("a/b"), info("a", tarfile.SYMTYPE, "..")],
    "link by way of a link": [info("a", tarfile.SYMTYPE, "."), info("b", tarfile.SYMTYPE, "a/.."), info("b/evil")],
    "link in a link": [
        info("a", tarfile.SYMTYPE, "."),
        info("b", tarfile.SYMTYPE, "a/.."),
        info("b/evil", tarfile.SYMTYPE, "x"),
    ],
    "link into later": [
        info("b", tarfile.SYMTYPE, "c/.."),
        info("c", tarfile.SYMTYPE, "."),
        info("b/evil", tarfile.SYMTYPE, "x"),
    ],
    "folder by way of a later link": [
        info("b", tarfile.SYMTYPE, "c/.."),
        info("c", tarfile.SYMTYPE, "."),
        info("b/new/evil", tarfile.SYMTYPE, "x"),
    ],
    "folder over a file": [info("a"), info("a", tarfile.DIRTYPE)],
    "endless name": [info("n" * 300)],
    "device": [info("a", tarfile.CHRTYPE)],
    "fifo": [info("a", tarfile.FIFOTYPE)],
    "twice": [info("a"), info("a")],
    "file as folder": [info("a"), info("a/b")],
}


@pytest.mark.parametrize("name", EVIL)
def test_nothing_evil_comes_out_of_a_tar(make_context, tmp_path, name: str) -> None:
    box = tmp_path / "box"
    archive, target = tmp_path / "archive", box / "target"
    target.mkdir(parents=True)
    tar_of(archive, "w", EVIL[name], {"a": b"1", "a/b": b"2", "b/evil": b"3", "/tmp/evil": b"4"})
    with pytest.raises(BadRequest, match=r"^here: the archive is refused: ") as caught:
        unpack(make_context({}), archive, target, "auto", "here")
    assert "\n" not in str(caught.value)
    assert [each.name for each in box.iterdir()] == ["target"]
    for each in target.rglob("*"):
        assert each.resolve().is_relative_to(target.resolve())


@pytest.mark.parametrize("name", ["/evil", "../evil", "a/../../evil", "C:/evil", "..\\evil"])
def test_nothing_evil_comes_out_of_a_zip(make_context, tmp_path, name: str) -> None:
    archive, target = tmp_path / "archive", tmp_path / "box" / "target"
    target.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as pack:
        pack.writestr(name, b"x")
    with pytest.raises(BadRequest, match=r"^here: the archive is refused: .* outside of its folder"):
        unpack(make_context({}), archive, target, "auto", "here")
    assert [each.name for each in (tmp_path / "box").iterdir()] == ["target"]


def test_a_zip_has_no_links(make_context, tmp_path) -> None:
    archive = tmp_path / "archive"
    with zipfile.ZipFile(archive, "w") as pack:
        link = zipfile.ZipInfo("a")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        pack.writestr(link, "/etc/passwd")
    with pytest.raises(BadRequest, match="neither a file nor a folder"):
        unpack(make_context({}), archive, tmp_path / "out", "zip", "here")


def make_tar(path: Path, bodies: dict[str, bytes]) -> None:
    tar_of(path, "w:gz", [info(name) for name in bodies], bodies)


def make_zip(path: Path, bodies: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, body in bodies.items():
            pack.writestr(name, body)


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_size_and_count_are_bounded(make_context, tmp_path, make: Callable[[Path, dict[str, bytes]], None]) -> None:
    archive, target = tmp_path / "archive", tmp_path / "out"
    make(archive, {f"zeros-{i}": bytes(2**20) for i in range(8)})
    assert archive.stat().st_size < 2**17
    target.mkdir()
    with pytest.raises(BadRequest, match="refused: more than 5000000 bytes unpacked"):
        unpack(make_context({}, limits={"unpack_max_bytes": 5_000_000}), archive, target, "auto", "here")
    assert sum(each.stat().st_size for each in target.iterdir()) <= 5_000_000
    (tmp_path / "again").mkdir()
    with pytest.raises(BadRequest, match="refused: more than 7 members"):
        unpack(make_context({}, limits={"unpack_max_files": 7}), archive, tmp_path / "again", "auto", "here")


@pytest.mark.parametrize("given", ["auto", "tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_what_is_no_archive_is_told_in_one_line(make_context, tmp_path, given: str) -> None:
    archive = tmp_path / "archive"
    for body in (b"", b"neither tar nor zip" * 100):
        archive.write_bytes(body)
        with pytest.raises(BadRequest, match=r"^here: not a sound ") as caught:
            unpack(make_context({}), archive, tmp_path / "out", given, "here")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_cut_archive_is_told_in_one_line(make_context, tmp_path, make, share: float) -> None:
    archive = tmp_path / "archive"
    make(archive, {"a": bytes(range(256)) * 1000, "b": b"b" * 1000})
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match=r"^here: not a sound "):
        unpack(make_context({}), archive, tmp_path / "out", "auto", "here")
