"""A session's calls: what goes on, what is a fork and why, what is refused, and what a failed call leaves."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import worked
from session_rig import ADD, CHAT, USER, Script, answered, check, make, one, said

from sluice.errors import EngineError
from sluice.rollout.chat.base import ChatMessage, Delta, ToolCall
from sluice.rollout.engines.base import Finish, GenerateRequest, Generation
from sluice.rollout.gateway.errors import (
    ContextOverflow,
    HistoryMismatch,
    SamplingPinned,
    SessionClosed,
    SessionError,
    SessionFull,
)
from sluice.rollout.session import Ask
from sluice.types import Author, Fork, Outcome, SamplingParams, expand

SYSTEM = ChatMessage("system", "be brief")
CALL = '<tool_call>\n{"name": "add", "arguments": {"b": 1.0, "a": 2}}\n</tool_call>'


def user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def forks(episode: Any) -> list[Fork | None]:
    return [segment.fork for segment in episode.segments]


# ── going on ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_faithful_client_stays_in_one_segment() -> None:
    async def main() -> None:
        engine = Script(["<think>\nhm\n</think>\n\n one ", CALL, "three"])
        session = make(engine)
        first = await one(session, SYSTEM, USER, tools=(ADD,))
        history = [SYSTEM, USER, said(first, reasoning=False), user("and?")]
        second = await one(session, *history, tools=(ADD,))
        (call,) = second.parsed.tool_calls
        renamed = ToolCall("toolu_1", call.name, json.dumps(json.loads(call.arguments), sort_keys=True))
        history += [ChatMessage("assistant", "", tool_calls=(renamed,)), answered(renamed, "3")]
        third = await one(session, *history, tools=(ADD,))
        assert (first.segment, second.segment, third.segment) == (0, 0, 0)
        episode = session.finish()
        assert forks(episode) == [None]
        assert episode.outcome is Outcome.COMPLETED
        assert [turn.author for turn in episode.segments[0].turns] == [Author.OBSERVED, Author.SAMPLED] * 3
        assert session.counters() == {
            "turns": 3,
            "segments": 1,
            "mismatches": 0,
            "sampling_flagged": 0,
            "malformed_calls": 0,
            "aborted_calls": 0,
            "sampled_tokens": episode.num_sampled_tokens,
        }
        check(episode, engine)

    asyncio.run(main())


def test_the_worked_example_comes_out_of_a_session() -> None:
    expected = worked.episodes()[0]

    class Rendering:
        """Ids as the example has them."""

        eos = (2,)

        def begin(self, messages: Any, tools: Any = (), **_: Any) -> Any:
            return np.array([1, 10, 11, 12], np.int32)

        def extend(self, last: Any, messages: Any, tools: Any = (), **_: Any) -> Any:
            return np.array([30, 31] if messages[0].role == "tool" else [40, 41], np.int32)

        def text(self, ids: Any) -> str:
            return " ".join(map(str, ids))

        def parser(self, tools: Any = (), call_id: Any = None, *, prompt: Any = None) -> Any:
            return CHAT.parser(tools, call_id or str)

    class Drawing(Script):
        async def generate(self, request: GenerateRequest) -> Generation:
            turn = turns[len(self.requests)]
            assert turn.logprobs is not None
            answer = Generation(turn.ids, turn.logprobs, turn.spans, Finish.STOP)
            self.requests.append(request)
            self.answers.append(answer)
            return answer

    turns = list(expected.sampled_turns())

    async def main() -> None:
        session = make(Drawing([]), chat=Rendering())
        first = await one(session, USER)
        await one(session, USER, said(first), ChatMessage("tool", "t"))
        session.declare_fork("sub_agent")
        await one(session, USER, said(first), user("sub"))
        episode = session.finish()
        assert forks(episode) == forks(expected)
        for segment, wanted in zip(episode.segments, expected.segments, strict=True):
            for turn, other in zip(segment.turns, wanted.turns, strict=True):
                assert turn.author is other.author
                assert turn.ids.tolist() == other.ids.tolist()
                assert turn.spans == other.spans
        trained = [sample.num_trained_tokens for sample in expand(episode)]
        assert trained == [6, 3]

    asyncio.run(main())


# ── deviations ──────────────────────────────────────────────────────────────────────────────────────────


async def two_turns(session: Any) -> tuple[Any, Any]:
    first = await one(session, SYSTEM, USER)
    second = await one(session, SYSTEM, USER, said(first), user("more"))
    return first, second


def test_a_retry_is_a_branch_where_the_answer_began() -> None:
    async def main() -> None:
        engine = Script(["a", "b", "c", "d"])
        session = make(engine)
        first, _ = await two_turns(session)
        again = await one(session, SYSTEM, USER, said(first), user("more"))
        start = await one(session, SYSTEM, USER)
        episode = session.finish()
        assert forks(episode) == [
            None,
            Fork(0, again.context_tokens, "branch"),
            Fork(0, start.context_tokens, "branch"),
        ]
        assert all(len(segment.turns) == 1 for segment in episode.segments[1:])
        assert session.counters()["forks/branch"] == 2
        assert session.counters()["mismatches"] == 0
        noise = [request.noise_key for request in engine.requests]
        assert len(set(noise)) == 4
        check(episode, engine)

    asyncio.run(main())


def test_another_question_after_an_earlier_answer_is_a_branch_where_that_ended() -> None:
    async def main() -> None:
        engine = Script(["a", "b", "c", "d"])
        session = make(engine)
        first, _ = await two_turns(session)
        other = await one(session, SYSTEM, USER, said(first), user("something else"))
        end = first.context_tokens + len(first.turn)
        more = await one(session, SYSTEM, USER, said(first), user("something else"), said(other), user("on"))
        assert (other.segment, more.segment) == (1, 1)
        episode = session.finish()
        assert forks(episode) == [None, Fork(0, end, "branch")]
        check(episode, engine)

    asyncio.run(main())


def test_a_fork_of_a_fork_names_the_segment_that_owns_the_last_shared_token() -> None:
    async def main() -> None:
        engine = Script(["a", "b", "c", "d", "e"])
        session = make(engine)
        first, _ = await two_turns(session)
        history = [SYSTEM, USER, said(first), user("other")]
        other = await one(session, *history)
        await one(session, *history)
        await one(session, *history, said(other), user("x"))
        episode = session.finish()
        assert forks(episode)[2] == Fork(1, other.context_tokens, "branch")
        assert len(episode.segments) == 3
        check(episode, engine)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("history", "tools", "deviation", "reason"),
    [
        ([ChatMessage("system", "sub"), user("task")], (), "root", "sub_agent"),
        ([SYSTEM, user("what was said so far: nothing")], (), "root", "compaction"),
        ([SYSTEM, USER, "a", user("more")], (ADD,), "root", "tools"),
        ([SYSTEM, USER, "z", user("more")], (), "mismatch", "mismatch: message 2 (assistant): content differs from "),
        (
            [ChatMessage("system", "it is noon"), USER, "a", user("more")],
            (),
            "mismatch",
            "mismatch: message 0 (system): ",
        ),
        ([SYSTEM, user("changed"), "a", user("more")], (), "mismatch", "mismatch: message 1 (user): content differs"),
        ([SYSTEM, USER, "a", user("more!"), "b", user("x")], (), "mismatch", "mismatch: message 3 (user): content"),
        ([SYSTEM, USER, "a", user("more"), "b!", user("x")], (), "mismatch", "mismatch: message 4 (assistant): "),
    ],
)
def test_every_other_history_is_a_root_or_a_mismatch(history: Any, tools: Any, deviation: str, reason: str) -> None:
    messages = [one if isinstance(one, ChatMessage) else ChatMessage("assistant", one) for one in history]

    async def main() -> None:
        engine = Script(["a", "b", "c"])
        session = make(engine)
        first, _ = await two_turns(session)
        await one(session, *messages, tools=tools)
        episode = session.finish()
        fork = forks(episode)[1]
        assert fork is not None
        after_first = first.context_tokens + len(first.turn)
        kept = deviation == "mismatch" and messages[:3] == [SYSTEM, USER, ChatMessage("assistant", "a")]
        assert (fork.parent, fork.position) == (0, after_first if kept else 0)
        assert fork.reason.startswith(reason)
        assert session.counters()["mismatches"] == (deviation == "mismatch")
        assert session.counters()[f"forks/{reason.partition(':')[0]}"] == 1
        check(episode, engine)

        refusing = make(Script(["a", "b", "c"]), limits={f"on_{deviation}": "fail"})
        await two_turns(refusing)
        with pytest.raises(HistoryMismatch, match="declare the fork"):
            await one(refusing, *messages, tools=tools)
        assert refusing.counters()["segments"] == 1
        refusing.declare_fork("edit")
        await one(refusing, *messages, tools=tools)
        assert refusing.counters()["forks/edit"] == 1
        assert refusing.counters()["mismatches"] == (deviation == "mismatch")

    asyncio.run(main())


def test_a_mismatch_shows_little_of_the_content() -> None:
    async def main() -> None:
        session = make(Script(["x" * 400, "b"]))
        await one(session, USER)
        await one(session, USER, ChatMessage("assistant", "y" * 400), user("more"))
        reason = forks(session.finish())[1].reason  # type: ignore[union-attr]
        assert reason.count("x") <= 40
        assert reason.count("y") <= 40

    asyncio.run(main())


def test_a_declaration_waits_for_a_deviation_and_survives_a_failed_one() -> None:
    async def main() -> None:
        engine = Script(["a", "b", "c"])
        session = make(engine, limits={"on_root": "fail"})
        session.declare_fork("summary")
        await two_turns(session)
        engine.failure = EngineError("gone")
        with pytest.raises(EngineError):
            await one(session, SYSTEM, user("summary"))
        engine.failure = None
        await one(session, SYSTEM, user("summary"))
        assert forks(session.finish()) == [None, Fork(0, 0, "summary")]

    asyncio.run(main())


# ── several at once ─────────────────────────────────────────────────────────────────────────────────────


def test_equal_requests_at_once_share_their_prompt() -> None:
    async def main() -> None:
        engine = Script(["a", "b", "c", "d"])
        engine.gate.clear()
        session = make(engine)
        calls = [asyncio.create_task(one(session, SYSTEM, USER)) for _ in range(2)]
        await engine.until_started(2)
        assert session.in_flight == 2
        engine.gate.set()
        first, second = await asyncio.gather(*calls)
        await asyncio.gather(*(one(session, SYSTEM, USER, said(first), user(text)) for text in ("left", "right")))
        episode = session.finish()
        end = first.context_tokens + len(first.turn)
        assert forks(episode) == [None, Fork(0, second.context_tokens, "branch"), Fork(0, end, "branch")]
        check(episode, engine)

    asyncio.run(main())


def test_n_answers_are_forks_where_the_answer_begins() -> None:
    async def main() -> None:
        engine = Script(["a", "b", "c", "d"])
        session = make(engine)
        choices = await session.ask(Ask((USER,), n=3))
        assert [choice.index for choice in choices] == [0, 1, 2]
        assert [choice.text for choice in choices] == ["a", "b", "c"]
        await one(session, USER, said(choices[1]), user("on"))
        episode = session.finish()
        at = choices[0].context_tokens
        assert forks(episode) == [None, Fork(0, at, "n"), Fork(0, at, "n")]
        assert [len(segment.turns) for segment in episode.segments] == [2, 3, 1]
        check(episode, engine)

    asyncio.run(main())


def test_a_cancelled_call_leaves_nothing() -> None:
    async def main() -> None:
        engine = Script(["a", "b"])
        session = make(engine)
        first = await one(session, USER)
        engine.gate.clear()
        call = asyncio.create_task(one(session, USER, said(first), user("more")))
        await engine.until_started(2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert session.in_flight == 0
        engine.gate.set()
        again = await one(session, USER, said(first), user("more"))
        assert again.segment == 0
        assert forks(session.finish()) == [None]

    asyncio.run(main())


def test_an_aborted_turn_is_no_end_of_the_model() -> None:
    async def main() -> None:
        engine = Script(["a", "half"])
        session = make(engine)
        first = await one(session, USER)
        engine.gate.clear()
        call = asyncio.create_task(one(session, USER, said(first), user("more")))
        await engine.until_started(2)
        await session.abort()
        with pytest.raises(EngineError, match="ended before the model ended it"):
            await call
        episode = session.finish()
        assert episode.outcome is Outcome.ABORTED
        assert episode.reason == "the last model call was aborted"
        assert sum(1 for _ in episode.sampled_turns()) == 1

    asyncio.run(main())


def test_one_failed_answer_of_several_ends_the_others() -> None:
    async def main() -> None:
        class Failing(Script):
            async def generate(self, request: GenerateRequest) -> Generation:
                if request.rid.endswith(".1"):
                    raise EngineError("gone")
                return await super().generate(request)

        engine = Failing(["a", "b"])
        engine.gate.clear()
        session = make(engine)
        with pytest.raises(EngineError, match="gone"):
            await session.ask(Ask((USER,), n=3))
        assert session.counters()["turns"] == session.in_flight == 0

    asyncio.run(main())


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────


def test_sampling_is_pinned() -> None:
    async def main() -> None:
        engine = Script(["a", "b"])
        session = make(engine)
        own = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "presence_penalty": 0.0}
        await one(session, USER, wishes=own)
        for name, value in {"temperature": 0.0, "top_p": 0.9, "seed": 3, "frequency_penalty": 0.1}.items():
            with pytest.raises(SamplingPinned, match=name):
                await one(session, USER, wishes={**own, name: value})
        flagging = make(engine, limits={"on_sampling": "flag"})
        await one(flagging, USER, wishes={"temperature": 0.0})
        assert engine.requests[-1].sampling.temperature == 0.8
        episode = flagging.finish()
        assert episode.info["sampling_wishes"] == [{"temperature": 0.0}]
        assert episode.info["counters"]["sampling_flagged"] == 1
        json.dumps(episode.info)

    asyncio.run(main())


def test_an_answer_has_the_room_that_is_left() -> None:
    async def main() -> None:
        engine = Script(["a", "b"])
        used = len(CHAT.begin((USER,)))
        session = make(engine, limits={"context_length": used + 5})
        assert session.count_tokens((USER,)) == used
        await one(session, USER, max_new_tokens=3)
        await one(session, USER)
        assert [request.sampling.max_new_tokens for request in engine.requests] == [3, 5]
        with pytest.raises(ContextOverflow, match=f"maximum context length is {used + 5} tokens"):
            await one(session, USER, user("much more than fits"), USER, USER)
        assert session.counters()["turns"] == 2

    asyncio.run(main())


def test_bounds_and_ends() -> None:
    async def main() -> None:
        session = make(Script(["a"] * 9), limits={"max_turns": 3, "max_segments": 2})
        with pytest.raises(SessionError, match="n is 0"):
            await one(session, USER, n=0)
        with pytest.raises(SessionError, match="no messages"):
            await one(session)
        with pytest.raises(SessionFull, match="2 segments"):
            await session.ask(Ask((USER,), n=3))
        await session.ask(Ask((USER,), n=2))
        with pytest.raises(SessionFull, match="3 model calls"):
            await session.ask(Ask((USER,), n=2))
        session.finish()
        with pytest.raises(SessionClosed):
            await one(session, USER)
        with pytest.raises(SessionClosed):
            session.finish()
        empty = make(Script([])).finish()
        assert (empty.outcome, empty.reason, empty.segments) == (Outcome.ABORTED, "no model call", ())

    asyncio.run(main())


def test_a_session_that_is_finished_meanwhile_records_no_more() -> None:
    async def main() -> None:
        engine = Script(["a"])
        engine.gate.clear()
        session = make(engine)
        call = asyncio.create_task(one(session, USER))
        await engine.until_started(1)
        episode = session.finish(Outcome.INFRA_FAILURE, "idle")
        engine.gate.set()
        with pytest.raises(SessionClosed):
            await call
        assert (episode.outcome, episode.reason, episode.segments) == (Outcome.INFRA_FAILURE, "idle", ())

    asyncio.run(main())


def test_a_cut_turn_is_truncated() -> None:
    async def main() -> None:
        engine = Script([CHAT.encode("no end").tolist()])
        engine.finish = Finish.LENGTH
        session = make(engine)
        assert (await one(session, USER)).turn.finish == "length"
        assert session.finish().outcome is Outcome.TRUNCATED

    asyncio.run(main())


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("streamed", [False, True])
def test_a_clients_stop_string_is_kept_as_tokens_and_not_shown(streamed: bool) -> None:
    async def main() -> None:
        engine = Script([CHAT.encode("first STOP").tolist(), "b"])
        session = make(engine, sampling=SamplingParams(temperature=0.8, stop=("own",)))
        told: list[Delta] = []
        first = await one(
            session, USER, stop=("STOP",), on_delta=(lambda _, new: told.extend(new)) if streamed else None
        )
        assert engine.requests[0].sampling.stop == ("own", "STOP")
        assert first.parsed.content == first.text == "first "
        assert CHAT.text(first.turn.ids) == "first STOP"
        assert not streamed or "".join(delta.text for delta in told) == "first "
        await one(session, USER, replace(said(first), content="first"), user("on"))
        episode = session.finish()
        assert forks(episode) == [None]
        check(episode, engine)

    asyncio.run(main())


def test_what_is_streamed_is_what_is_answered() -> None:
    async def main() -> None:
        engine = Script(["<think>\nhm\n</think>\n\nso: " + CALL, "plain"])
        session = make(engine)
        told: dict[int, list[Delta]] = {0: [], 1: []}
        choices = await session.ask(Ask((USER,), n=2, tools=(ADD,), on_delta=lambda n, new: told[n].extend(new)))
        for choice in choices:
            pieces = told[choice.index]
            assert "".join(one.text for one in pieces if one.kind == "content") == choice.parsed.content
            assert "".join(one.text for one in pieces if one.kind == "reasoning") == choice.parsed.reasoning
            assert tuple(one.call for one in pieces if one.call) == choice.parsed.tool_calls
        assert choices[0].parsed.reasoning == "hm"
        assert len(choices[0].parsed.tool_calls) == 1

    asyncio.run(main())


def test_a_transcript_is_json() -> None:
    async def main() -> None:
        session = make(Script(["a", "b"]))
        await session.ask(Ask((USER,), n=2))
        shown = json.loads(json.dumps(session.transcript()))
        assert [len(segment["turns"]) for segment in shown] == [2, 1]
        assert shown[1]["fork"]["reason"] == "n"
        assert shown[0]["turns"][1]["versions"] == ["0.0"]
        assert shown[0]["turns"][1]["text"].startswith("a")

    asyncio.run(main())


def test_routes_of_a_segment_have_no_gap() -> None:
    async def main() -> None:
        engine = Script(["a", "b", "c"])
        session = make(engine, routes=True)
        first, second = await two_turns(session)
        await one(session, SYSTEM, USER, said(first), user("other"))
        one_before_end = first.context_tokens + len(first.turn) - 1
        assert [request.routes_from for request in engine.requests] == [0, one_before_end, one_before_end]
        assert second.turn.routes is not None
        assert second.turn.routes.end == second.context_tokens + len(second.turn) - 1

    asyncio.run(main())


# ── raw completions ─────────────────────────────────────────────────────────────────────────────────────


def test_raw_text_goes_on_from_text_and_ids_from_ids() -> None:
    async def main() -> None:
        engine = Script([CHAT.encode(" two STOP").tolist(), "four", "x", "six", "y", "z"])
        session = make(engine)
        (first,) = await session.complete("one", stop=("STOP",))
        assert first.text == first.parsed.content == " two "
        (second,) = await session.complete("one two STOP three ")
        assert second.segment == 0
        assert engine.requests[1].ids.tolist() == [
            *CHAT.encode("one").tolist(),
            *first.turn.ids.tolist(),
            *CHAT.encode(" three ").tolist(),
        ]
        (other,) = await session.complete("elsewhere")
        assert other.segment == 1
        ids = np.concatenate([engine.requests[1].ids, second.turn.ids, CHAT.encode(" five ")])
        (third,) = await session.complete(ids.tolist())
        assert third.segment == 0
        (again,) = await session.complete("one")
        (early,) = await session.complete("one two  instead")
        assert (again.segment, early.segment) == (2, 3)
        episode = session.finish()
        begin = len(CHAT.encode("one"))
        assert forks(episode)[1:] == [
            Fork(0, 0, "sub_agent"),
            Fork(0, begin, "branch"),
            Fork(0, begin + len(first.turn), "branch"),
        ]
        check(episode, engine)

    asyncio.run(main())
