"""A causal language model that runs on packs and yields log-probs of chosen tokens, never logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sluice.errors import TrainError
from sluice.models.heads import backbone, output_head
from sluice.train.attention import PACKED_ATTENTION
from sluice.train.buckets import PackLayout, layout
from sluice.train.logprob import TokenScores, token_scores
from sluice.train.prefixes import first_copies
from sluice.train.routing import RoutingReplay
from sluice.train.sharding import Whole, rest
from sluice.types import MicroBatch

_PROBE_TOLERANCE = 2e-4
"""Log-prob error in float32 beyond which a pack is not what its samples are alone; rounding is far below."""


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """A micro-batch as tensors on a device.

    Attributes:
        ids, positions: int64 `[1, tokens]`.
        layout: where the samples lie.
        index: the tokens to score, int64 `[scored]`; the states that predict them stand one before.
        temperature: of the scored tokens, float32 `[scored]`.
        experts: recorded experts, int64 `[tokens, layers, top_k]`, for a model that replays them.
    """

    ids: Tensor
    positions: Tensor
    layout: PackLayout
    index: Tensor
    temperature: Tensor
    experts: Tensor | None = None


def shares_prompts(word: str, device: torch.device) -> bool:
    """Whether samples share what they begin with, by `train.share_prompts`."""
    return word == "always" or (word == "auto" and device.type == "cpu")


def make_pack(
    micro: MicroBatch,
    scored: np.ndarray,
    device: torch.device,
    replay: RoutingReplay | None = None,
    *,
    share: bool = True,
) -> Pack:
    """Tensors of `micro`; `scored` is the mask of tokens whose log-probs are wanted, `[tokens]`.

    Args:
        replay: of the model which will run the pack. The experts of equal tokens may differ then: nothing is shared.
        share: what samples begin with in common is computed once.

    Raises:
        TrainError: see `predicted_tokens`.
    """
    share = share and replay is None
    index, temperature = predicted_tokens(micro, scored)
    positions = micro.positions
    return Pack(
        ids=torch.from_numpy(micro.ids.astype(np.int64)).to(device).unsqueeze(0),
        positions=torch.from_numpy(positions).to(device).unsqueeze(0),
        layout=layout(micro.lengths, device, first_copies([s.ids for s in micro.samples]) if share else None),
        index=torch.from_numpy(index).to(device),
        temperature=torch.from_numpy(temperature).to(device),
        experts=replay.table(micro, device) if replay else None,
    )


def predicted_tokens(micro: MicroBatch, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and temperatures of the tokens that `scored` masks, `[scored]` each.

    Raises:
        TrainError: one is the first of its sample, where nothing predicts it, or its temperature is not positive.
    """
    index = np.flatnonzero(scored)
    positions = micro.positions
    temperature = micro.stream("temperature")[index]
    wrong = index[(positions[index] == 0) | (temperature <= 0)]
    if len(wrong):
        sample = micro.samples[int(np.searchsorted(micro.cu_seqlens, wrong[0], side="right")) - 1]
        if positions[wrong[0]] == 0:
            raise TrainError(
                f"the first token of segment {sample.segment} of episode {sample.episode_id} is to be trained, "
                "but no token before it predicts it",
                hint="a segment begins with at least one observed token, such as the prompt or a BOS token",
            )
        raise TrainError(
            f"segment {sample.segment} of episode {sample.episode_id} holds tokens drawn at temperature 0",
            hint="greedy tokens have no log-prob to train on; sample with rollout.sampling.temperature > 0",
        )
    return index, temperature


