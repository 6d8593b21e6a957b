"""The FlowMesh node agent: takes tasks from Redis and runs each in a process tree of its own."""

DISTRIBUTION = "flowmesh-supervisor"
"""Whose package this is; see `flowmesh.installed`, which has the version too."""
