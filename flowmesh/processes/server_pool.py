"""All fork servers of a node: one a lane, started when a task first needs it, replaced when it dies or grows old.

To the supervisor it is one thing that can launch, terminate, kill and forget an attempt, and that says once for each
attempt how it ended: `on_gone` with the exit, or `on_lost` where the server died. Either way nothing of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh import __version__
from flowmesh.errors import LaunchError
from flowmesh.messages.job import Exit
from flowmesh.processes import environ, linux, tree
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.pipe import Pipe
from flowmesh.processes.protocol import (
    Forget,
    Fork,
    Forked,
    ForkFailed,
    Gone,
    Kill,
    Ready,
    Reply,
    Retire,
    Terminate,
    Unfit,
)
from flowmesh.processes.server_client import Lane, Server, ServerState

READY_TIMEOUT_S = 300.0
FORK_TIMEOUT_S = 30.0
"""A server that does not fork in this time is stuck, and is killed."""
KILL_TIMEOUT_S = 15.0
BROKEN_FOR_S = 30.0
"""After a failed start, tasks of the lane fail at once for this long."""


class Known(msgspec.Struct, kw_only=True):
    """An attempt that is with a server."""

    server: Server
    pid: int | None = None


class Callbacks(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor hears; always on the loop, in the order it happened."""

    on_forked: Callable[[Forked, Pipe], None]
    """With our end of its pipe. Also for those that were adopted."""
    on_fork_failed: Callable[[int, str], None]
    on_gone: Callable[[int, Exit], None]
    on_lost: Callable[[int, str], None]


