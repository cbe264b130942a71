"""One request on its way: its tokens, what was drawn, where its KV lies, and when it ends. No torch."""

from __future__ import annotations

import numpy as np

from sluice.rollout.engines.base import Finish, GenerateRequest, Generation
from sluice.rollout.engines.embedded.kv import ROOT
from sluice.rollout.engines.embedded.stop import StopText
from sluice.types import Version, VersionSpan


class Sequence:
    """A running or waiting request.

    Args:
        request: what was asked.
        max_tokens: the sequence ends when it has this many tokens, context included.
        stop_text: search for stop strings, when there are any.

    Attributes:
        tokens: context and drawn tokens.
        computed: how many of them have their keys and values in the cache.
        blocks: the KV blocks, in order.
        row: row of the scheduler's block table; -1 while waiting.
        registered: leading blocks known to the prefix index, under the uid `prefix`.
        epoch: the pool's epoch in which the KV was begun; older KV is never registered.
        cached: context tokens found in the cache when first admitted; -1 before.
    """

    __slots__ = (
        "blocks", "cached", "computed", "context", "epoch", "logprobs", "max_tokens", "noise_key",
        "plain", "prefix", "registered", "request", "rid", "row", "sampled_logprobs", "sampling", "spans",
        "stop_ids", "stop_text", "tokens",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, *, max_tokens: int, stop_text: StopText | None) -> None:
        self.request = request
        self.rid = request.rid
        self.sampling = request.sampling
        self.plain = request.sampling.is_plain
        self.noise_key = request.noise_key & (2**64 - 1)
        self.stop_ids = frozenset(request.sampling.stop_token_ids)
        self.stop_text = stop_text
        self.max_tokens = max_tokens
        self.tokens: list[int] = request.ids.tolist()
        self.context = len(self.tokens)
        self.logprobs: list[float] = []
        self.sampled_logprobs: list[float] = []
        self.spans: list[tuple[int, Version]] = []
        self.cached = -1
        self.computed = 0
        self.blocks: list[int] = []
        self.row = -1
        self.registered = 0
        self.prefix = ROOT
        self.epoch = 0

    @property
    def num_missing(self) -> int:
        """Tokens whose keys and values must be computed before the next one can be drawn."""
        return len(self.tokens) - self.computed

    def accept(self, token: int, logprob: float, sampled_logprob: float, version: Version) -> Finish | None:
        """Append a drawn token. Returns why the sequence ends with it, or None when it goes on."""
        if not self.spans or self.spans[-1][1] != version:
            self.spans.append((len(self.logprobs), version))
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if not self.plain:
            self.sampled_logprobs.append(sampled_logprob)
        if token in self.stop_ids:
            return Finish.STOP
        if self.stop_text is not None and self.stop_text.found(self.tokens):
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self.max_tokens else None

    def generation(self, finish: Finish) -> Generation:
        """What is returned to the caller; arrays of shape `[drawn tokens]`."""
        starts = [start for start, _ in self.spans] + [len(self.logprobs)]
        return Generation(
            ids=np.asarray(self.tokens[self.context :], dtype=np.int32),
            logprobs=np.asarray(self.logprobs, dtype=np.float32),
            spans=tuple(
                VersionSpan(start, end, version) for (start, version), end in zip(self.spans, starts[1:], strict=True)
            ),
            finish=finish,
            sampled_logprobs=None if self.plain else np.asarray(self.sampled_logprobs, dtype=np.float32),
            cached_tokens=max(self.cached, 0),
        )
