"""The bounds of a jail against commands that hide what they use, and what is left in the folder after them.

Each of the three ways to keep the folder: in memory (namespaces), on disk in a mount of the jail, and on disk as it is
(landlock).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from runners.agent.command import Bounds, Ended
from runners.agent.sandbox import Sandbox, mode_works
from runners.agent.usage import over_disk
from runners.agent.workspace import PathRefused, Workspace

MIB = 2**20
NOBODY = 65534
KINDS = ("memory", "mounted", "landlock")
SYSCALL = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = libc.syscall(number, *args)
    return result if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Sandbox]:
    mode = "landlock" if request.param == "landlock" else "namespaces"
    if reason := mode_works(mode):
        pytest.skip(f"this system has no {mode}: {reason}")

    def made(**bounds: object) -> Sandbox:
        box = Sandbox(tmp_path / "work", Bounds(**{"timeout_s": 20.0, **bounds}), mode=mode)
        box.in_memory = request.param == "memory"
        return box

    return made


def shell(box: Sandbox, command: str) -> Ended:
    return box.run(["/bin/sh", "-c", command], lambda: None)


def python(box: Sandbox, code: str) -> Ended:
    return box.run(["python", "-c", code], lambda: None)


def on_x86_64() -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers here are those of x86_64")


def set_ids(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.lstat().st_mode & (stat.S_ISUID | stat.S_ISGID)]


SET_ID_WAYS = {
    "chmod": "os.chmod('s', 0o4755)",
    "chmod of a group": "os.chmod('s', 0o2755)",
    "fchmod": "os.fchmod(os.open('s', os.O_RDONLY), 0o6755)",
    "fchmodat": "call(268, -100, b's', 0o4755)",
    "fchmodat2": "call(452, -100, b's', 0o4755, 0)",
    "open": "os.close(os.open('new', os.O_CREAT | os.O_WRONLY, 0o4755))",
    "old open": "call(2, b'new', os.O_CREAT | os.O_WRONLY, 0o4755)",
    "openat2": "call(437, -100, b'new', struct.pack('QQQ', os.O_CREAT | os.O_WRONLY, 0o4755, 0), 24)",
    "creat": "call(85, b'new', 0o4755)",
    "an unnamed file": "fd = os.open('.', os.O_TMPFILE | os.O_RDWR, 0o4755); os.link(f'/proc/self/fd/{fd}', 'new')",
    "mknod": "os.mknod('new', stat.S_IFREG | 0o4755)",
    "mkdir": "call(83, b'new', 0o2755)",
    "link of a system's program": "os.link('/usr/bin/su', 'new')",
    "rename of a system's program": "os.rename('/usr/bin/su', 'new')",
    "capabilities": "os.setxattr('s', 'security.capability', bytes.fromhex('00000002' + 'ff' * 16))",
    "access list": "os.setxattr('s', 'system.posix_acl_access', bytes.fromhex('0200000001000700ffffffff'))",
    "flags": "fcntl.ioctl(os.open('s', os.O_RDONLY), 0x40086602, struct.pack('q', 0x80))",
}


def test_no_program_with_rights_is_left(make) -> None:
    """A set-id bit would outlive the command: the folder's files are the node's user's, and others can reach them."""
    on_x86_64()
    box = make()
    code = f"""{SYSCALL}
import fcntl, shutil, stat, struct
os.umask(0)
for name, way in {SET_ID_WAYS!r}.items():
    shutil.copyfile("/bin/sh", "s")
    try: exec(way)
    except OSError: pass
    for each in ("s", "new"):
        if os.path.lexists(each):
            if os.lstat(each).st_mode & 0o6000 or "security.capability" in os.listxattr(each): print(name)
            os.rmdir(each) if os.path.isdir(each) else os.unlink(each)
"""
    assert python(box, code) == Ended(code=0, output="")
    assert set_ids(box.folder) == []


