"""Reads the inputs of tasks: lists, files, datasets, templates."""
