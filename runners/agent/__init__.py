"""Agents: a model that works with tools, one run an item, in a process tree of their own."""