def empty_pack(device: torch.device, experts: Tensor | None = None) -> Pack:
    """Two tokens that nobody asked for: what a rank runs in a pass in which it has no sample."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    positions = torch.arange(2, device=device).unsqueeze(0)
    index = torch.ones(1, dtype=torch.int64, device=device)
    return Pack(ids, positions, layout((2,), device), index, torch.ones(1, device=device), experts)


class Pass(NamedTuple):
    """What the layers of a model run in one go: the rows of a whole pack, or one sample of it."""

    ids: Tensor
    positions: Tensor
    experts: Tensor | None
    options: dict[str, Any]

    def states(self, layers: torch.nn.Module) -> Tensor:
        """Hidden states after the last layer, `[rows, hidden size]`."""
        output = layers(input_ids=self.ids, position_ids=self.positions, use_cache=False, **self.options)
        return output.last_hidden_state[0]


def passes(layers: Any, pack: Pack) -> list[Pass]:
    """One pass where the attention of `layers` is `sluice_packed`, else one for each sample."""
    if _in_one(layers):
        ids, positions, sharing = pack.ids, pack.positions, pack.layout.sharing
        if sharing is not None:
            ids, positions = ids.index_select(1, sharing.tokens), positions.index_select(1, sharing.tokens)
        return [Pass(ids, positions, pack.experts, {"pack": pack.layout})]
    lengths = pack.layout.lengths
    experts = pack.experts.split(lengths) if pack.experts is not None else [None] * len(lengths)
    parts = zip(pack.ids.split(lengths, 1), pack.positions.split(lengths, 1), experts, strict=True)
    return [Pass(*part, {}) for part in parts]


def _in_one(layers: Any) -> bool:
    """Whether the layers run all samples of a pack in one pass."""
    return layers.config._attn_implementation == PACKED_ATTENTION


def predicting_states(layers: torch.nn.Module, pack: Pack, run: Callable[[Pass], Tensor] | None = None) -> Tensor:
    """Hidden states after the last of a model's layers from which `pack.index` is predicted, `[scored, hidden size]`.

    `run` makes a pass; None has the layers make it.
    """
    parts = [run(part) if run is not None else part.states(layers) for part in passes(layers, pack)]
    states = parts[0] if len(parts) == 1 else torch.cat(parts)
    before, sharing = pack.index - 1, pack.layout.sharing
    if sharing is not None and _in_one(layers):
        before = sharing.row.index_select(0, before)
    return states.index_select(0, before)


class PackedModel:
    """Runs a model on packs: all samples in one pass where its attention is `sluice_packed`, else one after the other.

    In one pass, what samples begin with in common is computed once.

    Args:
        model: on its device, with an attention that `choose_attention` returned.
        chunk: tokens whose logits exist at one time.
        compiled: as of `token_scores`.
        replay: directs the model's routers by `Pack.experts`.
        whole: of a model that is sharded over ranks; every pass then is one of all ranks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        chunk: int,
        compiled: bool | None = None,
        replay: RoutingReplay | None = None,
        whole: Whole | None = None,
    ) -> None:
        self.model = model
        self._whole = whole
        self._compiled = compiled
        self.replay = replay
        self._agreed: list[Tensor] = []
        self._backbone = backbone(model)
        self._chunk = chunk

    @property
    def alone(self) -> bool:
        """Whether the layers run one sample at a time: then ranks that meet in them must have as many samples each."""
        return not _in_one(self._backbone)

    def rest(self) -> None:
        """After passes without gradient of a sharded model: see `sharding.rest`."""
        if self._whole is not None:
            rest(self._whole)

    def move(self, device: str) -> None:
        """A sharded model to another device; there it is for safekeeping only, unless it is the ranks' own."""
        assert self._whole is not None
        self._whole.to(device)

    def scores(self, pack: Pack) -> TokenScores:
        """Log-prob and entropy of the tokens in `pack.index`, shape `[scored]`; with gradient if enabled."""
        if self._whole is None:
            return self._scores(pack)
        return TokenScores(*self._whole(lambda: tuple(self._scores(pack))))

    def _scores(self, pack: Pack) -> TokenScores:
        head = output_head(self.model)
        return token_scores(
            self._states(pack),
            head.weight,
            head.bias,
            pack.ids[0].index_select(0, pack.index),
            pack.temperature / head.scale,
            chunk=self._chunk,
            compiled=self._compiled,
        )

    def _states(self, pack: Pack) -> Tensor:
        """States that predict the tokens of `pack.index`, `[scored, hidden size]`."""
        self._agreed = []
        return predicting_states(self._backbone, pack, self._run)

    def _run(self, part: Pass) -> Tensor:
        if self.replay is None or part.experts is None:
            return part.states(self._backbone)
        with self.replay.using(part.experts):
            states = part.states(self._backbone)
        self._agreed.append(self.replay.agreement())
        return states

    def routing_metrics(self, pack: Pack) -> dict[str, Tensor]:
        """How the pass just made was routed, by scored token (from the position that predicts it), `[scored]` each.

        `routing/agreement` is the share of recorded experts that the trainer's routers would have chosen too,
        `routing/recorded` whether there was a record. Empty without replay.
        """
        if self.replay is None or pack.experts is None:
            return {}
        figures = {"agreement": torch.cat(self._agreed), "recorded": self.replay.recorded(pack.experts)}
        return {f"routing/{name}": values.index_select(0, pack.index - 1) for name, values in figures.items()}


