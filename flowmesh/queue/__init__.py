"""The queue of a deployment and the records of its tasks, both in Redis: names, classes, scripts, what is read of them.

Used by nodes and by clients. Nothing here connects: callers run the commands.
"""
