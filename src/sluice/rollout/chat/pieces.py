"""What each token of a vocabulary spells, one by one: bytes, since a character may be spread over several tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tokenizers import decoders

from sluice.rollout.chat.detokenise import Detokenisers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Pieces:
    """Spells tokens of one tokenizer.

    Byte-level vocabularies say their bytes. Of all others a token spells what it adds to a text that it stands in
    already; `<0xE2>` of a byte-fallback vocabulary is that byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._bytes = (
            Detokenisers(backend) if backend is not None and isinstance(backend.decoder, decoders.ByteLevel) else None
        )
        self._special = {int(id) for id in self._tokenizer.all_special_ids}
        self._special |= {int(id) for id, token in self._tokenizer.added_tokens_decoder.items() if token.special}

    def special(self, id: int) -> bool:
        """Whether it marks structure: end of sequence, roles of a chat."""
        return id in self._special

    def of(self, id: int) -> bytes | None:
        """The bytes of a token; None for an id that the vocabulary lacks."""
        token = self._tokenizer.convert_ids_to_tokens(id)
        if token is None:
            return None
        if self.special(id):
            return str(token).encode()
        if self._bytes is not None:
            return self._bytes.bytes_of(id)
        byte = _BYTE.fullmatch(str(token))
        if byte:
            return bytes((int(byte[1], 16),))
        once, twice = (self._tokenizer.decode([id] * count, skip_special_tokens=False) for count in (1, 2))
        return str(twice[len(once) :]).encode() if twice.startswith(once) else str(token).encode()