def choose_attention(model: PreTrainedModel, *, chunk: int, longest: int) -> str:
    """Find and set the attention under which a pack gives what its samples give alone.

    `sluice_packed` if it can be: all samples of a pack in one pass. Otherwise transformers' own, one sample at a time:
    sliding windows, sinks, softcapping, sparse attention, layers with a state.

    Args:
        chunk: see `PackedModel`.
        longest: most tokens that a sample may have; a window that is no narrower is full attention.

    Returns:
        The name for `load_model(attn_implementation=...)`.

    Raises:
        TrainError: none gives what the model's own forward pass does.
    """
    packed = PackedModel(model, chunk=chunk)
    own = "sdpa" if model._supports_sdpa else "eager"
    model.set_attn_implementation(PACKED_ATTENTION)
    try:
        probe(packed, longest=longest)
    except (TrainError, TypeError) as error:  # TypeError: the model computes on a mask, and there is none
        model.set_attn_implementation(own)
        try:
            probe(packed, longest=longest)
        except TrainError as worse:
            raise worse from error
        return own
    return PACKED_ATTENTION


def _probe_pack(model: PreTrainedModel, *, longest: int) -> tuple[Pack, list[Tensor]]:
    """Two short samples, `[length]` each, and their pack, which says that its longest has `longest` tokens."""
    vocabulary = output_head(model).weight.shape[0]
    device = next(model.parameters()).device
    samples = [
        torch.arange(start, start + length, device=device) * 7 % vocabulary for start, length in ((1, 6), (3, 4))
    ]
    ids = torch.cat(samples)
    positions = torch.cat([torch.arange(len(sample), device=device) for sample in samples])
    index = torch.nonzero(positions).squeeze(1)
    shape = layout([len(sample) for sample in samples], device)
    shape = replace(shape, longest=max(shape.longest, longest))
    return Pack(ids[None], positions[None], shape, index, torch.ones(len(index), device=device)), samples


@torch.no_grad()
def check_replay(packed: PackedModel, replay: RoutingReplay) -> None:
    """Raise TrainError when the model's routers cannot be directed, or route otherwise when they are."""
    pack, _ = _probe_pack(packed.model, longest=0)
    free = packed.scores(pack).logprob
    bound = packed.scores(replace(pack, experts=replay.empty(pack.ids.shape[1], pack.ids.device))).logprob
    if not torch.equal(free, bound):
        raise TrainError(
            f"{type(packed.model).__name__} gives other log-probs while its routers are directed",
            hint="set train.routing_replay = false",
        )


@torch.no_grad()
def probe(packed: PackedModel, *, longest: int = 0) -> None:
    """Compare two short packed samples with transformers' own full forward pass of each, in float32.

    This is what finds a model whose logits are scaled or capped, whose layers carry state along the pack
    (state-space models), or whose attention is not what the one that is set does.

    Args:
        longest: most tokens that a sample may have; layers with a narrower window are found too.

    Raises:
        TrainError: they differ; names the model and by how much.
    """
    model = packed.model
    pack, samples = _probe_pack(model, longest=longest)
    ours = packed.scores(pack).logprob
    chosen = str(model.config._attn_implementation)
    model.set_attn_implementation("eager")
    alone = [model(input_ids=sample[None], use_cache=False).logits[0, :-1].float() for sample in samples]
    model.set_attn_implementation(chosen)
    theirs = torch.cat(
        [
            logits.log_softmax(-1).gather(1, sample[1:, None])[:, 0]
            for logits, sample in zip(alone, samples, strict=True)
        ]
    )
    error = float((ours - theirs).abs().max())
    if not error <= _PROBE_TOLERANCE:
        raise TrainError(
            f"{type(model).__name__} gives other log-probs in a pack than alone (they differ by {error:.2g}): it "
            "scales or caps its logits, mixes the samples of a pack, or has an attention of its own",
            hint="this model family is not supported by the torch trainer",
        )
