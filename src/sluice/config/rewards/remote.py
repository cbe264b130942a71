"""Rewards that are asked for over HTTP: a service of your own, or a language model that judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import Url
from sluice.config.pattern import Pattern
from sluice.config.rewards.base import RewardBase
from sluice.config.rewards.group import GroupRewardBase


class RemoteRewardBase(RewardBase):
    """How a service is called. Connection errors and the statuses 429 and 5xx are tried again until the deadline,
    other statuses never; whatever is no score in the end is an infra failure."""

    url: Url
    """Where requests are posted to."""
    api_key_env: str = ""
    """Environment variable that holds the bearer token, when one is wanted. The token itself is in no recipe, log or
    run folder."""
    seconds: float = Field(default=120.0, gt=0)
    """Deadline of one request with all its repetitions, from when it is first sent."""
    attempt_seconds: float = Field(default=60.0, gt=0)
    """Deadline of one attempt."""
    backoff_seconds: float = Field(default=0.5, gt=0)
    """Wait before the first repetition; it doubles, up to 30 s. A `Retry-After` of the service counts if longer."""
    concurrent: int = Field(default=32, ge=1)
    """Requests in flight; further episodes wait their turn."""


class HttpReward(RemoteRewardBase):
    """A service of your own: it gets the episode as JSON and answers `{"reward": 0.5, …}`.

    Other numbers in the answer are logged beside the reward, as `NAME/key`, and do not count.
    """

    type: Literal["http"] = "http"


class JudgeRewardBase(RemoteRewardBase):
    """What is asked of a judge, and how its reply is read."""

    model: str = Field(min_length=1)
    """Name of the model, as the server calls it."""
    prompt: str = ""
    """What the judge is asked. `{prompt}`, `{messages}`, `{answer}` (the ground truth), `{response}`, `{extracted}`
    (what `pattern` found in the response), `{task}` and `{metadata.KEY}` are filled in; other braces stay."""
    prompt_file: Path | None = None
    """A file with that text, instead."""
    system: str = ""
    """System message put before it."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the judge's sampling."""
    max_tokens: int = Field(default=1_024, ge=0)
    """Limit of its reply; 0 leaves it to the server."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as `response_format` or `seed`."""
    attempts: int = Field(default=3, ge=1)
    """How often it is asked before a reply that cannot be read is an infra failure."""
    low: float = 0.0
    """Smallest score that is accepted."""
    high: float = 1.0
    """Largest score that is accepted; one outside counts as a reply that cannot be read."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if bool(self.prompt) == (self.prompt_file is not None):
            raise ValueError("a judge needs either `prompt` or `prompt_file`")
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        owned = sorted({"messages", "model", "temperature", "max_tokens", "stream", "n"} & self.params.keys())
        if owned:
            raise ValueError(f"params.{owned[0]} is set by a field of its own, or by Sluice")
        return self


class JudgeReward(JudgeRewardBase):
    """A language model that scores one response, at any OpenAI-compatible server.

    `url` is the API's base, such as `http://host:port/v1`.
    """

    type: Literal["judge"] = "judge"
    field: str = "score"
    """Its reply must contain a JSON object with a number in this field; the last such object counts."""
    reply_pattern: Pattern = ""
    """Read the reply by this expression instead: its last match, first group if it has one, is the score."""
    labels: dict[str, float] = Field(default_factory=dict)
    """Scores of words, such as `{"yes": 1, "no": 0}`, compared without case. Empty: the score is a number."""


class JudgeGroupReward(JudgeRewardBase, GroupRewardBase):
    """A language model that scores all responses of a group in one reply.

    The text needs `{responses}`: what `pattern` found in each, numbered from 1. `{response}` and `{extracted}` are not
    filled in.
    """

    type: Literal["judge_group"] = "judge_group"
    field: str = "scores"
    """Its reply must contain a JSON object with a list in this field, one number for each response in order."""
