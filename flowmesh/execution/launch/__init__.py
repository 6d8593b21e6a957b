"""From a granted slot to a running child, and what that child reports."""
