"""What the measured rates come to at the rate wanted, on made loads."""

from __future__ import annotations

from tests.bench.scale import _reckoned
from tests.bench.simulated import Load


def load(asked: float, nodes: int = 1000, reached: float | None = None) -> Load:
    """Of nodes that cost Redis 0.1 ‰ of a core each, and 1 µs for each task beside 200 µs for all of them."""
    rate = asked if reached is None else reached
    redis = nodes * 1e-4 + rate * (200e-6 + nodes * 1e-6)
    return Load(
        asked=asked,
        reached=rate,
        redis=redis,
        node=0.001 + rate * 4e-5,
        real_node=0.002 + rate * 6e-5,
        machine=0.5,
        out_bytes=0.0,
        end_s=0.01,
    )


def test_the_highest_rate_that_was_kept_up_with_counts() -> None:
    ladder = [load(5), load(10), load(20, reached=12)]
    row = _reckoned("streams", load(0), ladder, whole=1000, few=100, fixed=load(100, nodes=100), full=load(100))
    assert row.what == "reckoned from 10 tasks/s: 1000 nodes, 100 tasks/s by streams"
    assert row.value == "Redis 22%, a node 0.50%, the real one 0.80% of a core"
    # 0.7 = 0.1 + 0.0012 × tasks; 0.7 = 0.02 + 0.0002 × nodes
    assert row.against.startswith("70% of a core is reached with 500 tasks/s of 1000 nodes, and with 3400 nodes at 100")
    assert row.against.endswith("measured with readers 1.00 × this")


def test_what_was_not_kept_up_with_is_not_reckoned_from() -> None:
    few, full = load(100, nodes=100), load(100, reached=40)
    none = _reckoned("queue", load(0), [load(5, reached=3)], whole=1000, few=100, fixed=few, full=full)
    assert none.value == "not reckoned: no rate was kept up with"
    some = _reckoned("queue", load(0), [load(5)], whole=1000, few=100, fixed=few, full=full)
    assert "measured with readers" not in some.against
