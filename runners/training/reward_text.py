"""How prompt and completion become one text, for what scores them."""

from __future__ import annotations

from typing import Any


def text_of(prompt: Any) -> str:
    """A prompt or completion as one text; of a chat, its messages' contents."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt)
