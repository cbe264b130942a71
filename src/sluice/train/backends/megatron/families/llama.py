"""Llama 2 and 3, SmolLM2, and whatever else says `llama` (transformers: `modeling_llama.py`)."""

from __future__ import annotations

from sluice.train.backends.megatron.families.base import Family

LLAMA = Family("llama", fixed={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1})
