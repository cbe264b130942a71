"""Where a request goes on in what was recorded, and what kind of deviation that is.

A history goes on where a branch ends, which is no deviation, or leaves a branch at one of the points that tokens
can be added to without rendering any text again: where a sampled turn ended, where one began (the same request
once more), or before everything. Which of them, and what it is called:

* `branch`: every answer that the client sends is recorded, and what follows the last of them is new, or nothing:
  a retry, an edited last question, a parallel branch.
* `root`: another conversation. Reason `compaction` when it begins with the message that a finished conversation
  began with; `tools` when only the offered tools changed; else `sub_agent`.
* `mismatch`: the client sends answers that are not what was recorded, or the recorded ones after messages that are
  not: the history was changed on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sluice.rollout.session.branch import Answer, Branch, Plan
from sluice.rollout.session.history import Print, agreement
from sluice.types import Ids

RAW = "raw"
"""The head of raw completions; a chat's is JSON."""


class Place(NamedTuple):
    """A point to go on from. See `Plan` for the fields; `after` is the answer that ends there, None where one begins
    or at position 0."""

    base: Branch | None = None
    position: int = 0
    kept: int = 0
    after: Answer | None = None
    deviation: str = ""
    reason: str = ""


def find(branches: Iterable[Branch], pending: Iterable[Plan], head: str, sent: Sequence[Print], settings: str) -> Place:
    """The latest point of any branch that this history shares."""
    branches, pending = list(branches), list(pending)
    known = [(agreement(branch.prints, sent), branch) for branch in branches if branch.head == head]
    best = Place()
    for agreed, branch in known:
        place = _point(branch, agreed, len(sent), settings)
        ends = place.kept == len(branch.entries)
        if (place.position, ends) > (best.position, _ends(best)):
            best = place
    agreed = max((agreed for agreed, branch in known if best.base is None or branch is best.base), default=0)
    if best.base is None:
        return _from_nothing(branches, pending, head, sent, known)
    if _ends(best):
        claimed = any(plan.base is best.base and plan.kept == best.kept for plan in pending)
        return best._replace(deviation="branch", reason="branch") if claimed else best
    if any(print.role == "assistant" for print in sent[agreed:]):
        return best._replace(deviation="mismatch", reason=_mismatch(best.base, agreed, sent))
    return best._replace(deviation="branch", reason="branch")


def _ends(place: Place) -> bool:
    return place.base is not None and place.kept == len(place.base.entries)


def _point(branch: Branch, agreed: int, length: int, settings: str) -> Place:
    """The latest point within the first `agreed` messages of `branch`."""
    if agreed == length and agreed < len(branch.entries):
        answer = branch.entries[agreed].answer
        if answer is not None and answer.settings == settings:
            return Place(branch, answer.begin, agreed)
    for at in range(agreed - 1, -1, -1):
        answer = branch.entries[at].answer
        if answer is not None:
            return Place(branch, answer.end, at + 1, answer)
    return Place()


def _from_nothing(
    branches: list[Branch], pending: list[Plan], head: str, sent: Sequence[Print], known: list[tuple[int, Branch]]
) -> Place:
    """What a history is that shares no answer with any branch."""
    if not branches and not pending:
        return Place()
    if any(plan.head == head and agreement(plan.prints, sent) == len(plan.prints) == len(sent) for plan in pending):
        return Place(deviation="branch", reason="branch")
    for agreed, branch in known:
        if agreed == len(sent):
            return Place(deviation="branch", reason="branch")
        answered = branch.entries[agreed].answer is not None and sent[agreed].role == "assistant"
        if answered or _answers_kept(branch, sent):
            return Place(deviation="mismatch", reason=_mismatch(branch, agreed, sent))
    if any(agreed for agreed, _ in known):
        return Place(deviation="root", reason="compaction")
    same = any(branch.head != head and _answers_kept(branch, sent) for branch in branches if branch.head != RAW)
    return Place(deviation="root", reason="tools" if same else "sub_agent")


def _answers_kept(branch: Branch, sent: Sequence[Print]) -> bool:
    """Whether an answer of `branch` stands where it stood, whatever is before it."""
    pairs = zip(branch.entries, sent, strict=False)
    return any(entry.answer is not None and entry.print.same(print) for entry, print in pairs)


def _mismatch(branch: Branch, at: int, sent: Sequence[Print]) -> str:
    recorded = branch.entries[at].print if at < len(branch.entries) else Print("nothing")
    return f"mismatch: message {at} ({sent[at].role}): {recorded.difference(sent[at])}"


# ── raw completions ─────────────────────────────────────────────────────────────────────────────────────


def find_ids(branches: Iterable[Branch], pending: Iterable[Plan], prompt: Ids) -> Place:
    """The latest point of any raw branch whose tokens `prompt` begins with."""
    best = Place()
    branches = [branch for branch in branches if branch.head == RAW]
    for branch in branches:
        ids = branch.ids(branch.length)
        shared = int(np.argmin(np.append(ids[: len(prompt)] == prompt[: len(ids)], False)))
        for place in _points(branch):
            whole = place.after is not None or place.position == len(prompt)
            if whole and place.position <= shared and place.position > best.position:
                best = place
    return _raw(best, bool(branches), list(pending), prompt)


def find_text(branches: Iterable[Branch], pending: Iterable[Plan], prompt: str) -> tuple[Place, str]:
    """The latest point of any raw branch whose text `prompt` begins with, and the text that follows.

    A client that stopped at a string of its own may send that string with the answer, or not.
    """
    best, rest = Place(), prompt
    branches = [branch for branch in branches if branch.head == RAW]
    for branch in branches:
        ahead = prompt
        for at, (print, answer) in enumerate(branch.entries):
            if answer is not None and not ahead and answer.begin > best.position:
                best, rest = Place(branch, answer.begin, at), ""
            if not ahead.startswith(print.content):
                break
            ahead = ahead[len(print.content) :]
            if answer is not None:
                ahead = ahead.removeprefix(answer.dropped)
                if answer.end > best.position:
                    best, rest = Place(branch, answer.end, at + 1, answer), ahead
    return _raw(best, bool(branches), list(pending), prompt), rest


def _points(branch: Branch) -> Iterable[Place]:
    for at, entry in enumerate(branch.entries):
        if entry.answer is not None:
            yield Place(branch, entry.answer.begin, at)
            yield Place(branch, entry.answer.end, at + 1, entry.answer)


def _raw(best: Place, begun: bool, pending: list[Plan], prompt: str | Ids) -> Place:
    """`best` with its deviation: raw text that shares nothing is another conversation, never a mismatch."""
    if best.base is None:
        if any(plan.head == RAW and _equal(plan, prompt) for plan in pending):
            return best._replace(deviation="branch", reason="branch")
        return best._replace(deviation="root", reason="sub_agent") if begun or pending else best
    claimed = any(plan.base is best.base and plan.kept == best.kept for plan in pending)
    return best if _ends(best) and not claimed else best._replace(deviation="branch", reason="branch")


def _equal(plan: Plan, prompt: str | Ids) -> bool:
    if isinstance(prompt, str):
        return "".join(print.content for print in plan.prints) == prompt
    return np.array_equal(plan.context, prompt)
