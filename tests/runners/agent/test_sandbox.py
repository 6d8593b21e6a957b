"""What confines the code of agents, in both kinds that a system may offer: real processes, real attempts to get out."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from runners.agent import sandbox
from runners.agent.command import KEPT_BYTES, Bounds, Ended, Kept, NotConfined
from runners.agent.sandbox import MODES, Mode, Sandbox, mode_works, readable_paths
from tests.kit.paths import ROOT

SECRET = "node-secret-4711"


def available(mode: Mode) -> None:
    if reason := mode_works(mode):
        pytest.skip(f"this system has no {mode}: {reason}")


@pytest.fixture(params=MODES)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Sandbox]:
    available(request.param)

    def made(**bounds: object) -> Sandbox:
        return Sandbox(tmp_path / "work", Bounds(**{"timeout_s": 30.0, **bounds}), mode=request.param)

    return made


def shell(box: Sandbox, command: str) -> Ended:
    return box.run(["/bin/sh", "-c", command], lambda: None)


def python(box: Sandbox, code: str) -> Ended:
    return box.run(["python", "-c", code], lambda: None)


def test_commands_work_in_their_folder(make) -> None:
    box = make()
    ended = shell(box, "pwd; mkdir a && echo hello > a/b && cat a/b && ls; echo oops >&2; exit 3")
    assert ended.code == 3
    assert ended.output.splitlines() == [str(box.folder), "hello", "a", "oops"]
    assert (box.folder / "a" / "b").read_text() == "hello\n"
    assert python(box, "import json, sqlite3, ssl, tempfile; print(tempfile.mkstemp()[1])").output.startswith(
        str(box.folder)
    )
    assert python(box, "import msgspec; print(msgspec.__name__)").output == "msgspec\n"  # this Python's packages
    assert shell(box, "kill -9 $$").code == 137


def test_nothing_outside_can_be_read(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NODE_SECRET", SECRET)
    outside = tmp_path / "state"
    outside.mkdir()
    (outside / "token").write_text(SECRET)
    box = make()
    (box.folder / "link").symlink_to(outside / "token")
    home = Path.home()
    for command in (
        f"cat {outside}/token",
        "cat link",
        f"ls {outside}",
        f"ls {tmp_path}/state",
        "cat /proc/*/environ",
        f"cat /proc/{os.getpid()}/environ",
        f"ls -A {home}/.ssh {home}/.cache",
        "cat /etc/shadow",
        "env",
        f"ln {outside}/token hard && cat hard",
        f"cat /proc/{os.getpid()}/root{outside}/token /proc/self/root{outside}/token",
    ):
        assert SECRET not in shell(box, command).output, command
    assert shell(box, f"cat {outside}/token").code != 0
    assert shell(box, "cat /etc/shadow").code != 0


def test_nothing_outside_can_be_changed(make, tmp_path) -> None:
    outside = tmp_path / "results"
    outside.mkdir()
    precious = outside / "precious"
    precious.write_text("as it was")
    precious.chmod(0o640)
    before = precious.stat()
    box = make()
    (box.folder / "link").symlink_to(precious)
    for command in (
        f"echo no > {precious}",
        "echo no > link",
        f"rm -f {precious}",
        f"mv {precious} here",
        f"touch {outside}/new",
        f"chmod 777 {precious} {outside}",
        f"chown 1 {precious}",
        f"truncate -s 0 {precious}",
        "touch /usr/flowmesh-was-here /tmp/../usr/flowmesh-was-here /flowmesh-was-here",
    ):
        shell(box, command)
    assert sorted(each.name for each in outside.iterdir()) == ["precious"]
    assert precious.read_text() == "as it was"
    after = precious.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_mtime_ns)
    assert not Path("/usr/flowmesh-was-here").exists()
    assert not Path("/flowmesh-was-here").exists()


def test_times_outside_cannot_be_changed(make, tmp_path) -> None:
    """The node goes by them where it makes room."""
    precious = tmp_path / "precious"
    precious.write_text("old")
    before = precious.stat().st_mtime_ns
    assert python(make(), f"import os; os.utime({str(precious)!r}, (1, 1))").code != 0
    assert precious.stat().st_mtime_ns == before
    assert shell(make(), "touch new && touch -d @1 new && stat -c %Y new").output == "1\n"


def test_settings_of_the_machine_cannot_be_written(make) -> None:
    """Root would need no capability for it: the owner of those files is enough."""
    paths = ["/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory", "/proc/sysrq-trigger"]
    code = f"import os\nfor path in {paths}:\n    try: os.open(path, os.O_WRONLY)\n    except OSError: print('kept')"
    assert python(make(), code).output == "kept\n" * len(paths)


REACHING = {
    "vsock": "socket.socket(socket.AF_VSOCK)",
    "packet": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "user namespace": "call(syscall, 272, 0x10000000)",
    "user namespace by clone": "call(syscall, 56, 0x10000011, 0, 0, 0, 0)",
    "session keyring": "call(syscall, 250, 0, -3, 0)",
    "io_uring": "call(syscall, 425, 1, ctypes.create_string_buffer(120))",
    "userfaultfd": "call(syscall, 323, 1)",
    "memory in no process": "os.memfd_create('x')",
    "memory beyond processes": "call(libc.shmget, 0, 1 << 20, 0o1600)",
    "limits of others": "resource.prlimit({pid}, resource.RLIMIT_NOFILE, (512, 1024))",
    "niceness of others": "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "a signal to others": "os.kill({pid}, 0)",
}


@pytest.mark.parametrize("name", REACHING)
def test_calls_that_reach_past_the_jail_are_refused(name, make) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers here are those of x86_64")
    prelude = (
        "import ctypes, os, resource, socket\nlibc = ctypes.CDLL(None, use_errno=True)\nsyscall = libc.syscall\n"
        "def call(function, *args):\n    if function(*args) < 0: raise OSError(ctypes.get_errno(), 'refused')\n"
    )
    call = REACHING[name].format(pid=os.getpid())
    ended = python(make(), f"{prelude}try: {call}\nexcept OSError: print('refused')\nelse: print('done')")
    assert ended.output == "refused\n"


@pytest.fixture
def unscoped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The jail of a kernel whose Landlock keeps no signals in; with sockets."""
    available("landlock")
    jail = tmp_path / "runners" / "agent" / "jail"
    (tmp_path / "flowmesh").symlink_to(ROOT / "flowmesh")
    shutil.copytree(sandbox.JAIL.parent, jail, ignore=shutil.ignore_patterns("__pycache__"))
    with (jail / "kernel.py").open("a") as file:
        file.write("\nLANDLOCK_OF_SIGNALS = 1000\n")
    monkeypatch.setattr(sandbox, "JAIL", jail / "main.py")
    return Sandbox(tmp_path / "work", Bounds(timeout_s=30, network=True), mode="landlock")


