"""`scripts/gpu-check`: proves the node on real hardware, in minutes, on a machine without a package index.

`__main__` installs what is missing and guards the rest; `session` gives each step its time; `worker` runs the steps.
"""