def test_ordinary_modes_still_work(make) -> None:
    box = make()
    ended = shell(box, "umask 022; echo 'echo ran' > s; mkdir d; cp s d/t; sh d/t; mktemp -p . > /dev/null; ls | wc -l")
    assert (ended.code, ended.output) == (0, "ran\n3\n")
    if box.mode == "namespaces":
        assert shell(box, "chmod 750 s d; ./s; stat -c %a s d").output == "ran\n750\n750\n"


def test_set_id_bits_of_others_are_removed_at_the_end(tmp_path) -> None:
    """However they came: by an archive's unpacking before the task, or on a kernel whose filter knows a call less."""
    space = Workspace(tmp_path / "work")
    space.write("a/program", b"x")
    (space.folder / "a/program").chmod(0o6755)
    (space.folder / "a").chmod(0o2755)
    (space.folder / "closed").write_text("x")
    (space.folder / "closed").chmod(0)
    if os.geteuid() == 0:
        os.setxattr(space.folder / "a/program", "security.capability", bytes.fromhex("0000000200040000" + "00" * 12))
    assert space.tidy() == []
    assert set_ids(space.folder) == []
    assert (space.folder / "a/program").stat().st_mode & 0o777 == 0o755
    assert (space.folder / "closed").stat().st_mode & 0o400
    assert "security.capability" not in os.listxattr(space.folder / "a/program")


HIDDEN_FILES = {
    "plain": "for n in range(40): write(f'f{n}')",
    "deleted, open": "kept = []\nfor n in range(40):\n    kept.append(write('f'))\n    os.unlink('f')",
    "no name at all": "kept = [fill(os.open('.', os.O_TMPFILE | os.O_RDWR, 0o600)) for n in range(40)]",
    "a folder that cannot be listed": "os.mkdir('d', 0o300)\nfor n in range(40): write(f'd/{n}')",
    "scratch": "for n in range(40): write(f'.tmp/{n}')",
}
FILL = """
import os, time
def fill(fd):
    data = b'x' * 2**20
    for _ in range(6): os.write(fd, data)
    return fd
def write(name): return fill(os.open(name, os.O_CREAT | os.O_RDWR, 0o600))
try:
    {way}
except OSError as error:
    print(error.strerror)
else:
    time.sleep(60)
"""


@pytest.mark.parametrize("way", HIDDEN_FILES)
def test_disk_cannot_be_hidden(way, make) -> None:
    """240 MB under a bound of 50 MiB."""
    box = make(disk_bytes=50 * MIB)
    ended = python(box, FILL.format(way=HIDDEN_FILES[way].replace("\n", "\n    ")))
    if box.in_memory:
        assert ended.output == "No space left on device\n", ended
    else:
        assert "filled its folder" in ended.stopped, ended
    assert not [path for path in box.folder.rglob("*") if not os.access(path, os.R_OK)]


@pytest.mark.parametrize("make", ["memory", "mounted"], indirect=True)
def test_other_places_to_write_share_the_bound(make) -> None:
    box = make(disk_bytes=20 * MIB)
    used = shell(box, "for f in /tmp/a /dev/shm/b /tmp/c; do head -c 9000000 /dev/zero > $f; done; du -s /tmp /dev/shm")
    assert "No space left" in used.output
    assert shell(box, "touch /dev/f /f /proc/f /usr/f").output.count("Read-only file system") >= 2
    total = python(box, "import os\nv = os.statvfs('/tmp')\nprint(v.f_blocks * v.f_frsize, v.f_files)").output.split()
    assert int(total[0]) <= 21 * MIB
    assert int(total[1]) <= 20 * MIB // 4096 + 1000


