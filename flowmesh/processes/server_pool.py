"""The pool of a node's fork servers: one an environment, started on first use, replaced when it dies or is outdated.

The rest of the node launches, terminates, kills and forgets children through it. Each child has one owner, which is
told exactly once how the child ended: `on_gone` with its exit status, or `on_lost` if its fork server died. In either
case no process of the child is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from loguru import logger

from flowmesh import installed
from flowmesh.errors import LaunchError
from flowmesh.processes import environ, proc_files, tree
from flowmesh.processes.cgroup import Leaf
from flowmesh.processes.child_owner import ChildOwner
from flowmesh.processes.environment_faults import EnvironmentFaults, last_line
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
from flowmesh.processes.remains import end_leaves, end_remains
from flowmesh.processes.server_client import Environment, Server, ServerState

READY_TIMEOUT_S = 300.0
FORK_TIMEOUT_S = 30.0
"""A server that does not fork in this time is stuck, and is killed."""
KILL_TIMEOUT_S = 15.0


class Child(msgspec.Struct, kw_only=True):
    """A child that one of the servers has, or was asked to fork."""

    server: Server
    owner: ChildOwner
    pid: int | None = None
    late: asyncio.TimerHandle | None = None
    """Until it is forked: what happens if it is not."""


class ServerPool:
    """
    Args:
        environments: what each environment's server is started from, by name.
        folder: for the servers' sockets.
        log_folder: for the servers' own output, a file an environment.
        env: the servers' process environment.
        adoption_timeout_s: how long a server keeps its children without a supervisor.
        cgroup: where children get cgroups of their own; None: they get none.
        mark: this node's part of FLOWMESH_ATTEMPT, by which left-over processes are found.
    """

    def __init__(
        self,
        environments: Mapping[str, Environment],
        *,
        folder: Path,
        log_folder: Path,
        env: Mapping[str, str],
        adoption_timeout_s: float,
        cgroup: Path | None,
        mark: str,
    ) -> None:
        self.environments = environments
        self.servers: set[Server] = set()
        self.used_at: dict[str, float] = {}
        """By environment: when a child was asked for last, monotonic."""
        self._current: dict[str, Server] = {}
        self._children: dict[int, Child] = {}
        self._owner_of: Callable[[int], ChildOwner] | None = None
        self._faults = EnvironmentFaults()
        self._folder = folder
        self._log_folder = log_folder
        self._env = env
        self._adoption_timeout_s = adoption_timeout_s
        self._cgroup = cgroup
        self._mark = mark
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def adopt(self, timeout_s: float, owner_of: Callable[[int], ChildOwner]) -> set[int]:
        """Connect to the servers that an earlier supervisor left.

        Args:
            timeout_s: for each server's answer; one that does not answer is killed with all its children.
            owner_of: who answers for the child of an attempt from now on.

        Returns:
            the attempts whose children the servers still have.
        """
        self._owner_of = owner_of
        for path in sorted(self._folder.glob("*-*.sock")):
            if server := Server.adopt(path, **self._callbacks()):
                self.servers.add(server)
        for server in list(self.servers):
            try:
                await asyncio.wait_for(asyncio.shield(server.answered), timeout_s)
            except (TimeoutError, LaunchError) as error:
                logger.bind(server=server.id).warning("fork server not adopted: {}", str(error) or "it does not answer")
                if server.state is not ServerState.ENDED:  # its children too: nobody could report their end
                    tree.kill_all(await asyncio.to_thread(tree.forked_from, server.id))
                continue
            if server.ready is None:
                continue
            if self._may_serve(server, server.ready):
                self._current[server.environment] = server
            else:
                logger.bind(server=server.id).info("fork server adopted for its running tasks only: it is outdated")
                self._retire(server)
        return {attempt for server in self.servers if server.ready for attempt in server.ready.attempts}

    async def launch(
        self, environment: str, fork: Fork, owner: ChildOwner, before_fork: Callable[[str], None] = lambda _server: None
    ) -> None:
        """Ask the environment's server for a child; the server is started if there is none.

        Args:
            owner: is told what becomes of the child.
            before_fork: called with the server's id just before the request is sent: the moment to journal it.

        Raises:
            EnvironmentBroken: the environment has no server, and why.
            LaunchError: the request is too large.
        """
        self.used_at[environment] = time.monotonic()
        self._hasten(environment)
        server = await self._server(environment)
        before_fork(server.id)
        child = self._children[fork.attempt] = Child(server=server, owner=owner)
        try:
            server.send(fork)
        except LaunchError:
            del self._children[fork.attempt]
            raise
        child.late = asyncio.get_running_loop().call_later(FORK_TIMEOUT_S, self._check_forked, fork.attempt)

    def is_ready(self, environment: str) -> bool:
        """Whether a task of this environment can be forked at once."""
        server = self._current.get(environment)
        return server is not None and server.serves

    def has_server(self, environment: str) -> bool:
        """Whether there is one, or it is being started."""
        return environment in self._current

    def rss_bytes(self, environment: str) -> int:
        """Memory of the environment's server after its imports; 0 where it has none that is ready."""
        server = self._current.get(environment)
        return 0 if server is None or server.ready is None else server.ready.rss_bytes

    async def warm(self, environment: str, *, nice: int = 0) -> str:
        """Start the environment's server before a task needs it; returns why there is none.

        Args:
            nice: how much nicer than this process its imports are, until a task waits for them.
        """
        try:
            if environment not in self._current:
                self._start(environment, nice)
            await self._server(environment)
        except LaunchError as error:
            return str(error)
        return ""

    def let_go(self, environment: str) -> bool:
        """End the environment's server, if it has no child; the next task starts another one."""
        server = self._current.get(environment)
        if server is None or not server.serves or any(child.server is server for child in self._children.values()):
            return False
        self._retire(self._current.pop(environment))
        return True

    async def await_server(self, environment: str) -> str:
        """Wait for the environment's server, which is started if there is none; returns why there is none."""
        self._hasten(environment)
        try:
            await self._server(environment)
        except LaunchError as error:
            return str(error)
        return ""

    def _hasten(self, environment: str) -> None:
        if (server := self._current.get(environment)) is not None:
            server.hasten()

    def try_again(self, environment: str) -> None:
        """Start the environment's server at the next request, however short ago the last start failed."""
        self._faults.try_again(environment)

    def terminate(self, attempt: int) -> None:
        """SIGTERM to the child's process group; does nothing for a child that is gone."""
        if child := self._children.get(attempt):
            with contextlib.suppress(LaunchError):  # its server has ended: on_lost follows
                child.server.send(Terminate(attempt))

    def kill(self, attempt: int) -> None:
        """SIGKILL to the child's whole tree. A server that does not confirm it within KILL_TIMEOUT_S is killed too."""
        if child := self._children.get(attempt):
            with contextlib.suppress(LaunchError):
                child.server.send(Kill(attempt))
            asyncio.get_running_loop().call_later(KILL_TIMEOUT_S, self._check_killed, attempt)

    def forget(self, attempt: int) -> None:
        """The child's end is in the journal: its server need not report it again."""
        if (child := self._children.pop(attempt, None)) and child.server.state is not ServerState.ENDED:
            child.server.send(Forget(attempt))

    def recycle(self, environment: str | None = None) -> list[str]:
        """Retire the servers of an environment (None: of all): running tasks finish, new ones get a new server."""
        names = [name for name in self._current if environment in (None, name)]
        for name in names:
            self._retire(self._current.pop(name))
        self._faults.clear()
        return names

    def leave(self) -> None:
        """Disconnect from all servers; they keep their children for the next supervisor."""
        self._closing = True
        for server in self.servers:
            server.close()

    async def close(self, timeout_s: float = 10.0) -> None:
        """End all servers; their children should have ended before.

        Args:
            timeout_s: for each to retire; one that takes longer is killed.
        """
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
        """What is wrong, by environment."""
        return self._faults.warnings()

    async def _server(self, environment: str) -> Server:
        server = self._current.get(environment)
        if server is not None and server.is_stale():
            logger.bind(environment=environment, server=server.id).info("fork server retired: its packages changed")
            self._retire(self._current.pop(environment))
            server = None
        if server is None:
            server = self._start(environment)
        if server.serves:
            return server  # without an await: it could be retired between being chosen and being asked
        try:
            answer = await asyncio.wait_for(asyncio.shield(server.answered), READY_TIMEOUT_S)
        except TimeoutError:
            server.kill()
            message = f"environment {environment}: its imports took more than {READY_TIMEOUT_S:.0f} s"
            raise self._faults.failed(environment, message) from None
        except LaunchError as error:
            log = self._log_folder / f"{environment}.log"
            raise self._faults.failed(environment, f"{error}: {last_line(log)}; see {log}") from None
        if isinstance(answer, Ready):
            return server if server.serves else await self._server(environment)
        assert isinstance(answer, Unfit)
        if self._current.get(environment) is server:
            del self._current[environment]
        if not answer.unsafe or not self.environments[environment].preload:
            raise self._faults.failed(environment, f"environment {environment}: {answer.message}")
        self._faults.mark_unsafe(environment, answer.message)
        return await self._server(environment)

    def _may_serve(self, server: Server, ready: Ready) -> bool:
        """Whether an adopted server may take new tasks: settings, packages and version must be today's."""
        environment = self.environments.get(server.environment)
        if environment is None or server.environment in self._current or ready.retiring:
            return False
        return ready.made_of == self._made_of(environment) and not server.is_stale()

    def _made_of(self, environment: Environment) -> str:
        """A digest that is equal for servers which can replace each other."""
        parts = msgspec.json.encode((installed.version(), environment, str(self._cgroup), sorted(self._env.items())))
        return hashlib.blake2b(parts, digest_size=8).hexdigest()

    def _start(self, name: str, nice: int = 0) -> Server:
        self._faults.check(name)
        environment = self.environments[name]
        made_of = self._made_of(environment)
        if self._faults.is_unsafe(name):
            environment = msgspec.structs.replace(environment, preload=(), canary=None, prepare=None, rehearsal=None)
        server = Server.start(
            environment,
            self._folder,
            environ.with_package(self._env) if environment.python == sys.executable else self._env,
            self._log_folder / f"{name}.log",
            adoption_timeout_s=self._adoption_timeout_s,
            cgroup=self._cgroup if environment.contained else None,
            made_of=made_of,
            nice=nice,
            **self._callbacks(),
        )
        self.servers.add(server)
        self._current[name] = server
        return server

    def _retire(self, server: Server) -> None:
        with contextlib.suppress(LaunchError):
            server.send(Retire())
        if server.state is not ServerState.ENDED:
            server.state = ServerState.RETIRING

    def _callbacks(self) -> dict[str, Callable[..., None]]:
        return {"on_reply": self._on_reply, "on_ended": self._on_ended}

    def _on_reply(self, server: Server, reply: Reply, pipe: Pipe | None) -> None:
        match reply:
            case Ready():
                self._faults.started(server.environment)
                for attempt in reply.attempts:  # its Forked, and perhaps its Gone, follow; if it dies first: on_lost
                    self._child(attempt, server)
                logger.bind(
                    server=server.id, pid=reply.pid, rss_mb=reply.rss_bytes >> 20, preload_s=reply.preload_s
                ).info("fork server ready")
            case Forked():
                assert pipe is not None, "a Forked comes with a pipe"
                child = self._child(reply.attempt, server)
                child.pid = reply.pid
                if child.late is not None:
                    child.late.cancel()
                    child.late = None
                child.owner.on_forked(reply, pipe)
            case ForkFailed(attempt=attempt, message=message, own=own):
                child = self._child(attempt, server)
                del self._children[attempt]
                child.owner.on_fork_failed(attempt, message, own)
            case Gone(attempt=attempt, exit=exit_):
                self._child(attempt, server).owner.on_gone(attempt, exit_)
            case Unfit():
                pass  # awaited through `answered`

    def _child(self, attempt: int, server: Server) -> Child:
        """The child of an attempt; one that an earlier supervisor launched gets its owner now."""
        if (child := self._children.get(attempt)) is None:
            assert self._owner_of is not None, "only adopted servers have children that were not launched here"
            child = self._children[attempt] = Child(server=server, owner=self._owner_of(attempt))
        return child

    def _on_ended(self, server: Server) -> None:
        self.servers.discard(server)
        if self._current.get(server.environment) is server:
            del self._current[server.environment]
        lost = {attempt: child for attempt, child in self._children.items() if child.server is server}
        if lost or (server.state is ServerState.READY and not self._closing):
            logger.bind(server=server.id, tasks=len(lost)).warning("fork server exited unexpectedly")
        if lost or self._leaves(server):
            task = asyncio.get_running_loop().create_task(self._bury(server, lost))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _bury(self, server: Server, lost: dict[int, Child]) -> None:
        """The children of a dead server died with it (PDEATHSIG): end what they had forked, then tell their owners."""
        if not await server.gone(5.0):
            server.kill()  # it closed its socket but lives
            await server.gone(5.0)
        await asyncio.to_thread(end_leaves, self._leaves(server))
        for attempt, child in lost.items():
            await asyncio.to_thread(end_remains, f"{self._mark}:{attempt}", child.pid, (), server.id)
        self.sweep_orphans()
        for attempt, child in lost.items():
            self._children.pop(attempt, None)
            child.owner.on_lost(attempt, f"the fork server {server.id} died, and its tasks with it")

    def _leaves(self, server: Server) -> list[Leaf]:
        return [] if self._cgroup is None else Leaf.of_server(self._cgroup, server.id)

    def sweep_orphans(self) -> None:
        """Kill what was reparented to the supervisor: only fork servers and their children belong below it."""
        servers = {server.pid for server in self.servers if server.pid is not None}
        tree.kill_all(tree.descendants(os.getpid(), besides=servers))

    def _check_forked(self, attempt: int) -> None:
        child = self._children.get(attempt)
        if child is not None and child.pid is None:
            logger.bind(server=child.server.id).error("fork server killed: it did not fork in {} s", FORK_TIMEOUT_S)
            child.server.kill()

    def _check_killed(self, attempt: int) -> None:
        child = self._children.get(attempt)
        if child is not None and child.pid is not None and proc_files.start_ticks(child.pid) is not None:
            logger.bind(server=child.server.id).error(
                "fork server killed: it did not confirm a kill in {} s", KILL_TIMEOUT_S
            )
            child.server.kill()
