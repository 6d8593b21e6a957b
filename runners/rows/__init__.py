"""Rows of a task that are finished: their log, their keys, and where a retry takes them from."""