def test_many_empty_files_and_deep_folders_are_bounded(make) -> None:
    box = make(disk_bytes=8 * MIB)
    code = "for n in range(3000): open(f'e{n}', 'w').close()"
    ended = python(box, f"import time\ntry:\n    {code}\nexcept OSError as e: print(e.strerror)\nelse: time.sleep(60)")
    assert "No space left" in ended.output if box.in_memory else "filled its folder" in ended.stopped
    assert shell(box, "rm -f e*").code == 0
    deep = "import os, time\nfor _ in range(1500):\n    os.mkdir('a'); os.chdir('a')"
    ended = python(box, deep if box.in_memory else f"{deep}\ntime.sleep(60)")
    if box.in_memory:
        assert ended.left == ("/".join(["a"] * 101),)
        assert Workspace(box.folder).tidy() == []
    else:
        assert ended.stopped == "it nested more than 100 folders"
        assert Workspace(box.folder).tidy() == ["/".join(["a"] * 101)]


def test_a_full_folder_can_be_emptied(make) -> None:
    box = make(disk_bytes=4 * MIB)
    for number in range(6):
        Workspace(box.folder).write(f"f{number}", b"x" * MIB)
    assert shell(box, "rm f0 f1 f2 f3 && echo gone").output == "gone\n"
    assert sorted(path.name for path in box.folder.glob("f*")) == ["f4", "f5"]


HIDDEN_MEMORY = {
    "socket pairs": """
pairs = []
for _ in range(240):
    a, b = socket.socketpair()
    for each in (a, b):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        each.setblocking(False)
        try:
            while True: each.send(b'x' * 65536)
        except BlockingIOError: pass
    pairs.append((a, b))""",
    "pipes": """
pipes = []
for _ in range(4): os.fork() or pipes.clear()
for _ in range(220):
    r, w = os.pipe()
    try: fcntl.fcntl(w, 1031, 1 << 20)
    except OSError: pass
    os.set_blocking(w, False)
    try:
        while True: os.write(w, b'x' * 65536)
    except BlockingIOError: pass
    pipes.append((r, w))""",
    "shared memory given back": """
import mmap
maps = []
for _ in range(12):
    m = mmap.mmap(-1, 16 << 20)
    m.write(b'x' * (16 << 20))
    m.madvise(mmap.MADV_DONTNEED)
    maps.append(m)""",
    "shared zeros": """
import mmap
fd = os.open('/dev/zero', os.O_RDWR)
m = mmap.mmap(fd, 256 << 20)
m.write(b'x' * (256 << 20))
m.madvise(mmap.MADV_DONTNEED)""",
    "memfd": "fd = os.memfd_create('x'); os.write(fd, bytes(256 << 20))",
    "System V segments": "assert ctypes.CDLL(None).shmget(0, 256 << 20, 0o1600) >= 0 or no()",
    "System V messages": "assert ctypes.CDLL(None).msgget(0, 0o1600) >= 0 or no()",
    "POSIX messages": "assert ctypes.CDLL(None).mq_open(b'/q', os.O_CREAT | os.O_RDWR, 0o600, None) >= 0 or no()",
    "user's pages in a pipe": """
r, w = os.pipe()
buffer = ctypes.create_string_buffer(4096)
vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 4096)
assert ctypes.CDLL(None).vmsplice(w, vector, 1, 0) >= 0 or no()""",
}


@pytest.mark.parametrize("make", ["memory", "landlock"], indirect=True)
@pytest.mark.parametrize("way", HIDDEN_MEMORY)
def test_memory_cannot_be_hidden_in_the_kernel(way, make) -> None:
    box = make(memory_bytes=96 * MIB, disk_bytes=64 * MIB)
    prelude = "import ctypes, fcntl, os, socket, time\ndef no(): raise PermissionError('refused')\n"
    code = HIDDEN_MEMORY[way].replace("\n", "\n    ")
    ended = python(box, f"{prelude}try:\n    {code}\nexcept OSError: print('refused')\nelse: time.sleep(60)")
    assert ended.output == "refused\n" or "bytes of memory" in ended.stopped, ended


