"""Typed functions as tools: what the model is told about them, and what it is told when they go wrong."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from sluice.errors import ConfigError
from sluice.rollout.chat.base import ToolCall
from sluice.rollout.runners.functions import Function, Toolbox

TOOLS = '''
from __future__ import annotations

import asyncio
import threading
from typing import Annotated

from pydantic import Field

STARTED = threading.Semaphore(0)
RELEASE = threading.Event()


def add(a: int, b: Annotated[int, Field(description="the second one")] = 2) -> int:
    """Add two whole numbers."""
    return a + b


def table(rows: list[int]) -> dict:
    """A table."""
    return {"rows": rows, "ok": True}


def fails(a: int) -> int:
    """Divides by zero."""
    return a // 0


def leaves() -> int:
    """Ends the program."""
    raise SystemExit(3)


async def sleeps() -> str:
    """Never comes back."""
    await asyncio.Event().wait()
    return ""


def hangs() -> str:
    """Waits in its thread."""
    RELEASE.wait(60)
    return "late"


def meets() -> str:
    """Comes back only when two of it run at once."""
    STARTED.release()
    barrier.wait(30)
    return "met"


barrier = threading.Barrier(2)


def mute(a: int) -> int:
    return a


def untyped(a) -> int:
    """No type."""
    return a


def odd(a: int, /) -> int:
    """Positional."""
    return a


def strange(a: threading.Lock) -> int:
    """A lock is no JSON."""
    return 1


class Callable:
    """No function."""
'''


@pytest.fixture
def tools(tmp_path: Path) -> str:
    file = tmp_path / "tools.py"
    file.write_text(TOOLS)
    return str(file)


def ask(tools: str, name: str, arguments: str, *, seconds: float = 20.0, box: tuple[str, ...] = ()) -> str:
    toolbox = Toolbox([f"{tools}:{each}" for each in box or (name,)], seconds=seconds)
    return asyncio.run(toolbox.call(ToolCall("c0", name, arguments)))


def test_the_schema_is_the_signature(tools: str) -> None:
    assert Function(f"{tools}:add").spec == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two whole numbers.",
            "parameters": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "a": {"title": "A", "type": "integer"},
                    "b": {"title": "B", "type": "integer", "default": 2, "description": "the second one"},
                },
                "required": ["a"],
            },
        },
    }


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("add", '{"a": 3, "b": 4}', "7"),
        ("add", '{"a": 3}', "5"),
        ("table", '{"rows": [1, 2]}', '{"rows":[1,2],"ok":true}'),
        ("add", '{"a": "three"}', "error: a: Input should be a valid integer"),
        ("add", '{"b": 4}', "error: a: Missing required argument"),
        ("add", '{"a": 3, "c": 4}', "error: c: Unexpected keyword argument"),
        ("add", '{"a": 3', "error: the arguments are no JSON"),
        ("add", "[3, 4]", "error: the arguments are no JSON object"),
        ("fails", '{"a": 3}', "error: ZeroDivisionError"),
        ("leaves", "", "error: RuntimeError: SystemExit: 3"),
    ],
)
def test_what_the_model_is_told(tools: str, name: str, arguments: str, result: str) -> None:
    assert ask(tools, name, arguments).startswith(result)


def test_an_unknown_tool_names_the_nearest(tools: str) -> None:
    told = ask(tools, "ad", "{}", box=("add", "table"))
    assert told.startswith("error: there is no tool 'ad'")
    assert "add" in told


@pytest.mark.parametrize("name", ["sleeps", "hangs"])
def test_a_missed_deadline_is_told(tools: str, name: str) -> None:
    assert ask(tools, name, "{}", seconds=0.05) == f"error: {name} took longer than 0.05 s"
    assert not [each for each in threading.enumerate() if each.name == f"tool-{name}" and not each.daemon]


def test_calls_of_one_turn_run_at_once(tools: str) -> None:
    toolbox = Toolbox([f"{tools}:meets"], seconds=30)

    async def both() -> list[str]:
        return await asyncio.gather(*(toolbox.call(ToolCall(f"c{n}", "meets", "{}")) for n in range(2)))

    assert asyncio.run(both()) == ["met", "met"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mute", "has no docstring"),
        ("untyped", "has no type for 'a'"),
        ("odd", "positional-only"),
        ("strange", "has no JSON schema"),
        ("Callable", "is a type, not a typed function"),
        ("sub", "has no 'sub'"),
    ],
)
def test_functions_that_are_no_tools(tools: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Function(f"{tools}:{name}")


def test_two_tools_of_one_name(tools: str) -> None:
    with pytest.raises(ConfigError, match="two tools are called 'add'"):
        Toolbox([f"{tools}:add", f"{tools}:add"], seconds=1)
