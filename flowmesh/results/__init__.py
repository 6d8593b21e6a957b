"""A task's results: files, archives, uploads."""
