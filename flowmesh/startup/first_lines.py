"""What a node logs when it has started: what it is, what separates it from its tasks, and what does not fit."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping

from loguru import logger

from flowmesh import installed
from flowmesh.execution.executor import Executor
from flowmesh.node import cuda_build
from flowmesh.node.devices import Inventory
from flowmesh.settings.schema import Settings
from flowmesh.startup import old_variables
from flowmesh.startup.trust import SetUp, trust
from flowmesh.tasks.catalogue import Catalogue


def log(settings: Settings, environment: Mapping[str, str], catalogue: Catalogue, *, worker: str, how: str) -> None:
    """
    Args:
        environment: the node's own variables.
        worker: the node's worker id.
        how: the level of isolation.
    """
    logger.bind(isolation=how, types=",".join(sorted(catalogue.offered))).info(
        "node started: worker {} (FlowMesh {})", worker, installed.version()
    )
    if problem := installed.problem():
        logger.error("{}", problem)
    separation = trust(settings)
    if separation.set_up is SetUp.ROOT:
        logger.warning("{}; {}", separation.text, separation.remedy)
    else:
        logger.bind(trust=separation.set_up.value).info("{}", separation.text)
    for line in old_variables.warnings(environment):
        logger.warning("{}", line)
    missing: defaultdict[str, list[str]] = defaultdict(list)
    for name, why in sorted(catalogue.missing.items()):
        if name not in catalogue.off:
            missing[why].append(name)
    for why, names in missing.items():
        logger.bind(types=",".join(names)).info("not offered: {}", why)


async def compare_torch(executor: Executor, inventory: Inventory) -> None:
    """Log where an environment's torch does not fit driver and GPUs: its canary would fail without a reason."""
    offered = executor.catalogue.offered.values()
    names = {each.environment for each in offered if "torch" in each.requires} if inventory.gpus else set()
    for name in sorted(names):
        python = executor.pool.environments[name].python
        found = await asyncio.to_thread(cuda_build.ask, python)
        wrong = [found] if isinstance(found, cuda_build.Mismatch) else cuda_build.mismatches(found, inventory, python)
        for each in wrong:
            logger.bind(environment=name).error("{}; {}", each.text, each.remedy)
