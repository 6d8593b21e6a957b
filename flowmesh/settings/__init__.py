"""Settings of a node: schema, sources, checks, loading."""
