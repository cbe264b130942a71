"""A judge: what it is asked, how its reply is read, what is kept, and what becomes of prose."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.unit.answering import Answering, answering

from sluice.config.rewards import JudgeGroupReward, JudgeReward, RewardConfig
from sluice.errors import RewardError
from sluice.rewards.base import VerifierFailure
from sluice.rewards.rubric import Response, Rubric
from sluice.types import Message, Prompt, Reward

ASK = 'Question: {prompt}\nReference: {answer}\nResponse: {response}\nReply as {"score": s}, with 0 ≤ s ≤ 1.'
QUICK = {"model": "judge-1", "seconds": 5.0, "attempt_seconds": 2.0, "backoff_seconds": 0.001}


def said(text: str | None, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def prompt(**metadata: Any) -> Prompt:
    return Prompt("p7", "calc", (Message("user", "6 * 7 = {x}"),), "42", metadata)


async def with_judge(config: RewardConfig, work: Any) -> Any:
    rubric = Rubric([config])
    try:
        async with asyncio.timeout(30):
            return await work(rubric)
    finally:
        await rubric.close()


def ask(
    *script: Any, response: str = "it is 42", given: Prompt | None = None, **config: Any
) -> tuple[Reward, Answering]:
    async def main() -> tuple[Reward, Answering]:
        async with answering(*script) as server:
            made = JudgeReward(url=f"{server.url}/v1/", **{**QUICK, "prompt": ASK, **config})
            work = lambda rubric: rubric.reward(given or prompt(), response, episode_id="e")  # noqa: E731
            return await with_judge(made, work), server

    return asyncio.run(main())


def failure(*script: Any, **config: Any) -> str:
    with pytest.raises(VerifierFailure) as caught:
        ask(*script, **config)
    return str(caught.value)


def test_what_is_asked_and_what_is_kept() -> None:
    reply = 'It is right, if terse: {"score": 0}? No: {"score": 0.75, "why": "terse"}'
    reward, server = ask(
        said(reply), response='braces {"score": 1} {answer} stay', system="You judge.", params={"seed": 3}, weight=2
    )
    assert reward.total == 1.5
    assert reward.notes == {"judge": {"said": reply, "attempts": 1, "model": "judge-1"}}
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {
        "model": "judge-1", "temperature": 0.0, "max_tokens": 1024, "seed": 3,
        "messages": [
            {"role": "system", "content": "You judge."},
            {
                "role": "user",
                "content": 'Question: 6 * 7 = {x}\nReference: 42\nResponse: braces {"score": 1} {answer} stay\n'
                'Reply as {"score": s}, with 0 ≤ s ≤ 1.',
            },
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "config", "score"),
    [
        ('```json\n{"score": 1}\n```', {}, 1),
        ('{"score": "0.5"}', {}, 0.5),
        ('{"a": {"score": 1}} {"score": 0}', {}, 0),
        ('{"grade": 7}', {"field": "grade", "high": 10}, 7),
        ('{"score": "Yes "}', {"labels": {"yes": 1, "no": -1}}, 1),
        ("<think>GRADE: no</think> GRADE: yes", {"reply_pattern": r"GRADE: (\w+)", "labels": {"yes": 1, "no": 0}}, 1),
        ("I say 3 of 5", {"reply_pattern": r"(\d+) of 5", "high": 5}, 3),
    ],
)
def test_replies_that_can_be_read(reply: str, config: dict[str, Any], score: float) -> None:
    assert ask(said(reply), **config)[0].total == score


@pytest.mark.parametrize(
    ("reply", "config", "why"),
    [
        ("I would give this a 7 out of 10.", {}, "it holds no JSON object with 'score'"),
        ('{"score": 7}', {}, "int 7 is not a number from 0 to 1"),
        ('{"score": true}', {}, "bool True is not a number"),
        ('{"score": NaN}', {}, "float nan is not a number"),
        ('{"score": null}', {}, "NoneType None is not a number"),
        (None, {}, "it holds no JSON object"),
        ("maybe", {"reply_pattern": "yes|no", "labels": {"yes": 1, "no": 0}}, "matches nothing in it"),
        ('{"score": "maybe"}', {"labels": {"yes": 1, "no": 0}}, "is none of yes, no"),
    ],
)
def test_prose_is_asked_again_and_is_no_zero(reply: str | None, config: dict[str, Any], why: str) -> None:
    message = failure(said(reply), attempts=2, **config)
    assert "the judge judge-1 gave no score in 2 replies" in message
    assert why in message
    assert repr(reply or "") in message, "what it said is in the reason"


def test_a_reminder_helps_and_a_cut_off_reply_is_named() -> None:
    reward, server = ask(said("prose"), said('{"score": 1}'))
    assert reward.notes["judge"]["attempts"] == 2
    roles = [message["role"] for message in server.asked[1].body["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert (
        'only a JSON object {"score": …} that holds a number from 0 to 1'
        in server.asked[1].body["messages"][2]["content"]
    )
    assert "it was cut off by max_tokens" in failure(said("Let me think", "length"), attempts=1)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("close", "could not be reached"),
        ("hang", "did not answer within"),
        ((503, {}, {}), "status 503"),
        ((404, {"error": "no such model"}, {}), "refused with status 404"),
        (b"<html>", "what is no JSON"),
        ({"choices": []}, "which is no chat completion"),
        ({"choices": [{"message": {"content": [1]}}]}, "which is no text"),
    ],
)
def test_a_judge_that_is_slow_down_or_odd(answer: Any, reason: str) -> None:
    assert reason in failure(answer, seconds=1.0, attempt_seconds=0.3)


def test_a_group_is_judged_in_one_reply(tmp_path: Path) -> None:
    file = tmp_path / "compare.txt"
    file.write_text("{prompt}\n{responses}\nScores?")

    def compare(*script: Any) -> tuple[list[Reward], Answering]:
        async def main() -> tuple[list[Reward], Answering]:
            async with answering(*script) as server:
                config = JudgeGroupReward(url=server.url, prompt_file=file, **{**QUICK, "attempts": 2})
                none = Reward({}, {})
                members = [Response(f"e{n}", text, {}, none) for n, text in enumerate(("a", "bb"))]
                return await with_judge(config, lambda rubric: rubric.compare(prompt(), members)), server

        return asyncio.run(main())

    rewards, server = compare(said('{"scores": [1]}'), said('{"scores": [0, 1]}'))
    assert [reward.total for reward in rewards] == [0.0, 1.0]
    assert rewards[1].notes["judge_group"]["said"] == '{"scores": [0, 1]}'
    assert server.asked[0].body["messages"][0]["content"] == "6 * 7 = {x}\nResponse 1:\na\n\nResponse 2:\nbb\nScores?"
    with pytest.raises(VerifierFailure, match="not a list of 2 numbers"):
        compare(said('{"scores": "good"}'))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"prompt": "Judge {respnse}"}, r"(?s)reward 'judge': the judge's prompt has {respnse}.*mean {response}"),
        ({"prompt": "Judge {prompt}"}, r"has no {response} or {extracted}: the judge would see no answer"),
        ({"prompt": "", "prompt_file": Path("missing.txt")}, "prompt_file cannot be read"),
    ],
)
def test_a_prompt_that_does_not_fit_is_told_at_start(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(RewardError, match=reason):
        Rubric([JudgeReward(url="http://localhost:1/v1", **{**QUICK, **config})])


def test_metadata_and_bad_fields() -> None:
    _, server = ask(said('{"score": 1}'), prompt="{response} {metadata.rubric} {metadata}", given=prompt(rubric=[1]))
    assert server.asked[0].body["messages"][0]["content"] == "it is 42 [1] {metadata}"
    config = JudgeReward(url="http://localhost:1/v1", prompt="{response} {metadata.rubrik}", **QUICK)
    with pytest.raises(RewardError, match=r"(?s)asks for {metadata.rubrik}.*did you mean {metadata.rubric}"):
        Rubric([config]).check_prompts([prompt(rubric=1)])
    for wrong in (
        {},
        {"prompt": "a", "prompt_file": "b"},
        {"prompt": "a", "low": 1},
        {"prompt": "a", "params": {"n": 2}},
    ):
        with pytest.raises(ValidationError):
            JudgeReward(url="http://localhost:1/v1", model="m", **wrong)


def test_notes_are_in_the_log_line() -> None:
    from sluice.log.codec import Codec
    from sluice.log.jsonl import to_json
    from sluice.log.records import Entry, Kind, RewardRecord

    reward, _ = ask(said('{"score": 1}'))
    codec = Codec()
    back = codec.decode(Kind.REWARD, codec.encode(RewardRecord("e", reward)))
    assert back == RewardRecord("e", reward)
    assert json.loads(json.dumps(to_json(Entry(1, 0.0, back))))["reward"]["notes"]["judge"]["said"] == '{"score": 1}'
