"""Requests become plans: where they go on, and which tokens come new. Nothing is recorded or counted here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sluice.rollout.chat.base import ChatMessage, ToolSpec
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.errors import SessionError
from sluice.rollout.session.branch import Plan, Tree
from sluice.rollout.session.history import Print, prints, settled
from sluice.rollout.session.place import RAW, Place, find, find_ids, find_text
from sluice.types import Ids


class Planner:
    """Plans against what is recorded in `tree` and what is pending, i.e. being answered."""

    def __init__(self, chat: ChatRenderer, tree: Tree) -> None:
        self._chat = chat
        self._tree = tree

    def chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[ToolSpec],
        template_kwargs: Mapping[str, Any],
        pending: Sequence[Plan],
    ) -> Plan:
        """For a history. Raises DataError when the template does not take it."""
        if not messages:
            raise SessionError("there are no messages")
        sent, head, settings = prints(messages), settled(list(tools)), settled(dict(template_kwargs))
        place = find(self._tree, pending, head, sent, settings)
        observed: Ids = np.empty(0, np.int32)
        if place.base is None:
            observed = self._chat.begin(messages, tools, **template_kwargs)
        elif place.after is not None:
            observed = self._chat.extend(place.after.turn.ids, messages[place.kept :], tools, **template_kwargs)
        return _planned(head, sent, settings, place, observed)

    def raw(self, prompt: str | Sequence[int], pending: Sequence[Plan]) -> Plan:
        """For raw text or ids."""
        if not len(prompt):
            raise SessionError("the prompt is empty")
        if isinstance(prompt, str):
            place, rest = find_text(self._tree, pending, prompt)
            observed = self._chat.encode(rest) if rest else np.empty(0, np.int32)
        else:
            ids = np.asarray(prompt, dtype=np.int32)
            place = find_ids(self._tree, pending, ids)
            observed = ids[place.position :]
            rest = self._chat.text(observed)
        shared = [entry.print for entry in place.base.entries[: place.kept]] if place.base else []
        new = [Print("text", rest)] if len(observed) else []
        return _planned(RAW, (*shared, *new), "", place, observed)


def _planned(head: str, sent: tuple[Print, ...], settings: str, place: Place, observed: Ids) -> Plan:
    shared = place.base.ids(place.position) if place.base else np.empty(0, np.int32)
    context = np.concatenate([shared, observed]) if len(shared) else observed
    return Plan(
        head,
        sent,
        settings,
        place.base,
        place.position,
        place.kept,
        observed,
        context,
        place.deviation,
        place.reason,
    )
