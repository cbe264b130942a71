"""How model families write reasoning and tool calls: data, and one small reader each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from sluice.rollout.chat.base import ToolSpec


class Written(NamedTuple):
    """A call as it was read: a function's name and its arguments as JSON text."""

    name: str
    arguments: str


Reader: TypeAlias = Callable[[str, Sequence[ToolSpec]], list[Written] | None]
"""What stands between the marks of a call, and the tools → the calls; None: these are none."""


# ── readers ─────────────────────────────────────────────────────────────────────────────────────────────


class _Value(NamedTuple):
    value: Any
    text: str


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)
_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _object(text: str, at: int) -> tuple[dict[str, _Value], int]:
    """The JSON object at `at`, each value with the text that spells it, and where it ends.

    Raises:
        ValueError: there is none.
    """
    members: dict[str, _Value] = {}
    if not text.startswith("{", at):
        raise ValueError("no object")
    at = _skip(text, at + 1)
    if text.startswith("}", at):
        return members, at + 1
    while True:
        key, at = _JSON.raw_decode(text, at)
        at = _skip(text, at)
        if not isinstance(key, str) or not text.startswith(":", at):
            raise ValueError("no member")
        start = _skip(text, at + 1)
        value, end = _JSON.raw_decode(text, start)
        members[key] = _Value(value, text[start:end])
        at = _skip(text, end)
        if text.startswith("}", at):
            return members, at + 1
        if not text.startswith(",", at):
            raise ValueError("no end")
        at = _skip(text, at + 1)


def _call(members: Mapping[str, _Value]) -> Written:
    """`{"name": …, "arguments": {…}}`; `parameters` is taken for `arguments`, and none for `{}`."""
    name = members.get("name", _Value(None, "")).value
    arguments = members.get("arguments") or members.get("parameters") or _Value({}, "{}")
    if isinstance(arguments.value, str):  # JSON inside a JSON string
        arguments = _Value(json.loads(arguments.value, parse_constant=_refuse), arguments.value)
    if not isinstance(name, str) or not name or not isinstance(arguments.value, dict):
        raise ValueError("no call")
    return Written(name, arguments.text)


def read_json(body: str, tools: Sequence[ToolSpec]) -> list[Written] | None:
    """JSON objects, separated by `;` or nothing. The text of the arguments is kept as it was written."""
    calls: list[Written] = []
    try:
        at = _skip(body, 0)
        while at < len(body):
            members, at = _object(body, at)
            calls.append(_call(members))
            at = _skip(body, at)
            if body.startswith(";", at):
                at = _skip(body, at + 1)
    except (ValueError, RecursionError):
        return None
    return calls or None


def read_deepseek(body: str, tools: Sequence[ToolSpec]) -> list[Written] | None:
    """V3 and R1: type, mark, name, fenced JSON. V3.1: name, mark, JSON."""
    head, mark, rest = body.partition("<｜tool▁sep｜>")
    if not mark:
        return None
    fenced = re.fullmatch(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", rest, re.DOTALL)
    name, arguments = (fenced[1], fenced[2]) if fenced else (head.strip(), rest.strip())
    try:
        _, end = _object(arguments, 0)
    except (ValueError, RecursionError):
        return None
    return [Written(name, arguments)] if name and end == len(arguments) else None


_GLM_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def read_glm(body: str, tools: Sequence[ToolSpec]) -> list[Written] | None:
    """A name, then pairs of `<arg_key>` and `<arg_value>`."""
    name, mark, rest = body.partition("<arg_key>")
    return _pairs(name.strip(), mark + rest, _GLM_PAIR, tools)


_QWEN_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*</function>\s*", re.DOTALL)
_QWEN_PAIR = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def read_qwen_coder(body: str, tools: Sequence[ToolSpec]) -> list[Written] | None:
    """`<function=NAME>` around `<parameter=NAME>` blocks."""
    found = _QWEN_FUNCTION.fullmatch(body)
    return _pairs(found[1].strip(), found[2], _QWEN_PAIR, tools) if found else None


def _pairs(name: str, text: str, pattern: re.Pattern[str], tools: Sequence[ToolSpec]) -> list[Written] | None:
    """`text` as nothing but pairs; values become JSON by the schema of the tool."""
    schemas = _parameters(name, tools)
    arguments: dict[str, Any] = {}
    at = 0
    while at < len(text):
        found = pattern.match(text, at)
        if not found or not found[1].strip():
            return None
        key = found[1].strip()
        arguments[key] = typed(found[2], schemas.get(key))
        at = found.end()
    if not name or re.search(r"[\s<>]", name):
        return None
    return [Written(name, json.dumps(arguments, ensure_ascii=False))]


# ── values that are no JSON ─────────────────────────────────────────────────────────────────────────────


def _parameters(name: str, tools: Sequence[ToolSpec]) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            return (function.get("parameters") or {}).get("properties") or {}
    return {}


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Templates print booleans of earlier calls as Python does, and models copy that."""


def _declared(schema: Any) -> set[str]:
    """JSON types that `schema` allows; none when it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    types: set[str] = {given} if isinstance(given, str) else set(given or ())
    for part in (*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())):
        types |= _declared(part)
    if not types and all(isinstance(value, str) for value in schema.get("enum") or (0,)):
        types = {"string"}
    return types


