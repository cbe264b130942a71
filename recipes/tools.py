"""A tool loop from scratch, on a CPU: a model of 0.3 million parameters learns by RL to use its calculator.

The question is "Calculate 84 + 67.". A careless teacher demonstrates both ways to answer: call the tool `add` and
repeat what it says, or guess. A model that imitates it guesses most of the time, and is wrong then. RL sees only
whether the final answer is right, and the calls become the rule:

    user       Calculate 84 + 67.
    model      <tool_call>{"name": "add", "arguments": {"a": 84, "b": 67}}</tool_call>
    tool       151
    model      151

    sluice train recipes/tools.py
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sluice.types import Message, Prompt

GUESSES = 0.75
"""How often the teacher guesses."""
CHAT_TEMPLATE = (
    "{%- if tools %}{{- '<system>' + tools[0].function.name }}{%- endif %}"
    "{%- for message in messages %}{{- '<' + message.role + '>' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'<tool_call>{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
    "{{- '}</tool_call>' }}{%- endfor %}{%- if message.role == 'assistant' %}{{- '<eos>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)


def add(a: int, b: int) -> int:
    """The sum of two whole numbers."""
    return a + b


def careless(prompts: Sequence[Prompt], seed: int, passes: int = 3) -> Iterator[tuple[Prompt, str]]:
    """The teacher, a turn at a time: a demonstration is what stands before a turn, and the turn."""
    draw = random.Random(seed)
    for prompt in list(prompts) * passes:
        a, b = (int(number) for number in re.findall(r"\d+", prompt.messages[-1].content))
        if draw.random() < GUESSES:
            yield _with_tool(prompt), str(draw.randrange(20, 199))
            continue
        call = f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'
        yield _with_tool(prompt), call
        yield _with_tool(prompt, Message("assistant", call), Message("tool", str(a + b))), str(a + b)


def _with_tool(prompt: Prompt, *more: Message) -> Prompt:
    """What stands before a turn; the system message is what the template makes of the tool."""
    return replace(prompt, messages=(Message("system", "add"), *prompt.messages, *more))


def recipe() -> dict[str, Any]:
    """Everything that differs from the defaults."""
    marks = ["<system>", "<user>", "<assistant>", "<tool>", "<tool_call>", "</tool_call>", '{"name":', '"arguments":']
    return {
        "name": "tools",
        "threads": 1,
        "model": {
            "scratch": {
                "architecture": {
                    "model_type": "qwen3",
                    "hidden_size": 128,
                    "intermediate_size": 256,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 32,
                    "max_position_embeddings": 128,
                    "tie_word_embeddings": True,
                    "rope_theta": 100.0,
                    "initializer_range": 0.08,
                },
                "tokenizer": {
                    "words": [*marks, "add", "Calculate", "a", "b", *'"{}:,.+', *"0123456789"],
                    "chat_template": CHAT_TEMPLATE,
                },
            },
        },
        "data": {
            "train": {
                "type": "reasoning_gym",
                "dataset": "basic_arithmetic",
                "size": 6_000,
                "params": {
                    "min_terms": 2,
                    "max_terms": 2,
                    "min_digits": 2,
                    "max_digits": 2,
                    "operators": ["+"],
                    "allow_parentheses": False,
                    "allow_negation": False,
                },
            },
            "eval_prompts": 128,
            "strategy": {"type": "groups", "samples": 8},
        },
        "warm_start": {
            "demonstrations": {"type": "python", "path": f"{__file__}:careless"},
            "steps": 300,
            "batch": 64,
            "train": {"optimizer": {"lr": 3e-3, "betas": (0.9, 0.99), "warmup_steps": 20, "schedule": "cosine"}},
        },
        "rewards": [{"type": "exact"}],
        "algorithm": {"type": "grpo", "normaliser": "token"},
        "rollout": {
            "sampling": {"max_new_tokens": 40},
            "chat": {"format": "qwen"},
            "runner": {"type": "tools", "tools": [f"{__file__}:add"], "max_turns": 4},
        },
        "steps": 20,
        "groups_per_step": 16,
        "train": {"optimizer": {"lr": 5e-4, "betas": (0.9, 0.99), "warmup_steps": 2}},
        "evaluation": {"every": 10},
        "checkpoint": {"every": 10},
    }
