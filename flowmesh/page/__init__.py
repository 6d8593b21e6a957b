"""The page of a node: a process of its own, which reads and never changes anything."""
