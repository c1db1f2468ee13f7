"""Token ids in, text out as it becomes certain."""

from collections.abc import Callable
from typing import TextIO

from torch import Tensor

_WINDOW, _KEPT = 64, 16
_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no whole character (yet)


class Detokenizer:
    """Turns growing ids into growing text: half a character is held back, spaces come out right.

    A token's text depends on those before it (a character over several tokens, a space that a
    decoder strips at a beginning), so each step decodes a window that opens within the known text.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-_KEPT:])
        self._shown = decode(self._ids)

    def push(self, ids: list[int]) -> str:
        """The text that these ids settle; may be empty."""
        self._ids += ids
        text = self._decode(self._ids)
        certain = text.rstrip(_UNFINISHED)
        if not certain.startswith(self._shown):
            return ""
        new = certain[len(self._shown) :]
        self._shown = certain
        if len(self._ids) > _WINDOW and certain == text:
            tail = self._decode(self._ids[-_KEPT:])
            if tail and not tail.startswith(_UNFINISHED):
                self._ids, self._shown = self._ids[-_KEPT:], tail
        return new

    def finish(self) -> str:
        """What was held back and will not be completed."""
        text = self._decode(self._ids)
        new = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown = text
        return new


class TextStreamer:
    """The `streamer` of `generate`: writes the new text, not the prompt."""

    def __init__(self, decode: Callable[[list[int]], str], out: TextIO) -> None:
        self._decode, self._out = decode, out
        self._detokenizer: Detokenizer | None = None

    def put(self, value: Tensor) -> None:
        """The prompt's ids first, then each round's."""
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self._decode, value.tolist())
        else:
            self._write(self._detokenizer.push(value.tolist()))

    def end(self) -> None:
        """The text is complete: close its line."""
        self._write((self._detokenizer.finish() if self._detokenizer else "") + "\n")

    def _write(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()
