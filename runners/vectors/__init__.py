"""The task type `embedding`: a vector for each item, to a file, a FAISS index or a Qdrant collection."""
