"""The gateway: the OpenAI and Anthropic face that records sessions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sluice.config.base import Part

OnDeviation = Literal["fork", "fail"]
"""`fork` begins a new segment and records why; `fail` answers 409 and leaves the session as it is."""


class ChatConfig(Part):
    """How conversations become tokens, and how sampled text becomes tool calls and reasoning."""

    format: Literal["auto", "none", "qwen", "qwen_coder", "hermes", "glm", "llama", "deepseek"] = "auto"
    """Tool-call and reasoning format; `auto` reads it off the chat template, `none` leaves text as it is."""
    on_rewrite: Literal["extend", "fail"] = "extend"
    """A template that rewrites the past: go on by token extension (and say so), or refuse the model."""


class GatewayConfig(Part):
    """One HTTP server for agents."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=0, ge=0, lt=65536)
    """Port to listen on; 0 takes a free one."""
    owner_key_env: str = "SLUICE_OWNER_KEY"
    """Environment variable with the owner's key: opens sessions, gives rewards, finishes. Unset: a random one,
    shown once on the terminal that started the gateway."""
    on_sampling: Literal["refuse", "flag"] = "refuse"
    """A client asks for another temperature or top-p than the session's: answer 400, or go on with the
    session's own and record the wish."""
    on_mismatch: OnDeviation = "fork"
    """A client's history differs from what was recorded, without a declared fork."""
    on_branch: OnDeviation = "fork"
    """A client goes back to an earlier point of its own history (a retry, a parallel branch)."""
    on_root: OnDeviation = "fork"
    """A client begins another conversation inside the session (a sub-agent, a compaction)."""
    max_sessions: int = Field(default=4_096, ge=1)
    """Open sessions; one more is answered 429."""
    max_segments: int = Field(default=64, ge=1)
    """Segments of one session; one more is answered 409."""
    max_turns: int = Field(default=512, ge=1)
    """Model calls of one session."""
    idle_seconds: float = Field(default=1_800.0, gt=0)
    """A session without a call for this long ends as an infra failure, reason `idle`."""
    body_bytes: int = Field(default=16 * 1024**2, ge=1024)
    """Largest request body; more is answered 413."""
    context_tokens: int | None = Field(default=None, ge=2)
    """Context budget of a segment, prompt and answers, in tokens; None takes the engine's limit."""
    retry_after_seconds: int = Field(default=2, ge=1)
    """What a 429 tells the client to wait."""
