"""Logs, hung tasks, old results, and what tasks leave behind."""