BY_FILES = """
import ctypes, fcntl, os, socket, struct
KILL, victim = {kill}, {pid}
libc = ctypes.CDLL(None, use_errno=True)
def call(number, fd, command, argument):
    if libc.syscall(number, fd, ctypes.c_ulong(command), argument) < 0: raise OSError(ctypes.get_errno(), "refused")
owner = struct.pack("=ii", 1, victim)  # F_OWNER_PID
number = struct.pack("=i", victim)
HIGH = 1 << 32  # the kernel reads the low half alone
ways = [
    lambda fd: fcntl.fcntl(fd, 8, victim),
    lambda fd: fcntl.fcntl(fd, 15, owner),
    lambda fd: fcntl.ioctl(fd, 0x8901, number),
    lambda fd: fcntl.ioctl(fd, 0x8902, number),
    lambda fd: call({fcntl}, fd, HIGH | 8, victim),
    lambda fd: call({ioctl}, fd, HIGH | 0x8901, number),
]
"""
ARMED = """
def attempt(action):
    try: action()
    except OSError: return "refused"
    return "done"
server = socket.create_server(("127.0.0.1", 0))
for way in ways:
    there = socket.create_connection(server.getsockname())
    here = server.accept()[0]
    said = [attempt(lambda: way(here.fileno())), attempt(lambda: fcntl.fcntl(here, 10, KILL))]
    fcntl.fcntl(here, fcntl.F_SETFL, fcntl.fcntl(here, fcntl.F_GETFL) | os.O_ASYNC)
    there.send(b"x")
    print(*said, here.recv(1))
print("kill", attempt(lambda: os.kill(victim, KILL)))
"""


def test_no_signal_is_sent_by_way_of_a_file(unscoped) -> None:
    """Where nothing else keeps them in: the kernel would send them on a command's behalf."""
    fcntl, ioctl = {"x86_64": (72, 16), "aarch64": (25, 29)}[os.uname().machine]
    with subprocess.Popen(["sleep", "60"]) as victim:
        prelude = BY_FILES.format(kill=int(signal.SIGKILL), pid=victim.pid, fcntl=fcntl, ioctl=ioctl)
        ended = python(unscoped, prelude + ARMED)
        victim.terminate()
        assert victim.wait() == -signal.SIGTERM, ended.output  # a SIGKILL from before would have come first
    assert ended.output.splitlines() == ["refused refused b'x'"] * 6 + ["kill refused"]


