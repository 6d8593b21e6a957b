"""Runners that the tests register under names of their own: what a badly behaved task would do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from runners.api import Cancelled, Context, Runner


class EnvRunner(Runner):
    """What a task can see of its surroundings."""

    def run(self, ctx: Context) -> dict[str, Any]:
        own = Path("/proc/self/environ").read_bytes().decode("utf-8", "replace")
        return {
            "env": dict(os.environ),
            "executed_with": own,
            "cwd": str(Path.cwd()),
            "sid": os.getsid(0),
            "pid": os.getpid(),
        }


class MisbehavingRunner(Runner):
    """Does what `spec.do` says."""

    def run(self, ctx: Context) -> dict[str, Any]:
        return getattr(self, f"do_{ctx.spec['do']}")(ctx) or {"ok": True}

    def do_segfault(self, ctx: Context) -> None:
        ctypes.string_at(0)

    def do_abort(self, ctx: Context) -> None:
        os.abort()

    def do_exit(self, ctx: Context) -> None:
        os._exit(ctx.spec.get("code", 0))

    def do_sys_exit(self, ctx: Context) -> None:
        sys.exit(ctx.spec.get("code", 3))

    def do_raise(self, ctx: Context) -> None:
        raise ValueError("the runner's own error\nwith a second line")

    def do_tell_secrets(self, ctx: Context) -> None:
        """After a long log of other things."""
        found = [os.environ.get(name, "nothing") for name in ("MY_API_KEY", "NODES_TOKEN")]
        sys.stderr.write(("many words " * 30 + "\n") * 100)
        print("in my log, too:", *found, file=sys.stderr)
        raise ValueError(f"I have {found[0]} and {found[1]}")

    def do_forge(self, ctx: Context) -> None:
        """Leaves an outcome that nobody can read, where the node expects the child's own."""
        spool = Path(ctx.job.tmp_dir).parents[1] / "spool" / str(ctx.job.attempt)
        padding = b"x" * ctx.spec["bytes"]
        forged = b'{"attempt":%d,"ok":true,"result":{"a":"%s\xff"}}' % (ctx.job.attempt, padding)
        (spool / "outcome.json").write_bytes(forged)
        os._exit(0)

    def do_not_a_dict(self, ctx: Context) -> Any:
        return ["no", "mapping"]

    def do_kill_self(self, ctx: Context) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def do_sleep(self, ctx: Context) -> None:
        ctx.sleep(ctx.spec.get("seconds", 60))

    def do_wait_for(self, ctx: Context) -> None:
        """Until a file of that name lies in its folder."""
        while not (ctx.out_dir / ctx.spec["file"]).exists():
            ctx.sleep(0.02)

    def do_deaf(self, ctx: Context) -> None:
        """Neither polls nor dies of SIGTERM."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctx.phase("deaf")
        while True:
            time.sleep(1)

    def do_wait_for_others(self, ctx: Context) -> None:
        """Says nothing: it waits for another interpreter, for a stopped fork, and for what is no Python."""
        waits = "import time\n\ndef spawned_waits():\n    time.sleep(600)\n\nspawned_waits()\n"
        others = [subprocess.Popen([sys.executable, "-c", waits]), subprocess.Popen(["sleep", "600"])]
        stopped = os.fork()
        if stopped == 0:
            self._stops_itself()
        (ctx.out_dir / "others").write_text(" ".join(str(each) for each in [*(one.pid for one in others), stopped]))
        for each in others:
            each.wait()

    def _stops_itself(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)

    def do_checkpoint(self, ctx: Context) -> None:
        """Saves where it is when it is asked to, and only then."""
        ctx.phase("work")
        try:
            ctx.sleep(600)
        except Cancelled as asked:
            if asked.checkpoint:
                (ctx.out_dir / "checkpoints").mkdir(exist_ok=True)
                while ctx.spec.get("slow") and not (ctx.out_dir / "checkpoints" / "go").exists():
                    time.sleep(0.01)
                (ctx.out_dir / "checkpoints" / "last").write_text("saved")
            raise

    def do_alone(self, ctx: Context) -> None:
        """Fails where another task that does this runs beside it in the same node's only slot."""
        mark = ctx.out_dir.parent / "somebody-runs"
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        ctx.sleep(0.03)
        mark.unlink()

    def do_busy(self, ctx: Context) -> None:
        end = time.monotonic() + ctx.spec.get("seconds", 2)
        while time.monotonic() < end:
            pass

    def do_escape(self, ctx: Context) -> dict[str, Any]:
        """Leave processes behind in every way there is; their pids are the result."""
        reader, writer = os.pipe()
        # forked, with a session of its own
        if os.fork() == 0:
            os.setsid()
            os.write(writer, f"{os.getpid()} ".encode())
            time.sleep(600)
        # forked twice: an orphan
        if (child := os.fork()) == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                os.write(writer, f"{os.getpid()} ".encode())
                time.sleep(600)
            os._exit(0)
        os.waitpid(child, 0)
        # executed, with a clean environment and nothing inherited
        process = subprocess.Popen(["/bin/sleep", "600"], env={}, start_new_session=True, close_fds=True, cwd="/")
        pids = [process.pid]
        text = b""
        while text.count(b" ") < 2:
            text += os.read(reader, 100)
        pids += map(int, text.split())
        if ctx.spec.get("then") == "die":
            ctx.progress(1, 2, pids_0=pids[0], pids_1=pids[1], pids_2=pids[2])
            (ctx.out_dir / "pids").write_text(" ".join(map(str, pids)) + "\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if ctx.spec.get("then") == "sleep":
            (ctx.out_dir / "pids").write_text(" ".join(map(str, pids)) + "\n")
            ctx.sleep(60)
        if ctx.spec.get("then") == "doze":
            (ctx.out_dir / "pids").write_text(" ".join(map(str, pids)) + "\n")
            ctx.sleep(ctx.spec.get("seconds", 1))
        return {"ok": True, "pids": pids}

    def do_patricide(self, ctx: Context) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    def do_fork_bomb(self, ctx: Context) -> None:
        """Forks, each fork forking on, until it may not or there are `count`."""
        count = ctx.spec.get("count", 200)
        for _ in range(count):
            try:
                if os.fork() == 0:
                    os.setsid()
                    with contextlib.suppress(OSError):
                        os.fork()
                    time.sleep(600)
            except OSError:
                break
        os.kill(os.getpid(), signal.SIGKILL)

    def do_garbage(self, ctx: Context) -> None:
        """Writes what is no frame."""
        sock = self._raw(ctx)
        for junk in (b"\x00", b"hello", b"\xc1" * 100, os.urandom(60_000), b"\x93\x01\x02"):
            sock.send(junk)
        with contextlib.suppress(OSError):  # the node stops to listen
            for _ in range(200):
                sock.send(b"junk", socket.MSG_DONTWAIT)

    def do_huge_frame(self, ctx: Context) -> None:
        try:
            self._raw(ctx).send(b"x" * 100_000_000)
        except OSError:
            ctx.log.info("refused by the kernel")

    def do_close_pipe(self, ctx: Context) -> None:
        os.close(self._raw(ctx).fileno())

    def do_stuff_pipe(self, ctx: Context) -> None:
        for n in range(20_000):
            ctx._last_progress = 0.0
            ctx.progress(n, 20_000, "frames")

    def do_truncated(self, ctx: Context) -> None:
        """Frames that end too early, each a datagram."""
        frame = msgspec.msgpack.encode({"type": "progress", "done": 1.0, "total": 2.0, "unit": "x" * 50})
        sock = self._raw(ctx)
        with contextlib.suppress(OSError):
            for length in range(1, len(frame)):
                sock.send(frame[:length])

    def do_open_files(self, ctx: Context) -> None:
        """Opens all that it may."""
        held = []
        while True:
            held.append(os.dup(1))

    def do_fill(self, ctx: Context) -> None:
        """Fills the disk that its TMPDIR, or its out_dir, is on."""
        folder = ctx.tmp_dir if ctx.spec["where"] == "tmp" else ctx.out_dir
        with open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65536)

    def do_flood_pipe(self, ctx: Context) -> None:
        """Frames as fast as they go, from two processes, with no pause for the reader to come to its end."""
        from flowmesh.processes.pipe import Progress

        frame = msgspec.msgpack.encode(Progress(1.0, 2.0))
        sock = self._raw(ctx)
        child = os.fork()
        end = time.monotonic() + ctx.spec.get("seconds", 2)
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                sock.send(frame, socket.MSG_DONTWAIT)
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def do_ranks(self, ctx: Context) -> dict[str, Any]:
        """A group of two ranks, under the same watch as those of a training, that wait for each other at every step."""
        from runners.training import groups
        from runners.training.devices import Layout
        from runners.training.ranks import Place

        def work(place: Place, own: Context, listener: socket.socket, port: int) -> dict[str, Any]:
            note = os.open(ctx.out_dir / "ranks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(note, f"{place.rank} {os.getpid()}\n".encode())
            peer = listener.accept()[0] if place.leads else socket.create_connection(("127.0.0.1", port))
            steps = int(ctx.spec.get("seconds", 1) * 100)
            for step in range(steps):
                own.progress(step, steps, "steps")
                time.sleep(0.01)
                peer.send(b".")
                if not peer.recv(1):
                    raise ConnectionError("Connection closed by peer")
            return {"steps": steps}

        reports = groups.run(Layout(gpus=(), ranks=2), ctx, work)
        return {"ok": True, "ranks": [report.result for report in reports]}

    def do_hop(self, ctx: Context) -> None:
        """A process that is never there for long: each forks its successor and ends, and each says so in a file."""
        beat = os.open(ctx.out_dir / "beat", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if os.fork() == 0:
            os.setsid()
            signal.alarm(60)
            while os.fork() == 0:
                os.write(beat, b".")
            os._exit(0)
        while os.fstat(beat).st_size < 20:
            time.sleep(0.001)
        if ctx.spec.get("then") == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    def do_exec(self, ctx: Context) -> None:
        """Becomes another program."""
        command = ctx.spec["command"]
        os.execv(command, [command, "600"])

    def do_log_flood(self, ctx: Context) -> None:
        line = "x" * 1023 + "\n"
        for _ in range(ctx.spec.get("megabytes", 50) * 1024):
            sys.stdout.write(line)

    def do_eat_memory(self, ctx: Context) -> None:
        hoard = []
        while True:
            hoard.append(b"x" * 10_000_000)

    def do_big_result(self, ctx: Context) -> dict[str, Any]:
        return {"ok": True, "items": ["y" * 1000] * ctx.spec.get("kilobytes", 5000)}

    def do_tmp(self, ctx: Context) -> dict[str, Any]:
        """Leaves files where tasks leave them."""
        import tempfile

        path = tempfile.mkdtemp()
        Path(path, "left").write_text("x" * 1000)
        return {"tmp": path}

    def do_leave(self, ctx: Context) -> None:
        """Leaves what is hard to remove, count and hash, in its TMPDIR and its artifacts."""
        from tests.kit.hostile import make_deep, make_socket

        for top in (ctx.tmp_dir, ctx.artifacts_dir):
            match ctx.spec["leaves"]:
                case "deep":
                    make_deep(top, 1500, "folder")
                case "closed":
                    (top / "closed" / "inner").mkdir(parents=True)
                    (top / "closed" / "inner" / "file").touch()
                    (top / "closed" / "inner").chmod(0)
                    (top / "closed").chmod(0o555)
                case "links":
                    (top / "link").symlink_to("/etc")
                    (top / "loop").symlink_to("loop")
                    os.mkfifo(top / "pipe")
                    make_socket(top, "socket")
                case "names":
                    for name in (b"-rf", b"new\nline", b"\xff\xfe", b"x" * 255, b"\x1b[31m"):
                        os.mkdir(os.path.join(os.fsencode(top), name))  # noqa: PTH102, PTH118
                case "swapped":
                    top.rmdir()
                    top.symlink_to("/etc")
        if ctx.spec.get("then") == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    def do_lock_folder(self, ctx: Context) -> None:
        """Lets nobody into its folder, until a file says so where it can be seen: in its TMPDIR."""
        ctx.out_dir.chmod(0)
        try:
            while not (ctx.tmp_dir / "unlock").exists():
                ctx.sleep(0.05)
        finally:
            ctx.out_dir.chmod(0o755)

    def do_shm(self, ctx: Context) -> dict[str, Any]:
        from multiprocessing import shared_memory

        block = shared_memory.SharedMemory(create=True, size=1 << 20)
        name = block.name
        if ctx.spec.get("then") == "die":
            (ctx.out_dir / "shm").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"name": name}

    def do_write(self, ctx: Context) -> dict[str, Any]:
        (ctx.artifacts_dir / "note.txt").write_text("kept")
        print("to stdout")
        print("to stderr", file=sys.stderr)
        return {"ok": True}

    @staticmethod
    def _raw(ctx: Context) -> socket.socket:
        assert ctx._pipe is not None
        return ctx._pipe.sock


class Reads(Runner):
    """Gives the prompts of its data back."""

    def run(self, ctx: Context) -> dict[str, Any]:
        from runners.data.sources import load_items

        return {"prompts": load_items(ctx, ctx.spec).prompts}
