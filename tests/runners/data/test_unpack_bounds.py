"""What an archive can ask of memory and of folders before its members are counted."""

from __future__ import annotations

import io
import lzma
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runners.api import BadRequest
from runners.data import bounded_file
from runners.data.unpack import MAX_DEPTH, unpack

LONG = 40 << 20


def raw(name: str, kind: bytes, body: bytes = b"", size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(body) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def long_name(kind: bytes) -> bytes:
    return raw("././@LongLink", kind, b"x" * LONG) + raw("file", tarfile.REGTYPE)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return raw("pax", kind, records)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    size = len(body) + len(str(len(body) + 9))
    return str(size).encode() + body


def deep(count: int) -> bytes:
    return pax(record("path", "/".join(["d"] * count))) + raw("file", tarfile.REGTYPE)


TARS: dict[str, Callable[[], bytes]] = {
    "a long name of GNU tar": lambda: long_name(tarfile.GNUTYPE_LONGNAME),
    "a long link of GNU tar": lambda: long_name(tarfile.GNUTYPE_LONGLINK),
    "a large pax header": lambda: pax(record("comment", "x" * LONG)) + raw("file", tarfile.REGTYPE),
    "a large global header": lambda: b"".join(
        pax(record(f"k{n}", "x" * 500_000), tarfile.XGLTYPE) + raw(f"f{n}", tarfile.REGTYPE) for n in range(9)
    ),
    "many headers for one member": lambda: raw("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"x" * 100) * 3000,
    "a name that says it is longer than the archive": lambda: raw("n", tarfile.GNUTYPE_LONGNAME, b"x", size=1 << 33),
    "deep folders": lambda: deep(MAX_DEPTH + 1),
    "a name of several kilobytes": lambda: pax(record("path", "n" * 3000)) + raw("file", tarfile.REGTYPE),
    "a link to several kilobytes": lambda: pax(record("linkpath", "n" * 3000)) + raw("link", tarfile.SYMTYPE),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", TARS)
def test_a_tar_takes_no_memory_for_its_headers(make_context, tmp_path: Path, name: str, *, compressed: bool) -> None:
    import gzip
    import tracemalloc

    data = TARS[name]() + bytes(1024)
    (tmp_path / "archive").write_bytes(gzip.compress(data, 1) if compressed else data)
    del data
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest) as raised:
            unpack(make_context({}), tmp_path / "archive", tmp_path / "out", "auto", "here")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20
    assert len(str(raised.value)) < 500


def test_names_within_the_bounds_are_unpacked(make_context, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(deep(MAX_DEPTH - 1) + bytes(1024))
    (tmp_path / "out").mkdir()
    unpack(make_context({}), tmp_path / "archive", tmp_path / "out", "tar", "here")
    assert tmp_path.joinpath("out", *["d"] * (MAX_DEPTH - 1)).is_file()


def directory(count: int, name_bytes: int, comment_bytes: int = 0) -> bytes:
    """A zip that is all directory."""
    name, comment = b"n" * name_bytes, b"c" * comment_bytes
    fields = (*[0] * 11, len(name), 0, len(comment), 0, 0, 0, 0)
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", *fields) + name + comment
    whole = entry * count
    return whole + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(whole), 0, 0)


@pytest.mark.parametrize(
    ("most", "shape"),
    [(1000, (30_000, 1, 0)), (10_000, (50_000, 1, 0)), (1000, (1, 3000, 0)), (1000, (900, 1, 60_000))],
)
def test_a_zips_directory_is_bounded(make_context, tmp_path, most: int, shape: tuple[int, int, int]) -> None:
    (tmp_path / "archive").write_bytes(directory(*shape))
    (tmp_path / "out").mkdir()
    ctx = make_context({}, limits={"unpack_max_files": most})
    with pytest.raises(BadRequest, match="the archive is refused"):
        unpack(ctx, tmp_path / "archive", tmp_path / "out", "zip", "here")


def test_a_zips_folders_are_bounded_in_depth(make_context, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive", "w") as pack:
        pack.writestr("/".join(["d"] * (MAX_DEPTH + 1)), "x")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match="folders deep"):
        unpack(make_context({}), tmp_path / "archive", tmp_path / "out", "auto", "here")


def test_xz_gets_no_more_memory_than_its_bound(make_context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        info = tarfile.TarInfo("a/b")
        info.size = 3_000_000
        tar.addfile(info, io.BytesIO(bytes(3_000_000)))
        tar.addfile(tarfile.TarInfo("c"))
    large = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 64 << 20}]
    (tmp_path / "archive").write_bytes(lzma.compress(inner.getvalue(), filters=large))
    for each in ("fits", "does not"):
        (tmp_path / each).mkdir()
    unpack(make_context({}), tmp_path / "archive", tmp_path / "fits", "auto", "here")
    assert (tmp_path / "fits" / "a" / "b").stat().st_size == 3_000_000
    monkeypatch.setattr(bounded_file, "MAX_XZ_MEMORY_BYTES", 16 << 20)
    with pytest.raises(BadRequest, match="Memory usage limit exceeded"):
        unpack(make_context({}), tmp_path / "archive", tmp_path / "does not", "auto", "here")


def test_an_xz_of_several_streams_and_one_that_is_cut(make_context, tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a"))
        tar.addfile(tarfile.TarInfo("b"))
    data = inner.getvalue()
    parts = lzma.compress(data[:700]) + bytes(8) + lzma.compress(data[700:])
    for name in ("out", "cut"):
        (tmp_path / name).mkdir()
    (tmp_path / "archive").write_bytes(parts)
    unpack(make_context({}), tmp_path / "archive", tmp_path / "out", "tar.xz", "here")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        info = tarfile.TarInfo("a")
        info.size = 100_000
        tar.addfile(info, io.BytesIO(os.urandom(100_000)))
    (tmp_path / "archive").write_bytes(lzma.compress(inner.getvalue())[:50_000])
    with pytest.raises(BadRequest, match="not a sound"):
        unpack(make_context({}), tmp_path / "archive", tmp_path / "cut", "tar.xz", "here")
