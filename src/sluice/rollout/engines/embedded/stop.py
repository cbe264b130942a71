"""Where a turn ends: stop ids and stop strings, found as the tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sluice.types import SamplingParams

INCOMPLETE = "\ufffd"
"""What a tokenizer prints for bytes that are not a whole character yet."""


class Decoder(Protocol):
    """The one method of a Hugging Face tokenizer that is used here."""

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = ...,
        *,
        clean_up_tokenization_spaces: bool = ...,
    ) -> str | list[str]: ...


class StopText:
    """Searches the text of a growing token list for stop strings.

    Each new token is decoded together with the few before it, since a tokenizer may print a token
    differently at the start of a text. Bytes of an unfinished character wait for the rest of it. Special
    tokens are printed, so a stop string may be the spelling of one. Only text after the start is searched:
    a stop string in the context ends nothing.

    Args:
        stop: the strings.
        tokenizer: has `decode`.
        start: index of the first token that is searched.
    """

    def __init__(self, stop: Sequence[str], tokenizer: Decoder, start: int) -> None:
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        self._start = start
        self._shown = start
        self._read = start
        self._tail = ""
        self._keep = max(len(text) for text in self._stop) - 1

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether the newest token completes a stop string. Call once for each new token."""
        before = self._text(tokens[self._shown : self._read])
        after = self._text(tokens[self._shown :])
        if len(after) <= len(before) or after.endswith(INCOMPLETE):
            return False
        self._shown, self._read = self._read, len(tokens)
        searched = self._tail + after[len(before) :]
        self._tail = searched[-self._keep :] if self._keep else ""
        return any(text in searched for text in self._stop)

    def _text(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def stop_text(sampling: SamplingParams, tokenizer: Decoder | None, start: int) -> StopText | None:
    """The search for `sampling.stop`, or None when there is nothing to search for."""
    if not sampling.stop or tokenizer is None:
        return None
    return StopText(sampling.stop, tokenizer, start)
