"""Stop strings over token ids, with the meaning of transformers' `StopStringCriteria`.

A text ends with the token in which a stop string ends. The string may begin in the prompt or in the
middle of a token, and more text may follow it in the last token. Text is what a token adds behind
other text, in bytes, so that characters cut in several tokens are found too.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

_BEFORE = "abcdef"
"""Text in front of a token, where a decoder has no reason to strip a space."""


class StopStrings:
    """Whether one of the strings ends in the last token of a text."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        """tokenizer: a `tokenizers.Tokenizer` or a tokenizer of transformers."""
        self._strings = [string.encode() for string in strings]
        self._longest = max(map(len, self._strings))
        self._bytes_of = token_bytes(tokenizer)
        self._known: dict[int, bytes | None] = {}

    def end_in(self, ids: Sequence[int]) -> bool:
        """Whether the last of ids `[n]` completes a stop string."""
        last = self._text(ids[-1])
        if not last:
            return False
        before, at = b"", len(ids) - 2
        while at >= 0 and len(before) < self._longest - 1:
            text = self._text(ids[at])
            if text is None:  # no token of this tokenizer: nothing reaches over it
                break
            before, at = text + before, at - 1
        # With one byte less than the string before it, any match reaches into the last token.
        return any(s in before[max(0, len(before) - len(s) + 1) :] + last for s in self._strings)

    def _text(self, token: int) -> bytes | None:
        if token not in self._known:
            self._known[token] = self._bytes_of(token)
        return self._known[token]


def token_bytes(tokenizer: Any) -> Callable[[int], bytes | None]:
    """A function from a token id to what it adds to a text; None for an id without a token.

    Raises:
        TypeError: neither a `tokenizers.Tokenizer` nor a tokenizer of transformers.
    """
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(inner, Tokenizer):
        to_token, join = inner.id_to_token, _joiner(inner)
        base = inner.encode(_BEFORE, add_special_tokens=False).tokens
        decoder = _decoder_types(inner)
    elif callable(getattr(inner, "convert_tokens_to_string", None)):  # written in Python
        to_token, join = inner.convert_ids_to_tokens, inner.convert_tokens_to_string
        base = inner.tokenize(_BEFORE)
        decoder = set()
    else:
        raise TypeError(
            "tokenizer: expected a tokenizers.Tokenizer or a tokenizer of transformers, "
            f"got {type(tokenizer).__name__}"
        )
    byte_fallback = "ByteFallback" in decoder
    alphabet = _byte_alphabet() if "ByteLevel" in decoder and not byte_fallback else None

    def text(token: int) -> bytes | None:
        word = to_token(token)
        if word is None:
            return None
        if alphabet is not None and all(character in alphabet for character in word):
            return bytes(alphabet[character] for character in word)
        if byte_fallback and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            try:
                return bytes.fromhex(word[3:5])
            except ValueError:
                pass
        joined = str(join([*base, word]))
        _, found, behind = joined.partition(_BEFORE)
        return (behind if found else str(join([word]))).encode()

    return text


def _joiner(tokenizer: Tokenizer) -> Callable[[list[str]], str]:
    decoder = tokenizer.decoder
    return " ".join if decoder is None else decoder.decode


def _decoder_types(tokenizer: Tokenizer) -> set[str]:
    """Names of the decoder's parts, as its own description has them."""
    decoder = tokenizer.decoder
    if decoder is None:
        return set()
    try:
        described = json.loads(decoder.__getstate__())
    except (AttributeError, TypeError, ValueError):
        return {type(decoder).__name__}
    todo, types = [described], {type(decoder).__name__}
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            types.add(str(part.get("type")))
            todo += part.values()
        elif isinstance(part, list):
            todo += part
    return types


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): b for i, b in enumerate(others)}
