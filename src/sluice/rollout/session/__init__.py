"""A session: one episode's conversation, kept as tokens that are only ever appended to.

`history` says when two messages are the same, `branch` holds the tokens as a tree, `place` finds where a request
goes on in it, `reader` turns tokens into what the client is shown, and `session` puts them together.
"""

from sluice.rollout.session.base import Ask, Choice, Limits
from sluice.rollout.session.session import Session

__all__ = ["Ask", "Choice", "Limits", "Session"]
