"""Retrieval: embeddings, FAISS and Qdrant, and answers made from what was found."""
