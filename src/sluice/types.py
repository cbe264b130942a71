"""The words of Sluice: one type per concept, from a prompt to the batch of an optimizer step.

Nothing here imports torch or ray: arrays are numpy, and tensors begin in `sluice.train`. The ring is

    Prompt → Episode → Group → TrainSample → TrainBatch → version → …

and each stage adds a type of its own rather than filling an optional field of the one before. How one
episode passes through all of them, with numbers, is `tests/unit/test_worked_example.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Ids: TypeAlias = NDArray[np.int32]
"""Token ids, shape `[n]`."""
Floats: TypeAlias = NDArray[np.float32]
"""Per-token values, shape `[n]`."""


class Stateful(Protocol):
    """Anything whose state goes into a checkpoint. The state is JSON: small, readable, diffable."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


# ── versions ────────────────────────────────────────────────────────────────────────────────────────────


class Version(NamedTuple):
    """What published weights are called: the optimizer step that made them, and which attempt at it.

    `attempt` is 0 unless a resumed run published the same step again with other bits.
    """

    step: int
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.step}.{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> Version:
        """Inverse of `str`. Raises ValueError for anything else."""
        step, _, attempt = text.partition(".")
        return cls(int(step), int(attempt or 0))

    @property
    def code(self) -> int:
        """The version as one int64, for the `version` stream."""
        return (self.step << 20) | self.attempt

    @classmethod
    def from_code(cls, code: int) -> Version:
        return cls(int(code) >> 20, int(code) & ((1 << 20) - 1))


class VersionSpan(NamedTuple):
    """`version` sampled the tokens `[start, end)` of a turn."""

    start: int
    end: int
    version: Version


# ── prompts and requests ────────────────────────────────────────────────────────────────────────────────


class Message(NamedTuple):
    """One chat message as the chat template sees it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task instance.

    `id` is stable between runs: it names the instance, not its place in the epoch. `task` selects runner
    and reward. `answer` is the ground truth in whatever form the task's reward wants.
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    answer: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Recorded with every sampled turn; the trainer divides by the same temperature.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_p, top_k, min_p: keep the smallest set of mass `top_p` / the `top_k` likeliest tokens
            (-1: all) / tokens with at least `min_p` times the likeliest one's probability.
        max_new_tokens: limit of one turn.
        stop: strings that end the turn; the tokens that spell them are kept.
        stop_token_ids: ids that end the turn; the id is kept.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """True when the sampled distribution is softmax(logits / temperature), nothing cut off."""
        return self.top_p == 1.0 and self.top_k == -1 and self.min_p == 0.0


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """What a strategy asks for: `n` episodes of one prompt that are compared with each other.

    `ordinal` counts the requests of a run in dispatch order: it names the group (`g000017`), keys the
    sampling noise and is what a resumed run uses to find finished episodes in the log again.
    """

    ordinal: int
    prompt: Prompt
    n: int
    sampling: SamplingParams

    @property
    def id(self) -> str:
        return f"g{self.ordinal:06d}"

    def episode_id(self, sample: int) -> str:
        return f"{self.id}.{sample}"


# ── episodes ────────────────────────────────────────────────────────────────────────────────────────────


class Outcome(StrEnum):
    """How an episode ended. Validity is a type: a crash is never a reward of 0."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    INFRA_FAILURE = "infra_failure"

    @property
    def counts(self) -> bool:
        """Whether the episode is in the statistics of its group and may be trained."""
        return self in (Outcome.COMPLETED, Outcome.TRUNCATED)


class Routes(NamedTuple):
    """Which experts a mixture-of-experts model sent each position to, from position `start` on.

    `experts` is int16 of shape `[positions * layers * top_k]`, position-major; dense layers hold zeros.
    """

    start: int
    layers: int
    top_k: int
    experts: NDArray[np.int16]

    @property
    def end(self) -> int:
        """The first position that is not in it."""
        return self.start + len(self.experts) // (self.layers * self.top_k)

    def until(self, position: int) -> Routes:
        """Those of the positions before `position`."""
        positions = max(position - self.start, 0)
        return self._replace(experts=self.experts[: positions * self.layers * self.top_k])


class Author(StrEnum):
    SAMPLED = "sampled"
    OBSERVED = "observed"


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A contiguous run of tokens by one author.

    A sampled turn has `logprobs` (behaviour: log-softmax(logits / T) of the engine, before top-p/top-k),
    `spans` that tile `[0, len(ids))`, and the sampling parameters in force. An observed turn has none.
    `sampled_logprobs` are those of the distribution actually drawn from (after top-p/top-k/min-p),
    None when it is the plain one. `routes` are the experts of the segment's positions from the end of the
    routes of the sampled turn before it (or the segment's start) to this turn's last token but one.
    """

    author: Author
    ids: Ids
    logprobs: Floats | None = None
    spans: tuple[VersionSpan, ...] = ()
    sampling: SamplingParams | None = None
    finish: str = ""
    sampled_logprobs: Floats | None = None
    routes: Routes | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name, values, dtype in (
            ("ids", self.ids, np.int32),
            ("logprobs", self.logprobs, np.float32),
            ("sampled_logprobs", self.sampled_logprobs, np.float32),
        ):
            if values is not None and (values.dtype != dtype or values.ndim != 1):
                found = f"{values.dtype} of shape {values.shape}"
                raise ValueError(f"{name} of a turn are {found}, not {dtype.__name__} of shape [n]")
        if self.author is Author.OBSERVED:
            if self.logprobs is not None or self.spans or self.sampling is not None or self.finish:
                raise ValueError("an observed turn has no log-probs, versions, sampling parameters or finish")
            return
        if self.logprobs is None or len(self.logprobs) != n:
            raise ValueError(f"a sampled turn of {n} tokens needs {n} log-probs")
        if self.sampling is None:
            raise ValueError("a sampled turn needs the sampling parameters that were in force")
        if self.sampled_logprobs is not None and len(self.sampled_logprobs) != n:
            raise ValueError(f"a sampled turn of {n} tokens needs {n} sampled log-probs, or none")
        edges = [0, *(span.end for span in self.spans)]
        if [span.start for span in self.spans] != edges[:-1] or edges[-1] != n:
            raise ValueError(f"version spans {self.spans} do not tile the {n} tokens of the turn")

    def __len__(self) -> int:
        return len(self.ids)


def observed(ids: Sequence[int] | Ids) -> Turn:
    """A turn the model did not write: prompt, tool output, user text."""
    return Turn(Author.OBSERVED, np.asarray(ids, dtype=np.int32))


class Fork(NamedTuple):
    """Where a segment leaves its parent: it shares the parent's first `position` tokens."""

    parent: int
    position: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """An append-only token sequence: what one forward pass sees. Never re-tokenised.

    A forked segment owns only the tokens after the fork; the shared ones are context, weight 0.
    """

    turns: tuple[Turn, ...]
    fork: Fork | None = None

    @property
    def num_own_tokens(self) -> int:
        return sum(len(turn) for turn in self.turns)


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """One execution of a prompt. Immutable once finished; rewards are records of their own."""

    id: str
    group_id: str
    prompt: Prompt
    segments: tuple[Segment, ...]
    outcome: Outcome
    reason: str = ""
    policy: str = "actor"
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for index, segment in enumerate(self.segments):
            fork = segment.fork
            if fork is None:
                continue
            if not 0 <= fork.parent < index:
                raise ValueError(f"segment {index} of {self.id} forks from {fork.parent}, which is not before it")
            if not 0 <= fork.position <= self.length(fork.parent):
                raise ValueError(f"segment {index} of {self.id} forks at {fork.position}, beyond its parent")

    def start(self, segment: int) -> int:
        """Position of the first token that `segment` owns."""
        fork = self.segments[segment].fork
        return fork.position if fork else 0

    def length(self, segment: int) -> int:
        """Tokens that a forward pass over `segment` sees, shared ones included."""
        return self.start(segment) + self.segments[segment].num_own_tokens

    def ids(self, segment: int) -> Ids:
        """All token ids of `segment`, shape `[length(segment)]`."""
        fork = self.segments[segment].fork
        parts = [self.ids(fork.parent)[: fork.position]] if fork else []
        parts += [turn.ids for turn in self.segments[segment].turns]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def routes(self, segment: int) -> tuple[Routes, ...]:
        """What is recorded of the experts of `segment`'s positions, those shared with its parent included."""
        fork = self.segments[segment].fork
        parts = [each.until(fork.position) for each in self.routes(fork.parent)] if fork else []
        parts += [turn.routes for turn in self.segments[segment].turns if turn.routes is not None]
        return tuple(part for part in parts if len(part.experts))

    def sampled_turns(self) -> Iterator[Turn]:
        for segment in self.segments:
            yield from (turn for turn in segment.turns if turn.author is Author.SAMPLED)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(turn) for turn in self.sampled_turns())


@dataclass(frozen=True, slots=True)
class Reward:
    """Named components and their weights. The total is their weighted sum; every component is logged.

    `notes` are what components had to say besides numbers, by component: the words of a judge, the test that failed.
    """

    components: Mapping[str, float]
    weights: Mapping[str, float]
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.components.keys() != self.weights.keys():
            raise ValueError(f"reward components {set(self.components)} and weights {set(self.weights)} differ")
        bad = {name: value for name, value in self.components.items() if not math.isfinite(value)}
        if bad:
            raise ValueError(f"reward components are not finite: {bad}")

    @property
    def total(self) -> float:
        return math.fsum(value * self.weights[name] for name, value in self.components.items())


# ── training ────────────────────────────────────────────────────────────────────────────────────────────

STREAMS: Mapping[str, tuple[type[np.generic], float]] = {
    "behaviour": (np.float32, 0.0),
    "proximal": (np.float32, 0.0),
    "reference": (np.float32, 0.0),
    "value": (np.float32, 0.0),
    "advantage": (np.float64, 0.0),
    "return": (np.float64, 0.0),
    "weight": (np.float32, 0.0),
    "version": (np.int64, -1),
    "temperature": (np.float32, 1.0),
    "turn": (np.int32, -1),
    "lag": (np.int32, -1),
}
"""Declared streams: dtype, and the value at tokens the policy did not sample. `teacher:NAME` is float32.
The gate writes `lag`: optimizer steps between a token's version and the one in use when its batch is taken."""


def stream_dtype(name: str) -> type[np.generic]:
    """The declared dtype of a stream. Raises KeyError for a name nobody declared."""
    return np.float32 if name.startswith("teacher:") else STREAMS[name][0]


@dataclass(frozen=True, slots=True, eq=False)
class TrainSample:
    """One segment as arrays, all of shape `[length]`, aligned with `ids`.

    A stream's entry at position t belongs to the token at position t (its log-prob given tokens < t).
    `weight` is 1 at tokens trained here and 0 elsewhere. `missing` streams are filled by scoring. `routes` are the
    recorded experts, by position; where two overlap the later one counts.
    """

    episode_id: str
    group_id: str
    segment: int
    ids: Ids
    streams: Mapping[str, NDArray[Any]]
    routes: tuple[Routes, ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.streams.items():
            if values.shape != self.ids.shape:
                raise ValueError(f"stream {name} of {self.key} has shape {values.shape}, ids {self.ids.shape}")
            if values.dtype != stream_dtype(name):
                raise ValueError(f"stream {name} of {self.key} is {values.dtype}, not {stream_dtype(name)}")

    @property
    def key(self) -> tuple[str, int]:
        return self.episode_id, self.segment

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, stream: str) -> NDArray[Any]:
        return self.streams[stream]

    @property
    def trained(self) -> NDArray[np.bool_]:
        """Mask of the tokens that are in the loss, shape `[length]`."""
        return self.streams["weight"] > 0

    @property
    def num_trained_tokens(self) -> int:
        return int(np.count_nonzero(self.streams["weight"]))

    def with_streams(self, **streams: NDArray[Any]) -> TrainSample:
        """A copy with streams added or replaced, cast to their declared dtypes.

        `:` in a teacher's name is written `__`: `with_streams(teacher__big=...)`.
        """
        named = {name.replace("__", ":"): values for name, values in streams.items()}
        cast = {name: np.asarray(values, dtype=stream_dtype(name)) for name, values in named.items()}
        return TrainSample(
            self.episode_id, self.group_id, self.segment, self.ids, {**self.streams, **cast}, self.routes
        )


def expand(episode: Episode) -> tuple[TrainSample, ...]:
    """One TrainSample per segment: behaviour, weight, version, temperature and turn streams.

    A sampled token has weight 1 in the segment that owns it and 0 wherever it is context.
    """
    samples: list[TrainSample] = []
    for index, segment in enumerate(episode.segments):
        ids = episode.ids(index)
        names = ("behaviour", "weight", "version", "temperature", "turn")
        streams = {name: np.full(len(ids), STREAMS[name][1], dtype=STREAMS[name][0]) for name in names}
        at = episode.start(index)
        for number, turn in enumerate(segment.turns):
            here = slice(at, at + len(turn))
            streams["turn"][here] = number
            if turn.author is Author.SAMPLED:
                assert turn.logprobs is not None  # both held by Turn
                assert turn.sampling is not None
                streams["behaviour"][here] = turn.logprobs
                streams["weight"][here] = 1.0
                streams["temperature"][here] = turn.sampling.temperature
                for span in turn.spans:
                    streams["version"][at + span.start : at + span.end] = span.version.code
            at += len(turn)
        samples.append(TrainSample(episode.id, episode.group_id, index, ids, streams, episode.routes(index)))
    return tuple(samples)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A finished episode with its reward (None exactly when the outcome does not count) and its samples."""

    episode: Episode
    reward: Reward | None
    samples: tuple[TrainSample, ...] = ()

    def __post_init__(self) -> None:
        if self.episode.outcome.counts != (self.reward is not None):
            raise ValueError(f"episode {self.episode.id} is {self.episode.outcome} and has reward {self.reward}")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The finished episodes of one request, complete: identity survives fan-out, filters and failures."""

    request: GroupRequest
    members: tuple[Scored, ...]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def valid(self) -> tuple[Scored, ...]:
        """The members that are in the group's statistics."""
        return tuple(member for member in self.members if member.episode.outcome.counts)

    @property
    def rewards(self) -> NDArray[np.float64]:
        """Total rewards of the valid members, shape `[len(valid)]`."""
        return np.array([m.reward.total for m in self.valid if m.reward is not None], dtype=np.float64)


class Normaliser(StrEnum):
    """What the loss of a step is divided by. Counted once per step, before any split.

    * token: all trained tokens of the step.
    * sequence: tokens inside a segment, then segments (those with a trained token).
    * episode: tokens of an episode together, then episodes.
    * constant: a fixed length times segments (Dr. GRPO).
    """

    TOKEN = "token"
    SEQUENCE = "sequence"
    EPISODE = "episode"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Samples packed end to end without padding: one forward and backward pass.

    Attributes:
        samples: the packed samples, in order.
        scales: loss factor of every token, float64 `[tokens]`: the loss of a step is Σ scale · token loss.
    """

    samples: tuple[TrainSample, ...]
    scales: NDArray[np.float64]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(sample) for sample in self.samples)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> NDArray[np.int64]:
        """Cumulative lengths, shape `[len(samples) + 1]`, starting at 0."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions restart at 0 in each sample; shape `[tokens]`."""
        return np.concatenate([np.arange(length) for length in self.lengths])

    def stream(self, name: str) -> NDArray[Any]:
        """A stream of all samples end to end, shape `[tokens]`."""
        return np.concatenate([sample[name] for sample in self.samples])

    @property
    def ids(self) -> Ids:
        return np.concatenate([sample.ids for sample in self.samples])


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """Everything one optimizer step trains on: micro-batches whose gradients are summed."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def samples(self) -> tuple[TrainSample, ...]:
        return tuple(sample for micro in self.micro_batches for sample in micro.samples)

    @property
    def num_tokens(self) -> int:
        return sum(micro.num_tokens for micro in self.micro_batches)


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """What a loss sees of one micro-batch: full per-token tensors of shape `[tokens]`.

    Attributes:
        logprobs: of the policy being trained, at the recorded temperature; carries the gradient.
        entropy: of the policy at each token, in nats; carries no gradient.
        streams: what the samples carry and the algorithm requires, by stream name.
        weight: the `weight` stream: 0 outside the loss.
        sequence: index of the sample inside the micro-batch; episode: index of its episode.
        num_sequences: how many samples are packed.
    """

    logprobs: Tensor
    entropy: Tensor
    streams: Mapping[str, Tensor]
    weight: Tensor
    sequence: Tensor
    episode: Tensor
    num_sequences: int


@dataclass(frozen=True, slots=True, eq=False)
class ValueInputs:
    """What a value loss sees of one micro-batch; as `LossInputs`, with values in the place of log-probs.

    Attributes:
        values: of the state before each token, `[tokens]`; carries the gradient.
    """

    values: Tensor
    streams: Mapping[str, Tensor]
    weight: Tensor
    sequence: Tensor
    episode: Tensor
    num_sequences: int


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """Per-token loss `[tokens]` (the trainer scales and sums it) and metrics.

    `metrics` are per-token tensors `[tokens]`; the trainer reports their mean over trained tokens, so that
    no split changes a reported figure.
    """

    per_token: Tensor
    metrics: Mapping[str, Tensor]
