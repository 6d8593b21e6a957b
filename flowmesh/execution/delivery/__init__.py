"""Delivers the results of ended tasks."""
