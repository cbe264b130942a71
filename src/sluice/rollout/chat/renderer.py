"""Conversations become token ids once and are only ever appended to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.config.gateway import ChatConfig
from sluice.errors import DataError
from sluice.rollout.chat.base import ChatMessage, ToolCall, ToolSpec
from sluice.rollout.chat.detokenise import Detokenisers
from sluice.rollout.chat.formats import FORMATS, detect
from sluice.rollout.chat.parser import Opening, TurnParser
from sluice.rollout.chat.stability import Stability, examine
from sluice.rollout.chat.template import Template
from sluice.types import Ids, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "z9sluice"
"""Stands for a sampled turn where the template is asked what follows one."""
_TAIL = 64
"""Tokens at a prompt's end that are looked at for an opened `<think>`."""
_REMEMBERED = 1_024
"""Newest prompts whose ids are kept: all samples of a group ask for the same."""


class ChatRenderer:
    """The chat template of one tokenizer, used forward only.

    `begin` renders a whole conversation. From then on `extend` gives what comes after a sampled turn: its end if
    the model did not write it, the new messages, and the opening of the next answer. It asks the template about a
    stand-in turn, so no earlier text is rendered again, whatever the template would make of it.

    Args:
        tokenizer: with a chat template and an end-of-sequence token.
        config: format of tool calls and reasoning.
        template_kwargs: passed to the template with every call, e.g. `enable_thinking`.

    Attributes:
        format: name of the format in use.
        eos: every id that ends a turn; the tokenizer's own first.

    Raises:
        DataError: the tokenizer has no template or no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ChatConfig | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        config = config or ChatConfig()
        self._tokenizer = tokenizer
        self._template = Template(tokenizer, template_kwargs or {})
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token: answers would never end",
                hint="set eos_token in its tokenizer_config.json",
            )
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise DataError(
                f"{type(tokenizer).__name__} is not built on the tokenizers library, so text cannot be streamed",
                hint="use a checkpoint with a tokenizer.json",
            )
        self._backend.no_truncation()  # as every call of the tokenizer itself would
        self._backend.no_padding()
        self._messages_ids = lru_cache(_REMEMBERED)(self._render_messages)
        self._detokenisers = Detokenisers(self._backend)
        self.format = detect(self._template.text) if config.format == "auto" else config.format
        self._format = FORMATS[self.format]
        if not self._template.takes_tools and (self._template.takes_calls or self._format.spells):
            self._template.offer = self._format.offer
        special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._end = self._find_end(special)
        self.eos = self._find_eos()
        self._openers = frozenset(self._known(self._format.openers))
        self._hidden_without_tools = frozenset({*special, *self.eos}) - {*self._known(self._format.think or ())}
        self._hidden = self._hidden_without_tools - {*self._known(self._format.marks)}
        self._opening: Opening = self._opens(self.begin((ChatMessage("user", "u"),)))
        if config.on_rewrite == "fail":
            self.require_stable()

    # Messages to ids.

    def begin(self, messages: Sequence[ChatMessage], tools: Sequence[ToolSpec] = (), **template_kwargs: Any) -> Ids:
        """A whole conversation up to where the answer begins; shape `[n]`."""
        ids = self.encode(self._template.render(messages, tools, template_kwargs))
        if not len(ids):
            raise DataError("the conversation renders to no tokens", hint="check its messages and the template")
        return ids

    def extend(
        self,
        last: Sequence[int] | Ids,
        messages: Sequence[ChatMessage],
        tools: Sequence[ToolSpec] = (),
        **template_kwargs: Any,
    ) -> Ids:
        """What comes after the sampled turn `last`, up to where the next answer begins; shape `[n]`.

        A turn that was cut by length or by a stop string gets the template's end of turn; one that has its end
        keeps it. Where a model ends its turn with the token that opens the next message, that token is not
        doubled.
        """
        ids = self.encode(self._after_turn(messages, tools, template_kwargs))
        if not len(last) or not len(ids):
            return ids
        ended, first = int(last[-1]), int(ids[0])
        doubled = first == ended if first in self._openers else first in self.eos and ended in self.eos
        return ids[1:] if doubled else ids

    def prompt_ids(self, prompt: Prompt) -> Ids:
        """A task's prompt as the model sees it; shape `[n]`, read-only."""
        try:
            return self._messages_ids(prompt.messages)
        except DataError as error:
            raise DataError(f"prompt {prompt.id}: {error}", hint=error.hint) from error

    def response_ids(self, text: str) -> Ids:
        """A demonstrated answer with its end-of-sequence token; shape `[n]`."""
        return np.asarray([*self.encode(text), self.eos[0]], dtype=np.int32)

    def encode(self, text: str) -> Ids:
        """Raw text as ids, nothing added; shape `[n]`."""
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    @property
    def vocabulary_size(self) -> int:
        """Ids from 0 up to this one exist."""
        return len(self._tokenizer)

    # Ids to text.

    def text(self, ids: Sequence[int] | Ids) -> str:
        """Sampled ids as text, special tokens left out."""
        return str(self._backend.decode([int(id) for id in ids], skip_special_tokens=True))

    def whole_text(self, ids: Sequence[int] | Ids) -> str:
        """Ids as text, special tokens included."""
        return str(self._backend.decode([int(id) for id in ids], skip_special_tokens=False))

    def parser(
        self,
        tools: Sequence[ToolSpec] = (),
        call_id: Callable[[int], str] = "call_{}".format,
        *,
        prompt: Sequence[int] | Ids | None = None,
    ) -> TurnParser:
        """A parser of one sampled turn.

        Args:
            prompt: what the model was given. Its end tells whether the answer starts inside reasoning; without it
                that is taken from the template's own opening of an answer.
        """
        opening = self._opening if prompt is None else self._opens(prompt)
        hidden = self._hidden if tools else self._hidden_without_tools
        return TurnParser(self._detokenisers.make(hidden), self._format, tools, call_id, opening)

    # Whether the template leaves the past alone.

    def check(self, turns: int = 4) -> Stability:
        """Play a conversation of `turns` answers and compare with the template's own rendering of the whole."""
        think = self._format.think
        thinks = think is not None and think[1] in self._template.text and self._opening != "closed"
        return examine(self, self._template, turns, thinks=thinks)

    def require_stable(self) -> None:
        """Raises DataError when the template rewrites the past."""
        found = self.check()
        if not found.template_stable:
            raise DataError(
                f"the chat template rewrites earlier turns: {'; '.join(found.rewrites)}",
                hint='allow it with on_rewrite = "extend": sessions then go on by token extension',
            )

    # Inside.

    def _render_messages(self, messages: tuple[Message, ...]) -> Ids:
        ids = self.begin(tuple(ChatMessage(message.role, message.content) for message in messages))  # pyright: ignore[reportArgumentType]
        ids.flags.writeable = False  # callers share it
        return ids

    def _known(self, tokens: Sequence[str]) -> list[int]:
        """Ids of those of `tokens` that the vocabulary has as one token."""
        found = (self._backend.token_to_id(token) for token in tokens)
        return [int(id) for id in found if id is not None]

    def _find_end(self, special: Mapping[int, str]) -> str:
        """The special token with which the template ends a turn, or opens what follows one; empty: none."""
        turn = (ChatMessage("user", "u"), ChatMessage("assistant", _MARK), ChatMessage("user", "u"))
        after = self._template.render(turn).rpartition(_MARK)[2]
        return max((token for token in special.values() if after.startswith(token)), key=len, default="")

    def _find_eos(self) -> tuple[int, ...]:
        own: Any = self._tokenizer.eos_token_id
        return tuple(dict.fromkeys([int(own), *self._known((self._end,)), *self._known(self._format.ends)]))

    def _opens(self, prompt: Sequence[int] | Ids) -> Opening:
        if self._format.think is None:
            return ""
        tail = self.whole_text(prompt[-_TAIL:]).rstrip()
        opened, closed = self._format.think
        if tail.endswith(opened):
            return "open"
        return "closed" if tail.endswith(closed) else ""

    def _after_turn(
        self, messages: Sequence[ChatMessage], tools: Sequence[ToolSpec], template_kwargs: Mapping[str, Any]
    ) -> str:
        """What the template writes after a turn that stands before `messages`, from the end of that turn on."""
        mark = _MARK
        while any(mark in message.content for message in messages):
            mark += "9"
        refusal: DataError | None = None
        for turn in self._stand_ins(messages, mark):
            try:
                whole = self._template.render((ChatMessage("user", "u"), turn, *messages), tools, template_kwargs)
            except DataError as error:
                refusal = refusal or error
                continue
            after = whole.rpartition(mark)[2] if mark in whole else None
            if after is not None and not self._end:
                return after
            ends = [after.find(end) for end in self._ends() if end in after] if after is not None else []
            if after is not None and ends:
                return after[min(ends) :]
        raise refusal or DataError(
            "the chat template does not show where a turn ends before these messages",
            hint="run the prefix check and use another template",
        )

    def _ends(self) -> list[str]:
        return [str(self._backend.id_to_token(id)) for id in self.eos]

    def _stand_ins(self, messages: Sequence[ChatMessage], mark: str) -> Iterator[ChatMessage]:
        """Turns that may stand for the sampled one: with the calls that the results in `messages` answer, or not."""
        results = [message for message in messages if message.role == "tool"]
        arguments = f'{{"x": "{mark}"}}'
        calls = tuple(ToolCall(r.tool_call_id or "call00000", r.name or "f", arguments) for r in results)
        if calls and self._end:
            yield ChatMessage("assistant", mark, tool_calls=calls)
            yield ChatMessage("assistant", mark, tool_calls=calls[:1])
        yield ChatMessage("assistant", mark)
