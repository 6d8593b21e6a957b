"""Work in folders that a task wrote to: by descriptor, without following links, never across a mount point."""
