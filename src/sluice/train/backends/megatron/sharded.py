"""A model and its optimizer as far as this rank holds them: built, loaded, run and put together again.

Every method is a call of all ranks, in the same order. What the last stage's scores are for is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sluice.config.train import OptimizerConfig, TrainConfig
from sluice.train.backends.megatron.division import context_group, tensor_group
from sluice.train.backends.megatron.families import Architecture, Parameter
from sluice.train.backends.megatron.folder import Reader
from sluice.train.backends.megatron.model import build_stages
from sluice.train.backends.megatron.offload import HostStorages
from sluice.train.backends.megatron.optimizer import CoreOptimizer, wrap
from sluice.train.backends.megatron.owned import Own, first_replica, gathered_parts, on_host, writes
from sluice.train.backends.megatron.packs import Grid, Packed, make_packed
from sluice.train.backends.megatron.rotary import Angles
from sluice.train.backends.megatron.saving import SavedState
from sluice.train.backends.megatron.settings import settings
from sluice.train.backends.megatron.state import restore_state, set_main, whole_state
from sluice.train.base import Loss
from sluice.train.logprob import TokenScores
from sluice.train.ranks.weights import Sizes
from sluice.train.totals import MicroResult, run_loss
from sluice.types import MicroBatch, TrainSample

Finish = Callable[[int, Packed, TokenScores], Tensor]
"""What the last stage does with the scores of a pass, by its number. Returns the loss, with gradient."""


class TensorPlace(NamedTuple):
    """Which tensor-parallel rank this is, of how many."""

    rank: int
    size: int


class ShardedModel:
    """One model of a process group that megatron-core has divided.

    Args:
        config: precision, memory and layout.
        optimizer: rates, clipping and decay.
        described: the model.
        total_steps: where the schedule ends.
        device: of this rank.
        values: the head yields a value instead of scores over the vocabulary.
    """

    def __init__(
        self,
        config: TrainConfig,
        optimizer: OptimizerConfig,
        described: Architecture,
        *,
        total_steps: int,
        device: torch.device,
        values: bool = False,
    ) -> None:
        chosen = config.megatron
        self._config = config
        self._device = device
        self._described = described
        self._values = values
        self._options = settings(described, config, device)
        self._stages = build_stages(described, self._options, chunk=config.logprob_chunk, values=values)
        if device.type != "cpu":
            self._stages = [stage.to(device) for stage in self._stages]
        self._chunks: list[Any] = wrap(self._stages, self._options, config)
        self.optimizer = CoreOptimizer(optimizer, config, self._chunks, total_steps=total_steps)
        waits = [chunk.no_sync for chunk in self._chunks]
        self._options.no_sync_func = waits if len(waits) > 1 else waits[0]  # pyright: ignore[reportAttributeAccessIssue]
        self._options.finalize_model_grads_func = _sum_gradients
        dtype = getattr(torch, config.dtype)
        self._angles = Angles(described.config, device, interleaved=described.rotary_interleaved, dtype=dtype)
        by = chosen.tp if self._options.sequence_parallel else 1
        self._grid = Grid(chosen.cp, context_group().rank(), by, tensor_group().rank() % by)
        self._host = HostStorages(device)
        self.place = TensorPlace(tensor_group().rank(), chosen.tp)
        self.held = list(self._held())

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────

    def _held(self) -> Iterator[Own]:
        known = {each.name: each for each in self._described.parameters}
        embedding = known["embedding.word_embeddings.weight"]  # a tied head's
        for stage in self._stages:
            for part, name in zip(stage.parameters(), stage.whole_names(), strict=True):
                yield Own(known.get(name, embedding), part, tied=name not in known)

    @torch.no_grad()
    def load(self, read: Callable[[Own], Tensor]) -> None:
        """Set every parameter.

        Args:
            read: gives this rank's part, as it is stored.
        """
        for each in self.held:
            value = read(each).to(self._device)
            each.part.copy_(value)
            set_main(self.optimizer.parts, each.part, value)
        self.optimizer.reload_copies()

    def load_folder(self, folder: Path) -> None:
        """Set every parameter from a Hugging Face folder, reading only what this rank holds.

        Raises:
            TrainError: see `Reader`.
        """
        with Reader(folder, self._described) as reader:
            self.load(lambda own: reader.part(own.described, *self.place))

    # ── passes ──────────────────────────────────────────────────────────────────────────────────────────

    def packed(self, micro: MicroBatch, scored: np.ndarray) -> Packed:
        """`micro` as this rank sees it."""
        still = self._described.config.pad_token_id
        return make_packed(micro, scored, self._grid, self._angles, self._device, padding_id=still)

    def run(self, packs: Sequence[Packed], finish: Finish, *, forward_only: bool, everywhere: bool = False) -> None:
        """Every pass through the pipeline; `finish` is called at the last stage only.

        Args:
            everywhere: every replica gets the whole gradient, rather than the part that it updates.
        """

        def forward(passes: Iterator[tuple[int, Packed]], model: Any) -> tuple[Any, Callable[[Any], Any]]:
            number, pack = next(passes)
            return model(pack), partial(end, number, pack)

        def end(number: int, pack: Packed, scores: TokenScores) -> tuple[Tensor, Tensor, None]:
            return finish(number, pack, scores), torch.zeros((), dtype=torch.int, device=self._device), None

        for chunk in self._chunks:
            if chunk.training == forward_only:  # it goes through all modules
                chunk.train(not forward_only)
        several = len(self._chunks) > 1
        iterators: list[Any] = [iter(enumerate(packs)) for _ in self._chunks]
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if several else iterators[0],
            model=self._chunks if several else self._chunks[0],
            num_microbatches=len(packs),
            seq_length=1,  # shapes are exchanged, as passes have different lengths
            micro_batch_size=1,
            forward_only=forward_only,
            force_all_reduce=everywhere,
        )

    @torch.no_grad()
    def score(self, passes: Sequence[Sequence[TrainSample]]) -> list[np.ndarray]:
        """What the head says of each pass's tokens end to end, `[tokens]`, 0 where not asked for; see `Trainer.score`.

        Only the last stage has them: at other ranks they are zeros.
        """
        self.optimizer.settle()
        micros = [MicroBatch(tuple(samples), np.zeros(sum(len(s) for s in samples))) for samples in passes]
        masks = [
            (micro.stream("version") >= 0) | (micro.stream("weight") > 0) if micro.samples else np.zeros(0, bool)
            for micro in micros
        ]
        found = [np.zeros(micro.num_tokens, np.float32) for micro in micros]

        def keep(number: int, pack: Packed, scores: TokenScores) -> Tensor:
            found[number][masks[number]] = scores.logprob.float().cpu().numpy()
            return torch.zeros((), device=self._device)

        packs = [self.packed(micro, mask) for micro, mask in zip(micros, masks, strict=True)]
        self.run(packs, keep, forward_only=True)
        return found

    def backward(
        self, micros: Sequence[MicroBatch], loss: Loss, streams: frozenset[str], *, everywhere: bool = False
    ) -> tuple[MicroResult | None, ...]:
        """Forward and backward of every pass; gradients are summed over all ranks at the end, see `run`.

        Returns:
            Of each pass, at the last stage, what came out; None where nothing was trained.
        """
        self.optimizer.zero_grad()
        results: list[MicroResult | None] = [None] * len(micros)
        masks = [micro.stream("weight") > 0 if micro.samples else np.zeros(0, bool) for micro in micros]

        def train(number: int, pack: Packed, scores: TokenScores) -> Tensor:
            if not masks[number].any():
                return scores.logprob.sum().double()
            result = run_loss(micros[number], pack, scores, loss, streams)
            results[number] = replace(result, loss=result.loss.detach())
            return result.loss

        packs = [self.packed(micro, mask) for micro, mask in zip(micros, masks, strict=True)]
        self.run(packs, train, forward_only=False, everywhere=everywhere)
        return tuple(results)

    # ── whole tensors ───────────────────────────────────────────────────────────────────────────────────

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of its stages that has whole tensors."""
        return writes()

    def weights_in_turn(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's stages by checkpoint name, on the device, each put together as it is asked for, which is a call
        of all ranks; nothing at ranks that do not write."""
        self.optimizer.settle()
        yield from self._whole((own, self._host.there(own.part.detach())) for own in self.held)

    def whole_sizes(self) -> Sizes:
        """Of what `weights_in_turn` yields."""
        return {
            name: (own.part.dtype, shape)
            for own in self.held
            if not own.tied
            for name, shape in zip(own.described.tensors, own.described.shapes, strict=True)
        }

    def whole_weights(self) -> dict[str, Tensor]:
        """The same in host memory of their own; empty at ranks that do not write."""
        return {name: on_host(tensor) for name, tensor in self.weights_in_turn()}

    def whole_gradients(self) -> dict[str, Tensor]:
        """The same of gradients, after `backward(everywhere=True)`."""
        found = self._whole((own, own.part.main_grad) for own in self.held)  # pyright: ignore
        return {name: on_host(tensor) for name, tensor in found}

    def _whole(self, parts: Iterable[tuple[Own, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        if not first_replica():
            return
        for own, part in parts:
            if own.tied:
                continue
            every = gathered_parts(part)
            if writes():
                yield from own.whole(every)

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────

    def offload(self) -> None:
        """See `Trainer.offload`."""
        if self._device.type == "cpu":
            return
        self.optimizer.settle()
        buffers = [buffer for chunk in self._chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        weights = [parameter.data for stage in self._stages for parameter in stage.parameters()]
        self._host.take([*weights, *self.optimizer.tensors()], [buffer.grad_data for buffer in buffers])

    def onload(self) -> None:
        """See `Trainer.onload`."""
        self._host.give_back()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Everything is on the accelerator for the length of the block."""
        away = self._host.away
        self.onload()
        try:
            yield
        finally:
            if away:
                self.offload()

    # ── state ───────────────────────────────────────────────────────────────────────────────────────────

    def has_master(self, parameter: Parameter) -> bool:
        """Whether its main values are other numbers than the model's own: where these are rounded."""
        return self._config.dtype != "float32" and not (self._values and parameter.name.startswith("output_layer."))

    def whole_state(self) -> dict[str, Tensor]:
        """The optimizer's state of this rank's stages, as `whole_weights` gives weights."""
        return whole_state(
            self.optimizer.parts, self.held, steps_done=self.optimizer.steps_done, masters=self.has_master,
            divided=self._config.megatron.distributed_optimizer, there=self._host.there,
        )  # fmt: skip

    def restore(self, saved: SavedState) -> None:
        """Inverse of `whole_state`, after the weights were loaded, which are on the accelerator."""
        restore_state(
            self.optimizer.parts, self.held, lambda kind, parameter: saved.part(kind, parameter, *self.place),
            steps_done=saved.steps_done, masters=self.has_master,
        )  # fmt: skip
        self.optimizer.steps_done = saved.steps_done


def _sum_gradients(chunks: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Sum over replicas and shared parameters, and divide by nothing: scales were counted before any split."""
    finalize_model_grads(chunks, None, **options)
