"""The task type `api`: the items of a task as requests to an OpenAI-compatible endpoint."""
