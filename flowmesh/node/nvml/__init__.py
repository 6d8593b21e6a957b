"""NVIDIA's management library, called in one thread."""
