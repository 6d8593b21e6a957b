"""Models on disk: where a task's weights come from, and the built-in one that needs no download."""
