"""`vllm run-batch`, and its server's answers to completions, which run-batch does not take. One engine for both.

Arguments: those of run-batch, before them a file of completions (one body a line) and one for their answers.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from starlette.datastructures import State
from vllm.entrypoints.launchers import run_batch
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client, init_app_state
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.usage.usage_lib import UsageContext


async def main(bodies: Path, answers: Path) -> None:
    args = run_batch.parse_args()
    async with build_async_engine_client(args, usage_context=UsageContext.OPENAI_BATCH_RUNNER) as client:
        await run_batch.run_batch(client, args)
        state = State()
        await init_app_state(client, state, args, await client.get_supported_tasks())
        serving = state.openai_serving_completion
        requests = [CompletionRequest.model_validate_json(line) for line in bodies.read_text().splitlines()]
        found = await asyncio.gather(*(serving.create_completion(each) for each in requests))
        answers.write_text("".join(f"{each.model_dump_json()}\n" for each in found))


if __name__ == "__main__":
    bodies, answers = (Path(sys.argv.pop(1)) for _ in range(2))
    asyncio.run(main(bodies, answers))
