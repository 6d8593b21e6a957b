"""Redis: connections, subscriptions, streams, the outbox, and a worker's record."""