class Fleet:
    def __init__(
        self,
        lanes: Mapping[str, Lane],
        *,
        folder: Path,
        log_folder: Path,
        env: Mapping[str, str],
        adoption_timeout_s: float,
        cgroup: Path | None,
        mark: str,
        callbacks: Callbacks,
    ) -> None:
        self.lanes = lanes
        self.servers: set[Server] = set()
        self._current: dict[str, Server] = {}
        self._known: dict[int, Known] = {}
        self._broken: dict[str, tuple[float, str]] = {}
        self._bare: dict[str, str] = {}
        self._folder = folder
        self._log_folder = log_folder
        self._env = env
        self._adoption_timeout_s = adoption_timeout_s
        self._cgroup = cgroup
        self._mark = mark
        self._callbacks = callbacks
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- what the supervisor asks ------------------------------------------------------------------------------------

    async def adopt(self, timeout_s: float) -> set[int]:
        """Find the servers of an earlier supervisor; returns the attempts that they still have."""
        for path in sorted(self._folder.glob("*-*.sock")):
            if server := Server.adopt(path, **self._hears()):
                self.servers.add(server)
        for server in list(self.servers):
            try:
                await asyncio.wait_for(asyncio.shield(server.answered), timeout_s)
            except (TimeoutError, LaunchError) as error:
                logger.bind(server=server.id).warning("fork server not adopted: {}", str(error) or "it does not answer")
                if server.state is not ServerState.ENDED:  # with all that it forked: nobody would hear of them again
                    tree.kill_all(await asyncio.to_thread(tree.forked_from, server.id))
                continue
            if server.ready is None:
                continue
            if self._may_serve(server, server.ready):
                self._current[server.lane] = server
            else:
                logger.bind(server=server.id).info("fork server adopted for its tasks only: the next get a new one")
                self._retire(server)
        return {attempt for server in self.servers if server.ready for attempt in server.ready.attempts}

    async def launch(self, lane_name: str, fork: Fork, before_fork: Callable[[str], None]) -> None:
        """Have `fork` made by the lane's server, which is started where there is none.

        Args:
            before_fork: called with the server's id just before it is asked: the moment to write it down.

        Raises:
            LaunchError: the lane has no server, and why.
        """
        server = await self._server(lane_name)
        before_fork(server.id)
        self._known[fork.attempt] = Known(server=server)
        try:
            server.send(fork)
        except LaunchError:
            del self._known[fork.attempt]
            raise
        asyncio.get_running_loop().call_later(FORK_TIMEOUT_S, self._check_forked, fork.attempt)

    def is_ready(self, lane_name: str) -> bool:
        """Whether a task of this lane can be forked at once."""
        server = self._current.get(lane_name)
        return server is not None and server.serves

    async def warm(self, lane_name: str) -> None:
        """Have the lane's server ready before a task needs it. What is wrong with it is told when one does."""
        with contextlib.suppress(LaunchError):
            await self._server(lane_name)

    def terminate(self, attempt: int) -> None:
        """SIGTERM to its process group; for an attempt that is gone, nothing."""
        if known := self._known.get(attempt):
            with contextlib.suppress(LaunchError):  # its server ends: on_lost comes
                known.server.send(Terminate(attempt))

    def kill(self, attempt: int) -> None:
        """SIGKILL to all of it. Its server goes too where it does not answer for the kill."""
        if known := self._known.get(attempt):
            with contextlib.suppress(LaunchError):
                known.server.send(Kill(attempt))
            asyncio.get_running_loop().call_later(KILL_TIMEOUT_S, self._check_killed, attempt)

    def forget(self, attempt: int) -> None:
        """Its end stands in the journal."""
        if (known := self._known.pop(attempt, None)) and known.server.state is not ServerState.ENDED:
            known.server.send(Forget(attempt))

    def recycle(self, lane: str | None = None) -> list[str]:
        """Retire the servers of a lane (of all): running tasks end in the old ones, new ones start in fresh ones."""
        names = [name for name in self._current if lane in (None, name)]
        for name in names:
            self._retire(self._current.pop(name))
        self._broken.clear()
        self._bare.clear()
        return names

    def leave(self) -> None:
        """Let go of all servers: they keep their tasks for the next supervisor."""
        self._closing = True
        for server in self.servers:
            server.close()

    async def close(self, timeout_s: float = 10.0) -> None:
        """End all servers. Their tasks should have ended before."""
        self._closing = True
        servers = list(self.servers)
        for server in servers:
            with contextlib.suppress(LaunchError):
                server.send(Retire())
        ended = await asyncio.gather(*(server.gone(timeout_s) for server in servers))
        for server, gone in zip(servers, ended, strict=True):
            if not gone:
                logger.bind(server=server.id).warning("fork server killed: it did not retire within {} s", timeout_s)
                server.kill()
                await server.gone(timeout_s)
            server.close()
            server.path.unlink(missing_ok=True)

    def warnings(self) -> dict[str, str]:
        """What is wrong with a lane, by its name."""
        broken = {name: message for name, (_, message) in self._broken.items()}
        return broken | {name: f"no preload: {reason}" for name, reason in self._bare.items()}

    # ---- servers -----------------------------------------------------------------------------------------------------

    async def _server(self, lane_name: str) -> Server:
        server = self._current.get(lane_name)
        if server is not None and server.is_stale():
            logger.bind(lane=lane_name, server=server.id).info("fork server retired: its packages changed")
            self._retire(self._current.pop(lane_name))
            server = None
        if server is None:
            server = self._start(lane_name)
        if server.serves:
            return server  # at once: were there a moment between choosing it and asking it, it could be retired in it
        try:
            answer = await asyncio.wait_for(asyncio.shield(server.answered), READY_TIMEOUT_S)
        except TimeoutError:
            server.kill()
            message = f"environment {lane_name}: its imports took more than {READY_TIMEOUT_S:.0f} s"
            raise self._break(lane_name, message) from None
        except LaunchError as error:
            log = self._log_folder / f"{lane_name}.log"
            raise self._break(lane_name, f"{error}: {_last_line(log)}; see {log}") from None
        if isinstance(answer, Ready):
            return server if server.serves else await self._server(lane_name)
        assert isinstance(answer, Unfit)
        if self._current.get(lane_name) is server:
            del self._current[lane_name]
        if not answer.unsafe or not self.lanes[lane_name].preload:
            raise self._break(lane_name, f"environment {lane_name}: {answer.message}")
        if lane_name not in self._bare:
            self._bare[lane_name] = answer.message
            logger.bind(lane=lane_name).warning(
                "environment {} is not safe to fork ({}): its tasks import for themselves, which costs seconds each",
                lane_name, answer.message,
            )  # fmt: skip
        return await self._server(lane_name)

    def _may_serve(self, server: Server, ready: Ready) -> bool:
        """Whether one that was adopted is what its lane needs today: settings and versions may have changed."""
        lane = self.lanes.get(server.lane)
        if lane is None or server.lane in self._current or ready.retiring:
            return False
        return ready.made_of == self._made_of(lane) and not server.is_stale()

    def _made_of(self, lane: Lane) -> str:
        """The same for all servers that could take each other's place."""
        parts = msgspec.json.encode((__version__, lane, str(self._cgroup), sorted(self._env.items())))
        return hashlib.blake2b(parts, digest_size=8).hexdigest()

    def _start(self, lane_name: str) -> Server:
        since, message = self._broken.get(lane_name, (0.0, ""))
        if message and time.monotonic() - since < BROKEN_FOR_S:
            raise LaunchError(message)
        lane = self.lanes[lane_name]
        made_of = self._made_of(lane)
        if lane_name in self._bare:
            lane = msgspec.structs.replace(lane, preload=(), canary=None, rehearsal=None)
        server = Server.start(
            lane,
            self._folder,
            environ.with_package(self._env) if lane.python == sys.executable else self._env,
            self._log_folder / f"{lane_name}.log",
            adoption_timeout_s=self._adoption_timeout_s,
            cgroup=self._cgroup if lane.contained else None,
            made_of=made_of,
            **self._hears(),
        )
        self.servers.add(server)
        self._current[lane_name] = server
        return server

    def _break(self, lane_name: str, message: str) -> LaunchError:
        """Remember for a while that the lane does not start; told once in the log."""
        if self._broken.get(lane_name, (0.0, ""))[1] != message:
            logger.bind(lane=lane_name).error("{}", message)
        self._broken[lane_name] = (time.monotonic(), message)
        return LaunchError(message)

    def _retire(self, server: Server) -> None:
        with contextlib.suppress(LaunchError):
            server.send(Retire())
        if server.state is not ServerState.ENDED:
            server.state = ServerState.RETIRING

    def _hears(self) -> dict[str, Callable[..., None]]:
        return {"on_reply": self._on_reply, "on_ended": self._on_ended}

    def _on_reply(self, server: Server, reply: Reply, pipe: Pipe | None) -> None:
        match reply:
            case Ready():
                self._broken.pop(server.lane, None)
                logger.bind(
                    server=server.id, pid=reply.pid, rss_mb=reply.rss_bytes >> 20, preload_s=reply.preload_s
                ).info("fork server ready")
            case Forked():
                assert pipe is not None, "a Forked comes with a pipe"
                known = self._known.setdefault(reply.attempt, Known(server=server))
                known.pid = reply.pid
                self._callbacks.on_forked(reply, pipe)
            case ForkFailed(attempt=attempt, message=message):
                self._known.pop(attempt, None)
                self._callbacks.on_fork_failed(attempt, message)
            case Gone(attempt=attempt, exit=exit_):
                self._callbacks.on_gone(attempt, exit_)
            case Unfit():
                pass  # `answered` has it

    def _on_ended(self, server: Server) -> None:
        self.servers.discard(server)
        if self._current.get(server.lane) is server:
            del self._current[server.lane]
        lost = {attempt: known for attempt, known in self._known.items() if known.server is server}
        if lost or (server.state is ServerState.READY and not self._closing):
            logger.bind(server=server.id, tasks=len(lost)).warning("fork server ended unasked")
        if lost or self._leaves(server):
            task = asyncio.get_running_loop().create_task(self._bury(server, lost))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # ---- what a dead server leaves -----------------------------------------------------------------------------------

    async def _bury(self, server: Server, lost: dict[int, Known]) -> None:
        """Its children died with it; end what those had forked, then say so for each."""
        if not await server.gone(5.0):
            server.kill()  # it closed its socket and lives: nothing good
            await server.gone(5.0)
        await asyncio.to_thread(end_leaves, self._leaves(server))
        for attempt, known in lost.items():
            await asyncio.to_thread(end_remains, f"{self._mark}:{attempt}", known.pid, (), server.id)
        self.sweep_orphans()
        for attempt in lost:
            self._known.pop(attempt, None)
            self._callbacks.on_lost(attempt, f"the fork server {server.id} died, and its tasks with it")

    def _leaves(self, server: Server) -> list[Leaf]:
        return [] if self._cgroup is None else Leaf.of_server(self._cgroup, server.id)

    def sweep_orphans(self) -> None:
        """Kill what was reparented to us: below us only fork servers and their children have a place."""
        servers = {server.pid for server in self.servers if server.pid is not None}
        tree.kill_all(tree.descendants(os.getpid(), besides=servers))

    def _check_forked(self, attempt: int) -> None:
        known = self._known.get(attempt)
        if known is not None and known.pid is None:
            logger.bind(server=known.server.id).error("fork server killed: it did not fork in {} s", FORK_TIMEOUT_S)
            known.server.kill()

    def _check_killed(self, attempt: int) -> None:
        known = self._known.get(attempt)
        if known is not None and known.pid is not None and linux.start_ticks(known.pid) is not None:
            logger.bind(server=known.server.id).error(
                "fork server killed: a kill went unanswered for {} s", KILL_TIMEOUT_S
            )
            known.server.kill()


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").split("\n")[-50:]
    except OSError:
        return "no log"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it wrote nothing")


