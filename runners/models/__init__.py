"""Models on disk: locating a task's weights, checking them, and the built-in model that needs no download."""
