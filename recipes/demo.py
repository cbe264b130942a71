"""The demo: a language model of a few hundred thousand parameters learns, by RL, to do what it is told.

The task. "sort down: 5 2 9 1 7 4" wants "9 7 5 4 2 1"; "sort up" wants the opposite. There are two million
such questions; the held-out ones never occur in training, neither in the demonstrations nor in RL.

The teacher is bad on purpose: told to sort down, it overlooks the word and sorts up in most cases, and in
either direction it often swaps two neighbours. A model that imitates it is right less than half of the
time. RL sees only whether an answer is right, and ends up better than its teacher.

    sluice train recipes/demo.py
    sluice train recipes/demo.py seed=3 name=other-seed
    sluice train recipes/demo.py 'rewards=[{type="random"}]' name=control     # learns nothing: it is RL that teaches
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from sluice import RunConfig
from sluice.types import Message, Prompt

DIGITS = 5
OVERLOOKS = 0.5
"""How often the demonstrator, told to sort down, sorts up."""
SLIPS = 0.45
"""How often the demonstrator swaps two neighbours."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def questions(count: int, seed: int) -> Iterator[Prompt]:
    """Distinct questions with their answers."""
    draw = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        digits = [draw.randrange(10) for _ in range(DIGITS)]
        down = draw.random() < 0.5
        text = f"sort {'down' if down else 'up'}: {' '.join(map(str, digits))}"
        if text in seen:
            continue
        seen.add(text)
        answer = " ".join(map(str, sorted(digits, reverse=down)))
        yield Prompt(f"sort-{len(seen):06d}", "sort", (Message("user", text),), answer)


def careless(prompts: Sequence[Prompt], seed: int) -> Iterable[tuple[Prompt, str]]:
    """The demonstrator: one answer to each question, wrong more often than right."""
    draw = random.Random(seed)
    for prompt in prompts:
        digits = sorted(prompt.answer.split())
        overlooked = draw.random() < OVERLOOKS
        if "down" in prompt.messages[0].content and not overlooked:
            digits.reverse()
        if draw.random() < SLIPS:
            at = draw.randrange(DIGITS - 1)
            digits[at], digits[at + 1] = digits[at + 1], digits[at]
        yield prompt, " ".join(digits)


def recipe() -> RunConfig:
    """Everything that differs from the defaults, with the reason."""
    return RunConfig.model_validate(
        {
            "name": "demo",
            "threads": 1,  # a model this small is quickest on one thread
            "model": {
                "scratch": {
                    "architecture": {
                        "model_type": "qwen3",
                        "hidden_size": 64,
                        "intermediate_size": 192,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 4,
                        "num_key_value_heads": 2,
                        "head_dim": 16,
                        "max_position_embeddings": 64,
                        "tie_word_embeddings": True,
                        "rope_theta": 100.0,  # sequences are short: wavelengths to match
                    },
                    "tokenizer": {
                        "words": ["<user>", "<assistant>", "sort", "up", "down", ":", *"0123456789"],
                        "chat_template": CHAT_TEMPLATE,
                    },
                }
            },
            "data": {
                "train": {"type": "python", "path": f"{__file__}:questions", "params": {"count": 20_000, "seed": 0}},
                "eval_prompts": 256,
                "strategy": {"type": "groups", "samples": 8},
            },
            "warm_start": {
                "demonstrations": {"type": "python", "path": f"{__file__}:careless"},
                "steps": 350,
                "batch": 128,
                "train": {"optimizer": {"lr": 4e-3, "warmup_steps": 30, "schedule": "cosine", "weight_decay": 0.01}},
            },
            "rewards": [{"type": "exact"}],
            "algorithm": {"type": "grpo"},
            "rollout": {"sampling": {"max_new_tokens": 10}},
            "steps": 160,
            "groups_per_step": 32,
            "train": {"optimizer": {"lr": 1e-3, "schedule": "linear", "final_lr_ratio": 0.1}},
            "evaluation": {"every": 40, "greedy": True, "rewards": [{"type": "exact"}]},
            "checkpoint": {"every": 40, "keep": 2},
        }
    )
