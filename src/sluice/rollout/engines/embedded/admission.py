"""What the engine refuses before a request is queued: what could never be served, or would break a step."""

from __future__ import annotations

from typing import NamedTuple

from sluice.errors import EngineError
from sluice.rollout.engines.base import GenerateRequest
from sluice.types import SamplingParams


class Limits(NamedTuple):
    """What bounds a request: longest sequence and KV cache in tokens, vocabulary, presence of a tokenizer."""

    context_length: int
    kv_tokens: int
    vocab_size: int
    stop_strings: bool


def context_length(wanted: int | None, own: int | None, model: str) -> int:
    """The longest sequence: what the config wants, or the model's own limit.

    Raises:
        EngineError: neither is known, or more is wanted than the model can do.
    """
    if wanted is None and own is None:
        raise EngineError(f"the config of {model} names no context length", hint="set rollout.embedded.context_length")
    if wanted is not None and own is not None and wanted > own:
        raise EngineError(
            f"a context length of {wanted} is more than the {own} of {model}",
            hint="lower rollout.embedded.context_length",
        )
    return wanted or own or 0


def admit(request: GenerateRequest, limits: Limits) -> int:
    """Check a request; returns the number of tokens, context included, at which it ends at the latest.

    Raises:
        EngineError: it can never be served as it is; the message has the sizes and the next move.
    """
    rid, ids, sampling = request.rid, request.ids, request.sampling
    if ids.ndim != 1 or not len(ids):
        raise EngineError(f"request {rid!r} has a context of shape {list(ids.shape)}, not [n ≥ 1]")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limits.vocab_size:
        raise EngineError(
            f"request {rid!r} has token ids from {low} to {high}; the vocabulary has {limits.vocab_size}",
            hint="prompts must be made with the tokenizer of the model that is served",
        )
    _check_sampling(rid, sampling)
    if sampling.stop and not limits.stop_strings:
        raise EngineError(f"request {rid!r} has stop strings, but the engine has no tokenizer")
    if len(ids) >= limits.context_length:
        raise EngineError(
            f"request {rid!r} has {len(ids)} context tokens; the context length is {limits.context_length}, "
            "and at least one token must be drawn",
            hint="shorten the prompt or raise rollout.embedded.context_length",
        )
    longest = min(len(ids) + sampling.max_new_tokens, limits.context_length)
    if longest > limits.kv_tokens:
        raise EngineError(
            f"request {rid!r} may reach {longest} tokens ({len(ids)} of context and up to "
            f"{longest - len(ids)} new); the KV cache holds {limits.kv_tokens}",
            hint="lower max_new_tokens or raise rollout.embedded.kv_tokens",
        )
    return longest


def _check_sampling(rid: str, sampling: SamplingParams) -> None:
    checks = (
        ("temperature", sampling.temperature, 0 <= sampling.temperature < float("inf")),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1),
        ("top_k", sampling.top_k, sampling.top_k == -1 or sampling.top_k >= 1),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1),
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1),
        ("stop", sampling.stop, "" not in sampling.stop),
    )
    wrong = [f"{name} = {value}" for name, value, right in checks if not right]
    if wrong:
        raise EngineError(f"request {rid!r} cannot be drawn with {', '.join(wrong)}")
