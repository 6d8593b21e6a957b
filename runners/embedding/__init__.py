"""Text embeddings, for `rag` and for batch files."""