def typed(text: str, schema: Any) -> Any:
    """`text` as a value of the schema's type. What does not read as one stays text.

    A string parameter is never parsed: the zip code `01234` stays one. Without a type, JSON is read as JSON.
    """
    types = _declared(schema)
    if types == {"string"}:
        return text
    stripped = text.strip()
    try:
        value = json.loads(_PYTHON_WORDS.get(stripped, stripped), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if "integer" in types and isinstance(value, float) and value.is_integer():
        value = int(value)
    wanted = tuple(kind for name in types for kind in _TYPES.get(name, ()))
    if types and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
        return text
    return value


# ── the formats ─────────────────────────────────────────────────────────────────────────────────────────

THINK = ("<think>", "</think>")
_TAGS = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True, slots=True)
class Format:
    """One family's way to write a turn.

    Attributes:
        think: marks around reasoning, which stands first in a turn; None: there is none.
        open, close: marks around a call; without `close` a call goes to the end of the turn, without `open`
            the family has no calls.
        silent: marks around calls that say nothing themselves.
        inner: marks inside a call, for its reader.
        bare: a turn that is a JSON object may be a call without a mark.
        ends: tokens that end a turn, besides the tokenizer's own.
        openers: those of `ends` with which the next message begins.
        offer: words for the system message where the template has none for tools, with `{tools}`.
    """

    name: str
    read: Reader = read_json
    think: tuple[str, str] | None = None
    open: str = ""
    close: str = ""
    silent: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    bare: bool = False
    ends: tuple[str, ...] = ()
    openers: tuple[str, ...] = ()
    offer: str = ""

    @property
    def spells(self) -> bool:
        """Calls and results can be put into words too (`chat/spelled.py`), not only the offer."""
        return self.read is read_json and self.open == _TAGS[0]

    @property
    def marks(self) -> tuple[str, ...]:
        """Every mark; where it is one special token, it must not be left out of the text."""
        return tuple(mark for mark in (*(self.think or ()), self.open, self.close, *self.silent, *self.inner) if mark)


_CHATML = ("<|im_end|>", "<|endoftext|>")

_HERMES_OFFER = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

_DEEPSEEK_OFFER = """## Tools

You have access to the following tools:
{tools}

To use tools, end the answer with exactly this, arguments as a JSON object, further calls in the same way:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>"""

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("none"),
        Format("qwen", read_json, THINK, *_TAGS, ends=_CHATML, offer=_HERMES_OFFER),
        Format("qwen_coder", read_qwen_coder, THINK, *_TAGS, ends=_CHATML),
        Format("hermes", read_json, None, *_TAGS, ends=_CHATML, offer=_HERMES_OFFER),
        Format(
            "glm",
            read_glm,
            THINK,
            *_TAGS,
            ends=("<|user|>", "<|observation|>", "<|endoftext|>"),
            openers=("<|user|>", "<|observation|>"),
        ),
        Format(
            "llama", read_json, None, "<|python_tag|>", bare=True, ends=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
        ),
        Format(
            "deepseek",
            read_deepseek,
            THINK,
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            silent=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            inner=("<｜tool▁sep｜>",),
            ends=("<｜end▁of▁sentence｜>",),
            offer=_DEEPSEEK_OFFER,
        ),
    )
}


def detect(template: str) -> str:
    """The name of the format that a chat template (Jinja text) writes its own calls in.

    The order matters: GLM and Qwen-Coder use Qwen's outer tags. `hermes` is Qwen's format without reasoning.
    """
    if "<｜tool▁call▁begin｜>" in template or "<｜Assistant｜>" in template:
        return "deepseek"
    if "<arg_key>" in template:
        return "glm"
    if "<function=" in template and "<tool_call>" in template:
        return "qwen_coder"
    if "<tool_call>" in template:
        return "qwen" if "<think>" in template or "Qwen" in template else "hermes"
    if "<|python_tag|>" in template or "<|start_header_id|>" in template:
        return "llama"
    return "qwen" if "</think>" in template else "none"
