"""Promise P2: after a task its GPUs are empty again, and a report proves it.

`judge` decides from one look and is pure; `ReleaseProof` looks, waits and names whoever holds on.
"""

from __future__ import annotations

import asyncio
import enum
import pwd
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import psutil

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuLost, GpuProcess, GpuSample, Look
from flowmesh.node.nvml import Nvml

TOLERANCE_BYTES = 64 << 20
"""A driver keeps some pages of its own after a context is gone; a leaked context is several times this."""

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.25
_WHO_DEADLINE_S = 2.0
_COMMAND_SHOWN = 200


class GpuState(enum.StrEnum):
    """What one look says of a GPU after a task."""

    RELEASED = "released"
    HELD = "held"
    """A process of the task is on it."""
    FOREIGN = "foreign"
    """A process of somebody else came onto it."""
    LEAKED = "leaked"
    """No process to blame, but bytes above the baseline."""
    LOST = "lost"
    """It does not answer."""


class Baseline(msgspec.Struct, frozen=True):
    """One GPU before a task."""

    uuid: str
    used_bytes: int
    processes: tuple[GpuProcess, ...] = ()
    graphics_bytes: int = 0

    @classmethod
    def of(cls, look: GpuSample) -> Baseline:
        return cls(look.uuid, look.used_bytes, look.processes or (), look.graphics_bytes)

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(process.pid for process in self.processes)


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A process on a GPU, as far as /proc tells who it is."""

    pid: int
    user: str | None
    command: str | None
    used_bytes: int | None
    ours: bool
    """Whether it belongs to the task."""

    def __str__(self) -> str:
        size = "" if self.used_bytes is None else f" {self.used_bytes / (1 << 20):.0f} MiB"
        who = f"user {self.user}, {self.command}" if self.command else "not visible from here: another PID namespace?"
        return f"pid {self.pid} ({who}){size}"


class GpuRelease(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU's memory around a task, for the result's `resources`."""

    state: GpuState
    before_bytes: int
    peak_bytes: int
    after_bytes: int | None
    """None: it no longer answers."""
    pids_before: tuple[int, ...] = ()
    pids_after: tuple[int, ...] = ()
    holders: tuple[Holder, ...] = ()
    why: str = ""


class ReleaseReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a task's GPUs came back, or what keeps them."""

    released: bool
    ms: float
    """From the question until the last GPU was back, or until the wait was given up."""
    gpus: dict[str, GpuRelease]

    def __str__(self) -> str:
        if self.released:
            return f"{len(self.gpus)} GPUs back at their baseline after {self.ms:.0f} ms"
        return "; ".join(_line(uuid, gpu) for uuid, gpu in self.gpus.items() if gpu.state is not GpuState.RELEASED)


def judge(
    baseline: Baseline,
    look: Look,
    own_pids: Collection[int],
    *,
    tolerance_bytes: int = TOLERANCE_BYTES,
    allow_foreign: bool = False,
) -> GpuState:
    """Whether a GPU is back where it was before the task.

    Args:
        own_pids: every process that the task ever had, dead or alive.
        allow_foreign: others may use this GPU: what they hold is taken off before bytes are compared.
    """
    if isinstance(look, GpuLost):
        return GpuState.LOST
    if any(process.pid in own_pids for process in (*(look.processes or ()), *look.graphics)):
        return GpuState.HELD
    newcomers = [process for process in look.processes or () if process.pid not in baseline.pids]
    if newcomers and not allow_foreign:
        return GpuState.FOREIGN
    if allow_foreign and is_shared_blindly(look):
        return GpuState.RELEASED
    return GpuState.LEAKED if _excess(baseline, look, newcomers) > tolerance_bytes else GpuState.RELEASED


def _excess(baseline: Baseline, look: GpuSample, newcomers: Sequence[GpuProcess]) -> int:
    """Bytes above what those who were there before, and those who came since, account for.

    Who left took its bytes along, and who stayed may have grown or shrunk: that is not the task's doing.
    """
    before = {process.pid: process.used_bytes or 0 for process in baseline.processes}
    stayed = {process.pid: process.used_bytes or 0 for process in look.processes or () if process.pid in before}
    moved = sum(stayed.values()) - sum(before.values()) if look.processes is not None else 0
    moved += look.graphics_bytes - baseline.graphics_bytes
    return look.used_bytes - baseline.used_bytes - moved - sum(process.used_bytes or 0 for process in newcomers)


def is_shared_blindly(look: GpuSample) -> bool:
    """Whether somebody is on the GPU of whom the driver does not tell how much he has: then bytes prove nothing."""
    return any(process.used_bytes is None for process in look.processes or ())


