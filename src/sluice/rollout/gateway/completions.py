"""OpenAI's plain completions: raw text or ids, continued."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.content import MOST_CHOICES, Sampling, Stop, Tokens, usage_of
from sluice.rollout.gateway.errors import BadRequest
from sluice.rollout.gateway.openai_chat import StreamOptions
from sluice.rollout.gateway.stream import Choices, Stream, event
from sluice.rollout.session import Choice

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class CompletionRequest(Sampling):
    """Body of `POST /v1/completions`: one prompt, text or ids."""

    prompt: str | list[TokenId] | Annotated[list[str], Field(min_length=1, max_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    stop: Stop = None
    max_tokens: Tokens | None = None
    return_token_ids: bool | None = None

    def text_or_ids(self) -> str | list[int]:
        """The prompt.

        Raises:
            BadRequest: nothing to continue, or what cannot be honoured.
        """
        for name, asked in (
            ("echo", self.echo),
            ("suffix", self.suffix),
            ("best_of", (self.best_of or 1) > (self.n or 1)),
            ("logprobs", self.logprobs),
        ):
            if asked:
                only = "; only 0, the drawn token's own" if name == "logprobs" else ""
                raise BadRequest(f"{name} is not served{only}", param=name)
        if isinstance(self.prompt, str):
            prompt: str | list[int] = self.prompt
        elif self.prompt and isinstance(self.prompt[0], str):
            prompt = self.prompt[0]
        else:
            prompt = [id for id in self.prompt if isinstance(id, int)]
        if not prompt:
            raise BadRequest("the prompt is empty", param="prompt")
        return prompt


@dataclass(frozen=True, slots=True)
class Completing:
    """What all parts of one answer carry."""

    id: str
    model: str
    body: CompletionRequest
    chat: ChatRenderer

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": self.model}

    def completion(self, choices: Choices) -> dict[str, Any]:
        """The whole answer."""
        shown = [self._choice(choice, choice.text) for choice in choices]
        return {**self._head(), "choices": shown, "usage": usage_of(choices, self.chat)}

    def _choice(self, choice: Choice, text: str) -> dict[str, Any]:
        finish = "length" if choice.turn.finish == "length" else "stop"
        shown: dict[str, Any] = {"index": choice.index, "text": text, "finish_reason": finish, "logprobs": None}
        if self.body.logprobs is not None:
            shown["logprobs"] = self._logprobs(choice)
        if self.body.return_token_ids:
            shown["token_ids"] = choice.turn.ids.tolist()
        return shown

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        assert choice.turn.logprobs is not None  # a sampled turn
        tokens = [self.chat.whole_text([int(id)]) for id in choice.turn.ids]
        offsets = [0]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        values = [float(value) for value in choice.turn.logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets[:-1]}

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as it is drawn."""
        async for pieces in stream.pieces():
            for index, delta in pieces:
                choice = {"index": index, "text": delta.text, "finish_reason": None, "logprobs": None}
                yield event({**self._head(), "choices": [choice]})
        choices = stream.choices()
        for choice in choices:
            yield event({**self._head(), "choices": [self._choice(choice, "")]})
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event({**self._head(), "choices": [], "usage": usage_of(choices, self.chat)})
        yield event("[DONE]")
