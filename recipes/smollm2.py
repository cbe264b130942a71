"""A real model on one GPU: SmolLM2-135M-Instruct learns sums, SGLang samples, the trainer shares the card.

    sluice models fetch smollm2
    sluice engines install sglang --cuda
    sluice train recipes/smollm2.py

The questions are reasoning-gym's `chain_sum` with two terms of one digit (there are 200 of them; 48 are held out). When
the last 64 groups are right three times out of four, three terms follow. The reward is the scorer's 0 or 1 on the last
number of the answer.

`recipes/smollm2.py:gpu_host` is the same run on a host that `benchmarks/gpu/setup.sh` prepared.
"""

from __future__ import annotations

import os
from typing import Any

from sluice.models.smollm2 import default_folder

SCORER = {"type": "reasoning_gym", "pattern": r"-?\d+(?:\.\d+)?", "threshold": 1.0}
SIZES = ["1", "8", "32", "64", "128", "256", "512"]
"""Batch sizes whose decode step is captured as a CUDA graph; a batch in between is padded to the next one."""


def sums(terms: int, size: int, digits: int = 1) -> dict[str, Any]:
    """A source of sums and differences."""
    return {
        "type": "reasoning_gym",
        "dataset": "chain_sum",
        "size": size,
        "params": {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits},
    }


def recipe() -> dict[str, Any]:
    """Everything that differs from the defaults."""
    return {
        "name": "smollm2",
        "model": {"path": str(default_folder())},
        "data": {
            "train": sums(2, 3_000),
            "eval_prompts": 48,
            "strategy": {
                "type": "curriculum",
                "samples": 8,
                "levels": [sums(3, 3_000)],
                "threshold": 0.75,
                "window": 64,
                "review": 0.2,
            },
        },
        "rewards": [SCORER],
        "algorithm": {"type": "grpo", "normaliser": "token"},
        "rollout": {
            "engine": "sglang",
            "context_length": 512,
            "sampling": {"max_new_tokens": 64},
            "sglang": {
                "dtype": "bfloat16",
                "memory_fraction": 0.35,  # the trainer has the rest
                "sync": "tensor",
                "max_concurrent": 512,
                "groups": [{"args": {"cuda-graph-bs": SIZES}}],
            },
        },
        "steps": 100,
        "groups_per_step": 32,
        "train": {
            "dtype": "bfloat16",
            "micro_batch_tokens": 16_384,
            "optimizer": {"lr": 2e-5, "warmup_steps": 5, "schedule": "linear", "final_lr_ratio": 0.1},
        },
        "evaluation": {"every": 10, "samples": 4, "greedy": True},
        "checkpoint": {"every": 50, "keep": 1},
        "obs": {"tensorboard": False},
    }


def gpu_host() -> dict[str, Any]:
    """The same on a host without a registry: SGLang 0.5.17, kernels without FlashAttention 3.

    `SLUICE_SITE` is the folder that `benchmarks/gpu/setup.sh` filled; the engines' interpreter is in it.
    """
    return on_gpu_host(recipe())


def on_gpu_host(recipe: dict[str, Any]) -> dict[str, Any]:
    """`recipe` with the servers' settings of such a host."""
    sglang = recipe["rollout"]["sglang"]
    flags = {"attention-backend": "triton", "sampling-backend": "pytorch", "disable-prefill-cuda-graph": True}
    flags["skip-server-warmup"] = True  # a minute and a half of a prefill engine's start
    groups = [{**group, "args": {**group["args"], **flags}} for group in sglang["groups"]]
    python = os.path.join(os.environ.get("SLUICE_SITE", "/tmp/site"), "engine", "bin", "python")
    here = {"python": python, "build": "cuda", "groups": groups}
    return {**recipe, "rollout": {**recipe["rollout"], "sglang": {**sglang, **here}}}
