"""The client for asyncio: the same requests as `Client`, with awaits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

from flowmesh.client import connection, pipelines, requests, waiting
from flowmesh.client.log_lines import ANSWER_S, LogReader
from flowmesh.client.pipelines import StageState, is_pipeline, refuse_worker
from flowmesh.client.requests import (
    LOST_S,
    OUTAGE_POLL_S,
    POLL_S,
    Command,
    Endpoint,
    Request,
    Task,
    first_event,
    is_again,
    script_call,
    shown_end,
)
from flowmesh.client.shapes import checked
from flowmesh.client.waiting import Removal, WaitingTask
from flowmesh.errors import FlowMeshError, UnavailableError
from flowmesh.messages.wire import TASK_EVENTS_CHANNEL
from flowmesh.queue import names
from flowmesh.queue.lua import Script
from flowmesh.queue.records import Attempt, End, Event, TaskState, end_of, event_of
from flowmesh.queue.workers import Worker

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same methods, arguments and errors, awaited. An asynchronous context manager.

    async with AsyncClient("redis://10.0.0.1") as client:
        task = await client.queue({"spec": {"taskType": "echo"}})
        end = await client.wait(task.task_id)
    """

    def __init__(self, url: str | None = None, *, topic: str = "tasks") -> None:
        self._url = connection.address(url)
        self._topic = topic
        self._possible: dict[str, float] = {}
        self._redis = connection.open_async_client(self._url)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._redis.aclose()

    async def submit(
        self, document: Mapping[str, Any], *, worker: str | None = None, task_id: str | None = None
    ) -> Task:
        """As `Client.submit`.

        task = await client.submit({"spec": {"taskType": "echo"}})
        """
        if is_pipeline(document):
            refuse_worker(worker)
            return await self.do(pipelines.submit(document, task_id=task_id))
        return await self.do(requests.submit(document, worker=worker, task_id=task_id, topic=self._topic))

    async def queue(
        self,
        document: Mapping[str, Any],
        *,
        priority: str = "normal",
        retries: int = 2,
        task_id: str | None = None,
        anyway: bool = False,
    ) -> Task:
        """As `Client.queue`.

        task = await client.queue({"spec": {"taskType": "echo"}}, priority="low")
        """
        if is_pipeline(document):
            return await self.do(
                pipelines.submit(document, priority=priority, retries=retries, task_id=task_id, anyway=anyway)
            )
        return await self.do(
            requests.queue(
                document,
                priority=priority,
                retries=retries,
                task_id=task_id,
                anyway=anyway,
                possible=self._possible,
            )
        )

    async def wait(self, task_id: str, timeout_s: float | None = None) -> End:
        """As `Client.wait`.

        ends = await asyncio.gather(*(client.wait(task.task_id) for task in tasks))
        """
        checked(task_id)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        async for event in self._heard(task_id, deadline):
            if isinstance(event, End):
                return event
            if event.terminal:
                with contextlib.suppress(FlowMeshError):  # the record knows of earlier attempts
                    return (await self.do(requests.end(task_id))) or end_of(event)
                return end_of(event)
        assert timeout_s is not None, "without a limit only an end ends it"
        raise requests.late(task_id, timeout_s)

    async def events(self, task_id: str, follow: bool = True) -> AsyncIterator[Event]:
        """As `Client.events`.

        async for event in client.events(task.task_id):
            print(event.type)
        """
        if not follow:
            if (first := first_event(await self.state(task_id))) is not None:
                yield first
            if (end := await self.do(requests.end(task_id))) is not None:
                yield shown_end(end)
            return
        async for event in self._heard(task_id, None, from_record=True):
            yield shown_end(event) if isinstance(event, End) else event
            if isinstance(event, End) or event.terminal:
                return

    async def result(self, task_id: str) -> dict[str, Any]:
        """As `Client.result`.

        items = (await client.result(task.task_id))["items"]
        """
        return await self.do(requests.result(task_id))

    async def logs(self, task_id: str, follow: bool = False) -> AsyncIterator[str]:
        """As `Client.logs`.

        async for line in client.logs(task.task_id, follow=True):
            print(line)
        """
        if pipelines.is_one(await self.state(task_id)):
            async for line in self._pipeline_logs(task_id, follow):
                yield line
            return
        reader, began = LogReader(), time.monotonic()
        asked = float("-inf")
        while not reader.ended:
            if time.monotonic() - asked > requests.FOLLOW_S / 3:
                asked = time.monotonic()
                await self.do(requests.follow(task_id, reader.token, keep=follow))
            for line in reader.take(await self._run([reader.command()])):
                yield line
            if not reader.answered and time.monotonic() - began > ANSWER_S:
                raise requests.no_answer(task_id, ANSWER_S)

    async def _pipeline_logs(self, task_id: str, follow: bool) -> AsyncIterator[str]:
        """What its driver said of its stages, which lies in Redis."""
        reader = LogReader(names.pipeline_key(task_id, "log"))
        while not reader.ended:
            state = await self.state(task_id)  # before the lines are read, so that the last ones are not missed
            lines = list(reader.take(await self._run([reader.command(wait=follow)])))
            for line in lines:
                yield line
            if not lines and (not follow or state is None or state.ended):
                return

    async def endpoint(self, task_id: str, wait_s: float = 0.0) -> Endpoint:
        """As `Client.endpoint`.

        endpoint = await client.endpoint(task.task_id, wait_s=600)
        """
        deadline = time.monotonic() + wait_s
        while (found := await self.do(requests.endpoint(task_id))) is None:
            ended = None
            with contextlib.suppress(requests.UnknownTask, requests.WorkerGone):
                ended = await self.do(requests.end(task_id))
            if ended is not None or time.monotonic() >= deadline:
                raise requests.no_endpoint(task_id, ended)
            await asyncio.sleep(min(OUTAGE_POLL_S, max(0.0, deadline - time.monotonic())))
        return found

    async def cancel(self, task_id: str, reason: str = "cancelled", *, force: bool = False) -> str:
        """As `Client.cancel`.

        await client.cancel(task.task_id)
        """
        return await self.do(requests.cancel(task_id, reason=reason, force=force))

    async def workers(self) -> list[Worker]:
        """As `Client.workers`.

        workers = await client.workers()
        """
        return await self.do(requests.workers())

    async def tasks(self, all: bool = False) -> list[TaskState]:
        """As `Client.tasks`.

        running = [task for task in await client.tasks() if task.state == "running"]
        """
        return await self.do(requests.tasks(every=all))

    async def state(self, task_id: str) -> TaskState | None:
        """As `Client.state`.

        state = await client.state(task.task_id)
        """
        return await self.do(requests.state(task_id))

    async def attempts(self, task_id: str) -> list[Attempt]:
        """As `Client.attempts`.

        attempts = await client.attempts(task.task_id)
        """
        return await self.do(requests.attempts(task_id))

    async def stages(self, task_id: str) -> dict[str, StageState]:
        """As `Client.stages`.

        stages = await client.stages(pipeline.task_id)
        """
        return await self.do(pipelines.stages(task_id))

    async def waiting(self) -> list[dict[str, Any]]:
        """As `Client.waiting`.

        counts = await client.waiting()
        """
        return await self.do(waiting.counts())

    async def waiting_tasks(
        self, *, owner: str | None = None, task_class: str | None = None, limit: int = 100
    ) -> list[WaitingTask]:
        """As `Client.waiting_tasks`.

        first = await client.waiting_tasks(limit=10)
        """
        return await self.do(waiting.tasks(owner=owner, task_class=task_class, limit=limit))

    async def remove(self, task_id: str, reason: str = "removed from the queue") -> Removal:
        """As `Client.remove`.

        removal = await client.remove(task.task_id)
        """
        return await self.do(waiting.remove(task_id, reason=reason))

    async def _heard(
        self, task_id: str, deadline: float | None, from_record: bool = False
    ) -> AsyncIterator[Event | End]:
        """Events of a task as they come; its recorded End where an event may have been missed. Ends at the deadline.

        Args:
            from_record: begin with what the record says, read when nothing can be missed any more.
        """
        import redis

        looked = known = float("-inf")
        first: Event | None = None
        subscribed = False
        async with self._redis.pubsub() as events:
            while deadline is None or time.monotonic() < deadline:
                try:
                    if not subscribed:
                        await events.subscribe(TASK_EVENTS_CHANNEL, names.CHANNEL)
                        subscribed = True
                        await events.get_message(timeout=connection.TIMEOUT_S)
                    if time.monotonic() - looked >= POLL_S:
                        looked = time.monotonic()
                        end = await self.do(requests.end(task_id))
                        known = time.monotonic()
                        if end is not None:
                            yield end
                            return
                        if from_record and (first := first_event(await self.state(task_id))) is not None:
                            yield first
                        from_record = False
                    left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
                    message = await events.get_message(timeout=max(0.01, left))
                except requests.UnknownTask:
                    if time.monotonic() - known > LOST_S:
                        raise
                    continue
                except (redis.ConnectionError, redis.TimeoutError, UnavailableError):
                    await asyncio.sleep(OUTAGE_POLL_S)
                    continue
                if message is not None and message["type"] == "message":
                    event = event_of(message["data"])
                    if event is not None and event.task_id == task_id and event.type != "LOGS":
                        repeated, first = is_again(event, first), None
                        if not repeated:
                            yield event

    async def do(self, request: Request[T]) -> T:
        """Run a request. For parts of this package; programs use the other methods."""
        try:
            commands = next(request)
            while True:
                commands = request.send(await self._run(commands))
        except StopIteration as done:
            value: T = done.value
            return value

    async def _run(self, commands: list[Command]) -> list[Any]:
        import redis

        try:
            if isinstance(commands[0][0], Script):
                return [await self._script(*each) for each in commands]
            if len(commands) == 1:
                return [await self._redis.execute_command(*commands[0])]  # type: ignore[no-untyped-call]
            pipe = self._redis.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            return list(await pipe.execute())
        except redis.RedisError as error:
            raise connection.unavailable(self._url, error) from None

    async def _script(self, script: Script, *arguments: Any) -> Any:
        import redis

        try:
            return await self._redis.execute_command(*script_call(script, arguments, whole=False))  # type: ignore[no-untyped-call]
        except redis.exceptions.NoScriptError:
            return await self._redis.execute_command(*script_call(script, arguments, whole=True))  # type: ignore[no-untyped-call]
