"""An agent like any other: a plain program that talks to an OpenAI endpoint and has a calculator.

Nothing in it knows Sluice. The client reads OPENAI_BASE_URL and OPENAI_API_KEY from the environment, as always; the
task comes as a JSON file, whose path is in SLUICE_PROMPT. What it prints is in the episode's log.

    pip install openai
    OPENAI_BASE_URL=… OPENAI_API_KEY=… python examples/calculator_agent.py "Calculate 84 + 67."
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from openai import BadRequestError, OpenAI

MAX_TURNS = 4
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def main() -> None:
    """Ask, call the calculator as long as the model wants it, leave the answer in a file."""
    if len(sys.argv) > 1:
        messages: list[dict[str, Any]] = [{"role": "user", "content": sys.argv[1]}]
    else:
        messages = json.loads(Path(os.environ["SLUICE_PROMPT"]).read_text())["messages"]
    answer = converse(OpenAI(max_retries=4), messages)
    print(answer)
    Path("answer.txt").write_text(answer)


def converse(client: OpenAI, messages: list[dict[str, Any]]) -> str:
    """The model's last words; empty when it never came to an end."""
    for _ in range(MAX_TURNS):
        try:
            reply = client.chat.completions.create(model="actor", messages=messages, tools=[ADD])  # pyright: ignore
        except BadRequestError as error:
            if error.code == "context_length_exceeded":  # the model has said too much: an end, not an accident
                return ""
            raise
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = calculate(call.function.arguments)  # pyright: ignore[reportAttributeAccessIssue]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


def calculate(arguments: str) -> str:
    """The tool. What the model got wrong is told to the model."""
    try:
        given = json.loads(arguments)
        return str(int(given["a"]) + int(given["b"]))
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {error!r}"


if __name__ == "__main__":
    main()
