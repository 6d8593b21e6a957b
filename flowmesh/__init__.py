"""The FlowMesh node agent: takes tasks from Redis and runs each in a process tree of its own."""

__version__ = "0.1.0"
