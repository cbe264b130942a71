"""A tiny model that calls a tool rightly, made and taught on the spot in about a minute.

It has a Qwen-like chat template and has learnt these conversations by heart, with or without system text:

    user: add 3 4          →  <tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>
    tool: 7                →  = 7
    user: think add 3 4    →  <think>3 + 4</think> and the same call
    user: add 3 4 and 5 6  →  two calls in one turn
    tools: 7, 11           →  = 7 11
    user: say 5            →  = 5

Numbers in questions have one digit. Its greedy answers are right; `teach` checks that before it returns.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sluice.algos.sft import SFT
from sluice.config.gateway import ChatConfig
from sluice.config.model import ScratchConfig, TokenizerConfig
from sluice.config.train import OptimizerConfig, TrainConfig
from sluice.models.build import load_tokenizer, make_scratch
from sluice.rollout.chat.base import ChatMessage, ToolSpec
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import STREAMS, TrainSample

ADD: ToolSpec = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
TEMPLATE = """\
{%- if tools or (messages and messages[0].role == 'system') %}
{{- '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- ' ' + tool.function.name }}{%- endfor %}\
{{- '</tools>\\n' }}{%- endif %}
{{- '<eos>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- if not loop.first %}{{- '<|im_start|>system\\n' + message.content + '<eos>\\n' }}{%- endif %}
{%- elif message.role == 'user' %}
{{- '<|im_start|>user\\n' + message.content + '<eos>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>\\n' }}{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}\
{%- else %}{{- call.function.arguments | tojson }}{%- endif %}
{{- '}</tool_call>' }}
{%- endfor %}
{{- '<eos>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response> ' + message.content + '</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<eos>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
CONTEXT = 2_048
_WORDS = (
    *("<|im_start|>", "<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>", "system", "user", "assistant", "add", "and", "say", "think", "name", "arguments"),
    *("a", "b", "You", "are", "an", "agent", "help", "with", "numbers", "use", "the", "tool"),
    *('{"name":', '"add",', '"arguments":', '{"a":', '"b":', "}}"),  # few tokens a call: short distances to copy over
    *('{}":,.+=[]'),
    *"0123456789",
)
SCRATCH = ScratchConfig(
    architecture={
        "model_type": "qwen3",
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "rope_theta": 100.0,
        "initializer_range": 0.08,
    },
    tokenizer=TokenizerConfig(words=_WORDS, chat_template=TEMPLATE),
)


def call_text(a: int, b: int) -> str:
    """A call as the model writes it."""
    return f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'


def exchange(draw: random.Random, kind: str) -> list[tuple[list[ChatMessage], str]]:
    """One question and what follows: messages that come in, and the answer to them as it is sampled."""
    a, b, c, d = (draw.randrange(10) for _ in range(4))
    user = lambda text: [ChatMessage("user", text)]  # noqa: E731
    match kind:
        case "add":
            return [(user(f"add {a} {b}"), call_text(a, b)), (results(a + b), f"= {a + b}")]
        case "think":
            text = f"<think>{a} + {b}</think>\n{call_text(a, b)}"
            return [(user(f"think add {a} {b}"), text), (results(a + b), f"= {a + b}")]
        case "two":
            text = f"{call_text(a, b)}\n{call_text(c, d)}"
            return [(user(f"add {a} {b} and {c} {d}"), text), (results(a + b, c + d), f"= {a + b} {c + d}")]
        case _:
            return [(user(f"say {a}"), f"= {a}")]


def results(*values: int) -> list[ChatMessage]:
    """What the tools said."""
    return [ChatMessage("tool", str(value), tool_call_id=f"c{n}", name="add") for n, value in enumerate(values)]


def conversation(chat: ChatRenderer, draw: random.Random, name: str) -> TrainSample:
    """One to three questions end to end, weight 1 at every answer."""
    tools = (ADD,) if draw.random() < 0.85 else ()
    words = [*_WORDS[20:], "unheard"]
    system = " ".join(draw.choice(words) for _ in range(draw.randrange(1, 12)))
    history = [ChatMessage("system", system)] if draw.random() < 0.5 else []
    ids, weights, last = list[int](), list[float](), list[int]()
    for _ in range(draw.randrange(1, 4)):
        for messages, answer in exchange(draw, draw.choice(("add", "add", "think", "two")) if tools else "say"):
            observed = chat.extend(last, messages, tools) if ids else chat.begin([*history, *messages], tools)
            last = [*chat.encode(answer).tolist(), chat.eos[0]]
            ids += [*observed.tolist(), *last]
            weights += [0.0] * len(observed) + [1.0] * len(last)
    names = ("behaviour", "version", "temperature", "turn", "advantage")
    streams: dict[str, Any] = {key: np.full(len(ids), STREAMS[key][1], dtype=STREAMS[key][0]) for key in names}
    streams["weight"] = np.asarray(weights, np.float32)
    streams["turn"] = np.cumsum(np.diff(streams["weight"], prepend=0) != 0).astype(np.int32)
    return TrainSample(name, name, 0, np.asarray(ids, np.int32), streams)


def teach(folder: Path, *, seed: int = 0, steps: int = 400, batch: int = 12) -> Path:
    """Make the model in `folder` and return its Hugging Face folder. Ends when it answers rightly."""
    torch.set_num_threads(1)
    blank = folder / "blank"
    make_scratch(SCRATCH, blank, seed=seed)
    chat = ChatRenderer(load_tokenizer(blank), ChatConfig(format="qwen"))
    config = TrainConfig(
        optimizer=OptimizerConfig(lr=4e-3, betas=(0.9, 0.98), warmup_steps=30, schedule="cosine", final_lr_ratio=0.02)
    )
    trainer = TorchTrainer(config, blank, total_steps=steps, seed=seed)
    objective = SFT()
    draw = random.Random(seed)
    probes = [conversation(chat, random.Random(10_000 + n), f"probe{n}") for n in range(32)]
    for step in range(steps):
        samples = [conversation(chat, draw, f"{step}-{n}") for n in range(batch)]
        trainer.step(make_batch(samples, budget=8_192, normaliser=objective.normaliser), objective.loss)
        if step % 25 == 24 and step >= 200 and sure(trainer, probes):
            out = folder / "model"
            trainer.save_model(out)
            return out
    raise AssertionError(f"the tool model did not learn its conversations in {steps} steps")


def sure(trainer: TorchTrainer, probes: Sequence[TrainSample], least: float = 0.9) -> bool:
    """Every trained token of the probes has at least this probability: greedy answers are right, sampled ones too."""
    filled = trainer.score(list(probes), frozenset({"proximal"}))
    return all(bool((one["proximal"][one.trained] > np.log(least)).all()) for one in filled)
