"""LLM inference on Transformers and vLLM."""
