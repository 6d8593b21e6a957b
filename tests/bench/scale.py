"""How far one Redis reaches: a thousand nodes with the node's own code for Redis, at rates up to the machine's.

Every node receives every dispatch on the channel, and every worker's event. All nodes, Redis and who sends are on this
machine, so its processors end the ladder of rates. For the rate wanted there are fewer nodes, and in place of the
others as many subscribers that only read; beside it stands what the highest rate that was kept up with comes to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.bench.measure import Row, ms
from tests.bench.simulated import Deployment, Load, deployment

RATE = 100.0
"""Tasks a second that the goal is for."""
RATES = (5.0, 10.0, 20.0, 40.0, RATE)
FULL = 0.7
"""The share of a core up to which a Redis is worth using: it has one thread for commands."""
WAYS = ("channel", "streams", "queue")


def measure(*, quick: bool, so_far: list[Row]) -> list[Row]:
    count, few, seconds = (100, 10, 3.0) if quick else (1000, 100, 6.0)
    with deployment(count) as whole:
        rest = whole.rest(2 * seconds)
        rows = [_at_rest(whole, rest)]
        ladders = {way: _ladder(whole, way, seconds) for way in WAYS}
    rows += [_step(count, way, load) for way in WAYS for load in ladders[way]]
    with deployment(few) as mixed:
        fixed = {way: mixed.measured(RATE, seconds, mixed.sends[way]) for way in WAYS}
        mixed.add_readers(count - few)
        reading = mixed.rest(seconds)
        full = {way: mixed.measured(RATE, seconds, mixed.sends[way]) for way in WAYS}
    some = f"{few} nodes and {count - few} that only read"
    rows.append(Row(f"{some}, at rest", _without_nodes(reading), _sent(reading)))
    for way in WAYS:
        against = f"{_cost(full[way])}; {few} nodes alone: Redis {fixed[way].redis:.0%}"
        rows.append(Row(f"{some}, {RATE:g} tasks/s by {way}", _value(full[way], _without_nodes), against))
    for way in WAYS:
        rows.append(_reckoned(way, rest, ladders[way], whole=count, few=few, fixed=fixed[way], full=full[way]))
    return rows


def _ladder(whole: Deployment, way: str, seconds: float) -> list[Load]:
    """Rates up to the first that is not kept up with."""
    found: list[Load] = []
    for rate in RATES:
        found.append(whole.measured(rate, seconds, whole.sends[way]))
        if not found[-1].kept_up:
            break
    return found


def _reckoned(way: str, rest: Load, ladder: Sequence[Load], *, whole: int, few: int, fixed: Load, full: Load) -> Row:
    """What RATE comes to, from the highest rate that was kept up with, and how far FULL reaches.

    Args:
        whole: how many nodes `rest` and `ladder` are of.
        few: how many nodes `fixed` is of; in `full` there are readers beside them, `whole` in all.
    """
    what = f"{whole} nodes, {RATE:g} tasks/s by {way}"
    kept_up = [load for load in ladder if load.kept_up]
    if not kept_up:
        return Row(f"reckoned: {what}", "not reckoned: no rate was kept up with", aim="a node at most 1 %")
    best = kept_up[-1]
    per_task, per_node, per_real = (
        (getattr(best, name) - getattr(rest, name)) / best.reached for name in ("redis", "node", "real_node")
    )
    redis = rest.redis + RATE * per_task
    node, real = rest.node + RATE * per_node, rest.real_node + RATE * per_real
    tasks = max(0.0, FULL - rest.redis) / per_task if per_task > 0 else 0.0
    reach = f"{FULL:.0%} of a core is reached with {tasks:.0f} tasks/s of {whole} nodes"
    if full.kept_up and fixed.kept_up and full.redis > fixed.redis:
        most = few + max(0.0, FULL - fixed.redis) * (whole - few) / (full.redis - fixed.redis)
        reach += (
            f", and with {most:.0f} nodes at {RATE:g} tasks/s; measured with readers {full.redis / redis:.2f} × this"
        )
    return Row(
        f"reckoned from {best.reached:.0f} tasks/s: {what}",
        f"Redis {redis:.0%}, a node {node:.2%}, the real one {real:.2%} of a core",
        reach,
        "a node at most 1 %",
        redis,
    )


def _at_rest(whole: Deployment, rest: Load) -> Row:
    memory = f"memory of a simulated node {whole.node_bytes() / 1e6:.2f} MB, of Redis {_used(whole) / 1e6:.0f} MB"
    return Row(f"{whole.count} nodes at rest", _shares(rest), f"{_sent(rest)}; {memory}")


def _step(count: int, way: str, load: Load) -> Row:
    return Row(
        f"{count} nodes, {load.asked:g} tasks/s of 5 KB by {way}", _value(load, _shares), _cost(load), number=load.redis
    )


def _value(load: Load, shares: Callable[[Load], str]) -> str:
    return shares(load) if load.kept_up else f"not kept up with, {load.reached:.1f}/s: {shares(load)}"


def _shares(load: Load) -> str:
    return f"Redis {load.redis:.1%}, a node {load.node:.3%}, the real one {load.real_node:.2%} of a core"


def _without_nodes(load: Load) -> str:
    """A few nodes have all the tasks: more each than with a thousand."""
    return f"Redis {load.redis:.1%}, the real node {load.real_node:.2%} of a core"


def _cost(load: Load) -> str:
    return f"{_sent(load)}; end after {ms(load.end_s)}"


def _sent(load: Load) -> str:
    return f"Redis sends {load.out_bytes / 1e6:.1f} MB/s; all cores busy for {load.machine:.0%}"


def _used(whole: Deployment) -> int:
    return int(whole.server.client().info("memory")["used_memory"])
