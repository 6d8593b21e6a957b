"""A task's state machine, verdicts, journal and types."""
