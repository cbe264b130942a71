"""Keys: random, shown once, kept as hashes.

The owner's key opens sessions, gives rewards and finishes. A session's key is good for model calls of that session.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

SESSION_PREFIX = "sk-sluice-"
_BYTES = 32


def new_session_key() -> str:
    """A key of 256 random bits."""
    return SESSION_PREFIX + secrets.token_urlsafe(_BYTES)


def digest(key: str) -> bytes:
    """SHA-256 of a key. Keys are random and long, so a plain hash cannot be reversed by guessing."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class OwnerKey:
    """The owner's key.

    Attributes:
        fresh: the key itself when it was made here, for showing it once; empty when it came from outside.
    """

    def __init__(self, variable: str) -> None:
        given = os.environ.get(variable, "") if variable else ""
        self.fresh = "" if given else f"sk-owner-{secrets.token_urlsafe(_BYTES)}"
        self._digest = digest(given or self.fresh)

    def matches(self, key: str) -> bool:
        """Constant-time comparison."""
        return hmac.compare_digest(self._digest, digest(key))


def presented(headers: list[tuple[bytes, bytes]]) -> str:
    """The key in `Authorization: Bearer …` or `x-api-key`; empty without one.

    Where both are there, `x-api-key` counts: Anthropic's client sends it beside a bearer token.
    """
    found = ""
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name.lower() == b"x-api-key" and text:
            return text
        scheme, _, rest = text.partition(" ")
        if name.lower() == b"authorization" and scheme.lower() == "bearer":
            found = rest.strip()
    return found
