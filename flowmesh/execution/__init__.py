"""Carries tasks out, from admission to the terminal event."""
