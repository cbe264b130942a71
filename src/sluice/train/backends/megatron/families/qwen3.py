"""Qwen3 without experts (transformers: `modeling_qwen3.py`)."""

from __future__ import annotations

from sluice.train.backends.megatron.families.base import Family

QWEN3 = Family("qwen3", fixed={"attention_bias": False}, qk_norm=True)
