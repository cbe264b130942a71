"""The torch trainer: Hugging Face modules, CPU or GPU; one process, or one of several that share the model.

Parameters and moments are float32. With `train.dtype = "bfloat16"` the model computes on a bfloat16 copy
that every update rounds anew, rather than under autocast: what is published, and so what an engine serves,
is then bit for bit what the trainer computes with. Dropout is off, as it is in the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from sluice import device as devices
from sluice.config.train import TrainConfig
from sluice.errors import CheckpointError, TrainError
from sluice.models.build import load_model, to_device
from sluice.train.attention import PACKED_ATTENTION
from sluice.train.backends.frozen import FrozenPolicies
from sluice.train.backends.lora import Adapters
from sluice.train.backends.offload import HostMemory
from sluice.train.backends.optimizer import MasterOptimizer
from sluice.train.backends.snapshot import Shell, nothing, state_writer
from sluice.train.backends.state import check_same_architecture, read_state
from sluice.train.backends.updating import step_gradients, take_step
from sluice.train.base import Loss, Snapshot, StepStats, Writer
from sluice.train.packed_model import (
    Pack,
    PackedModel,
    check_replay,
    choose_attention,
    empty_pack,
    make_pack,
    shares_prompts,
)
from sluice.train.packing import assign_groups, check_fit
from sluice.train.routing import RoutingReplay
from sluice.train.sharding import Shards, apart, gathered, identity, like
from sluice.train.totals import MicroResult, StepTotals, run_loss, send_back
from sluice.types import MicroBatch, TrainBatch, TrainSample


class TorchTrainer:
    """Implements `train.base.Trainer`.

    Args:
        config: optimizer and memory.
        model_folder: Hugging Face folder of the initial weights. They are also the reference policy.
        total_steps: optimizer steps of the run, for the schedule.
        seed: of torch's global generator.
        device: where parameters live.
        frozen: folders of further policies by the stream that they fill, such as `teacher:big`. Like the
            reference they are read when a step first asks for them, and kept as models of their own.
        shards: divides everything among the ranks; None where there is one. The methods of `Trainer` that take
            samples are then not for use: what each rank does in a call is `train.ranks.worker`'s to say.

    Raises:
        ConfigError: the folder is no usable model.
        TrainError: the model family is not supported.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_folder: Path,
        *,
        total_steps: int,
        seed: int,
        device: torch.device | str = "cpu",
        frozen: Mapping[str, Path] | None = None,
        shards: Shards | None = None,
    ) -> None:
        self._config = config
        self._shards = shards
        self._device = torch.device(device)
        self._host = HostMemory(self._device)
        self._share = shares_prompts(config.share_prompts, self._device)
        torch.manual_seed(seed)
        exact = load_model(model_folder, dtype="float32", attn_implementation=PACKED_ATTENTION)
        self._attention = choose_attention(exact, chunk=config.logprob_chunk, longest=config.micro_batch_tokens)
        if config.dtype == "float32" or shards:
            model = exact
            model.set_attn_implementation(self._attention)
        else:
            model = load_model(model_folder, dtype=config.dtype, attn_implementation=self._attention)
        self._shell = Shell(model, model_folder, getattr(torch, config.dtype))
        self.model = model if shards else to_device(model, self._device)
        self._adapters = Adapters(model, config.lora) if config.lora else None
        replay = RoutingReplay(model) if config.routing_replay else None
        if config.activation_checkpointing:
            checkpoint_activations(model, replay)
        if replay:
            check_replay(PackedModel(model, chunk=config.logprob_chunk, replay=replay), replay)
        whole = shards.wrap(model) if shards else None
        self._packed = PackedModel(
            model, chunk=config.logprob_chunk, compiled=config.compile, replay=replay, whole=whole
        )
        others = frozen or {} if self._adapters else {"reference": model_folder, **(frozen or {})}
        self._frozen = FrozenPolicies(others, config, self._device, shards)
        parameters = self._adapters.parameters if self._adapters else dict(model.named_parameters())
        wide = dict(exact.named_parameters())
        masters = {name: wide[name].detach() for name, p in parameters.items() if p.dtype != torch.float32}
        self.optimizer = MasterOptimizer(
            config.optimizer, parameters, masters, total_steps=total_steps,
            rounded=self._rounds or self._adapters is not None,  # the model's folder holds no adapters
        )  # fmt: skip

    @property
    def _rounds(self) -> bool:
        """Whether float32 parameters are rounded for every pass, by FSDP, rather than after every update."""
        return self._shards is not None and self._config.dtype != "float32"

    # ── scoring ─────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def score(self, samples: Sequence[TrainSample], streams: frozenset[str]) -> list[TrainSample]:
        """See `Trainer.score`."""
        fillable = {"proximal", "reference", *self._frozen.streams}
        unknown = sorted(streams - fillable)
        if unknown:
            raise TrainError(
                f"the torch trainer cannot fill the stream {unknown[0]!r}, only {sorted(fillable)}",
                hint="choose an algorithm that does without it",
            )
        filled = list(samples)
        for name in sorted(streams):
            bare = name == "reference" and self._adapters is not None
            with self._adapters.off() if bare and self._adapters else nullcontext():
                found = self._logprobs(self._packed if bare else self.packed(name), samples)
            for index, values in enumerate(found):
                filled[index] = filled[index].with_streams(**{name: values})
        return filled

    def _logprobs(self, model: PackedModel, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Log-probs of sampled and trained tokens, one float32 array `[len(sample)]` each."""
        results = [np.zeros(len(sample), np.float32) for sample in samples]
        check_fit(samples, self._config.micro_batch_tokens)
        for members in assign_groups(samples, self._config.micro_batch_tokens):
            values = self._values(model, [samples[index] for index in members])
            ends = np.cumsum([len(samples[index]) for index in members])[:-1]
            for index, part in zip(members, np.split(values, ends), strict=True):
                results[index] = part
        return results

    @torch.no_grad()
    def score_pass(self, stream: str, samples: Sequence[TrainSample]) -> np.ndarray:
        """One pass of `score`: log-probs of all tokens of `samples` end to end, `[tokens]`, 0 where not asked for.

        With shards a call of all ranks; a rank may have no samples.
        """
        return self._values(self.packed(stream), samples)

    def packed(self, stream: str) -> PackedModel:
        """The model that fills `stream`, which is loaded when it is first asked for."""
        return self._packed if stream == "proximal" else self._frozen.model(stream)

    def _values(self, model: PackedModel, samples: Sequence[TrainSample]) -> np.ndarray:
        micro = MicroBatch(tuple(samples), np.zeros(sum(len(sample) for sample in samples)))
        values = np.zeros(micro.num_tokens, np.float32)
        scored = values > 0
        if samples:
            scored = (micro.stream("version") >= 0) | (micro.stream("weight") > 0)
        if scored.any():
            pack = make_pack(micro, scored, self._device, model.replay, share=self._share)
            values[scored] = model.scores(pack).logprob.float().cpu().numpy()
        elif self._shards:
            model.scores(self._empty(model))
        return values

    def _empty(self, model: PackedModel) -> Pack:
        experts = model.replay.empty(2, self._device) if model.replay else None
        return empty_pack(self._device, experts)

    # ── training ────────────────────────────────────────────────────────────────────────────────────────

    def step(self, batch: TrainBatch, loss: Loss) -> StepStats:
        """See `Trainer.step`."""
        if not any(sample.num_trained_tokens for sample in batch.samples):
            return StepTotals(batch).skipped(lr=self.optimizer.next_lr)
        return take_step(self.optimizer, lambda: self._backward(batch, loss))

    def gradients(self, batch: TrainBatch, loss: Loss) -> dict[str, Tensor]:
        """The gradient of the step's loss by parameter name, before clipping. For tests and inspection."""
        return step_gradients(self.optimizer, lambda: self._backward(batch, loss))

    def _backward(self, batch: TrainBatch, loss: Loss) -> StepTotals:
        """Forward and backward over all micro-batches that train something."""
        totals = StepTotals(batch)
        training = [micro for micro in batch.micro_batches if micro.stream("weight").any()]
        sent = False
        for micro in training:
            # A step in which nothing has a gradient still has one, of zeros: moments decay as in any other.
            result, flat = self._train_pass(micro, loss, totals.streams, always=micro is training[-1] and not sent)
            sent |= not flat
            totals.add(micro, result)
        return totals

    def _train_pass(
        self, micro: MicroBatch, loss: Loss, streams: frozenset[str], *, always: bool
    ) -> tuple[MicroResult, bool]:
        """Forward and backward of one micro-batch, and whether the latter was left out; see `send_back`."""
        packed = make_pack(micro, micro.stream("weight") > 0, self._device, self._packed.replay, share=self._share)
        scores = self._packed.scores(packed)
        result: MicroResult = run_loss(micro, packed, scores, loss, streams)
        routing = self._packed.routing_metrics(packed)
        sent = send_back(result.loss, scores, always=always)
        return replace(result, metrics={**result.metrics, **routing}), not sent

    def train_pass(self, micro: MicroBatch, loss: Loss, streams: frozenset[str]) -> MicroResult | None:
        """One pass of `step`, in which every rank takes part; None for a micro-batch that trains nothing."""
        if micro.samples and micro.stream("weight").any():
            return self._train_pass(micro, loss, streams, always=True)[0]
        (self._packed.scores(self._empty(self._packed)).logprob.sum() * 0.0).backward()
        return None

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────

    def offload(self) -> None:
        """See `Trainer.offload`."""
        self.optimizer.zero_grad()
        if self._shards is None:
            self._host.take(self._tensors())
        elif self._device.type != "cpu":
            self._move_shards("cpu")
            devices.free_cached(self._device)

    def onload(self) -> None:
        """See `Trainer.onload`."""
        if self._shards is None:
            self._host.give_back(self._tensors())
        elif self._device.type != "cpu":
            self._move_shards(str(self._device))

    def peak_memory(self) -> list[int]:
        """See `Trainer.peak_memory`."""
        return [devices.peak_memory(self._device.type)]

    def _tensors(self) -> Iterator[Tensor]:
        """Everything that lies on the device between two steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self.optimizer.tensors()
        yield from self._frozen.tensors()

    def _move_shards(self, device: str) -> None:
        self._packed.move(device)
        self._frozen.move(device)
        self.optimizer.move_moments(device)

    # ── weights and state ───────────────────────────────────────────────────────────────────────────────

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer.named_weights`; tensors have the dtype the trainer computes in."""
        yield from revert_weight_conversion(self.model, self._whole_weights(once=True)).items()

    def _whole_weights(self, *, once: bool, copy: bool = False) -> dict[str, Tensor]:
        """The model's tensors in the dtype it computes in; tied ones under the first name only, or under each.

        With shards a call of all ranks, of which only the first gets what it asks for. With `copy` they are in host
        memory of their own.
        """
        dtype = getattr(torch, self._config.dtype)
        first: dict[Any, Tensor] = {}
        found: dict[str, Tensor] = {}
        lasting = {identity(tensor) for tensor in self.model.state_dict().values()}
        own = self._adapters.merged() if self._adapters else self.model.state_dict().items()
        for name, tensor in own:
            key = identity(tensor)
            if key not in lasting:  # merged with its adapter, in memory that the next one may get
                key = name
            if key in first:
                if not once and (not self._shards or self._shards.rank == 0):
                    found[name] = first[key]
                continue
            whole = first[key] = gathered(tensor.detach())
            if self._shards and self._shards.rank:
                first[key] = whole.new_empty(0)
                continue
            if self._rounds and whole.is_floating_point():
                whole = first[key] = whole.to(dtype)
            if copy:
                whole = first[key] = apart(whole, tensor) if key in lasting else whole.cpu()
            found[name] = whole
        return found

    def snapshot(self, *, copy: bool = True) -> Snapshot:
        """See `Trainer.snapshot`. With shards a call of all ranks, of which the first writes everything."""
        return Snapshot(self._model_writer(copy=copy), self._state_writer(copy=copy))

    def save_model(self, folder: Path) -> None:
        """See `Trainer.save_model`. Weights have the dtype the trainer computes in."""
        self._model_writer(copy=False)(folder)

    def save_state(self, folder: Path) -> None:
        """See `Trainer.save_state`."""
        self._state_writer(copy=False)(folder)

    def _model_writer(self, *, copy: bool) -> Writer:
        weights = self._whole_weights(once=False, copy=copy)
        return nothing if self._shards and self._shards.rank else self._shell.writer(weights)

    def _state_writer(self, *, copy: bool) -> Writer:
        state = self.optimizer.state(copy=copy)
        return nothing if self._shards and self._shards.rank else state_writer(state, self.optimizer.steps_done)

    @torch.no_grad()
    def load_state(self, model: Path, state: Path) -> None:
        """See `Trainer.load_state`. The reference stays what it was: the initial weights."""
        check_same_architecture(model, self.model.config)
        try:
            saved = load_model(model, dtype=self._config.dtype, attn_implementation=PACKED_ATTENTION)
        except TrainError as error:
            raise CheckpointError(str(error), hint="resume from an older checkpoint") from error
        if self._adapters:
            self.optimizer.load_state(*read_state(state))
            self._adapters.check(saved.state_dict(), model)
            return
        parameters = dict(saved.named_parameters())
        for name, parameter in self.model.named_parameters():
            if name not in parameters or parameters[name].shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint in {model} has no tensor {name} of shape {tuple(parameter.shape)}",
                    hint="resume with the model the run was started with, or start a new run",
                )
        tensors, steps_done = read_state(state)
        self.optimizer.load_state(tensors, steps_done)
        for name, parameter in self.model.named_parameters():
            if not self._rounds:  # else it was among the optimizer's tensors, before rounding
                parameter.copy_(like(parameters[name], parameter))


def checkpoint_activations(model: PreTrainedModel, replay: RoutingReplay | None = None) -> None:
    """Recompute each layer in the backward pass, with dropout still off.

    transformers checkpoints only layers in training mode, so the layers alone are put into it; their
    parts, which hold the dropout, stay in evaluation mode.
    """
    options: dict[str, Any] = {"use_reentrant": False} | ({"context_fn": replay.again} if replay else {})
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise TrainError(
            f"{type(model).__name__} has no layers that transformers can checkpoint",
            hint="set train.activation_checkpointing = false",
        )
    for layer in layers:
        layer.training = True
