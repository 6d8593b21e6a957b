"""The blocking client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

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

if TYPE_CHECKING:
    import redis

T = TypeVar("T")


class Client:
    """A deployment's client. A context manager; may be used by several threads.

    Args:
        url: redis://, rediss://, unix:// or redis+sentinel:// address; None: `REDIS_URL`.
        topic: the channel of direct dispatches (`redis.task_topic`).

    Raises:
        ConfigError: there is no address, or it cannot be used.

    Every method raises UnavailableError where Redis does not answer.

        with Client("redis://10.0.0.1") as client:
            print([worker.worker_id for worker in client.workers()])
    """

    def __init__(self, url: str | None = None, *, topic: str = "tasks") -> None:
        self._url = connection.address(url)
        self._topic = topic
        self._possible: dict[str, float] = {}
        self._redis = connection.open_client(self._url)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._redis.close()

    def submit(self, document: Mapping[str, Any], *, worker: str | None = None, task_id: str | None = None) -> Task:
        """Send a task to the cheapest idle worker that fits it; or give a pipeline to the nodes, as `queue` does.

        Args:
            document: with a `spec`.
            worker: only this one.
            task_id: None: a new one.

        Raises:
            NoWorkerFits: no worker can run it now; has the reason for each. `queue` waits for one.
            TaskExists: a task of this id has not ended.
            FieldError: the document cannot be used.

            task = client.submit({"spec": {"taskType": "echo"}})
            print("runs on", task.worker_id)
        """
        if is_pipeline(document):
            refuse_worker(worker)
            return self.do(pipelines.submit(document, task_id=task_id))
        return self.do(requests.submit(document, worker=worker, task_id=task_id, topic=self._topic))

    def queue(
        self,
        document: Mapping[str, Any],
        *,
        priority: str = "normal",
        retries: int = 2,
        task_id: str | None = None,
        anyway: bool = False,
    ) -> Task:
        """Queue a task: it waits until a worker that fits it is idle.

        A document with `spec.stages` or `spec.graph` is a pipeline: one of the nodes drives it, and its stages are
        queued, with this priority and these retries.

        Args:
            document: with a `spec`; `metadata.owner` is whom the queue is fair between. With `spec.nodes` it runs on
                several nodes at once: see docs/fleet.md.
            priority: `high`, `normal` or `low`.
            retries: how many more attempts a retryable failure gets, on another node where one fits.
            task_id: None: a new one. One that has ended may be queued again.
            anyway: queue it even if no registered worker could ever run it.

        Raises:
            NeverFits: no registered worker could ever run it; has the reason for each.
            TaskExists: a task of this id has not ended.
            FieldError: the document cannot be used.

            task = client.queue({"spec": {"taskType": "echo"}}, priority="high")
        """
        if is_pipeline(document):
            return self.do(
                pipelines.submit(document, priority=priority, retries=retries, task_id=task_id, anyway=anyway)
            )
        return self.do(
            requests.queue(
                document,
                priority=priority,
                retries=retries,
                task_id=task_id,
                anyway=anyway,
                possible=self._possible,
            )
        )

    def wait(self, task_id: str, timeout_s: float | None = None) -> End:
        """Wait for a task's end, through outages of Redis.

        Args:
            timeout_s: None: as long as it takes. The task continues after it.

        Raises:
            UnknownTask: no record of it, and no worker runs it.
            WorkerGone: it was submitted directly, and its worker has no heartbeat.
            BusyError: it has not ended in time.

            end = client.wait(task.task_id, timeout_s=600)
            if not end.ok:
                print(end.verdict, end.error)
        """
        checked(task_id)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for event in self._heard(task_id, deadline):
            if isinstance(event, End):
                return event
            if event.terminal:
                with contextlib.suppress(FlowMeshError):  # the record knows of earlier attempts
                    return (self.do(requests.end(task_id))) or end_of(event)
                return end_of(event)
        assert timeout_s is not None, "without a limit only an end ends it"
        raise requests.late(task_id, timeout_s)

    def events(self, task_id: str, follow: bool = True) -> Iterator[Event]:
        """A task's events: first what its record says, then, with `follow`, what happens, up to its end.

        Raises:
            UnknownTask: no record of it, and no worker runs it.

            for event in client.events(task.task_id):
                print(event.ts, event.type, event.error)
        """
        if not follow:
            if (first := first_event(self.state(task_id))) is not None:
                yield first
            if (end := self.do(requests.end(task_id))) is not None:
                yield shown_end(end)
            return
        for event in self._heard(task_id, None, from_record=True):
            yield shown_end(event) if isinstance(event, End) else event
            if isinstance(event, End) or event.terminal:
                return

    def result(self, task_id: str) -> dict[str, Any]:
        """A task's result: `responses.json`, or of one above 1 MiB a summary with `truncated: true`.

        Raises:
            NoResult: there is none in Redis; says where it is.

            print(client.result(task.task_id)["items"])
        """
        return self.do(requests.result(task_id))

    def logs(self, task_id: str, follow: bool = False) -> Iterator[str]:
        """The lines of a task's logs, sent by its node: secrets hidden, control characters escaped.

        Of a pipeline: a line for each change of a stage. The stages' own logs are those of their tasks.

        Args:
            follow: until the task ends; False: those that there are now.

        Raises:
            UnavailableError: no node answered.

            for line in client.logs(task.task_id, follow=True):
                print(line)
        """
        if pipelines.is_one(self.state(task_id)):
            yield from self._pipeline_logs(task_id, follow)
            return
        reader, began = LogReader(), time.monotonic()
        asked = float("-inf")
        while not reader.ended:
            if time.monotonic() - asked > requests.FOLLOW_S / 3:
                asked = time.monotonic()
                self.do(requests.follow(task_id, reader.token, keep=follow))
            yield from reader.take(self._run([reader.command()]))
            if not reader.answered and time.monotonic() - began > ANSWER_S:
                raise requests.no_answer(task_id, ANSWER_S)

    def _pipeline_logs(self, task_id: str, follow: bool) -> Iterator[str]:
        """What its driver said of its stages, which lies in Redis."""
        reader = LogReader(names.pipeline_key(task_id, "log"))
        while not reader.ended:
            state = self.state(task_id)  # before the lines are read, so that the last ones are not missed
            lines = list(reader.take(self._run([reader.command(wait=follow)])))
            yield from lines
            if not lines and (not follow or state is None or state.ended):
                return

    def endpoint(self, task_id: str, wait_s: float = 0.0) -> Endpoint:
        """Where a task of the type `serve` serves its model, with its key.

        Args:
            wait_s: how long to wait until it does.

        Raises:
            NoEndpoint: it does not serve in time, or has ended.

            endpoint = client.endpoint(task.task_id, wait_s=600)
            openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key)
        """
        deadline = time.monotonic() + wait_s
        while (found := self.do(requests.endpoint(task_id))) is None:
            ended = None
            with contextlib.suppress(requests.UnknownTask, requests.WorkerGone):
                ended = self.do(requests.end(task_id))
            if ended is not None or time.monotonic() >= deadline:
                raise requests.no_endpoint(task_id, ended)
            time.sleep(min(OUTAGE_POLL_S, max(0.0, deadline - time.monotonic())))
        return found

    def cancel(self, task_id: str, reason: str = "cancelled", *, force: bool = False) -> str:
        """Cancel a task, wherever it is.

        Args:
            reason: the error of its event.
            force: kill it at once, without time to clean up.

        Returns:
            its state before: `queued` (it has ended now), `claimed`, `running` or `dispatched` (its node was told),
            `done`, or `unknown` (all nodes were told).

            client.cancel(task.task_id, reason="not needed any more")
        """
        return self.do(requests.cancel(task_id, reason=reason, force=force))

    def workers(self) -> list[Worker]:
        """The registered workers, sorted by id.

        idle = [worker for worker in client.workers() if worker.status == "IDLE"]
        """
        return self.do(requests.workers())

    def tasks(self, all: bool = False) -> list[TaskState]:
        """The tasks that wait or run; with `all` also those that ended within a day, 1000 at most.

        for task in client.tasks():
            print(task.task_id, task.state, task.worker_id)
        """
        return self.do(requests.tasks(every=all))

    def state(self, task_id: str) -> TaskState | None:
        """A task's record; None where there is none.

        state = client.state(task.task_id)
        """
        return self.do(requests.state(task_id))

    def attempts(self, task_id: str) -> list[Attempt]:
        """What is known of a task's attempts that have ended, in order.

        print([(attempt.worker_id, attempt.error_kind) for attempt in client.attempts(task.task_id)])
        """
        return self.do(requests.attempts(task_id))

    def stages(self, task_id: str) -> dict[str, StageState]:
        """Where the stages of a submitted pipeline stand, by name; without those that have not begun.

        for name, stage in client.stages(pipeline.task_id).items():
            print(name, stage.state, stage.task_ids)
        """
        return self.do(pipelines.stages(task_id))

    def waiting(self) -> list[dict[str, Any]]:
        """How many tasks wait, by what they ask for and by priority.

        print(client.waiting())
        """
        return self.do(waiting.counts())

    def waiting_tasks(
        self, *, owner: str | None = None, task_class: str | None = None, limit: int = 100
    ) -> list[WaitingTask]:
        """The tasks that wait, by class, in the order in which workers take them; last, pipelines without a driver.

        Args:
            owner: only those of this owner (`metadata.owner`); empty: of those that name none.
            task_class: only those of this task type, or of the class whose key begins so (4 characters or more).
            limit: at most so many, 1000 at most.

        Raises:
            FieldError: names the argument.

            for task in client.waiting_tasks(owner="ann"):
                print(task.position, task.task_id)
        """
        return self.do(waiting.tasks(owner=owner, task_class=task_class, limit=limit))

    def remove(self, task_id: str, reason: str = "removed from the queue") -> Removal:
        """Take a task out of the queue if it waits; one that a worker has goes on (`cancel` stops it).

        Args:
            reason: the error of its event.

            removal = client.remove(task.task_id)
            if not removal.removed:
                print(removal.state, "on", removal.worker_id)
        """
        return self.do(waiting.remove(task_id, reason=reason))

    def _heard(self, task_id: str, deadline: float | None, from_record: bool = False) -> Iterator[Event | End]:
        """Events of a task as they come; its recorded End where an event may have been missed. Ends at the deadline.

        Args:
            from_record: begin with what the record says, read when nothing can be missed any more.
        """
        import redis

        looked = known = float("-inf")
        first: Event | None = None
        with self._redis.pubsub() as events:  # type: ignore[no-untyped-call]
            subscribed = False
            while deadline is None or time.monotonic() < deadline:
                try:
                    if not subscribed:
                        events.subscribe(TASK_EVENTS_CHANNEL, names.CHANNEL)
                        subscribed = True
                        events.get_message(timeout=connection.TIMEOUT_S)  # confirmed: nothing is missed from here
                    if time.monotonic() - looked >= POLL_S:
                        looked = time.monotonic()
                        end = self.do(requests.end(task_id))
                        known = time.monotonic()
                        if end is not None:
                            yield end
                            return
                        if from_record and (first := first_event(self.state(task_id))) is not None:
                            yield first
                        from_record = False
                    left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
                    message = events.get_message(timeout=max(0.01, left))
                except requests.UnknownTask:
                    if time.monotonic() - known > LOST_S:
                        raise
                    continue
                except (redis.ConnectionError, redis.TimeoutError, UnavailableError):
                    time.sleep(OUTAGE_POLL_S)
                    continue
                if message is None or message["type"] != "message":
                    continue
                event = event_of(message["data"])
                if event is not None and event.task_id == task_id and event.type != "LOGS":
                    repeated, first = is_again(event, first), None
                    if repeated:
                        continue
                    yield event

    def do(self, request: Request[T]) -> T:
        """Run a request. For parts of this package; programs use the other methods."""
        try:
            commands = next(request)
            while True:
                commands = request.send(self._run(commands))
        except StopIteration as done:
            value: T = done.value
            return value

    def _run(self, commands: list[Command]) -> list[Any]:
        import redis

        try:
            if isinstance(commands[0][0], Script):
                return [self._script(*each) for each in commands]
            if len(commands) == 1:
                return [self._redis.execute_command(*commands[0])]  # type: ignore[no-untyped-call]
            pipe: redis.client.Pipeline = self._redis.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            return list(pipe.execute())
        except redis.RedisError as error:
            raise connection.unavailable(self._url, error) from None

    def _script(self, script: Script, *arguments: Any) -> Any:
        import redis

        try:
            return self._redis.execute_command(*script_call(script, arguments, whole=False))  # type: ignore[no-untyped-call]
        except redis.exceptions.NoScriptError:
            return self._redis.execute_command(*script_call(script, arguments, whole=True))  # type: ignore[no-untyped-call]
