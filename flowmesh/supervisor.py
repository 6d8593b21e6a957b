"""The node: wires its parts, owns the event loop and the signals. What each part does stands in the part."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import msgspec
from loguru import logger

from flowmesh import __version__
from flowmesh.control import ControlServer
from flowmesh.errors import ConfigError, DeviceError, FlowMeshError, LaunchError
from flowmesh.execution import files, folders, lanes, preflight
from flowmesh.execution.executor import Executor
from flowmesh.execution.identity import About, presence
from flowmesh.execution.operations import Operations
from flowmesh.execution.recovery import recover
from flowmesh.execution.release import Devices
from flowmesh.execution.run import Run
from flowmesh.execution.uplink import Uplink
from flowmesh.execution.watch import watch
from flowmesh.execution.workers import Workers
from flowmesh.messages.wire import utc_now
from flowmesh.node.devices import Inventory
from flowmesh.node.notify import Notifier
from flowmesh.node.nvml import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot
from flowmesh.processes import environ, linux
from flowmesh.processes.fleet import Fleet
from flowmesh.settings_paths import results_dir, state_dir
from flowmesh.settings_schema import Settings
from flowmesh.tasks.journal import Journal
from flowmesh.tasks.types import LIGHT

THREADS = 8
FAREWELL_TIMEOUT_S = 5.0
CANCEL_AGAIN_S = 0.2
FLUSH_TIMEOUT_S = 10.0
"""How long a node that ends waits for Redis to take its last events; the rest is sent after its next start."""


class Supervisor:
    """One node's life, from `run()` to its return value, the exit code."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], reread: Callable[[], Settings]) -> None:
        """
        Args:
            settings: have passed `preflight.check`.
            reread: reads them anew, with the same check; raises ConfigError. Called in a thread.
        """
        self.settings = settings
        self.state_dir = state_dir(self.settings, environment)
        self.results_dir = results_dir(self.settings)
        self._reread = reread
        self._environ = environment
        self._stop = asyncio.Event()
        self._upgrade = False
        self._drain_mode: str | None = None
        self._notifier = Notifier(environment)
        self._lock: IO[str] | None = None
        self._reloading: set[asyncio.Task[None]] = set()

    # ---- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Run until a signal or a command ends the node.

        Raises:
            FlowMeshError: it cannot start, and why.
        """
        self._lock = folders.hold_state_dir(self.state_dir)
        linux.become_subreaper()
        linux.hide_from_same_user()
        _start_threads()
        self.journal = Journal(self.state_dir / "journal.sqlite")
        await self._wire()
        self._handle_signals()
        tasks = [asyncio.create_task(work) for work in self._works()]
        try:
            await self.control.start()
            self._notifier.say(READY="1", STATUS="running")
            await self._until_stopped(tasks)
            if self._upgrade:
                self._replace()
            await self._drained()
        finally:
            await _end(tasks)
        await self._close()
        return 0

    async def _wire(self) -> None:
        settings = self.settings
        self.node_id = node_id = self.journal.fact("node_id", secrets.token_hex(4))
        self.worker_id = worker_id = settings.node.worker_id or self.journal.fact(
            "worker_id", f"worker-{secrets.token_hex(6)}"
        )
        self.nvml = Nvml()
        inventory = await self._take_inventory(settings)
        for problem in inventory.unusable:
            logger.error("not offered: {}", problem)
        fitted = self._fit(settings, inventory)
        self.cgroup = fitted.cgroup
        about = About(
            node_id=node_id,
            started=time.monotonic(),
            started_at=utc_now(),
            isolation="cgroup" if self.cgroup is not None else "subreaper",
            inventory=inventory,
            power=PowerMeter(),
            nvml=self.nvml,
        )
        owner = preflight.owner(settings)
        if owner is not None:
            folders.open_for(owner.uid, owner.gid, self.state_dir)
        self.workers = Workers()
        self.executor = self._make_executor(about, fitted, owner)
        self.operations = Operations(about, self.executor, self.workers, stop=self.stop, start_anew=self.start_anew)
        self.uplink = Uplink(self.executor, self.workers, worker_id, self.operations.on_channel)
        self.workers.executor, self.workers.uplink = self.executor, self.uplink
        self.workers.operations = self.operations
        for each, slot in self.executor.slots.items():
            made = presence(about, self.executor, slot, self.uplink.bus, self.workers.on_missed)
            self.workers.presences[each] = made
        self.control = ControlServer(
            self.state_dir / "run" / "control.sock", self.operations.handlers(), self.operations.subscribe
        )
        catalogue = self.executor.catalogue
        logger.bind(isolation=about.isolation, types=",".join(sorted(catalogue.offered))).info(
            "node starts: worker {} (FlowMesh {})", worker_id, __version__
        )
        for name, why in sorted(catalogue.missing.items()):
            logger.bind(type=name).info("task type not offered: {}", why)

    def _make_executor(self, about: About, fitted: preflight.Fitted, owner: files.Owner | None) -> Executor:
        settings = self.settings
        for name in sorted({slot.name for slot in settings.slots} - {plan.name for plan in fitted.slots}):
            logger.error("slot {} is left out: none of its GPUs works", name)
        slots: dict[str, Slot[Run]] = {plan.worker_id: Slot(plan, lambda run: bool(run.gpus)) for plan in fitted.slots}
        base_env = environ.base(self._environ, settings.tasks.pass_env)
        catalogue, lane_table = lanes.plan(settings)
        executor = Executor(
            settings=settings,
            catalogue=catalogue,
            journal=self.journal,
            slots=slots,
            layout=files.Layout(
                state_dir=self.state_dir,
                results_dir=self.results_dir,
                work_dir=Path.cwd(),
                mark=about.node_id,
                base_env=base_env,
                cgroup=self.cgroup,
                processes=settings.processes,
                limits=msgspec.to_builtins(settings.runners),
                owner=owner,
            ),
            hooks=self.workers,
        )
        executor.devices = Devices(executor, self.nvml, about.power, fitted.gpus)
        executor.fleet = Fleet(
            lane_table,
            folder=self.state_dir / "run",
            log_folder=self.state_dir / "log",
            env=environ.for_server(base_env) | {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in fitted.gpus)},
            adoption_timeout_s=settings.processes.adoption_timeout_s,
            cgroup=self.cgroup,
            mark=about.node_id,
            callbacks=executor.callbacks,
        )
        return executor

    async def _take_inventory(self, settings: Settings) -> Inventory:
        try:
            return await self.nvml.inventory()
        except DeviceError as error:
            if any(slot.gpus for slot in settings.slots):
                raise  # later, or after a repair, it may be there: a restart is worth a try
            logger.error("the node starts without GPUs: {}", error)
            return Inventory()

    def _fit(self, settings: Settings, inventory: Inventory) -> preflight.Fitted:
        return preflight.fit(settings, self._environ, inventory, node_id=self.node_id, worker_id=self.worker_id)

    def _works(self) -> list[Any]:
        looks = [watch(self.executor), self.executor.room.watch(), self.executor.devices.sample()]
        return [self._begin(), self.uplink.send_events(), self._watchdog(), *looks]

    async def _begin(self) -> None:
        """Take over what an earlier supervisor left; then listen; then say that we are idle."""
        await recover(self.executor)
        await self.executor.fleet.warm(LIGHT)
        await self.executor.devices.first_look()
        gc.collect()
        gc.freeze()  # what lives for ever need not be looked at again
        self.workers.resume()
        await asyncio.gather(*self.uplink.works())

    # ---- ends --------------------------------------------------------------------------------------------------------

    def stop(self, mode: str) -> None:
        """Drain in this mode and end. A second word may only be harder than the first."""
        hardness = ("finish", "checkpoint", "now")
        if self._drain_mode is not None and hardness.index(mode) <= hardness.index(self._drain_mode):
            return
        self._drain_mode = mode
        self._stop.set()
        logger.bind(mode=mode, tasks=len(self.executor.runs)).info("draining")
        self._notifier.say(STOPPING="1", STATUS=f"draining ({mode})")
        self.workers.drain()
        self.executor.drain(mode)

    async def start_anew(self) -> None:
        """End this process and start the program anew in its place, with the settings as they are now and the version
        that is on disk; tasks run on and are adopted.

        Raises:
            FlowMeshError: the start would refuse the settings; nothing has changed.
        """
        try:
            await self._check_anew()
            if self._drain_mode is not None:
                raise LaunchError("the node is draining, and ends when its tasks have")
        except FlowMeshError as error:
            logger.error("settings not reloaded, the old ones stay: {}", error)
            raise
        self._upgrade = True
        self._stop.set()

    async def _check_anew(self) -> None:
        settings = await asyncio.to_thread(self._reread)
        if (there := state_dir(settings, self._environ)) != self.state_dir:
            raise ConfigError(
                f"node.state_dir: {there} is not {self.state_dir}, where this node and its tasks are; "
                "to move it, drain the node and start it again"
            )
        await asyncio.to_thread(self._fit, settings, await self._take_inventory(settings))

    async def _until_stopped(self, tasks: list[asyncio.Task[Any]]) -> None:
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        for task in done - {stop}:
            if (error := task.exception()) is not None:
                raise error

    async def _drained(self) -> None:
        """Wait for the tasks, as long as the mode lets them."""
        limit_s = self.settings.processes.drain_timeout_s
        try:
            await asyncio.wait_for(self.executor.idle(), limit_s)
        except TimeoutError:
            logger.warning("the drain took more than {} s: stopping what still runs", limit_s)
            self.stop("now")
            await self.executor.idle()

    def _replace(self) -> None:
        """Replace this process by the program as it is on disk now. Does not return."""
        logger.info("handing over to a new supervisor; {} tasks run on", len(self.executor.runs))
        self.executor.fleet.leave()
        self.journal.close()
        self._notifier.say(RELOADING="1", STATUS="handing over")
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    async def _close(self) -> None:
        outbox = self.uplink.outbox
        sending = asyncio.create_task(outbox.run())
        if not await outbox.flushed(FLUSH_TIMEOUT_S / 10 if outbox.trouble else FLUSH_TIMEOUT_S):
            logger.warning("{} events wait on disk for the next start", self.journal.outbox_size())
        await _end([sending])
        await self.workers.unregister(FAREWELL_TIMEOUT_S)
        await self.control.close()
        await self.executor.fleet.close()
        await self.nvml.close()
        await self.uplink.close()
        self.journal.close()
        if self.cgroup is not None:
            with contextlib.suppress(OSError):
                self.cgroup.rmdir()
        logger.info("ended")

    # ---- what happens ------------------------------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        for number in (signal.SIGHUP, signal.SIGUSR2):
            loop.add_signal_handler(number, self._on_start_anew_signal)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def _on_stop_signal(self) -> None:
        self.stop("finish" if self._drain_mode is None else "now")

    def _on_start_anew_signal(self) -> None:
        """SIGHUP for new settings, SIGUSR2 for a new version: one way for both."""

        async def start_anew() -> None:
            with contextlib.suppress(FlowMeshError):  # told in the log, and the old settings stay
                await self.start_anew()

        task = asyncio.create_task(start_anew())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    def _reap(self) -> None:
        """Collect fork servers that ended, and orphans of theirs that came to us."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    async def _watchdog(self) -> None:
        """Feeds systemd for as long as the loop turns; Redis' health has no part in it."""
        interval_s = self._notifier.watchdog_s
        while True:
            status = next(iter(self.uplink.troubles()), f"{len(self.executor.runs)} tasks")
            self._notifier.say(WATCHDOG="1", STATUS=status)
            await asyncio.sleep(min(interval_s / 3, 10.0) if interval_s is not None else 10.0)


def _start_threads() -> None:
    """Have the threads for what blocks beforehand: none can be had later, while a task holds all the processes that
    there may be."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="flowmesh")
    all_there = threading.Barrier(THREADS)
    for _ in range(THREADS):
        pool.submit(all_there.wait)
    asyncio.get_running_loop().set_default_executor(pool)


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel these, more than once where it takes that: redis-py loses a cancel that meets an answer."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
