"""Qwen2 and Qwen2.5 (transformers: `modeling_qwen2.py`)."""

from __future__ import annotations

from sluice.train.backends.megatron.families.base import Family

QWEN2 = Family("qwen2", qkv_bias=True)
