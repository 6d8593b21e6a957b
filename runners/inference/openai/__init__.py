"""Batch files of OpenAI's API: their lines as requests, and the answers in OpenAI's and vLLM's shapes."""