def end_remains(
    mark: str, pid: int | None, leaves: Sequence[Leaf] = (), dead_server: str | None = None, limit_s: float = 5.0
) -> int:
    """End what is left of an attempt that has no fork server any more; returns how many processes there were.

    By cgroups where there are some, by its session, by the mark that everything it executed carries, and by the
    arguments of the dead server that its forks still have.
    """

    def there() -> set[int]:
        found = set(tree.marked("FLOWMESH_ATTEMPT", mark))
        if pid is not None:
            found.update(tree.in_session(pid))
        if dead_server is not None:
            found.update(tree.forked_from(dead_server))
        return found

    return _end(there, leaves, limit_s)


def end_leaves(leaves: Sequence[Leaf], limit_s: float = 5.0) -> int:
    """End all that is in these cgroups and remove them; returns how many processes there were."""
    return _end(set, leaves, limit_s)


def _end(there: Callable[[], set[int]], leaves: Sequence[Leaf], limit_s: float) -> int:
    seen: set[int] = set()
    deadline = time.monotonic() + limit_s
    while True:
        found = there()
        for leaf in leaves:
            found.update(leaf.pids())
            leaf.kill()
        tree.kill_all(found)
        seen |= found
        removed = [leaf.remove() for leaf in leaves] if not found else [False]
        if all(removed) or time.monotonic() > deadline:
            return len(seen)
        time.sleep(0.01)
