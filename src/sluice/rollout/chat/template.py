"""One tokenizer's chat template: messages in, text out, and what is found out about it by trying."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sluice.errors import DataError
from sluice.rollout.chat.base import ChatMessage, ToolCall, ToolSpec
from sluice.rollout.chat.spelled import offered, spelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a template raises when it does not take a message: its own word, or Python's from inside it."""

PROBE = "q7sluice"
"""A word that no template contains."""
_PROBE_TOOL: ToolSpec = {
    "type": "function",
    "function": {
        "name": PROBE,
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}
_PROBE_CALL = ToolCall("call00000", PROBE, '{"x": "q8sluice"}')


class Template:
    """Renders with the tokenizer's own chat template.

    Templates disagree on how earlier calls are handed to them: arguments as JSON text or parsed, the content
    beside a call as `""` or None. Both are tried once.

    Attributes:
        text: the Jinja source, all variants of it together.
        takes_calls, takes_tools: whether earlier calls and offered tools appear in what is rendered at all.
        offer: how to put tools into words where the template has no place for them; empty: refuse them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                hint="add one to its tokenizer_config.json (or chat_template.jinja)",
            )
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs)
        given: Any = tokenizer.chat_template
        self.text = "\n".join(given.values()) if isinstance(given, dict) else str(given)
        self.offer = ""
        self._arguments_as_text = False
        self._empty: str | None = ""
        self._no_tools: list[Any] | None = None
        if not self._try((ChatMessage("user", "u"),)):
            self._no_tools = []  # templates that loop over the tools they are given
        self._offered = self._try((ChatMessage("user", "u"),), (_PROBE_TOOL,)).count(PROBE)
        self.takes_tools = self._offered > 0
        self.takes_calls = self._find_manner()

    @property
    def tools(self) -> bool:
        """A client may offer tools, or the history may have calls."""
        return self.takes_tools or self.takes_calls or bool(self.offer)

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[ToolSpec] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        prompt: bool = True,
    ) -> str:
        """The conversation as text, with `prompt` up to where the next answer begins.

        Raises:
            DataError: the template does not take these messages or tools.
        """
        hint = "set the chat format to hermes, which puts them into words"
        if tools and not self.takes_tools:
            if not self.offer:
                raise DataError("tools were offered, but the chat template has no place for them", hint=hint)
            messages, tools = offered(messages, tools, self.offer), ()
        if not self.takes_calls:
            if self.offer:
                messages = spelled(messages)
            elif any(message.tool_calls for message in messages):
                raise DataError("the history has tool calls, but the chat template has no place for them", hint=hint)
        return self._render(messages, tools, template_kwargs or {}, prompt=prompt)

    def _render(
        self, messages: Sequence[ChatMessage], tools: Sequence[ToolSpec], kwargs: Mapping[str, Any], *, prompt: bool
    ) -> str:
        plain = [self._plain(message) for message in messages]
        settings: dict[str, Any] = {
            "tools": [dict(tool) for tool in tools] or self._no_tools,
            "add_generation_prompt": prompt,
            **self._kwargs,
            **kwargs,
        }
        try:
            if self._empty is not None:
                return str(self._tokenizer.apply_chat_template(plain, tokenize=False, **settings))
            # apply_chat_template drops keys whose value is None; a template that asks for None needs them.
            from transformers.utils.chat_template_utils import render_jinja_template

            source = self._tokenizer.get_chat_template(tools=settings["tools"])
            named = {**self._tokenizer.special_tokens_map, **settings}
            return render_jinja_template([plain], chat_template=source, **named)[0][0]
        except _REFUSALS as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the chat template does not take these messages ({roles}): {type(error).__name__}: {error}",
                hint="check the order of roles and the template's needs",
            ) from error

    def _try(self, messages: Sequence[ChatMessage], tools: Sequence[ToolSpec] = ()) -> str:
        """The conversation as text; empty when the template does not take it."""
        try:
            return self._render(messages, tools, {}, prompt=True)
        except DataError:
            return ""

    def _find_manner(self) -> bool:
        """Choose how calls are handed over: as the text the model wrote, unless the template wants it parsed.

        A template that takes both prints the same for both; one that quotes the text, or labels it raw, does not.
        """
        for empty in ("", None):
            self._empty = empty
            parsed, text = self._call_rendered(as_text=False), self._call_rendered(as_text=True)
            self._arguments_as_text = bool(text) and (text == parsed or not parsed)
            if text or parsed:
                return True
        self._empty = ""
        return False

    def _call_rendered(self, *, as_text: bool) -> str:
        """A conversation with a call in it; empty when the template refuses it or does not show the call."""
        self._arguments_as_text = as_text
        calling = ChatMessage("assistant", tool_calls=(_PROBE_CALL,))
        result = ChatMessage("tool", "r", tool_call_id=_PROBE_CALL.id)
        rendered = self._try((ChatMessage("user", "u"), calling, result), (_PROBE_TOOL,))
        shown = rendered.count(PROBE) > self._offered or "q8sluice" in rendered
        return rendered if shown else ""

    def _plain(self, message: ChatMessage) -> dict[str, Any]:
        """The dictionary that templates expect."""
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            plain["reasoning_content"] = message.reasoning
        if message.tool_calls:
            plain["tool_calls"] = [self._plain_call(call) for call in message.tool_calls]
            plain["content"] = message.content or self._empty
        if message.tool_call_id:
            plain["tool_call_id"] = message.tool_call_id
        if message.name:
            plain["name"] = message.name
        return plain

    def _plain_call(self, call: ToolCall) -> dict[str, Any]:
        arguments: Any = call.arguments
        if not self._arguments_as_text:
            try:
                arguments = json.loads(call.arguments)
            except ValueError:
                arguments = call.arguments
        return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}
