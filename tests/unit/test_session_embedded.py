"""Sessions over the real embedded engine: tokens, versions and log-probs of turns that a weight swap interrupts."""

from __future__ import annotations

import asyncio

import numpy as np
from embedded_rig import V0, make, publish, reference_logprobs, tiny, until_drawn
from session_rig import make as open_session
from session_rig import one, said
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sluice.config.gateway import ChatConfig
from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.session import Ask
from sluice.types import Author, Outcome, SamplingParams, Version, expand

V1 = Version(1)
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '~' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def character_chat() -> ChatRenderer:
    """Token n is the n-th printable character from space on; `~` ends a turn."""
    backend = Tokenizer(models.WordLevel({chr(32 + n): n for n in range(95)} | {"@@": 95}, "@@"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="~")
    tokenizer.chat_template = TEMPLATE
    return ChatRenderer(tokenizer, ChatConfig(format="none"))


def user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def test_a_turn_that_a_swap_interrupts_carries_two_versions_and_the_client_sees_one_answer() -> None:
    old, new = tiny(seed=0), tiny(seed=1)
    engine = make(old)
    chat = character_chat()
    sampling = SamplingParams(max_new_tokens=40)  # no stop id: the swap comes in the middle

    async def main() -> None:
        session = open_session(engine, chat=chat, sampling=sampling, limits={"context_length": 512})
        told: list[str] = []
        first = await one(session, user("hello"))
        before = engine.statistics()["generated_tokens"]
        ask = Ask(
            (user("hello"), said(first), user("more")),
            n=2,
            on_delta=lambda at, new: told.extend(delta.text for delta in new if at == 0),
        )
        call = asyncio.create_task(session.ask(ask))
        async with asyncio.timeout(60):
            await until_drawn(engine, int(before) + 12)
            await engine.apply(publish(new, V1))
            second, other = await call
            third = await one(session, *ask.messages, said(second), user("end"))
        assert [span.version for span in second.turn.spans] == [V0, V1]
        assert "".join(told) == second.parsed.content
        assert (first.segment, second.segment, other.segment, third.segment) == (0, 0, 1, 0)
        assert third.cached_tokens >= 0

        episode = session.finish()
        assert episode.outcome is Outcome.TRUNCATED
        weights = {V0: old, V1: new}
        for index, segment in enumerate(episode.segments):
            ids, at = episode.ids(index), episode.start(index)
            for turn in segment.turns:
                if turn.author is Author.SAMPLED:
                    assert turn.logprobs is not None
                    for span in turn.spans:
                        start, end = at + span.start, at + span.end
                        expected = reference_logprobs(weights[span.version], ids[:start], ids[start:end])
                        found = turn.logprobs[span.start : span.end]
                        assert np.abs(found - expected).max() < 1e-4
                at += len(turn)
        trained = sum(sample.num_trained_tokens for sample in expand(episode))
        assert trained == sum(len(choice.turn) for choice in (first, second, other, third))

    asyncio.run(main())


def test_a_cancelled_call_frees_the_engine() -> None:
    engine = make()
    chat = character_chat()

    async def main() -> None:
        session = open_session(
            engine, chat=chat, sampling=SamplingParams(max_new_tokens=400), limits={"context_length": 512}
        )
        call = asyncio.create_task(session.ask(Ask((user("hello"),), n=3)))
        async with asyncio.timeout(60):
            await until_drawn(engine, 6)
            call.cancel()
            await asyncio.wait([call])
        assert call.cancelled()
        assert engine.statistics()["running"] == engine.statistics()["kv_blocks_used"] == 0
        assert session.counters()["turns"] == session.in_flight == 0

    asyncio.run(main())
