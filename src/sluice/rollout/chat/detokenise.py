"""Ids to text, piece by piece. The pieces together are the decoded whole, whatever ids a model draws.

Two ways, by the tokenizer's decoder. Byte-level vocabularies (Qwen, Llama 3, DeepSeek, GLM, GPT-2) spell bytes:
they go through an incremental UTF-8 decoder, which replaces what is no UTF-8 as the tokenizers library does. All
others are decoded in windows that begin one piece back, so that what depends on a token's neighbour comes out right.
The library's own `DecodeStream` raises on byte-fallback vocabularies when a model writes broken UTF-8.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer, decoders

from sluice.types import Ids

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokeniser(Protocol):
    """One turn's way from ids to text."""

    def feed(self, ids: Sequence[int] | Ids) -> str:
        """The text that these ids make certain."""
        ...

    def close(self) -> str:
        """What was held back."""
        ...


class Detokenisers:
    """Makes detokenisers of one tokenizer; they share what is known about its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._spelled: dict[int, bytes] = {}

    def make(self, hidden: frozenset[int]) -> Detokeniser:
        """A new one, which leaves `hidden` out."""
        if self._byte_level:
            return _ByteLevel(self, hidden)
        return _Windowed(self._tokenizer, hidden)

    def bytes_of(self, id: int) -> bytes:
        """What a token of a byte-level vocabulary spells."""
        spelled = self._spelled.get(id)
        if spelled is None:
            token = self._tokenizer.id_to_token(id) or ""
            values = [_BYTES.get(character) for character in token]
            known = [value for value in values if value is not None]
            # Added tokens may contain other characters: they stand for themselves.
            spelled = bytes(known) if len(known) == len(values) else token.encode()
            self._spelled[id] = spelled
        return spelled


class _ByteLevel:
    def __init__(self, owner: Detokenisers, hidden: frozenset[int]) -> None:
        self._owner = owner
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int] | Ids) -> str:
        spelled = [self._owner.bytes_of(int(id)) for id in ids if int(id) not in self._hidden]
        return self._decoder.decode(b"".join(spelled))

    def close(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windowed:
    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._told: list[int] = []  # the last piece
        self._held: list[int] = []

    def feed(self, ids: Sequence[int] | Ids) -> str:
        pieces: list[str] = []
        for id in ids:
            if int(id) in self._hidden:
                continue
            self._held.append(int(id))
            # A run of byte tokens is valid, or replaced, as a whole.
            if not _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(int(id)) or ""):
                pieces.append(self.close())
        return "".join(pieces)

    def close(self) -> str:
        before = self._tokenizer.decode(self._told, skip_special_tokens=False)
        text = self._tokenizer.decode(self._told + self._held, skip_special_tokens=False)
        self._told, self._held = self._held or self._told, []
        return text[len(before) :]


def _alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones by themselves, the others by code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _alphabet()
