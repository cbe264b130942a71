"""A calculator for a model whose chat template knows no tools: agent and model speak plain text.

    user: State the final answer to the following arithmetic problem: 63 - 28 + 17 =
    assistant: CALC: 63 - 28 + 17
    user: RESULT: 52
    assistant: ANSWER: 52

Nothing in it knows Sluice. The client reads OPENAI_BASE_URL and OPENAI_API_KEY from the environment, as always; the
task comes as a JSON file, whose path is in SLUICE_PROMPT. One example goes before the question.

    pip install openai
    OPENAI_BASE_URL=… OPENAI_API_KEY=… python examples/calculator_words.py "What is 63 - 28 + 17?"
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from openai import OpenAI

MAX_TURNS = 4
RULES = "You have a calculator. Write CALC: and the problem to use it. When you know the result, write ANSWER: and it."
EXAMPLE = [
    {"role": "user", "content": "State the final answer to the following arithmetic problem: 9 - 4 + 21 ="},
    {"role": "assistant", "content": "CALC: 9 - 4 + 21"},
    {"role": "user", "content": "RESULT: 26"},
    {"role": "assistant", "content": "ANSWER: 26"},
]
SUM = re.compile(r"CALC: *(-?\d{1,9}(?: *[+-] *\d{1,9}){0,9}) *$")


def main() -> None:
    """Ask, calculate as often as the model wants, print the conversation."""
    if len(sys.argv) > 1:
        question = sys.argv[1]
    else:
        question = json.loads(Path(os.environ["SLUICE_PROMPT"]).read_text())["messages"][-1]["content"]
    client = OpenAI(max_retries=4)
    messages = [{"role": "system", "content": RULES}, *EXAMPLE, {"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        reply = client.chat.completions.create(model="actor", messages=messages)  # pyright: ignore
        answer = reply.choices[0].message.content or ""
        print(answer)
        if "CALC:" not in answer:
            return
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": calculate(answer)}]


def calculate(text: str) -> str:
    """What the calculator says to the sum at the end of the first line."""
    found = SUM.search(text.splitlines()[0])
    if found is None:
        return "RESULT: error"
    terms = re.findall(r"[+-]?\d+", found[1].replace(" ", ""))
    return f"RESULT: {sum(map(int, terms))}"


if __name__ == "__main__":
    main()
