"""The tool loop: the model calls Python functions until it answers without a call."""

from __future__ import annotations

import asyncio

from sluice.config.runners import ToolsRunner
from sluice.errors import DataError
from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.gateway.errors import ContextOverflow, SessionFull
from sluice.rollout.runners.base import EpisodeRequest
from sluice.rollout.runners.functions import Toolbox
from sluice.rollout.runners.toolkit import Toolkit, chat_messages
from sluice.rollout.session import Ask, Choice, Session
from sluice.types import Episode, Outcome, Prompt


class ToolLoop:
    """Answers with tools. What a tool does wrong is told to the model: only an engine or a deadline fails us.

    Outcomes: an answer without a call is `completed`; a turn cut by its limit, a full context or `max_turns`
    answers that all call is `truncated`; the deadline of the whole episode is an `infra_failure`.
    """

    def __init__(self, config: ToolsRunner, kit: Toolkit) -> None:
        self._config = config
        self._kit = kit
        self._tools = Toolbox(config.tools, seconds=config.tool_seconds)

    def admit(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise DataError when prompt and tools leave no room for an answer."""
        self._kit.admit(prompt, max_new_tokens, self._tools.specs)

    async def run(self, request: EpisodeRequest) -> Episode:
        """The whole conversation, as one session."""
        session = self._kit.session(request)
        deadline = asyncio.timeout(self._config.episode_seconds)
        try:
            async with deadline:
                return await self._converse(session)
        except TimeoutError:
            if not deadline.expired():
                raise
            await session.abort()
            reason = f"the episode took longer than {self._config.episode_seconds:g} s"
            return session.finish(Outcome.INFRA_FAILURE, reason)
        finally:
            await self._kit.engine.release(session.id)

    async def _converse(self, session: Session) -> Episode:
        messages = list(chat_messages(session.prompt))
        for turn in range(self._config.max_turns):
            try:
                (choice,) = await session.ask(Ask(tuple(messages), tools=self._tools.specs))
            except ContextOverflow as error:
                if not turn:  # `admit` saw to it that the first answer fits
                    raise DataError(error.args[0], hint=error.hint) from error
                return session.finish(Outcome.TRUNCATED, "the context is full")
            except SessionFull as error:
                return session.finish(Outcome.TRUNCATED, error.args[0])
            calls = choice.parsed.tool_calls
            if choice.turn.finish != "stop" or not calls:
                return session.finish()
            messages.append(as_message(choice))
            if turn + 1 < self._config.max_turns:
                results = await asyncio.gather(*(self._tools.call(call) for call in calls))
                messages += [
                    ChatMessage("tool", text, tool_call_id=call.id, name=call.name)
                    for call, text in zip(calls, results, strict=True)
                ]
        return session.finish(Outcome.TRUNCATED, f"{self._config.max_turns} answers, and the last one calls a tool")


def as_message(choice: Choice) -> ChatMessage:
    """A sampled turn as the next request sends it back."""
    parsed = choice.parsed
    return ChatMessage("assistant", parsed.content, reasoning=parsed.reasoning, tool_calls=parsed.tool_calls)
