"""NVML for an asyncio loop: one thread owns the library, every call has a deadline, and none blocks the loop.

A call that hangs in the driver is left alone: until it returns, every other call raises a DeviceError at once.
A node without a driver keeps no thread.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flowmesh.errors import DeviceError
from flowmesh.node.devices import GpuEvent, GpuReading, Inventory
from flowmesh.node.nvml.binding import NoDriverError
from flowmesh.node.nvml.session import Session

DEADLINE_S = 5.0
INIT_DEADLINE_S = 60.0
"""Without persistence mode the driver initialises every GPU again at init, which takes seconds per GPU."""

T = TypeVar("T")


class _Job:
    """One call on its way through the thread."""

    def __init__(self, name: str, call: Callable[[Session], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.call = call
        self.loop = loop
        self.answer: asyncio.Future[Any] = loop.create_future()


class Nvml:
    """The node's GPUs. Used from the event loop that made it."""

    def __init__(
        self,
        *,
        deadline_s: float = DEADLINE_S,
        init_deadline_s: float = INIT_DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deadline_s = deadline_s
        self._init_deadline_s = init_deadline_s
        self._clock = clock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._session: Session | None = None
        """Owned by the thread; the loop reads only `opening`."""
        self._running: tuple[_Job, float] | None = None
        self._late: _Job | None = None
        """The call that has missed its deadline."""
        self._absent = False
        """Whether there is no driver."""

    async def inventory(self) -> Inventory:
        """All GPUs of the machine; an empty inventory where there is no driver.

        Raises:
            DeviceError: there is a driver, and it does not work or does not answer in time.
        """
        try:
            found = await self._call("init", Session.inventory, self._init_deadline_s)
        except NoDriverError as error:
            self._absent = True
            await self.close()
            return Inventory(unusable=error.unusable)
        self._absent = False
        return found

    async def sample(self, uuids: Sequence[str], *, memory_only: bool = False) -> dict[str, GpuReading]:
        """One reading of each of these GPUs. A GPU that does not answer is a GpuLost among the others' samples.

        Args:
            memory_only: read used bytes and processes only.

        Raises:
            DeviceError: the driver does not work, or did not answer in time.
        """
        if not uuids:
            return {}
        chosen = tuple(uuids)
        return await self._call(
            "sample", lambda session: session.sample(chosen, memory_only=memory_only), self._deadline_s
        )

    async def events(self) -> tuple[GpuEvent, ...]:
        """The critical events since the last call.

        Raises:
            DeviceError: as for `sample`.
        """
        return () if self._absent else await self._call("events", Session.events, self._deadline_s)

    async def close(self) -> None:
        """Shut NVML down and end the thread. A daemon thread that hangs in the driver is left behind."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._jobs.put(None)
        self._jobs = queue.SimpleQueue()
        deadline = self._clock() + self._deadline_s
        while thread.is_alive() and self.stuck_for_s is None and self._clock() < deadline:
            await asyncio.sleep(0.005)

    @property
    def stuck_for_s(self) -> float | None:
        """Seconds that a call has been hanging in the driver; None while the driver answers."""
        running = self._running
        return self._clock() - running[1] if running is not None and running[0] is self._late else None

    async def _call(self, name: str, call: Callable[[Session], T], deadline_s: float) -> T:
        if (hanging_s := self.stuck_for_s) is not None:
            raise DeviceError(self._hangs(hanging_s))
        job, called_s = _Job(name, call, asyncio.get_running_loop()), time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._jobs,), name="nvml", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        try:
            answer: T = await self._result(job, deadline_s)
        except NoDriverError as error:
            if name == "init":
                raise
            raise DeviceError(f"NVML: {error}; is the driver being reloaded?") from error
        except TimeoutError:
            running = self._running
            self._late = running[0] if running is not None else None
            raise DeviceError(self._hangs(time.monotonic() - called_s)) from None
        return answer

    async def _result(self, job: _Job, deadline_s: float) -> Any:
        """The call's result within its deadline, or the init's deadline where NVML is initialised again meanwhile."""
        try:
            done, _ = await asyncio.wait({job.answer}, timeout=deadline_s)
            if not done and self._opening:
                done, _ = await asyncio.wait({job.answer}, timeout=max(0.0, self._init_deadline_s - deadline_s))
            if not done:
                raise TimeoutError
            return job.answer.result()
        finally:
            job.answer.cancel()  # the thread skips it, or drops its result

    @property
    def _opening(self) -> bool:
        return self._session is not None and self._session.opening

    def _hangs(self, seconds: float) -> str:
        running = self._running
        doing = "init" if self._opening else running[0].name if running is not None else "a call"
        return (
            f"NVML has not answered for {seconds:.0f} s (in {doing}): the driver hangs; "
            "look for Xid lines in the kernel log, and reset the GPU or reboot if it does not recover"
        )

    def _work(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        """The thread."""
        session = self._session = Session()
        while (job := jobs.get()) is not None:
            if job.answer.cancelled():
                continue
            self._running = (job, self._clock())
            try:
                outcome: Any = job.call(session)
                failed = None
            except Exception as error:  # noqa: BLE001 (raised to the caller: this is the boundary of a thread)
                outcome, failed = None, error
            self._running = None
            try:
                job.loop.call_soon_threadsafe(_settle, job.answer, outcome, failed)
            except RuntimeError:
                break  # the loop is closed: there are no callers any more
        session.close()


def _settle(answer: asyncio.Future[Any], outcome: Any, failed: Exception | None) -> None:
    if answer.done():
        return
    if failed is None:
        answer.set_result(outcome)
    else:
        answer.set_exception(failed)
