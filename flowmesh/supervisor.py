"""Wires the parts of the node, and owns the event loop and the signals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import IO, Any

from loguru import logger

from flowmesh.cancellation import end_all, run_all
from flowmesh.control.drain import Drain
from flowmesh.control.node_end import NodeEnd
from flowmesh.control.operations import Operations
from flowmesh.control.server import ControlServer
from flowmesh.control.submission import Submissions
from flowmesh.control.watchers import Watchers
from flowmesh.errors import BusyError, ConfigError, DeviceError, FlowMeshError, LaunchError
from flowmesh.execution.launch.warming import Warming
from flowmesh.execution.layout import make_parts
from flowmesh.execution.recovery import recover
from flowmesh.messages.wire import utc_now
from flowmesh.metrics.files import MetricsFiles
from flowmesh.metrics.node_metrics import NodeMetrics
from flowmesh.node.devices import Inventory
from flowmesh.node.nvml.client import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.systemd import Notifier
from flowmesh.orchestrator.link import Link
from flowmesh.orchestrator.worker_description import NodeDescription
from flowmesh.processes import linux
from flowmesh.redaction import Redactor
from flowmesh.reporting.outgoing import Outgoing
from flowmesh.reporting.reporting import Reporting
from flowmesh.settings.paths import results_dir, state_dir
from flowmesh.settings.schema import Settings
from flowmesh.startup import first_lines, identity, preflight, successor
from flowmesh.startup.assembly import make_executor
from flowmesh.startup.event_loop import reap_children, start_threads
from flowmesh.startup.gpu_watch import GpuWatch
from flowmesh.startup.state_dir import hold_state_dir, keep_lock
from flowmesh.tasks.catalogue import LIGHT
from flowmesh.tasks.journal import Journal, JournalError
from flowmesh.tasks.journal_db import JOURNAL_FILE

FAREWELL_TIMEOUT_S = 5.0
LOCK_INTERVAL_S = 1.0
RECOVERY_WAIT_S = 20.0
"""How long a stop waits for the first look at the node's folders."""
SIGNAL_WAIT_S = 0.01
"""Before an exec: a signal that came before signals were held is handled in this time."""
FLUSH_TIMEOUT_S = 10.0
"""How long a node that ends waits for Redis to take its last events; the rest is sent after its next start."""


