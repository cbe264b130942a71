"""A language model as a judge: what it is asked, how its reply is read, what is kept of it.

A judge reads text that the policy wrote, and that text may speak to the judge ("give this a 1"). Nothing here prevents
that: put the response between marks in the prompt, and look at what scores high in `sluice episodes`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from sluice.config.rewards import JudgeGroupReward, JudgeReward, JudgeRewardBase
from sluice.rewards.base import Score, Submission, shown
from sluice.rewards.judge_prompt import JudgePrompt
from sluice.rewards.means import Means
from sluice.rewards.pattern import EXTRACT_SECONDS, TimedPattern
from sluice.rewards.remote import Service, ServiceError
from sluice.types import Prompt

T = TypeVar("T")
MAX_SAID = 16_384
"""Characters of a reply that are kept."""


class UnreadableReply(Exception):  # noqa: N818 - the state is the name
    """The judge replied, but not in the form that was agreed; it is asked again."""


class Judge:
    """Asks until the reply can be read, `attempts` times."""

    def __init__(self, config: JudgeRewardBase, means: Means) -> None:
        self._config = config
        self._service = Service(config, f"{config.url.rstrip('/')}/chat/completions", means)

    async def ask(self, text: str, read: Callable[[str], T], form: str) -> tuple[T, dict[str, Any]]:
        """What `read` makes of the reply, and notes of what was said.

        Args:
            text: the user's message.
            read: raises UnreadableReply; called in a thread.
            form: how the reply must look, for the reminder.

        Raises:
            ServiceError: no reply, or none that can be read.
        """
        config = self._config
        messages = [{"role": "system", "content": config.system}] if config.system else []
        messages.append({"role": "user", "content": text})
        said, why = "", ""
        for attempt in range(1, config.attempts + 1):
            said, whole = await self._reply(messages)
            try:
                found = await asyncio.to_thread(read, said)  # a pattern may take its time
            except UnreadableReply as error:
                why = str(error) if whole else f"{error}; it was cut off by max_tokens"
                reminder = f"Your reply could not be read: {error}. Reply again, with {form}."
                messages = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": reminder}]
            else:
                return found, {"said": said[:MAX_SAID], "attempts": attempt, "model": config.model}
        raise ServiceError(
            f"the judge {config.model} gave no score in {config.attempts} replies: {why}. "
            f"The last one: {shown(said, 500)}"
        )

    async def _reply(self, messages: Sequence[dict[str, str]]) -> tuple[str, bool]:
        """The text of one reply, and whether it is whole."""
        config = self._config
        body = {"model": config.model, "messages": list(messages), "temperature": config.temperature, **config.params}
        if config.max_tokens:
            body["max_tokens"] = config.max_tokens
        reply = await self._service.post(body)
        try:
            choice = reply["choices"][0]
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ServiceError(f"the judge answered with {shown(reply, 300)}, which is no chat completion") from None
        if content is not None and not isinstance(content, str):
            raise ServiceError(f"the judge's message is {shown(content, 300)}, which is no text")
        return content or "", choice.get("finish_reason") != "length"


class JudgeVerifier:
    """Has one response scored."""

    def __init__(self, config: JudgeReward, means: Means) -> None:
        self._config = config
        self._prompt = JudgePrompt(config, needs=("response", "extracted"))
        self._judge = Judge(config, means)
        self._labels = {label.strip().casefold(): score for label, score in config.labels.items()}
        pattern = config.reply_pattern
        self._pattern = TimedPattern(pattern, seconds=EXTRACT_SECONDS) if pattern else None

    def check(self, prompt: Prompt) -> None:
        """The prompt must have the metadata that the judge's text asks for."""
        self._prompt.check(prompt)

    async def score(self, submission: Submission) -> Score:
        """The judge's score.

        Raises:
            ServiceError: it gave none.
        """
        text = self._prompt.fill(submission.prompt, response=submission.response, extracted=submission.text)
        score, notes = await self._judge.ask(text, self._read, self._form)
        return Score(score, notes=notes)

    @property
    def _form(self) -> str:
        what = f"one of {', '.join(self._labels)}" if self._labels else _between(self._config)
        if self._pattern is not None:
            return f"{what}, in the form that was asked for"
        return f'only a JSON object {{"{self._config.field}": …}} that holds {what}'

    def _read(self, said: str) -> float:
        if self._pattern is None:
            value = json_field(said, self._config.field)
        else:
            value = self._pattern.last_now(said)
            if not value:
                raise UnreadableReply(f"{self._config.reply_pattern!r} matches nothing in it")
        if self._labels:
            label = str(value).strip().casefold()
            if label not in self._labels:
                raise UnreadableReply(f"{shown(value)} is none of {', '.join(self._labels)}")
            return self._labels[label]
        return number(value, self._config)


class JudgeGroupVerifier:
    """Has all responses of a group scored in one reply, so that the judge sees them side by side."""

    def __init__(self, config: JudgeGroupReward, means: Means) -> None:
        self._config = config
        self._prompt = JudgePrompt(config, needs=("responses",))
        self._judge = Judge(config, means)

    def check(self, prompt: Prompt) -> None:
        """The prompt must have the metadata that the judge's text asks for."""
        self._prompt.check(prompt)

    async def compare(self, submissions: Sequence[Submission]) -> Sequence[Score]:
        """The judge's scores, in order.

        Raises:
            ServiceError: it gave none, or not one for each.
        """
        numbered = "\n\n".join(f"Response {at}:\n{each.text}" for at, each in enumerate(submissions, start=1))
        text = self._prompt.fill(submissions[0].prompt, responses=numbered)
        count = len(submissions)
        form = f'only a JSON object {{"{self._config.field}": […]}} that holds a list of {count} numbers, each '
        scores, notes = await self._judge.ask(text, lambda said: self._read(said, count), form + _between(self._config))
        return [Score(score, notes=notes) for score in scores]

    def _read(self, said: str, count: int) -> list[float]:
        value = json_field(said, self._config.field)
        if not isinstance(value, list) or len(cast("list[Any]", value)) != count:
            raise UnreadableReply(f"{self._config.field!r} is {shown(value)}, not a list of {count} numbers")
        return [number(each, self._config) for each in cast("list[Any]", value)]


def number(value: Any, config: JudgeRewardBase) -> float:
    """A score in the range that is accepted; digits in quotes are a number too. Raises UnreadableReply."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not config.low <= found <= config.high:
        raise UnreadableReply(f"{shown(value)} is not {_between(config)}")
    return found


def _between(config: JudgeRewardBase) -> str:
    return f"a number from {config.low:g} to {config.high:g}"


def json_field(text: str, field: str) -> Any:
    """The value of `field` in the last JSON object of `text` that has it. Raises UnreadableReply."""
    found = [each[field] for each in _objects(text) if field in each]
    if not found:
        raise UnreadableReply(f"it holds no JSON object with {field!r}")
    return found[-1]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = text.find("{", end)
