"""A place where a pipeline's tasks run at once: a function of the task's document is its result."""

from __future__ import annotations

from collections import deque

from flowmesh.pipelines.document import read
from flowmesh.pipelines.driver import Driver
from flowmesh.pipelines.ports import Ended, Started


class Memory:
    """A store without files."""

    def __init__(self):
        self.records = {}
        self.summary = None

    def load(self):
        return dict(self.records)

    def save(self, *records):
        self.records |= {record.name: record for record in records}

    def finish(self, summary):
        self.summary = summary


class Place:
    """
    Args:
        answer: called with a task; returns its result, an error text, or None: it runs until it is cancelled.
    """

    def __init__(self, answer=lambda task: {"ok": True, "spec": task.document["spec"]}, slots=1):
        self.answer = answer
        self.total = slots
        self.tasks = []
        self.most = 0
        self.cancelled = []
        self._running = deque()
        self._events = deque()

    def slots(self):
        return self.total

    def submit(self, task):
        if len(self._running) >= self.total:
            return False
        self.tasks.append(task)
        self._running.append(task)
        self.most = max(self.most, len(self._running))
        self._events.append(Started(task_id=task.task_id))
        return True

    def cancel(self, task_id, *, force):
        self.cancelled.append((task_id, force))
        for task in [task for task in self._running if task.task_id == task_id]:
            self._running.remove(task)
            self._events.append(Ended(task_id=task_id, ok=False, verdict="cancelled", error="cancelled"))

    def next(self):
        if self._events:
            return self._events.popleft()
        for task in list(self._running):
            answer = self.answer(task)
            if answer is None:
                continue
            self._running.remove(task)
            if isinstance(answer, str):
                return Ended(task_id=task.task_id, ok=False, verdict="error", error=answer)
            return Ended(task_id=task.task_id, ok=True, result=answer)
        return None

    @property
    def ran(self):
        return [task.task_id.removeprefix("p.") for task in self.tasks]


def run(spec, place=None, store=None, **options):
    """Run a pipeline; returns its driver, the place and the store."""
    place, store = place or Place(), store or Memory()
    driver = Driver(read({"spec": spec}), "p", place, store, **options)
    driver.run()
    return driver, place, store


def states(driver):
    return {name: run.state.value for name, run in driver.runs.items()}
