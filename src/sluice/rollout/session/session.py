"""One session: histories in, answers out, every sampled token recorded once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sluice.errors import EngineError
from sluice.rollout.chat.base import ChatMessage, Parsed, ToolSpec
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Engine, Finish, GenerateRequest, Generation
from sluice.rollout.gateway.errors import HistoryMismatch, SessionClosed, SessionError, SessionFull
from sluice.rollout.runners.base import sampled_turn
from sluice.rollout.session.base import Ask, Choice, Limits, OnDelta
from sluice.rollout.session.branch import Answer, Plan, Tree
from sluice.rollout.session.flights import Flights
from sluice.rollout.session.history import Print, prints
from sluice.rollout.session.pinned import Pinned
from sluice.rollout.session.planner import Planner
from sluice.rollout.session.reader import Parser, PlainParser, Reader, cut
from sluice.types import Episode, Outcome, Prompt, SamplingParams, Turn


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """What the answers of one request have in common."""

    number: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    parser: Callable[[int], Parser]
    raw: bool
    on_delta: OnDelta | None


class Session:
    """The conversation of one episode.

    A call is recorded when all its answers are there, in one step: one that fails, is cancelled or is ended with
    `Finish.ABORT` leaves nothing but a count. Calls may overlap; each sees what was recorded before it began.

    Args:
        id, group_id, prompt: of the episode.
        sampling: pinned for every turn.
        engine: serves the policy.
        chat: its chat template and parsers.
        limits: see `Limits`.
        noise: the key of a turn's sampling noise by its name: empty for the first call's, then `1`, `2`, … in the
            order of calls, with `.1`, `.2`, … behind it for the second and later answers to one call.
        routes: bring the experts that each position was routed to.
        policy: name of the policy.

    Attributes:
        closed: finished; every further call is refused.
        last_used: `time.monotonic()` of the last begin or end of a call.
        in_flight: calls being answered.
    """

    def __init__(
        self,
        *,
        id: str,
        group_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        engine: Engine,
        chat: ChatRenderer,
        limits: Limits,
        noise: Callable[[str], int],
        routes: bool = False,
        policy: str = "actor",
    ) -> None:
        self.id = id
        self.group_id = group_id
        self.prompt = prompt
        self.sampling = sampling
        self.closed = False
        self.last_used = time.monotonic()
        self._chat = chat
        self._limits = limits
        self._noise = noise
        self._routes = routes
        self._policy = policy
        self._pinned = Pinned(sampling, limits.on_sampling)
        self._tree = Tree()
        self._planner = Planner(chat, self._tree)
        self._pending: list[tuple[Plan, int]] = []  # calls in flight, and the answers to each
        self._declared: list[str] = []
        self._calls = 0
        self._counts: Counter[str] = Counter()
        self._flights = Flights(engine)
        self._end = ""  # finish of the last call

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    # Calls.

    async def ask(self, ask: Ask) -> tuple[Choice, ...]:
        """Answer a history.

        Raises:
            SessionError: refused; nothing was sampled or recorded.
            DataError: the chat template does not take these messages.
            EngineError: the engine is gone, or ended the turn before the model did. Nothing was recorded; the same
                request may come again.
        """
        self._check(ask.n, ask.max_new_tokens, ask.wishes)
        plan = self._planner.chat(ask.messages, ask.tools, ask.template_kwargs, self._plans)
        number = self._calls

        def parser(index: int) -> Parser:
            name = f"call{number:05d}{index:03d}" + "{:03d}"
            return self._chat.parser(ask.tools, name.format, prompt=plan.context)

        sampling = self._pinned.limited(len(plan.context), self._limits.context_length, ask.max_new_tokens, ask.stop)
        return await self._answer(plan, ask.n, _Call(number, sampling, ask.stop, parser, False, ask.on_delta))

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        n: int = 1,
        max_new_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        wishes: Mapping[str, float] | None = None,
        on_delta: OnDelta | None = None,
    ) -> tuple[Choice, ...]:
        """Continue raw text or ids. What begins with a recorded text, or with recorded ids, goes on from there.

        Raises: see `ask`.
        """
        self._check(n, max_new_tokens, wishes or {})
        plan = self._planner.raw(prompt, self._plans)
        sampling = self._pinned.limited(len(plan.context), self._limits.context_length, max_new_tokens, stop)
        call = _Call(self._calls, sampling, stop, lambda _: PlainParser(self._chat.text), True, on_delta)
        return await self._answer(plan, n, call)

    def declare_fork(self, reason: str) -> None:
        """The next history that does not go on where a branch ends is a fork for this reason: no config refuses it
        and none counts it as a mismatch. Several declarations are taken in order."""
        self._declared.append(reason)

    def count_tokens(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[ToolSpec] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> int:
        """Tokens before the answer if this were asked now."""
        return len(self._planner.chat(messages, tools, template_kwargs or {}, self._plans).context)

    async def abort(self) -> None:
        """End what is in flight: its callers get EngineError. Returns when nothing is, or the engine is too slow."""
        await self._flights.abort()

    # What was recorded.

    def counters(self) -> dict[str, int]:
        """`turns`, `segments`, `forks/REASON`, `mismatches`, `sampling_flagged`, `malformed_calls`,
        `sampled_tokens`, `aborted_calls`."""
        named = ("turns", "mismatches", "malformed_calls", "sampled_tokens", "aborted_calls")
        counts = {name: self._counts[name] for name in named}
        forks = {name: count for name, count in self._counts.items() if name.startswith("forks/")}
        return {**counts, "segments": len(self._tree), "sampling_flagged": self._pinned.flagged, **forks}

    def transcript(self) -> list[dict[str, Any]]:
        """Every segment as JSON: its fork, and of each turn author, text, tokens, versions and finish."""
        return [
            {
                "fork": branch.fork._asdict() if branch.fork else None,
                "turns": [
                    {
                        "author": turn.author.value,
                        "text": self._chat.whole_text(turn.ids),
                        "tokens": len(turn),
                        "versions": [str(span.version) for span in turn.spans],
                        "finish": turn.finish,
                    }
                    for turn in branch.turns
                ],
            }
            for branch in self._tree
        ]

    def finish(
        self, outcome: Outcome | None = None, reason: str = "", info: Mapping[str, Any] | None = None
    ) -> Episode:
        """Close the session. Without an outcome the last call's end is taken: `length` is truncated, an aborted call
        or none at all is aborted, anything else is completed.

        Raises:
            SessionClosed: it was finished before.
        """
        self._require_open()
        self.closed = True
        if outcome is None:
            ends = {"": Outcome.ABORTED, "abort": Outcome.ABORTED, "length": Outcome.TRUNCATED}
            outcome = ends.get(self._end, Outcome.COMPLETED)
            whys = {"": "no model call", "abort": "the last model call was aborted"}
            reason = reason or whys.get(self._end, "")
        facts: dict[str, Any] = {"counters": self.counters(), **(info or {})}
        if self._pinned.wishes:
            facts["sampling_wishes"] = list(self._pinned.wishes)
        return self._tree.episode(
            self.id, self.group_id, self.prompt, outcome, reason=reason, policy=self._policy, info=facts
        )

    # Before an answer.

    def _require_open(self) -> None:
        if self.closed:
            raise SessionClosed(f"session {self.id} is closed", hint="open another one")

    def _check(self, n: int, max_new_tokens: int | None, wishes: Mapping[str, float]) -> None:
        self._require_open()
        if n < 1:
            raise SessionError(f"n is {n}; at least one answer must be asked for")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise SessionError(f"the limit of new tokens is {max_new_tokens}; it must be at least 1")
        flying = sum(wanted for _, wanted in self._pending)
        if self._counts["turns"] + flying + n > self._limits.max_turns:
            raise SessionFull(f"session {self.id} has had its {self._limits.max_turns} model calls")
        self._pinned.check(wishes)

    @property
    def _plans(self) -> list[Plan]:
        return [plan for plan, _ in self._pending]

    # An answer.

    async def _answer(self, plan: Plan, n: int, call: _Call) -> tuple[Choice, ...]:
        with self._admitted(plan, n) as plan:
            readers = [self._reader(call, index) for index in range(n)]
            drawn = await self._flights.draw(self._requests(plan, call, readers))
            if self.closed:
                raise SessionClosed(f"session {self.id} was finished while this was being answered")
            if any(one.finish is Finish.ABORT for one in drawn):
                self._counts["aborted_calls"] += 1
                self._end = "abort"
                raise EngineError(
                    f"the turn was ended before the model ended it (session {self.id})", hint="send the request again"
                )
            return self._record(plan, call, readers, drawn)

    @contextmanager
    def _admitted(self, plan: Plan, n: int) -> Iterator[Plan]:
        """Hold a place among the calls in flight. A declared reason is taken, and given back by a call that fails."""
        declared = self._declared.pop(0) if plan.deviation and self._declared else ""
        try:
            if declared:
                plan = replace(plan, reason=declared)
            else:
                self._permit(plan)
            calls = [*self._pending, (plan, n)]
            expected = max(1, len(self._tree)) + sum(wanted - 1 + bool(one.deviation) for one, wanted in calls)
            if expected > self._limits.max_segments:
                raise SessionFull(
                    f"session {self.id} may have {self._limits.max_segments} segments; this one would be {expected}",
                    hint="go on where a segment ended, or raise max_segments",
                )
            self._calls += 1
            self.last_used = time.monotonic()
            held = calls[-1]
            self._pending = calls
            try:
                yield plan
            finally:
                self._pending = [one for one in self._pending if one is not held]
                self.last_used = time.monotonic()
        except BaseException:
            if declared:
                self._declared.insert(0, declared)
            raise

    def _permit(self, plan: Plan) -> None:
        """Count a deviation that nobody declared, or refuse it as config says."""
        limits = self._limits
        if plan.deviation == "mismatch":
            self._counts["mismatches"] += 1
        allowed = {"mismatch": limits.on_mismatch, "branch": limits.on_branch, "root": limits.on_root}
        if allowed.get(plan.deviation) == "fail":
            raise HistoryMismatch(
                f"this history does not go on where session {self.id} is: {plan.reason}",
                hint=f"send back what was answered, declare the fork, or allow it with on_{plan.deviation} = 'fork'",
            )

    def _reader(self, call: _Call, index: int) -> Reader:
        tell = partial(call.on_delta, index) if call.on_delta is not None else None
        return Reader(call.parser(index), call.stop, tell)

    def _requests(self, plan: Plan, call: _Call, readers: Sequence[Reader]) -> list[GenerateRequest]:
        """One per reader, each with noise of its own."""
        routes_from = (plan.base.routes_end(plan.kept) if plan.base else 0) if self._routes else None
        requests: list[GenerateRequest] = []
        for index, reader in enumerate(readers):
            name = (str(call.number) if call.number or index else "") + (f".{index}" if index else "")
            requests.append(
                GenerateRequest(
                    f"{self.id}/{name or 0}",
                    plan.context,
                    call.sampling,
                    self._noise(name),
                    routing_key=self.id,
                    on_tokens=reader.feed if call.on_delta is not None else None,
                    routes_from=routes_from,
                )
            )
        return requests

    def _record(
        self, plan: Plan, call: _Call, readers: Sequence[Reader], drawn: Sequence[Generation]
    ) -> tuple[Choice, ...]:
        """Everything of one call, in one step."""
        turns = [sampled_turn(one, call.sampling) for one in drawn]
        parsed = [reader.close(turn.ids) for reader, turn in zip(readers, turns, strict=True)]
        texts = [self._chat.text(turn.ids) for turn in turns]
        answers = [self._as_answer(plan, call, *one) for one in zip(turns, parsed, texts, strict=True)]
        before = len(self._tree)
        branches = self._tree.record(plan, answers)
        for branch in self._tree.branches[before:]:
            if branch.fork is not None:
                self._counts[f"forks/{branch.fork.reason.partition(':')[0]}"] += 1
        self._counts["turns"] += len(turns)
        self._counts["sampled_tokens"] += sum(map(len, turns))
        self._counts["malformed_calls"] += sum(len(one.malformed) for one in parsed)
        self._end = turns[0].finish
        shown = [cut(text, call.stop) for text in texts]
        used = len(plan.context)
        return tuple(
            Choice(at, parsed[at], turns[at], shown[at], branches[at].index, used, one.cached_tokens)
            for at, one in enumerate(drawn)
        )

    def _as_answer(self, plan: Plan, call: _Call, turn: Turn, parsed: Parsed, text: str) -> tuple[Print, Answer]:
        begin = len(plan.context)
        if call.raw:
            shown = parsed.content
            return Print("text", shown), Answer(begin, turn, dropped=text.removeprefix(shown))
        message = ChatMessage("assistant", parsed.content, parsed.reasoning, parsed.tool_calls)
        return prints((message,))[0], Answer(begin, turn, plan.settings)
