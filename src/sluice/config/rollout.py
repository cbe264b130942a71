"""Rollout: which engine samples, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from sluice.config.base import Part
from sluice.config.model import DType
from sluice.types import SamplingParams


class SamplingConfig(Part):
    """How tokens are drawn; see `sluice.types.SamplingParams`."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the smallest set of tokens with this probability mass."""
    top_k: int = Field(default=-1, ge=-1)
    """Keep the likeliest tokens; -1 keeps all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Keep tokens with at least this fraction of the likeliest one's probability."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Limit of one turn, in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a turn."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a turn, besides the tokenizer's end-of-sequence token."""

    @field_validator("top_k")
    @classmethod
    def _top_k_not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("top_k = 0 would keep no token; -1 keeps all")
        return value

    def params(self, *, eos: tuple[int, ...] = ()) -> SamplingParams:
        """The run-time form, with the end-of-sequence ids added to the stop ids."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            stop_token_ids=tuple(dict.fromkeys((*self.stop_token_ids, *eos))),
        )


class EmbeddedConfig(Part):
    """The engine inside the trainer's process."""

    max_running: int = Field(default=256, ge=1)
    """Sequences decoded together."""
    kv_tokens: int = Field(default=65_536, ge=256)
    """KV cache size in tokens, all sequences together."""
    block_tokens: int = Field(default=16, ge=1)
    """Tokens of one KV block: the unit of prefix sharing."""
    prefill_tokens: int = Field(default=8_192, ge=16)
    """At most this many context tokens are computed in one forward pass."""
    context_length: int | None = Field(default=None, ge=2)
    """Longest sequence; None takes the model's own limit."""
    dtype: DType = "float32"
    """Precision of weights and cache."""


class SGLangConfig(Part):
    """A running SGLang server."""

    sync: Literal["tensor", "disk"] = "tensor"
    """How weights reach the server: tensors over shared memory (same host), or a folder both can read."""
    bucket_bytes: int = Field(default=512 * 1024**2, ge=1024)
    """Tensors are sent in buckets of about this size."""
    api_key_env: str = ""
    """Environment variable that holds the server's bearer token, when it wants one. The token itself is in no
    recipe, log or run folder."""
    request_seconds: float = Field(default=600.0, gt=0)
    """Deadline of one generation."""
    control_seconds: float = Field(default=120.0, gt=0)
    """Deadline of any other call: handshake, pause, weight update."""
    max_concurrent: int = Field(default=256, ge=1)
    """Requests in flight at the server."""


class RolloutConfig(Part):
    """Which engine, and the sampling of training episodes."""

    engine: str = "embedded"
    """`embedded`, or the URL of a running SGLang server."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of training episodes."""
    context_length: int | None = Field(default=None, ge=2)
    """Longest prompt plus answer, in tokens; None takes the engine's limit."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    """Settings of the embedded engine."""
    sglang: SGLangConfig = SGLangConfig()
    """Settings of the SGLang client."""

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value != "embedded" and not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is neither 'embedded' nor the URL of an SGLang server (http://host:port)")
        return value
