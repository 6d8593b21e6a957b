"""The node: wires its parts, owns the event loop and the signals. What each part does stands in the part."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
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
from flowmesh.bus.connection import connect
from flowmesh.bus.intake import Intake
from flowmesh.bus.outbox import Outbox
from flowmesh.bus.presence import Identity, Presence
from flowmesh.bus.stream import Stream
from flowmesh.config import Loaded, Settings, results_dir, state_dir
from flowmesh.control import ControlServer
from flowmesh.errors import BusyError, ConfigError, DeviceError
from flowmesh.execution import events, files, lanes
from flowmesh.execution.dispatch import Dispatcher
from flowmesh.execution.executor import Executor
from flowmesh.execution.hooks import Hooks
from flowmesh.execution.operations import Operations
from flowmesh.execution.recovery import recover
from flowmesh.execution.release import Devices
from flowmesh.execution.run import Run
from flowmesh.execution.watch import watch
from flowmesh.messages.wire import utc_now, worker_key
from flowmesh.node import metrics
from flowmesh.node.devices import Inventory, visible_gpus
from flowmesh.node.hardware import collect, logical_cores
from flowmesh.node.notify import Notifier
from flowmesh.node.nvml import Nvml
from flowmesh.node.power import PowerMeter
from flowmesh.node.slots import Slot
from flowmesh.node.slots import plan as plan_slots
from flowmesh.processes import cgroup, environ, linux
from flowmesh.processes.fleet import Fleet
from flowmesh.tasks.journal import Journal, JournalError, ensure_private_dir
from flowmesh.tasks.types import LIGHT

THREADS = 8
FAREWELL_TIMEOUT_S = 5.0
CANCEL_AGAIN_S = 0.2
FLUSH_TIMEOUT_S = 10.0
"""How long a node that ends waits for Redis to take its last events; the rest is sent after its next start."""
CONTROL_CHANNEL = "flowmesh.control"
"""Ours: `{"type": "CANCEL", "task_id", "force"?}` to every node; see README."""


class Supervisor(Hooks):
    """One node's life, from `run()` to its return value, the exit code."""

    def __init__(self, loaded: Loaded, environment: Mapping[str, str], recheck: Callable[[], object]) -> None:
        """
        Args:
            recheck: reads the settings anew and raises ConfigError where they cannot be used; for SIGHUP.
        """
        self._recheck = recheck
        self.settings: Settings = loaded.settings
        self.state_dir = state_dir(self.settings, environment)
        self.results_dir = results_dir(self.settings)
        self.started = time.monotonic()
        self.started_at = utc_now()
        self.presences: dict[str, Presence] = {}
        self.streams: list[Stream] = []
        self.gaps: set[str] = set()
        """Workers that may have missed a dispatch, and have not re-announced themselves yet."""
        self.upgrade = False
        self._environ = environment
        self._stop = asyncio.Event()
        self._subscribed = asyncio.Event()
        self._drain_mode: str | None = None
        self._notifier = Notifier(environment)
        self._lock: IO[str] | None = None

    # ---- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Run until a signal or a command ends the node.

        Raises:
            FlowMeshError: it cannot start, and why.
        """
        self._prepare_folders()
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
            if self.upgrade:
                self._hand_over()
            await self._drained()
        finally:
            await _end(tasks)
        await self._close()
        return 0

    def _prepare_folders(self) -> None:
        ensure_private_dir(self.state_dir)
        try:
            for name in ("run", "log", "spool", "tmp", "cache"):
                (self.state_dir / name).mkdir(exist_ok=True, mode=0o700)
            self._lock = open(self.state_dir / "lock", "a+")  # noqa: SIM115 - held for the whole life
        except OSError as error:
            raise JournalError(
                f"{error.filename}: {error.strerror}; set node.state_dir to a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "?"
            raise BusyError(
                f"{self.state_dir}: another supervisor (pid {holder}) uses this folder; "
                "stop it, or set node.state_dir to another"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        try:
            self.results_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"results.dir: {self.results_dir} cannot be made: {error.strerror}") from error
        if not os.access(self.results_dir, os.W_OK):
            raise ConfigError(f"results.dir: {self.results_dir} cannot be written by this user")

    async def _wire(self) -> None:
        settings = self.settings
        self.node_id = self.journal.fact("node_id", secrets.token_hex(4))
        worker_id = settings.node.worker_id or self.journal.fact("worker_id", f"worker-{secrets.token_hex(6)}")
        self.power = PowerMeter()
        self.nvml = Nvml()
        self.inventory = await self._take_inventory()
        down = self.inventory.some_are_down
        visible = visible_gpus(self.inventory.gpus, self._environ.get("CUDA_VISIBLE_DEVICES"), some_are_down=down)
        cpus = sorted(os.sched_getaffinity(0))
        plans = plan_slots(settings, worker_id, visible, cpus, logical_cores(), some_are_down=down)
        for name in sorted({slot.name for slot in settings.slots} - {plan.name for plan in plans}):
            logger.error("slot {} is left out: none of its GPUs works", name)
        self.slots: dict[str, Slot[Run]] = {plan.worker_id: Slot(plan, lambda run: bool(run.gpus)) for plan in plans}
        base_env = environ.base(self._environ, settings.tasks.pass_env)
        self.catalogue, lane_table = lanes.plan(settings)
        isolated = settings.processes.isolation != "subreaper"
        self.cgroup = cgroup.prepare(self.node_id) if isolated else None
        if settings.processes.isolation == "cgroup" and self.cgroup is None:
            raise ConfigError(
                "processes.isolation: 'cgroup' needs a cgroup v2 hierarchy that this user may write "
                "(under systemd: Delegate=yes); 'auto' takes what there is"
            )
        self._check_limits()
        self.executor = Executor(
            settings=settings,
            catalogue=self.catalogue,
            journal=self.journal,
            slots=self.slots,
            layout=files.Layout(
                state_dir=self.state_dir,
                results_dir=self.results_dir,
                work_dir=Path.cwd(),
                mark=self.node_id,
                base_env=base_env,
                cgroup=self.cgroup,
                processes=settings.processes,
                limits=msgspec.to_builtins(settings.runners),
                owner=None if settings.processes.task_user is None else files.Owner.named(settings.processes.task_user),
            ),
            hooks=self,
        )
        self.executor.devices = Devices(self.executor, self.nvml, self.power, visible)
        self.executor.fleet = Fleet(
            lane_table,
            folder=self.state_dir / "run",
            log_folder=self.state_dir / "log",
            env=environ.for_server(base_env) | {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in visible)},
            adoption_timeout_s=settings.processes.adoption_timeout_s,
            cgroup=self.cgroup,
            mark=self.node_id,
            callbacks=self.executor.callbacks,
        )
        self._connect(worker_id)
        self.operations = Operations(self)
        self.control = ControlServer(
            self.state_dir / "run" / "control.sock", self.operations.handlers(), self.operations.subscribe
        )
        logger.bind(isolation=self.isolation, types=",".join(sorted(self.catalogue.offered))).info(
            "node starts: worker {} (FlowMesh {})", worker_id, __version__
        )
        for name, why in sorted(self.catalogue.missing.items()):
            logger.bind(type=name).info("task type not offered: {}", why)

    def _check_limits(self) -> None:
        wants = self.settings.processes
        there = cgroup.controllers(self.cgroup) if self.cgroup is not None else set()
        for key, controller in (("task_memory_max_bytes", "memory"), ("task_pids_max", "pids")):
            if getattr(wants, key) is not None and controller not in there:
                raise ConfigError(
                    f"processes.{key}: this system gives us no cgroup v2 {controller!r} controller "
                    "(under systemd 254 or newer: Delegate=yes and DelegateSubgroup=supervisor); leave the setting out"
                )
        if wants.task_user is not None:
            for folder in (self.state_dir, self.state_dir / "spool", self.state_dir / "tmp"):
                folder.chmod(0o711)  # its user may pass through to its own folders, and list none
            owner = files.Owner.named(wants.task_user)
            os.chown(self.state_dir / "cache", owner.uid, owner.gid)

    def _connect(self, name: str) -> None:
        settings = self.settings
        assert settings.redis.url is not None, "checked before the node starts"
        reach = functools.partial(
            connect,
            settings.redis.url,
            timeout_s=settings.redis.timeout_s,
            health_check_interval_s=settings.redis.health_check_interval_s,
        )
        asking = 2 * len(self.slots) + 1  # each worker's status and heartbeat, and the outbox
        bus = reach(name=f"flowmesh-{name}-bus", users=asking)
        listener = reach(name=f"flowmesh-{name}-sub")
        self._clients = [bus, listener]
        dispatcher = Dispatcher(self.executor)
        self.outbox = Outbox(bus, self.journal, self._on_events_sent, guard=f"{worker_key(name)}:guard")
        self.intake = Intake(
            listener,
            {settings.redis.task_topic: dispatcher.on_message, CONTROL_CHANNEL: self._on_control},
            self._on_subscribed,
            silence_s=settings.redis.health_check_interval_s,
        )
        for slot in self.slots.values():
            self.presences[slot.plan.worker_id] = self._presence(slot)
        for worker_id in self.slots if settings.redis.stream else ():
            client = reach(name=f"flowmesh-{worker_id}-stream")
            self._clients.append(client)
            self.streams.append(Stream(client, worker_id, dispatcher.take, block_s=settings.redis.timeout_s / 2))

    def _presence(self, slot: Slot[Run]) -> Presence:
        settings, plan = self.settings, slot.plan
        gpus = tuple(gpu for gpu in self.inventory.gpus if gpu.uuid in plan.gpus)
        identity = Identity(
            worker_id=plan.worker_id,
            pid=os.getpid(),
            started_at=self.started_at,
            cost_per_hour=settings.node.cost_per_hour * plan.share,
            tags=settings.node.tags,
            env={
                "RESULTS_DIR": str(self.results_dir),
                "TASK_TOPIC": settings.redis.task_topic,
                "HEARTBEAT_INTERVAL_SEC": settings.redis.heartbeat_interval_s,
                "ENABLE_ELASTIC_SCALING": settings.node.elastic_scaling,
                "task_types": sorted(self.catalogue.offered),
                "isolation": self.isolation,
                "version": __version__,
            },
            hardware=collect(
                gpus,
                driver_version=self.inventory.driver_version,
                cuda_version=self.inventory.cuda_version,
                bandwidth_bytes_per_sec=settings.delivery.bandwidth_bytes_per_sec,
                cpus=plan.threads,
            ),
        )
        reporter = metrics.Reporter(
            self.power,
            self.nvml,
            gpus,
            cost_per_hour=identity.cost_per_hour,
            started=self.started,
            cpu_share=plan.threads / sum(each.plan.threads for each in self.slots.values()),
            watch=self.executor.devices.watch(slot) if gpus else None,
        )
        return Presence(
            self._clients[0],
            identity,
            interval_s=settings.redis.heartbeat_interval_s,
            metrics=reporter.heartbeat,
            power=reporter.power,
            farewell=reporter.farewell,
            on_left_over=lambda: self.on_missed(slot),
        )

    async def _take_inventory(self) -> Inventory:
        try:
            found = await self.nvml.inventory()
        except DeviceError as error:
            if any(slot.gpus for slot in self.settings.slots):
                raise  # later, or after a repair, it may be there: a restart is worth a try
            logger.error("the node starts without GPUs: {}", error)
            return Inventory()
        for problem in found.unusable:
            logger.error("not offered: {}", problem)
        return found

    def _works(self) -> list[Any]:
        looks = [watch(self.executor), self.executor.room.watch(), self.executor.devices.sample()]
        return [self._begin(), self._send_events(), self._watchdog(), *looks]

    async def _send_events(self) -> None:
        """What an event makes the orchestrator send must find us listening."""
        await self._subscribed.wait()
        await self.outbox.run()

    async def _begin(self) -> None:
        """Take over what an earlier supervisor left; then listen; then say that we are idle."""
        await recover(self.executor)
        await self.executor.fleet.warm(LIGHT)
        await self.executor.devices.first_look()
        gc.collect()
        gc.freeze()  # what lives for ever need not be looked at again
        for worker_id, slot in self.slots.items():
            if slot.current is not None:
                self.presences[worker_id].set_status("RUNNING", slot.current.task_id)
        presences = [presence.run() for presence in self.presences.values()]
        await asyncio.gather(self.intake.run(), *presences, *(stream.run() for stream in self.streams))

    # ---- ends --------------------------------------------------------------------------------------------------------

    def stop(self, mode: str) -> None:
        """Drain in this mode and end. A second word may only be harder than the first."""
        hardness = ("finish", "checkpoint", "now")
        if self._drain_mode is not None and hardness.index(mode) <= hardness.index(self._drain_mode):
            return
        self._drain_mode = mode
        logger.bind(mode=mode, tasks=len(self.executor.runs)).info("draining")
        self._notifier.say(STOPPING="1", STATUS=f"draining ({mode})")
        for presence in self.presences.values():
            presence.set_status("DRAINING")
        self.executor.drain(mode)
        self._stop.set()

    def hand_over(self) -> None:
        """End this process and start the program anew in its place; tasks run on and are adopted."""
        self.upgrade = True
        self._stop.set()

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

    def _hand_over(self) -> None:
        """Replace this process by the program as it is on disk now. Does not return."""
        logger.info("handing over to a new supervisor; {} tasks run on", len(self.executor.runs))
        self.executor.fleet.leave()
        self.journal.close()
        self._notifier.say(RELOADING="1", STATUS="handing over")
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    async def _close(self) -> None:
        sending = asyncio.create_task(self.outbox.run())
        if not await self.outbox.flushed(FLUSH_TIMEOUT_S / 10 if self.outbox.trouble else FLUSH_TIMEOUT_S):
            logger.warning("{} events wait on disk for the next start", self.journal.outbox_size())
        await _end([sending])
        await asyncio.gather(*(presence.unregister(FAREWELL_TIMEOUT_S) for presence in self.presences.values()))
        await self.control.close()
        await self.executor.fleet.close()
        await self.nvml.close()
        for client in self._clients:
            await client.aclose()
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
        loop.add_signal_handler(signal.SIGUSR2, self.hand_over)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def _on_stop_signal(self) -> None:
        self.stop("finish" if self._drain_mode is None else "now")

    def _reload(self) -> None:
        """Take new settings by starting anew under the running tasks; bad ones are told, and the old ones stay."""
        try:
            self._recheck()
        except ConfigError as error:
            logger.error("settings not reloaded, the old ones stay: {}", error)
            return
        self.hand_over()

    def _reap(self) -> None:
        """Collect fork servers that ended, and orphans of theirs that came to us."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _on_control(self, data: bytes) -> None:
        self.operations.on_channel(data)

    def _on_subscribed(self, gap: bool) -> None:
        self._subscribed.set()
        for worker_id, slot in self.slots.items():
            if gap:
                self.gaps.add(worker_id)
            if (slot.idle or slot.trouble) and slot.current is None:
                self._rest(slot)
            self._heal(slot)

    def _heal(self, slot: Slot[Run]) -> None:
        """After a gap in the subscription: have the orchestrator queue again what we missed.

        It queues all that we hold, too: so not before each task's end, delivered ones' included, has been told.
        """
        if slot.plan.worker_id not in self.gaps or self.executor.draining is not None or not self.intake.up:
            return
        if not self.executor.holds(slot) and not self.journal.outbox_size():
            self.gaps.discard(slot.plan.worker_id)
            logger.bind(worker=slot.plan.worker_id).info("announcing anew: a dispatch may have been missed")
            self.presences[slot.plan.worker_id].reannounce()

    def _on_events_sent(self, sent: list[bytes]) -> None:
        """The orchestrator sets a worker idle when it sees a success; one that is busy by then says so again."""
        if all(events.is_start(event) for event in sent):
            return
        for worker_id, slot in self.slots.items():
            if slot.current is not None or slot.trouble:
                self.presences[worker_id].restate()
            self._heal(slot)

    def on_posted(self) -> None:
        self.outbox.wake()

    def on_slot_taken(self, slot: Slot[Run], run: Run) -> None:
        if self.executor.draining is None:
            self.presences[slot.plan.worker_id].set_status("RUNNING", run.task_id)

    def on_slot_free(self, slot: Slot[Run], last: Run) -> None:
        self._rest(slot, last.task_id)
        self._heal(slot)

    def on_slot_changed(self, slot: Slot[Run]) -> None:
        if slot.current is None and slot.plan.worker_id in self.presences:
            self._rest(slot)

    def _rest(self, slot: Slot[Run], last: str | None = None) -> None:
        """Say what a slot without a task is; before we listen, not yet."""
        if self.executor.draining is None and self._subscribed.is_set():
            self.presences[slot.plan.worker_id].set_status("DEGRADED" if slot.trouble else "IDLE", last)

    def on_missed(self, slot: Slot[Run]) -> None:
        self.gaps.add(slot.plan.worker_id)
        self._heal(slot)

    def on_accepted(self, run: Run) -> None:
        self.operations.on_accepted(run)

    def on_refused(self, task_id: str, message: str) -> None:
        self.operations.on_refused(task_id, message)

    async def _watchdog(self) -> None:
        """Feeds systemd for as long as the loop turns; Redis' health has no part in it."""
        interval_s = self._notifier.watchdog_s
        while True:
            status = next(iter(self.redis_troubles()), f"{len(self.executor.runs)} tasks")
            self._notifier.say(WATCHDOG="1", STATUS=status)
            await asyncio.sleep(min(interval_s / 3, 10.0) if interval_s is not None else 10.0)

    def redis_troubles(self) -> list[str]:
        """Why parts of the bus do not get on with Redis; empty where all do."""
        troubles = [self.intake.trouble, self.outbox.trouble, *(stream.trouble for stream in self.streams)]
        for presence in self.presences.values():
            troubles += presence.trouble, presence.beats
        return list(dict.fromkeys(trouble.reason for trouble in troubles if trouble))

    @property
    def isolation(self) -> str:
        return "cgroup" if self.cgroup is not None else "subreaper"


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
