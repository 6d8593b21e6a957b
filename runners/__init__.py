"""The child's side of a task: what runs in its process. Heavy libraries are imported here, when a task needs them."""