class ReleaseProof:
    """One task's GPUs, from just before it to their proven release.

    `begin`, then `observe` with every sample while the task runs, then `wait_released` when its last process is gone.
    """

    def __init__(
        self,
        nvml: Nvml,
        uuids: Sequence[str],
        *,
        tolerance_bytes: int = TOLERANCE_BYTES,
        allow_foreign: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = nvml
        self._uuids = tuple(uuids)
        self._tolerance_bytes = tolerance_bytes
        self._allow_foreign = allow_foreign
        self._clock = clock
        self.baselines: dict[str, Baseline] = {}
        self.peak_bytes: dict[str, int] = {}
        self._seen_pids: dict[str, set[int]] = {}

    async def begin(self) -> dict[str, Look]:
        """Take the baseline. Gives the looks that it is made of, for the preflight.

        Raises:
            DeviceError: a GPU does not answer; the task must not start on it.
        """
        looks = await self._nvml.sample(self._uuids, memory_only=True)
        for uuid, look in looks.items():
            if isinstance(look, GpuLost):
                raise DeviceError(f"{uuid} does not answer: {look.why}")
            self.baselines[uuid] = Baseline.of(look)
            self.peak_bytes[uuid] = look.used_bytes
        return looks

    def resume(self, baselines: Mapping[str, Baseline]) -> None:
        """Go on from baselines that an earlier supervisor has taken and journalled."""
        self.baselines = dict(baselines)
        self.peak_bytes = {uuid: baseline.used_bytes for uuid, baseline in baselines.items()}

    def observe(self, looks: Mapping[str, Look]) -> None:
        """Note the peak. Looks at other GPUs may be among them."""
        for uuid in self.baselines.keys() & looks.keys():
            look = looks[uuid]
            if isinstance(look, GpuSample):
                self.peak_bytes[uuid] = max(self.peak_bytes[uuid], look.used_bytes)

    async def wait_released(self, own_pids: Collection[int], timeout_s: float) -> ReleaseReport:
        """Look until every GPU is back at its baseline, at most `timeout_s`.

        Never raises for a GPU or a driver that does not answer: those GPUs are reported as lost.
        """
        started_s = self._clock()
        pause_s = _FIRST_PAUSE_S
        while True:
            looks = await self._look(started_s + timeout_s - self._clock())
            self.observe(looks)
            states = {
                uuid: judge(
                    baseline,
                    looks[uuid],
                    own_pids,
                    tolerance_bytes=self._tolerance_bytes,
                    allow_foreign=self._allow_foreign,
                )
                for uuid, baseline in self.baselines.items()
            }
            now_s = self._clock()
            released = all(state is GpuState.RELEASED for state in states.values())
            if released or now_s - started_s >= timeout_s:
                break
            await asyncio.sleep(min(pause_s, max(started_s + timeout_s - now_s, 0)))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        ms = round((now_s - started_s) * 1000, 3)
        gpus = {uuid: await self._describe(uuid, states[uuid], looks[uuid], own_pids) for uuid in states}
        return ReleaseReport(released=released, ms=ms, gpus=gpus)

    async def _look(self, left_s: float) -> dict[str, Look]:
        try:
            return await self._nvml.sample(tuple(self.baselines), memory_only=True)
        except DeviceError as error:
            if left_s > 0:
                await asyncio.sleep(min(_LONGEST_PAUSE_S, left_s))
            return {uuid: GpuLost(uuid, str(error)) for uuid in self.baselines}

    async def _describe(self, uuid: str, state: GpuState, look: Look, own_pids: Collection[int]) -> GpuRelease:
        before_bytes, peak_bytes = self.baselines[uuid].used_bytes, self.peak_bytes[uuid]
        pids_before = tuple(sorted(self.baselines[uuid].pids))
        if isinstance(look, GpuLost):
            return GpuRelease(
                state=state,
                before_bytes=before_bytes,
                peak_bytes=peak_bytes,
                after_bytes=None,
                pids_before=pids_before,
                why=look.why,
            )
        there = [] if state is GpuState.RELEASED else [*(look.processes or ())]
        there += [process for process in look.graphics if process.pid in own_pids]
        strangers = [process for process in there if process.pid not in self.baselines[uuid].pids]
        return GpuRelease(
            state=state,
            before_bytes=before_bytes,
            peak_bytes=peak_bytes,
            after_bytes=look.used_bytes,
            pids_before=pids_before,
            pids_after=tuple(sorted(look.pids)),
            holders=await name_holders(strangers or there, own_pids),
        )


async def name_holders(processes: Sequence[GpuProcess], own_pids: Collection[int] = ()) -> tuple[Holder, ...]:
    """Who these processes are. User names may come over the network, so they are looked up off the loop."""
    if not processes:
        return ()
    own = frozenset(own_pids)
    try:
        async with asyncio.timeout(_WHO_DEADLINE_S):
            people = await asyncio.to_thread(lambda: [_who(process.pid) for process in processes])
    except TimeoutError:
        people = [(None, None)] * len(processes)
    return tuple(
        Holder(pid=process.pid, user=user, command=command, used_bytes=process.used_bytes, ours=process.pid in own)
        for process, (user, command) in zip(processes, people, strict=True)
    )


def _who(pid: int) -> tuple[str | None, str | None]:
    try:
        process = psutil.Process(pid)
        uid = process.uids().real
        command = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return None, None
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return user, command[:_COMMAND_SHOWN]


def _line(uuid: str, gpu: GpuRelease) -> str:
    holders = ", ".join(str(holder) for holder in gpu.holders)
    match gpu.state:
        case GpuState.LOST:
            return f"{uuid} does not answer: {gpu.why}"
        case GpuState.HELD:
            return f"{uuid} is still held by the task: {holders}"
        case GpuState.FOREIGN:
            return f"{uuid} is used by somebody else: {holders}"
        case GpuState.LEAKED | GpuState.RELEASED:
            more = ((gpu.after_bytes or 0) - gpu.before_bytes) / (1 << 20)
            return f"{uuid} has {more:.0f} MiB more in use than before the task" + (f": {holders}" if holders else "")
