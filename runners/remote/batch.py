"""Sends the items that have no row, several at a time, and writes their rows as they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from runners.api import BadRequest, RunnerError
from runners.remote.answers import Answer, Usage, cost_usd, estimated_tokens, most_tokens
from runners.remote.client import Client, EndpointError, ItemError
from runners.remote.task import Api
from runners.rows.log import RowLog

DEFAULT_CONCURRENCY = 8
POLL_S = 0.02
HOPELESS = 5
"""Items in a row that got no answer after all attempts, before the endpoint counts as gone; at least `concurrency`."""


class Batch:
    """The items of one task. Its rows are written on the event loop."""

    def __init__(self, api: Api, client: Client, log: RowLog, entry: Callable[[int], dict[str, Any]]) -> None:
        """
        Args:
            entry: an item's fields beside its answer.
        """
        self._api = api
        self._client = client
        self._log = log
        self._entry = entry
        self._workers = api.concurrency or DEFAULT_CONCURRENCY
        self._in_a_row = 0
        self._answered = 0
        self.spent_usd = 0.0
        """Of this attempt."""
        self._before_usd = sum(row.item.get("cost_usd") or 0.0 for row in log.rows.values())
        self._in_flight = 0
        self._reserved_usd = 0.0
        """Of the requests on their way."""
        self._over = False

    async def run(self, requests: dict[int, dict[str, Any]]) -> None:
        """
        Args:
            requests: bodies, by item.

        Raises:
            BadRequest: the budget is spent.
            EndpointError: the endpoint serves nobody, or cannot be reached any more.
        """
        if not requests:
            return
        waiting = iter(requests.items())
        workers = [asyncio.create_task(self._work(waiting)) for _ in range(min(self._workers, len(requests)))]
        failures: list[BaseException] = []
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            failures = [error for each in done if (error := each.exception()) is not None]
            if failures and isinstance(failures[0], BadRequest):
                await asyncio.wait(workers)  # what is on its way is paid: its answers are kept
        finally:
            for each in workers:
                each.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if failures:
            raise failures[0]

    async def _work(self, waiting: Iterator[tuple[int, dict[str, Any]]]) -> None:
        for index, body in waiting:
            reserved = await self._reserve(body)
            try:
                answer = await self._client.ask(body)
            except ItemError as error:
                self._failed(index, error)
            else:
                self._keep(index, answer)
            finally:
                self._in_flight -= 1
                self._reserved_usd -= reserved

    async def _reserve(self, body: dict[str, Any]) -> float:
        """Reserve what a request may cost, in US dollars; waits for those on their way where it might be too much.

        Raises:
            BadRequest: it does not fit the budget.
        """
        most = self._api.max_cost_usd
        while True:
            expected = self._expected_usd(body)
            if most is None or self._before_usd + self.spent_usd + self._reserved_usd + expected <= most:
                self._in_flight += 1
                self._reserved_usd += expected
                return expected
            if self._in_flight == 0 or self._over:
                break
            await asyncio.sleep(POLL_S)
        self._over = True
        counts, spent = self._log.counts, self._before_usd + self.spent_usd
        raise BadRequest(
            f"spec.api.max_cost_usd: {most:g}; {spent:.6g} is spent, after {counts.done} of {counts.total} items, and "
            "the next may exceed it. Raise it and send the task again with the same id: what is answered is kept"
        )

    def _expected_usd(self, body: dict[str, Any]) -> float:
        """By the request's size and `max_tokens`; without that, the mean of the answers so far."""
        tokens, answer = estimated_tokens(body), most_tokens(body)
        by_size = cost_usd(Usage(tokens - answer, answer), self._api.prices) or 0.0
        mean = self.spent_usd / self._answered if self._answered else 0.0
        return by_size if answer else max(by_size, mean)

    def _keep(self, index: int, answer: Answer) -> None:
        self._in_a_row = 0
        self._answered += 1
        usage, cost = answer.usage, cost_usd(answer.usage, self._api.prices)
        item = {**self._entry(index), **answer.fields}
        if answer.problem:
            item["incomplete"] = answer.problem
        if usage is not None:
            item["usage"] = msgspec.to_builtins(usage)
        if cost is not None:
            item["cost_usd"] = cost
            self.spent_usd += cost
        prompt, completion = (0, 0) if usage is None else (usage.prompt_tokens, usage.completion_tokens)
        self._log.add(index, item, prompt_tokens=prompt, completion_tokens=completion)
        if usage is None and self._api.max_cost_usd is not None:
            raise RunnerError(
                f"the endpoint {self._api.shown} reports no usage, so spec.api.max_cost_usd cannot be kept; "
                "leave it out"
            )

    def _failed(self, index: int, error: ItemError) -> None:
        said = {"type": error.kind, "message": str(error), **({} if error.status is None else {"status": error.status})}
        self._log.add(index, {**self._entry(index), "error": said}, again=True)
        self._in_a_row = self._in_a_row + 1 if error.kind == "unavailable" else 0
        if self._in_a_row >= max(HOPELESS, self._workers):
            raise EndpointError(f"{error}; so did the last {self._in_a_row} items")
