"""Rollout: which engine samples, and how."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from sluice.config.base import Part, UrlOrName
from sluice.config.gateway import ChatConfig, GatewayConfig
from sluice.config.model import DType
from sluice.config.router import RouterConfig
from sluice.config.runners import RunnerConfig, SingleTurnRunner, ToolsRunner
from sluice.config.sglang import SGLangConfig
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
    """Sluice's own engine: inside the run's process, or in servers of its own."""

    servers: int = Field(default=0, ge=0)
    """Processes that serve the model, behind the router when there are several; 0 generates in the run's own."""
    threads: int = Field(default=1, ge=1)
    """Threads of each server; the engine in the run's own process has those of the run."""

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


class RolloutConfig(Part):
    """Which engine, and the sampling of training episodes."""

    engine: UrlOrName = "embedded"
    """`embedded`; `sglang`, as `rollout.sglang` says; or the URL of one running SGLang server."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of training episodes."""
    context_length: int | None = Field(default=None, ge=2)
    """Longest prompt plus answer, in tokens; None takes the engine's limit."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    """Settings of the embedded engine."""
    sglang: SGLangConfig = SGLangConfig()
    """SGLang servers and their client."""
    router: RouterConfig = RouterConfig()
    """The router in front of several engines."""
    gateway: GatewayConfig = GatewayConfig()
    """The HTTP server that agents talk to."""
    chat: ChatConfig = ChatConfig()
    """Chat template, tool calls, reasoning."""
    runner: RunnerConfig = SingleTurnRunner()
    """Who executes an episode."""
    retries: int = Field(default=0, ge=0)
    """How often a training episode whose agent, sandbox or lease failed is run again before it is an infra failure."""

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in ("embedded", "sglang") and not value.startswith(("http://", "https://")):
            raise ValueError(
                f"{value!r} is neither 'embedded' nor 'sglang' nor the URL of an SGLang server (http://host:port)"
            )
        return value

    @model_validator(mode="after")
    def _urls_have_one_place(self) -> Self:
        if self.sglang.urls and self.engine != "sglang":
            raise ValueError("sglang.urls are read with engine = 'sglang'; engine itself names one server at most")
        return self

    @model_validator(mode="after")
    def _tools_can_be_called(self) -> Self:
        if isinstance(self.runner, ToolsRunner) and self.chat.format == "none":
            raise ValueError("chat.format = 'none' leaves tool calls as text, so the runner 'tools' would see none")
        return self
