"""Whose key a request carries, and what it is good for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request

from sluice.rollout.gateway.book import Ended, Entry
from sluice.rollout.gateway.errors import BadKey, NotAllowed, SessionClosed
from sluice.rollout.gateway.keys import presented

if TYPE_CHECKING:
    from sluice.rollout.gateway.server import Gateway


def session_of(gateway: Gateway, request: Request) -> Entry:
    """The open session whose key the request carries.

    Raises:
        BadKey: no key, or one that nobody was given.
        NotAllowed: the owner's key.
        SessionClosed: the session has ended.
    """
    key = _key(request)
    found = gateway.book.by_key(key)
    if isinstance(found, Entry):
        return found
    if isinstance(found, Ended):
        raise SessionClosed(f"session {found.id} has ended ({found.outcome})", hint="open another one")
    if gateway.owner.matches(key):
        raise NotAllowed("model calls need a session's key, not the owner's", hint="POST /sessions opens a session")
    raise BadKey("this key opens no session", hint="use the key that POST /sessions returned")


def require_owner(gateway: Gateway, request: Request) -> None:
    """Raises BadKey or NotAllowed unless the request carries the owner's key."""
    key = _key(request)
    if gateway.owner.matches(key):
        return
    if gateway.book.by_key(key) is not None:
        raise NotAllowed("this needs the owner's key; a session's is good for its model calls alone")
    raise BadKey("this is not the owner's key")


def require_any(gateway: Gateway, request: Request) -> None:
    """Raises BadKey unless the request carries a key that is good for something."""
    key = _key(request)
    if not gateway.owner.matches(key) and not isinstance(gateway.book.by_key(key), Entry):
        raise BadKey("this key opens nothing here")


def _key(request: Request) -> str:
    key = presented(request.scope["headers"])
    if not key:
        raise BadKey("a key is needed", hint="send it as `Authorization: Bearer …` or `x-api-key`")
    return key
