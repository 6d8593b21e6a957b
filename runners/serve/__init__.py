"""Task type `serve`: an OpenAI-compatible endpoint as a task."""
