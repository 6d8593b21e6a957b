"""Processes and what bounds them: the pipe, the fork server, process trees, cgroups."""