ORDINARY = """
import fcntl, os, socket, struct, termios
reading, writing = os.pipe()
fcntl.fcntl(reading, fcntl.F_SETFL, fcntl.fcntl(reading, fcntl.F_GETFL) | os.O_NONBLOCK)
copy = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, 100)
print(copy >= 100, os.get_blocking(copy), fcntl.fcntl(copy, fcntl.F_GETFD) == fcntl.FD_CLOEXEC)
os.write(writing, b"abc")
print(struct.unpack("i", fcntl.ioctl(reading, termios.FIONREAD, bytes(4)))[0])
with open("file", "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(file, fcntl.LOCK_UN)
    fcntl.flock(file, fcntl.LOCK_SH)
    print(fcntl.fcntl(file, fcntl.F_GETOWN))
socket.create_server(("127.0.0.1", 0)).setblocking(False)
print("done")
"""


def test_files_can_be_used_as_ever_where_signals_are_refused(unscoped) -> None:
    assert python(unscoped, ORDINARY).output.splitlines() == ["True False True", "3", "0", "done"]


def test_private_keys_and_what_lies_beside_python_are_not_shown(tmp_path, monkeypatch) -> None:
    for name in ("bin", "lib/python3/site-packages", "results_workers", "overlay/site-packages"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "overlay" / "site-packages")])
    shown = [Path(path) for path in readable_paths()]
    assert {tmp_path / "bin", tmp_path / "lib", tmp_path / "overlay" / "site-packages"} <= set(shown)
    for path in (tmp_path / "results_workers", Path("/etc/ssl/private/key.pem"), Path("/etc/pki/tls/private/key.pem")):
        assert not [each for each in shown if path.is_relative_to(each)]


def test_files_of_this_python_keep_their_modes(make) -> None:
    """They belong to our user, and a command runs as that user."""
    target = Path(sys.prefix) / "pyvenv.cfg"
    if not target.exists():
        pytest.skip("this Python is no virtual environment")
    before = target.stat().st_mode
    box = make()
    for code in (
        f"import os; os.chmod({str(target)!r}, 0o777)",
        f"import os; fd = os.open({str(target)!r}, os.O_RDONLY); os.fchmod(fd, 0o777)",
    ):
        assert python(box, code).code != 0
    assert target.stat().st_mode == before


def test_there_is_no_network(make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 3).sendall(b'x'); print('out')"
        ended = python(make(), code)
        assert ended.code != 0
        assert "out" not in ended.output.splitlines()
    assert make().describe()["network"].startswith("off")


def test_sockets_of_the_machine_are_out_of_reach(make, tmp_path) -> None:
    """As those of Redis, docker, or the node itself may be."""
    path, abstract = str(tmp_path / "s"), f"\0flowmesh-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as other:
        for server, address in ((one, path), (other, abstract)):
            server.bind(address)
            server.listen()
            code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({address!r}); print('out')"
            for network in (False, True):
                ended = python(make(network=network), code)
                assert ended.code != 0, (address, network)


def test_the_network_is_there_where_it_is_allowed(make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        box = make(network=True)
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 3).sendall(b'x'); print('out')"
        assert python(box, code).output == "out\n"
        assert box.describe()["network"] == "on"


