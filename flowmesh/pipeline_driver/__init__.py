"""The process that drives one submitted pipeline, beside a node's supervisor. It needs Redis and nothing heavy."""
