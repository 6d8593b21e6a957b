"""The task type `score`: scores of pairs by a cross-encoder, and documents in the order of their scores."""
