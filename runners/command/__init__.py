"""Task types `command` and `python`: any program, with the guarantees of all other tasks."""
