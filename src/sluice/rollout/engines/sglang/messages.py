"""What is said to POST /generate, and what a reply to it means."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sluice.errors import EngineError
from sluice.rollout.engines.base import Finish, GenerateRequest, Generation
from sluice.types import Floats, Routes, SamplingParams, Version, VersionSpan


class RouteShape(NamedTuple):
    """What a position's experts are made of: `layers` of the model times `top_k` experts."""

    layers: int
    top_k: int


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What a server sampled for one POST; several make a generation when pauses or deaths cut it.

    Attributes:
        sampled: log-probs of the distribution drawn from, when it is not the plain one.
        labels: (the server's name of the weights, start, end), tiling the tokens of this piece.
        versions: what `labels` mean to the run.
        routes: experts, when they were asked for and came.
    """

    finish: Finish
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    sampled: list[float] = field(default_factory=list[float])
    labels: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    versions: list[Version] = field(default_factory=list[Version])
    cached_tokens: int = 0
    routes: Routes | None = None


def sampling_params(sampling: SamplingParams, max_new_tokens: int) -> dict[str, Any]:
    """Every parameter in SGLang's words, so that no default of the server or of the model steps in.

    The model's own end-of-sequence tokens end a turn too: `ignore_eos` would switch off stop_token_ids.
    """
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "n": 1,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }


class Answer:
    """A reply as it comes in: at once, or in chunks that repeat all tokens so far or bring only the new ones.

    Which of the two it is, each chunk says itself: `completion_tokens` counts all tokens so far.

    Args:
        label: what the weights were called when the request was sent, for a server that names none.
    """

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._named: list[tuple[str, int, int]] = []
        self.ids: list[int] = []
        self._rows: list[Any] = []
        self._sampled: list[float] = []
        self._meta: dict[str, Any] = {}

    def add(self, chunk: Mapping[str, Any]) -> list[int]:
        """Take in a chunk. Returns the ids that are new."""
        meta: dict[str, Any] = chunk.get("meta_info") or {}
        # a request that is aborted in the server's queue comes back without anything
        ids: list[int] = chunk.get("output_ids") or [] if "output_token_logprobs" in meta else []
        repeated = len(self.ids) if len(ids) == int(meta.get("completion_tokens", len(ids))) else 0
        self._meta = meta
        self._rows += (meta.get("output_token_logprobs") or [])[repeated:]
        self._sampled += (meta.get("output_token_sampling_logprobs") or [])[repeated:]
        new = ids[repeated:]
        label, at = str(meta.get("weight_version", self._label)), len(self.ids)
        self.ids += new
        if self._named and self._named[-1][0] == label:
            at = self._named.pop()[1]
        self._named.append((label, at, len(self.ids)))
        return new

    @property
    def ended(self) -> bool:
        """Whether the last chunk says how the request ended."""
        return bool(self._meta.get("finish_reason"))

    def labels_of(self, chunk: Mapping[str, Any]) -> list[str]:
        """What a chunk calls the weights that drew its tokens."""
        meta: dict[str, Any] = chunk.get("meta_info") or {}
        rows: list[dict[str, Any]] = meta.get("weight_versions") or []
        return [str(row["version"]) for row in rows] or [str(meta.get("weight_version", self._label))]

    @property
    def labels(self) -> list[tuple[str, int, int]]:
        """The server's names of the weights, tiling the tokens so far.

        The last chunk has the exact spans. What came before it is called as the server called its weights when
        it sent it; a server that never tells spans keeps no request across a pause, so that is exact too.
        """
        rows: list[dict[str, Any]] = self._meta.get("weight_versions") or []
        return [(str(row["version"]), int(row["start"]), int(row["end"])) for row in rows] or self._named

    def piece(self, request: GenerateRequest, start: int | None, shape: RouteShape | None) -> Piece:
        """What has come in, `Finish.ABORT` when it has not ended.

        Args:
            request: what was asked.
            start: first position whose experts were asked for, or None.
            shape: what a position's experts are made of.

        Raises:
            EngineError: the logits were NaN, or the reply contradicts itself.
        """
        reason: dict[str, Any] = self._meta.get("finish_reason") or {"type": "abort"}
        if reason["type"] == "stop" and reason.get("matched") == "NaN happened":
            raise EngineError(f"the logits of request {request.rid!r} are NaN under the weights {self._label!r}")
        logprobs = [float(row[0]) for row in self._rows]
        if len(logprobs) != len(self.ids) or not np.isfinite(logprobs).all():
            tokens = f"{len(self.ids)} tokens and the log-probs {logprobs}"
            raise EngineError(f"request {request.rid!r} came back with {tokens}")
        if not request.sampling.is_plain and len(self._sampled) != len(self.ids):
            counts = f"{len(self.ids)} tokens, {len(self._sampled)} log-probs after top-p/top-k"
            raise EngineError(f"request {request.rid!r}: {counts}")
        return Piece(
            Finish(reason["type"]),
            self.ids,
            logprobs,
            [float(value) for value in self._sampled],
            self.labels,
            cached_tokens=int(self._meta.get("cached_tokens") or 0),
            routes=self._routes(request, start, shape),
        )

    def _routes(self, request: GenerateRequest, start: int | None, shape: RouteShape | None) -> Routes | None:
        text = self._meta.get("routed_experts")
        if start is None or shape is None or not text:
            return None
        experts = np.frombuffer(base64.b64decode(text), dtype=np.int32)
        if len(experts) % (shape.layers * shape.top_k):
            raise EngineError(f"request {request.rid!r}: {len(experts)} routed experts are not {shape} per token")
        return Routes(start, shape.layers, shape.top_k, experts.astype(np.int16))


def join(pieces: Sequence[Piece], *, plain: bool, engine: str = "") -> Generation:
    """The pieces of one request, in order; the last one says how it ended."""
    spans: list[VersionSpan] = []
    at = 0
    for piece in pieces:
        for (_, start, end), version in zip(piece.labels, piece.versions, strict=True):
            if start == end:
                continue
            if spans and spans[-1].version == version:
                spans[-1] = spans[-1]._replace(end=at + end)
            else:
                spans.append(VersionSpan(at + start, at + end, version))
        at += len(piece.ids)
    routes = [piece.routes for piece in pieces if piece.routes is not None]
    return Generation(
        ids=np.array([token for piece in pieces for token in piece.ids], dtype=np.int32),
        logprobs=_floats(value for piece in pieces for value in piece.logprobs),
        spans=tuple(spans),
        finish=pieces[-1].finish,
        sampled_logprobs=None if plain else _floats(value for piece in pieces for value in piece.sampled),
        cached_tokens=pieces[0].cached_tokens,
        routes=routes[0]._replace(experts=np.concatenate([part.experts for part in routes])) if routes else None,
        engine=engine,
    )


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float32)