def strays(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if mark in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid():
            found.append(process.pid)
    return found


def gone(mark: str) -> bool:
    """Whether no process of that mark is left; killed ones may need a moment to vanish."""
    for _ in range(100):
        if not strays(mark):
            return True
        time.sleep(0.05)
    return False


ESCAPE = """
import os, subprocess, sys, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "{mark}"], start_new_session=True)
        os._exit(0)
{then}
"""


def test_what_a_command_leaves_behind_is_gone_when_it_ends(make) -> None:
    mark = f"flowmesh-stray-{os.getpid()}-a"
    ended = python(make(), ESCAPE.format(mark=mark, then="time.sleep(0.5); print('ended')"))
    assert ended.output == "ended\n"
    assert gone(mark)


def test_a_command_that_runs_too_long_ends_with_all_it_started(make) -> None:
    mark = f"flowmesh-stray-{os.getpid()}-b"
    box = make(timeout_s=1.0)
    ended = python(box, ESCAPE.format(mark=mark, then="print('begun', flush=True); time.sleep(600)"))
    assert ended.stopped == "it ran for more than 1 s"
    assert ended.output == "begun\n"
    assert gone(mark)
    ignoring = "trap '' TERM INT HUP; while true; do sleep 0.1; done"
    assert shell(make(timeout_s=0.3), ignoring).stopped == "it ran for more than 0.3 s"


def test_a_cancel_ends_a_command_with_all_it_started(make) -> None:
    mark = f"flowmesh-stray-{os.getpid()}-c"
    box = make()

    class Enough(BaseException):
        pass

    def check() -> None:
        if strays(mark):
            raise Enough

    with pytest.raises(Enough):
        box.run(["python", "-c", ESCAPE.format(mark=mark, then="time.sleep(600)")], check)
    assert gone(mark)


def test_the_death_of_the_task_is_the_commands_death(make, tmp_path) -> None:
    mark = f"flowmesh-stray-{os.getpid()}-d"
    box = make()
    program = (
        "from pathlib import Path\nfrom runners.agent.sandbox import Bounds, Sandbox\n"
        f"Sandbox(Path({str(box.folder)!r}), Bounds(), mode={box.mode!r})"
        f".run(['python', '-c', 'import time; time.sleep(600)', {mark!r}], lambda: None)"
    )
    task = psutil.Popen([sys.executable, "-c", program])
    while not [
        pid for pid in strays(mark) if pid != task.pid and "jail" not in " ".join(psutil.Process(pid).cmdline())
    ]:
        assert task.poll() is None
        time.sleep(0.02)
    task.kill()
    task.wait()
    assert gone(mark)


def test_memory_and_processes_have_bounds(make) -> None:
    small = make(memory_bytes=200 * 2**20)
    one = python(small, "x = bytearray(400 * 2**20)")
    assert one.code != 0
    assert "MemoryError" in one.output
    child = "x = bytearray(100 * 2**20); time.sleep(60)"
    many = f"import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        {child}\ntime.sleep(60)"
    assert "bytes of memory" in python(small, many).stopped
    bomb = "import os, time\nfor _ in range(40): os.fork() or time.sleep(60)\ntime.sleep(60)"
    assert python(make(processes=10), bomb).stopped == "it ran more than 10 processes"


def test_endless_output_does_not_keep_a_command_alive(make) -> None:
    assert shell(make(timeout_s=0.5), "yes & yes & yes").stopped == "it ran for more than 0.5 s"


def test_much_output_is_cut_in_its_middle(make) -> None:
    ended = python(make(), "print('first'); print('x' * 5_000_000); print('last')")
    assert ended.code == 0
    assert ended.output.startswith("first\nx")
    assert ended.output.endswith("x\nlast\n")
    assert "bytes left out" in ended.output
    assert len(ended.output) < 2 * KEPT_BYTES


def test_the_command_has_no_privileges(make) -> None:
    code = "print([l for l in open('/proc/self/status') if l.startswith(('CapEff', 'NoNewPrivs'))])"
    box = make()
    if box.mode == "namespaces":
        output = python(box, code).output
        assert "CapEff:\\t0000000000000000" in output
        assert "NoNewPrivs:\\t1" in output
    mounting = "import ctypes; print(ctypes.CDLL(None).mount(b'tmpfs', b'.', b'tmpfs', 0, None))"
    assert python(box, mounting).output == "-1\n"


def test_a_program_that_is_not_there_is_no_crash(make) -> None:
    with pytest.raises(NotConfined, match="no-such-program: No such file"):
        make().run(["no-such-program"], lambda: None)


def test_commands_side_by_side_do_not_disturb_each_other(make) -> None:
    box = make()
    ended: dict[int, Ended] = {}

    def run(number: int) -> None:
        ended[number] = shell(box, f"sleep 0.{number}; echo {number}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: each.output for number, each in ended.items()} == {n: f"{n}\n" for n in range(1, 5)}


@pytest.mark.parametrize("sizes", [[5], [40], [41], [100], [30, 30], [1] * 90, [0, 200, 3]])
def test_kept_has_both_ends(sizes) -> None:
    kept, whole = Kept(40), b""
    for number, size in enumerate(sizes):
        piece = bytes([97 + number % 26]) * size
        kept.add(piece)
        whole += piece
    text = kept.text()
    if len(whole) <= 40:
        assert text == whole.decode()
    else:
        assert text.startswith(whole[:20].decode())
        assert text.endswith(whole[-20:].decode())
        assert f"{len(whole) - 40} bytes left out" in text
