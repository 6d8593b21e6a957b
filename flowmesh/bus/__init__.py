"""Redis: connections, subscriptions, streams, the outbox, and a worker's record."""

import sys

# Where OpenTelemetry is installed, redis-py imports its SDK for metrics of its own: 1.7 MB of the supervisor's memory.
if "opentelemetry" not in sys.modules:
    sys.modules["opentelemetry"] = None  # type: ignore[assignment]
    try:
        import redis.asyncio  # noqa: F401
    finally:
        del sys.modules["opentelemetry"]
