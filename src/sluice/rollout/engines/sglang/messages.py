"""What is said to POST /generate, and what a reply to it means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sluice.errors import EngineError
from sluice.rollout.engines.base import Finish, GenerateRequest, Generation
from sluice.types import Floats, SamplingParams, Version, VersionSpan


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What the server sampled for one POST; several make a generation when pauses cut it.

    Attributes:
        labels: (the server's name of the weights, start, end), tiling the tokens of this piece.
        sampled: log-probs of the distribution drawn from, when it is not the plain one.
    """

    finish: Finish
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    sampled: list[float] = field(default_factory=list[float])
    labels: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    cached_tokens: int = 0


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


def read(reply: Mapping[str, Any], request: GenerateRequest, label: str) -> Piece:
    """A reply to a request that was sent while the weights were called `label`.

    Raises:
        EngineError: the logits were NaN, or the reply contradicts itself.
    """
    meta = reply["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] == "stop" and reason.get("matched") == "NaN happened":
        raise EngineError(f"the logits of request {request.rid!r} are NaN under the weights {label!r}")
    # a request that is aborted in the server's queue comes back without anything
    ids: list[int] = reply.get("output_ids") or [] if "output_token_logprobs" in meta else []
    logprobs = [float(row[0]) for row in meta.get("output_token_logprobs") or []]
    sampled = [float(value) for value in meta.get("output_token_sampling_logprobs") or []]
    if len(logprobs) != len(ids) or not np.isfinite(logprobs).all():
        raise EngineError(f"request {request.rid!r} came back with {len(ids)} tokens and the log-probs {logprobs}")
    if not request.sampling.is_plain and len(sampled) != len(ids):
        raise EngineError(f"request {request.rid!r}: {len(ids)} tokens, {len(sampled)} log-probs after top-p/top-k")
    # a server that reports no spans keeps no request across a pause: one reply is one version
    whole = {"version": meta.get("weight_version", label), "start": 0, "end": len(ids)}
    rows = meta.get("weight_versions") or [whole]
    labels = [(str(row["version"]), int(row["start"]), int(row["end"])) for row in rows]
    return Piece(Finish(reason["type"]), ids, logprobs, sampled, labels, int(meta.get("cached_tokens") or 0))


def join(pieces: Sequence[Piece], *, plain: bool, version_of: Callable[[str], Version]) -> Generation:
    """The pieces of one request, in order; the last one says how it ended."""
    spans: list[VersionSpan] = []
    at = 0
    for piece in pieces:
        for label, start, end in piece.labels:
            version = version_of(label)
            if spans and spans[-1].version == version:
                spans[-1] = spans[-1]._replace(end=at + end)
            elif start < end:
                spans.append(VersionSpan(at + start, at + end, version))
        at += len(piece.ids)
    return Generation(
        ids=np.array([token for piece in pieces for token in piece.ids], dtype=np.int32),
        logprobs=_floats(value for piece in pieces for value in piece.logprobs),
        spans=tuple(spans),
        finish=pieces[-1].finish,
        sampled_logprobs=None if plain else _floats(value for piece in pieces for value in piece.sampled),
        cached_tokens=pieces[0].cached_tokens,
    )


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float32)