@pytest.mark.parametrize("make", ["memory"], indirect=True)
def test_connections_that_nobody_accepts_count(make) -> None:
    """They have no descriptor, and hold what was sent before the other side closed."""
    box = make(memory_bytes=64 * MIB)
    code = """
import socket, time
servers = []
for n in range(40):
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"s{n}")
    server.listen(4096)
    servers.append(server)
    for _ in range(4096):
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        try: client.connect(f"s{n}")
        except BlockingIOError: break
        try:
            while True: client.send(b"x" * 65536)
        except BlockingIOError: pass
        client.close()
time.sleep(60)
"""
    assert "bytes of memory" in python(box, code).stopped


@pytest.mark.parametrize("make", ["memory", "landlock"], indirect=True)
def test_large_buffers_of_the_machines_network_count(make) -> None:
    """There TCP's buffers grow to several MiB a socket."""
    box = make(memory_bytes=64 * MIB, network=True)
    code = """
import socket, time
server, pairs = socket.create_server(("127.0.0.1", 0)), []
for _ in range(40):
    near = socket.create_connection(server.getsockname())
    pairs.append((near, server.accept()[0]))
    near.setblocking(False)
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        try: near.send(b"x" * 65536)
        except BlockingIOError: time.sleep(0.005)
time.sleep(60)
"""
    assert "bytes of memory" in python(box, code).stopped


@pytest.mark.parametrize("make", ["memory", "landlock"], indirect=True)
def test_sockets_work_as_ever(make) -> None:
    """Event loops, pools of processes and servers on loopback, with buffers of ordinary size."""
    box = make()
    code = """
import asyncio, socket
async def main():
    await asyncio.sleep(0)
asyncio.run(main())
a, b = socket.socketpair()
a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
a.sendall(b"x"); print(b.recv(1))
"""
    assert python(box, code).output == "b'x'\n"
    if box.mode == "namespaces":
        serve = """
import multiprocessing, socket, threading
with multiprocessing.get_context("fork").Pool(4) as pool: print(pool.map(abs, range(4)))
s = socket.create_server(("127.0.0.1", 0))
def send():
    with s.accept()[0] as c: c.sendall(b"y" * 5_000_000)
threading.Thread(target=send).start()
c, n = socket.create_connection(s.getsockname()), 0
while d := c.recv(65536): n += len(d)
print(n)
"""
        assert python(box, serve).output == "[0, 1, 2, 3]\n5000000\n"


def test_files_are_kept_between_commands(make) -> None:
    box = make()
    first = (
        "mkdir -p a/b; echo one > a/b/c; ln -s a/b link; echo x > gone; head -c 100000 /dev/urandom > big; cksum big"
    )
    total = shell(box, first).output
    assert shell(box, "cksum big; cat link/c; rm -r gone; echo two >> a/b/c; mv a/b a/d; rm link").output.startswith(
        total
    )
    assert shell(box, "cat a/d/c; ls; test -x a/d && echo ok").output == "one\ntwo\na\nbig\nok\n"
    assert (box.folder / "a/d/c").read_text() == "one\ntwo\n"
    assert sorted(path.name for path in box.folder.iterdir()) == [".tmp", "a", "big"]


def test_every_change_of_a_file_is_kept(make) -> None:
    """Also one that changes neither size nor times: a mapping of a file in a tmpfs updates no time."""
    box = make()
    (box.folder / "map").write_bytes(b"a" * 8192)
    (box.folder / "same").write_bytes(b"b" * 10)
    code = """
import mmap, os
about = os.stat("same")
with open("same", "r+b") as f: f.write(b"c" * 10)
os.utime(f := os.open("same", os.O_RDONLY), ns=(about.st_atime_ns, about.st_mtime_ns))
with open("map", "r+b") as f, mmap.mmap(f.fileno(), 0) as m: m[4000] = 122
with open("sparse", "wb") as f: f.truncate(300 << 20); f.seek(200 << 20); f.write(b"end")
"""
    assert python(box, code).code == 0
    assert (box.folder / "map").read_bytes()[4000] == 122
    assert (box.folder / "same").read_bytes() == b"c" * 10
    about = (box.folder / "sparse").stat()
    assert about.st_size == 300 * MIB
    assert about.st_blocks * 512 < MIB


