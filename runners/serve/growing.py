"""An answer's text while it is generated: as much of it as no later token changes."""

from __future__ import annotations

from collections.abc import Sequence

from runners.inference.tokens import Texts

CUT = "\ufffd"
"""What stands for the bytes of a character that is not whole yet."""


class Growing:
    """
    Args:
        prompt_ids: the tokens that the answer continues.
        stop: strings that end the answer and are not part of it.
        special: whether special tokens are part of the text.
    """

    def __init__(self, texts: Texts, prompt_ids: Sequence[int], stop: Sequence[str], *, special: bool = False) -> None:
        self._texts = texts
        self._before = list(prompt_ids)
        self._lead = texts.visible(self._before)
        self._stop = stop
        self._special = special
        self._read = 0
        """Tokens whose text is whole."""
        self._whole = ""
        self._text = ""
        """With what is certain of the next tokens."""
        self.sent = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """What has become certain.

        Args:
            token_ids: the answer's tokens so far.
        """
        new = token_ids[self._read :]
        if not new:
            return ""
        text = self._texts.decode_after(self._lead, new, special=self._special)
        certain = text.rstrip(CUT)
        self._text = self._whole + certain
        if certain == text:
            self._whole = self._text
            self._read = len(token_ids)
            self._before += new
            self._lead = self._texts.visible(self._before)
        return self.rest(self._text[: len(self._text) - self._held()])

    def rest(self, text: str) -> str:
        """What of a text was not sent yet; it counts as sent."""
        more = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += more
        return more

    def _held(self) -> int:
        """Characters at the end that may begin a stop string."""
        most = max((len(each) - 1 for each in self._stop), default=0)
        for size in range(min(most, len(self._text)), 0, -1):
            end = self._text[-size:]
            if any(len(each) > size and each.startswith(end) for each in self._stop):
                return size
        return 0