class Supervisor:
    """One node, from its start to its exit code."""

    def __init__(
        self, settings: Settings, environment: Mapping[str, str], reread: Callable[[], Settings], hides: Redactor
    ) -> None:
        """
        Args:
            settings: checked by `preflight.check`.
            environment: the process environment that they were read with.
            reread: reads and checks them again; raises ConfigError. Called in a thread.
            hides: the node's secrets, wherever it says something.
        """
        self.settings = settings
        self.state_dir = state_dir(self.settings, environment)
        self.results_dir = results_dir(self.settings)
        self._reread = reread
        self._hides = hides
        self._environ = environment
        self._stop = asyncio.Event()
        self._recovers = asyncio.Event()
        """Set once the tasks of an earlier supervisor are about to be taken over: before that, none is known."""
        self._upgrade = False
        self._next_workers: set[str] = set()
        """The workers that a new supervisor will have."""
        self._notifier = Notifier(environment)
        self._lock: IO[str] | None = None
        self._reloading: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Run until a signal or a command ends the node.

        Raises:
            FlowMeshError: it cannot start, and why.
        """
        successor.hold_signals()
        os.umask(int(self.settings.results.umask, 8))
        self._lock = hold_state_dir(self.state_dir)
        linux.become_subreaper()
        start_threads()
        self.journal = Journal(self.state_dir / JOURNAL_FILE)
        try:
            await self._wire()
        except JournalError as error:
            raise BusyError(f"node.state_dir: {self.state_dir}: {error}; free or repair its disk") from error
        self._handle_signals()
        await self._claim()
        tasks = [asyncio.create_task(work) for work in self._works()]
        try:
            await self.control.start()
            while not await self._ended(tasks):
                pass
            await self._flushed()  # by the sender that runs: one that is cancelled while it sends would repeat events
            await self.reporting.flushed(FAREWELL_TIMEOUT_S)
        finally:
            await end_all(tasks)
        await self._close()
        return 0

    async def _ended(self, tasks: list[asyncio.Task[Any]]) -> bool:
        """Wait for a stop and its end; False where it was taken back."""
        await self._until_stopped(tasks)
        with contextlib.suppress(TimeoutError):  # a signal during a hand-over: its tasks are not known yet
            await asyncio.wait_for(self._recovers.wait(), RECOVERY_WAIT_S)
        if self._upgrade:
            await self._hand_over()
        return await self.drain.ended()

    async def _claim(self) -> None:
        """Take the worker ids before a task or a process is touched under them. A stop ends the wait.

        Raises:
            BusyError: another live node has one.
        """
        claim = asyncio.create_task(self.link.registration.claim())
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait([claim, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if claim.done():
            claim.result()
        else:
            claim.cancel()

    async def _wire(self) -> None:
        settings = self.settings
        ids = identity.settle(self.journal, self.state_dir, settings.node.worker_id)
        self.node_id, self.worker_id = node_id, worker_id = ids.node_id, ids.worker_id
        self.nvml = Nvml()
        self.inventory = inventory = await self._take_inventory()
        fitted = self._fit(settings, inventory)
        self.cgroup = fitted.cgroup
        node = NodeDescription(
            node_id=node_id,
            owner=ids.owner,
            started=time.monotonic(),
            started_at=utc_now(),
            isolation="cgroup" if self.cgroup is not None else "subreaper",
            inventory=inventory,
            power=PowerMeter(),
            nvml=self.nvml,
        )
        owner = preflight.owner(settings)
        make_parts(self.state_dir, owner)
        outgoing = Outgoing(settings, self._environ, node_id)
        self.executor = make_executor(
            settings,
            fitted,
            owner,
            self.journal,
            self.state_dir,
            node_id=node_id,
            nvml=self.nvml,
            power=node.power,
            environment=self._environ,
            secrets=self._hides,
            sendings_of=outgoing.of_end,
            traces=outgoing.traces,
        )
        self.reporting = Reporting(outgoing, self.executor, worker_id)
        self.gpu_watch = GpuWatch(
            self.executor.parts.conditions,
            fitted,
            fit=functools.partial(self._fit, settings),
            restart=self.start_anew,
            wait_s=settings.tasks.node_fault_wait_s,
        )
        self.gpu_watch.begin(inventory)
        self.link = Link(node, self.executor, worker_id)
        on_sigterm = settings.node.on_sigterm or ("finish" if settings.node.ends_at is None else "checkpoint")
        self.drain = Drain(
            self.executor,
            self.link.registration,
            self._notifier,
            self._stop,
            limit_s=settings.processes.drain_timeout_s,
            on_sigterm=on_sigterm,
        )
        self.end = NodeEnd(self.executor, self.link, self.drain)
        metrics = NodeMetrics(node, self.executor, self.link)
        indices = {gpu.uuid: gpu.index for gpu in inventory.gpus}
        self.metrics_files = MetricsFiles(self.executor, settings.metrics, metrics.text, indices)
        operations = Operations(
            node,
            self.executor,
            self.link,
            stop=self.drain.by_operator,
            resume=self.drain.take_back,
            start_anew=self.start_anew,
            metrics=metrics.text,
            notify=self.reporting.summary,
            end=self.end.listed,
        )
        watchers = Watchers(self.executor)
        socket = self.state_dir / "run" / "control.sock"
        taken = {"submit": Submissions(self.executor, self.link).take}
        self.control = ControlServer(socket, operations.handlers(), watchers.subscribe, self._hides, bulk=taken)
        catalogue = self.executor.catalogue
        first_lines.log(settings, self._environ, catalogue, worker=worker_id, how=node.isolation)

    async def _take_inventory(self) -> Inventory:
        try:
            return await self.nvml.inventory()
        except DeviceError as error:
            return Inventory(unusable=(str(error),))

    def _fit(self, settings: Settings, inventory: Inventory) -> preflight.Fitted:
        return preflight.fit(settings, self._environ, inventory, node_id=self.node_id, worker_id=self.worker_id)

    def _works(self) -> list[Coroutine[Any, Any, None]]:
        works = [self._begin(), self.link.send_events(), self._feed_watchdog(), *self.executor.works()]
        works += self.metrics_files.works() + self.reporting.works()
        return [*works, self.control.keep(), self._keep_lock()]

    async def _begin(self) -> None:
        """Take over the tasks of an earlier supervisor; then subscribe; then report IDLE."""
        mode = self.drain.kept
        self.executor.draining = mode  # no task of the queue starts meanwhile
        await self.executor.look_first()
        self._recovers.set()  # `recover` lists the tasks before it awaits anything
        await recover(self.executor)
        if mode is not None:
            logger.info("the drain that began before the restart continues; `flowmesh drain --cancel` ends it")
            self.drain.by_operator(mode)
        if len(self.executor.runs):
            self.executor.parts.gateway.need()
        warming = self._warming()
        warming.begin()
        await self.executor.pool.warm(LIGHT)
        await self.executor.parts.gpus.check_idle_slots()
        self.reporting.look()
        gc.collect()
        gc.freeze()  # long-lived objects need no further collection
        self.link.registration.resume()
        self._notifier.send(READY="1", STATUS="running")
        compared = first_lines.compare_torch(self.executor, self.inventory)
        works = [warming.run(), self.end.run(), *self.executor.parts.page.works()]
        await run_all(*self.link.works(), compared, *works)

    def _warming(self) -> Warming:
        executor, registration = self.executor, self.link.registration
        return Warming(
            pool=executor.pool,
            catalogue=executor.catalogue,
            broken=lambda: executor.parts.environments.broken,
            report=executor.parts.environments.report,
            journal=self.journal,
            settings=self.settings.environments,
            max_mb=self.settings.processes.warm_max_mb,
            idle=lambda: len(executor.runs) == 0,
            wanted=lambda: executor.draining is None and not registration.disabled,
        )

    async def start_anew(self, fitted: preflight.Fitted | None = None) -> None:
        """Replace this process by the program as it is on disk, with the settings as they are now; tasks run on.

        Args:
            fitted: what the new one will make of the machine; None: found out here.

        Raises:
            FlowMeshError: the new process would not start, or refuse the settings; nothing has changed.
        """
        self._notifier.reloading("checking the settings and the program on disk")
        try:
            await self._check_anew(fitted)
            if self.drain.mode is not None:
                raise LaunchError("the node is draining, and ends when its tasks have ended")
        except FlowMeshError as error:
            logger.error("not restarted, the node keeps its version and settings: {}", error)
            self._notifier.send(READY="1", STATUS=f"not reloaded: {error}")
            raise
        self._upgrade = True
        self._stop.set()

    async def _check_anew(self, fitted: preflight.Fitted | None) -> None:
        settings = await asyncio.to_thread(self._reread)
        if (there := state_dir(settings, self._environ)) != self.state_dir:
            raise ConfigError(
                f"node.state_dir: {there} is not {self.state_dir}, where this node and its tasks are; "
                "to move it, drain the node and start it again"
            )
        if fitted is None:
            fitted = await asyncio.to_thread(self._fit, settings, await self._take_inventory())
        self._next_workers = {plan.worker_id for plan in fitted.slots}
        await asyncio.to_thread(successor.check, self._environ)

    async def _keep_lock(self) -> None:
        """Until cancelled: hold the lock in a new file when somebody has deleted the old one."""
        assert self._lock is not None
        while True:
            await asyncio.sleep(LOCK_INTERVAL_S)
            with contextlib.suppress(OSError):  # said by the checks of the state folder
                self._lock = keep_lock(self.state_dir, self._lock)

    async def _until_stopped(self, tasks: list[asyncio.Task[Any]]) -> None:
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        for task in done - {stop}:
            if (error := task.exception()) is not None:
                raise error

    async def _hand_over(self) -> None:
        """exec the program as it is on disk now. Returns only if a stop has come meanwhile."""
        successor.hold_signals()
        await asyncio.sleep(SIGNAL_WAIT_S)
        if self.drain.mode is not None:
            self._upgrade = False
            successor.take_signals()
            return
        logger.info("handing over to a new supervisor; {} tasks run on", len(self.executor.runs))
        await self.link.registration.unregister(FAREWELL_TIMEOUT_S, keep=self._next_workers)
        self.executor.pool.leave()
        self.journal.close()
        self._notifier.reloading("handing over")
        successor.replace(self._environ)

    async def _flushed(self) -> bool:
        """Wait until all events are sent; not for long where that does not work."""
        trouble = self.link.outbox.trouble or self.link.queue.sender.trouble
        return await self.link.flushed(FLUSH_TIMEOUT_S / 10 if trouble else FLUSH_TIMEOUT_S)

    async def _close(self) -> None:
        self._notifier.send(STOPPING="1", STATUS="ending")
        if self.journal.outbox_size():
            sending = asyncio.create_task(self.link.send_last_events())
            if not await self._flushed():
                logger.warning("{} events not sent; they are sent after the next start", self.journal.outbox_size())
            await end_all([sending])
        await self.link.registration.unregister(FAREWELL_TIMEOUT_S)
        await self.control.close()
        await self.reporting.close()
        await self.executor.parts.gateway.stop()
        await self.executor.pool.close()
        await self.nvml.close()
        await self.link.close()
        self.journal.close()
        if self.cgroup is not None:
            with contextlib.suppress(OSError):
                self.cgroup.rmdir()
        logger.info("node ended")

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.drain.on_sigterm)
        loop.add_signal_handler(signal.SIGINT, self.drain.on_sigint)
        loop.add_signal_handler(signal.SIGUSR1, self.drain.on_warning)
        for number in (signal.SIGHUP, signal.SIGUSR2):
            loop.add_signal_handler(number, self._on_start_anew_signal)
        loop.add_signal_handler(signal.SIGCHLD, reap_children)
        successor.take_signals()

    def _on_start_anew_signal(self) -> None:
        """SIGHUP for new settings, SIGUSR2 for a new version: both restart the program in place."""

        async def start_anew() -> None:
            with contextlib.suppress(FlowMeshError):  # logged; the node keeps its old settings
                await self.start_anew()

        task = asyncio.create_task(start_anew())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    async def _feed_watchdog(self) -> None:
        """Feed systemd's watchdog while the loop runs. An outage of Redis must not restart the node; see STATUS."""
        interval_s = self._notifier.watchdog_s
        while True:
            status = next(iter(self.link.troubles()), f"{len(self.executor.runs)} tasks")
            self._notifier.send(WATCHDOG="1", STATUS=status)
            await asyncio.sleep(min(interval_s / 3, 10.0) if interval_s is not None else 10.0)