def test_what_a_command_wrote_before_its_limit_is_kept(make) -> None:
    ended = shell(make(timeout_s=1.5), "echo kept > file; mkfifo pipe; sleep 60")
    assert ended.stopped == "it ran for more than 1.5 s"
    assert (make().folder / "file").read_text() == "kept\n"


def test_links_in_the_folder_lead_nowhere_when_it_is_copied_back(make, tmp_path) -> None:
    """Neither a link that is there nor one that the command makes in place of a folder is followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("as it was")
    box = make()
    (box.folder / "d").mkdir()
    (box.folder / "l").symlink_to(outside)
    shell(box, f"rmdir d; ln -s {outside} d; rm l; mkdir l; echo no > l/precious; echo no > d/precious")
    assert (outside / "precious").read_text() == "as it was"
    assert (box.folder / "l/precious").read_text() == "no\n"
    assert (box.folder / "d").is_symlink()
    shell(box, "rm -rf d; mkdir d; rm -rf l; echo file > l")
    assert sorted(path.name for path in outside.iterdir()) == ["precious"]


def test_what_others_write_meanwhile_stays(make) -> None:
    """Calls of one turn run at the same time in one folder."""
    box = make()
    Workspace(box.folder).write("old", b"old")
    written: list[bool] = []

    def check() -> None:
        if not written and any(each.info["cmdline"] == ["sleep", "0.537"] for each in psutil.process_iter(["cmdline"])):
            written.append(True)
            Workspace(box.folder).write("new", b"new")
            Workspace(box.folder).write("old", b"newer")

    box.run(["/bin/sh", "-c", "sleep 0.537; echo mine > mine"], check)
    assert written
    assert (box.folder / "new").read_text() == "new"
    assert (box.folder / "old").read_text() == "newer"
    assert (box.folder / "mine").read_text() == "mine\n"


def test_the_walk_opens_what_is_closed(tmp_path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"x" * MIB)
    (tmp_path / "d").chmod(0)
    if os.geteuid() != 0:
        assert "filled" in over_disk(tmp_path, 100_000)
        return
    for path in (tmp_path, tmp_path / "d"):  # root reads it anyway: walk as somebody else
        os.chown(path, NOBODY, NOBODY)
    child = os.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os._exit("filled" not in over_disk(Path(), 100_000))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_paths_that_are_too_deep_are_not_written(tmp_path) -> None:
    with pytest.raises(PathRefused, match="nested more than 100"):
        Workspace(tmp_path / "work").write("a/" * 150 + "b", b"x")


@pytest.mark.parametrize("make", ["memory"], indirect=True)
def test_the_jails_own_processes_cannot_be_looked_into(make) -> None:
    """The init process has the same user; what it holds open leads out."""
    box = make()
    code = """
import os
paths = [f"/proc/1/{name}" for name in ("environ", "root", "cwd", "mem", "maps", "exe")]
paths += [f"/proc/1/fd/{number}" for number in range(64)]
for path in paths:
    for look in (os.readlink, os.listdir, lambda path: open(path, "rb").read(1)):
        try:
            look(path)
            print(path)
        except OSError: pass
print(sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1] if os.path.exists("/proc/self/fd") else [0, 1, 2])
for fd in range(3, 64):
    try: print(fd, os.readlink(f"/proc/self/fd/{fd}"))
    except OSError: pass
"""
    assert python(box, code).output == "[0, 1, 2]\n"


@pytest.mark.parametrize("trick", ["ln -s /etc .tmp", "echo x > .tmp", "mkfifo .tmp", "mkdir -p .tmp/part .back-1"])
def test_a_scratch_folder_that_was_replaced_loses_nothing(trick, make) -> None:
    box = make()
    ended = shell(box, f"rm -rf .tmp; {trick}; echo kept > file")
    assert ended.stopped == ""
    assert shell(box, "cat file; echo more > file2").output == "kept\n"
    assert (box.folder / "file2").read_text() == "more\n"
    assert not list(box.folder.glob(".back-[0-9][0-9]*"))
