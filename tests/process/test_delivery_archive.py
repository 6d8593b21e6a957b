"""Archives: real tar, pigz and gzip on both ends."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from flowmesh.errors import DeliveryError
from flowmesh.installed import install_command
from flowmesh.results import compress
from flowmesh.settings.schema import ArchiveSettings
from tests.kit.archives import make_archive

PIGZ_TAR = ArchiveSettings(pigz_threads=2)
PIGZ_OWN = ArchiveSettings(pigz_threads=2, tar_bin="no-such-tar")
OWN_TAR = ArchiveSettings(pigz_threads=2, use_pigz=False)
OWN_OWN = ArchiveSettings(pigz_threads=2, use_pigz=False, tar_bin="no-such-tar")
WAYS = {"pigz+tar": PIGZ_TAR, "pigz+own": PIGZ_OWN, "own+tar": OWN_TAR, "own+own": OWN_OWN}
EACH_WAY = pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS.keys())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "final_model"
    (folder / "sub" / "empty").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(os.urandom(3_000_000) + bytes(2_000_000))
    (folder / "exactly.bin").write_bytes(os.urandom(1 << 20))
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "empty.txt").touch()
    (folder / "sub" / ("n" * 180)).write_text("a long name")
    (folder / "sub" / "spaces and\nline").write_text("odd")
    (folder / "sub" / "ünï").write_text("ü")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_text("no utf-8")
    (folder / "-rf").write_text("a dash")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o700)
    (folder / "sub" / "up").symlink_to("../config.json")
    os.link(folder / "config.json", folder / "hard")
    return folder


def gzipped(chunks: Iterable[bytes], settings: ArchiveSettings) -> bytes:
    sink = io.BytesIO()
    compress.compress(chunks, sink, settings)
    return sink.getvalue()


def contents(folder: Path) -> dict[bytes, tuple[str, bytes]]:
    said = {}
    for path in folder.rglob("*"):
        name = os.fsencode(path.relative_to(folder))
        if path.is_symlink():
            said[name] = ("link", os.fsencode(path.readlink()))
        elif path.is_dir():
            said[name] = ("folder", b"")
        else:
            said[name] = ("file", path.read_bytes())
    return said


@EACH_WAY
def test_plain_tar_unpacks_it_to_the_same_content(model: Path, tmp_path: Path, settings: ArchiveSettings) -> None:
    target = tmp_path / "final_model.tar.gz"
    sizes: list[int] = []
    archive = make_archive(model, target, settings, sizes.append)
    assert archive.name == target.name
    assert archive.size == target.stat().st_size == sizes[-1]
    assert archive.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final_model", "final_model.tar.gz"]
    there = tmp_path / "there"
    there.mkdir()
    subprocess.run(["tar", "xzf", target, "-C", there], check=True, capture_output=True)
    assert [p.name for p in there.iterdir()] == ["final_model"]
    assert contents(there / "final_model") == contents(model)
    assert os.access(there / "final_model" / "run.sh", os.X_OK)
    assert not os.access(there / "final_model" / "config.json", os.X_OK)
    subprocess.run(["gzip", "--test", target], check=True)


@EACH_WAY
def test_the_same_content_gives_the_same_bytes(model: Path, tmp_path: Path, settings: ArchiveSettings) -> None:
    first = make_archive(model, tmp_path / "1.tar.gz", settings)
    for index, path in enumerate(sorted(model.rglob("*"))):
        os.utime(path, (index, index), follow_symlinks=False)
    second = make_archive(model, tmp_path / "2.tar.gz", settings)
    assert first.sha256 == second.sha256
    with tarfile.open(tmp_path / "2.tar.gz") as tar:
        members = tar.getmembers()
    assert {m.mtime for m in members} == {0}
    assert {(m.uid, m.gid) for m in members} == {(0, 0)}
    files = {m.name: m for m in members}
    assert files["final_model/config.json"].mode == 0o644
    assert files["final_model/run.sh"].mode == 0o755
    assert not any(m.islnk() for m in members)


def test_tar_and_our_own_stream_hold_the_same(model: Path, tmp_path: Path) -> None:
    def members(settings: ArchiveSettings) -> list[tuple[object, ...]]:
        make_archive(model, tmp_path / "a.tar.gz", settings)
        with tarfile.open(tmp_path / "a.tar.gz") as tar:
            return [(m.name, m.type, m.mode if not m.issym() else 0, m.size, m.linkname) for m in tar]

    assert members(PIGZ_TAR) == members(OWN_OWN)


@pytest.mark.parametrize("kind", ["absolute", "out", "dangling", "fifo"])
def test_what_leads_out_or_is_no_file_is_refused_by_name(model: Path, tmp_path: Path, kind: str) -> None:
    odd = model / "sub" / "odd"
    match kind:
        case "absolute":
            odd.symlink_to(model / "config.json")
        case "out":
            (tmp_path / "secret").write_text("x")
            odd.symlink_to("../../secret")
        case "dangling":
            odd.symlink_to("../../nowhere")
        case "fifo":
            os.mkfifo(odd)
    with pytest.raises(DeliveryError, match="final_model/sub/odd"):
        make_archive(model, tmp_path / "a.tar.gz", PIGZ_TAR)
    assert not list(tmp_path.glob("a.tar.gz*"))


def test_a_folder_that_is_a_link_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "final_lora").symlink_to(model)
    with pytest.raises(DeliveryError, match="final_lora"):
        make_archive(tmp_path / "final_lora", tmp_path / "a.tar.gz", PIGZ_TAR)


def test_missing_programs_are_told_and_done_without(model: Path, tmp_path: Path) -> None:
    settings = ArchiveSettings(pigz_bin="no-such-pigz", tar_bin="no-such-tar")
    archive = make_archive(model, tmp_path / "a.tar.gz", settings)
    assert "no-such-pigz is not installed" in archive.notes[0]
    assert "no-such-tar is not installed" in archive.notes[1]
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert tar.getnames()[0] == "final_model"
    assert make_archive(model, tmp_path / "a.tar.gz", OWN_TAR).notes == ()


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_a_tar_that_is_not_gnus_is_done_without(model: Path, tmp_path: Path) -> None:
    other = script(tmp_path / "bsdtar", "echo bsdtar 3.6\n")
    archive = make_archive(model, tmp_path / "a.tar.gz", ArchiveSettings(tar_bin=other))
    assert "is not GNU tar" in archive.notes[0]


def test_a_tar_that_fails_midway_leaves_no_archive(model: Path, tmp_path: Path) -> None:
    text = '[ "$1" = --version ] && exec tar --version\nhead -c 100000 /dev/zero\necho broken disk >&2\nexit 2\n'
    tar = script(tmp_path / "faketar", text)
    for settings in (ArchiveSettings(tar_bin=tar), ArchiveSettings(tar_bin=tar, use_pigz=False)):
        with pytest.raises(DeliveryError, match="exit status 2 on final_model: broken disk"):
            make_archive(model, tmp_path / "a.tar.gz", settings)
    assert not list(tmp_path.glob("a.tar.gz*"))


@pytest.mark.parametrize("tar", ["tar", "no-such-tar"])
def test_a_pigz_that_fails_leaves_no_archive(model: Path, tmp_path: Path, tar: str) -> None:
    pigz = script(tmp_path / "fakepigz", "head -c 1000 > /dev/null\nprintf x\necho no memory >&2\nexit 3\n")
    with pytest.raises(DeliveryError, match="exit status 3: no memory"):
        make_archive(model, tmp_path / "a.tar.gz", ArchiveSettings(pigz_bin=pigz, tar_bin=tar))
    assert not list(tmp_path.glob("a.tar.gz*"))


@EACH_WAY
def test_a_full_disk_is_a_clear_error(model: Path, tmp_path: Path, settings: ArchiveSettings) -> None:
    # RLIMIT_FSIZE makes the kernel refuse the write, as a full disk does
    code = (
        "import resource, signal, sys, msgspec\n"
        "from pathlib import Path\n"
        "from flowmesh.settings.schema import ArchiveSettings\n"
        "from flowmesh.errors import DeliveryError\n"
        "from tests.kit.archives import make_archive\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "settings = msgspec.json.decode(sys.argv[2], type=ArchiveSettings)\n"
        "try: make_archive(Path(sys.argv[1]) / 'final_model', Path(sys.argv[1]) / 'a.tar.gz', settings)\n"
        "except DeliveryError as error: print(error)\n"
    )
    import msgspec

    said = subprocess.run(
        [sys.executable, "-c", code, tmp_path, msgspec.json.encode(settings)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "cannot write a.tar.gz: File too large" in said.stdout
    assert not list(tmp_path.glob("a.tar.gz*"))


@pytest.mark.parametrize("level", range(10))
@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 * (1 << 20) + 17])
def test_our_own_gzip_is_read_by_everyone(size: int, level: int) -> None:
    data = (os.urandom(1000) + bytes(5000)) * (size // 6000 + 1)
    data = data[:size]
    settings = ArchiveSettings(use_pigz=False, compression_level=level, pigz_threads=2)

    def uneven() -> Iterator[bytes]:
        for start in range(0, size, 70_001):
            yield data[start : start + 70_001]

    packed = gzipped(uneven(), settings)
    assert gzip.decompress(packed) == data
    read = subprocess.run(["gzip", "-dc"], input=packed, capture_output=True, check=True)
    assert read.stdout == data


def test_levels_have_their_meaning() -> None:
    text = "".join(f"{i * i} is a square, {i}\n" for i in range(60_000)).encode()

    def packed(level: int, *, use_pigz: bool) -> int:
        settings = ArchiveSettings(compression_level=level, pigz_threads=2, use_pigz=use_pigz)
        return len(gzipped([text], settings))

    assert packed(0, use_pigz=True) > len(text)
    assert packed(0, use_pigz=False) > len(text)
    assert packed(9, use_pigz=True) < packed(1, use_pigz=True) < len(text) / 2
    assert packed(1, use_pigz=False) < len(text) / 2
    if compress.library_name() == "zlib":  # ISA-L's levels differ in speed more than in size
        assert packed(9, use_pigz=False) < packed(1, use_pigz=False)


def test_many_threads_take_no_more_memory_than_is_promised() -> None:
    code = (
        "import os, resource\n"
        "from flowmesh.settings.schema import ArchiveSettings\n"
        "from flowmesh.results import compress\n"
        "settings = ArchiveSettings(use_pigz=False, compression_level=1, pigz_threads=128)\n"
        "block = os.urandom(1 << 20)\n"
        "class Sink:\n"
        "    size = 0\n"
        "    def write(self, data): self.size += len(data); return len(data)\n"
        "    def flush(self): pass\n"
        "sink = Sink()\n"
        "compress.compress((block for _ in range(200)), sink, settings)\n"
        "assert sink.size > 200 << 20, sink.size\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(said.stdout) * 1024 < 100e6


class FullDisk(io.BytesIO):
    """Takes one write."""

    def write(self, data: object, /) -> int:
        if self.tell():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("use_pigz", [True, False], ids=["pigz", "library"])
def test_a_sink_that_fails_stops_the_source_and_leaves_no_process(use_pigz: bool) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield os.urandom(1 << 16)

    before, threads = children(), set(threading.enumerate())
    settings = ArchiveSettings(pigz_threads=2, use_pigz=use_pigz)
    with pytest.raises(OSError, match="No space left on device"):
        compress.compress(endless(), FullDisk(), settings)
    assert children() == before
    assert not set(threading.enumerate()) - threads


def children() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("use_pigz", [True, False], ids=["pigz", "library"])
def test_an_error_of_the_source_is_raised(use_pigz: bool) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise DeliveryError("the source broke")

    with pytest.raises(DeliveryError, match="the source broke"):
        gzipped(broken(), ArchiveSettings(pigz_threads=2, use_pigz=use_pigz))


def test_without_isal_zlib_does_it_and_the_note_names_the_extra(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['isal'] = None\n"
        "from pathlib import Path\n"
        "from flowmesh.settings.schema import ArchiveSettings\n"
        "from tests.kit.archives import make_archive\n"
        "settings = ArchiveSettings(pigz_bin='no-such-pigz')\n"
        "print(*make_archive(Path(sys.argv[1]), Path(sys.argv[2]), settings).notes)\n"
    )
    target = tmp_path / "a.tar.gz"
    printed = subprocess.run(
        [sys.executable, "-c", code, model, target], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert f"compressed with zlib on one core; {install_command('archive')} is faster" in printed
    with tarfile.open(target) as tar:
        assert tar.getnames()[0] == "final_model"
