"""Whose devices they are: engine and trainer each have their own, or take turns on the same ones.

    serving ─► draining ─► released ─► training ─► offloaded ─► synced ─► serving
       (no turn runs)  (memory given up) (trainer's state is back) (it is in host memory) (new weights)

A run begins at `serving` with an engine that serves nothing yet. Every arrow is one call that returns when it has
happened; a stage is entered after that, and no stage can be left out.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Protocol

from sluice import device as devices
from sluice.errors import CapabilityError
from sluice.obs.timing import PhaseTimer
from sluice.orchestrate.beside import Beside
from sluice.rollout.engines.base import Engine, Memory, Yielding
from sluice.train.base import Critic, Trainer
from sluice.weights.base import Published, Sink
from sluice.weights.store import activate

GIB = 2**30


class Pool(Protocol):
    """What a run asks for before it makes its trainer and before it trains, and what it hands new weights to."""

    async def vacate(self) -> None:
        """Returns when the trainer may be made."""
        ...

    async def occupied(self, trainer: Trainer, critic: Critic | None, beside: Beside) -> None:
        """The trainer was made, and is on its devices."""
        ...

    async def train(self) -> None:
        """Returns when trainer and critic may compute."""
        ...

    async def rest(self) -> None:
        """Trainer and critic have computed; until `train` they are asked for nothing but their weights and state."""
        ...

    async def serve(self, published: Published) -> None:
        """Activate a version. Returns when the engine serves it."""
        ...

    def figures(self) -> dict[str, float]:
        """For the metrics of a batch."""
        ...


class Apart:
    """Devices of their own: nobody waits for anybody.

    Args:
        sink: the engine.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    async def vacate(self) -> None:
        return

    async def occupied(self, trainer: Trainer, critic: Critic | None, beside: Beside) -> None:
        return

    async def train(self) -> None:
        return

    async def rest(self) -> None:
        return

    async def serve(self, published: Published) -> None:
        await activate(published, [self._sink])

    def figures(self) -> dict[str, float]:
        return {}


class Stage(StrEnum):
    """Of a shared pool. In this order, and round again."""

    SERVING = "serving"
    DRAINING = "draining"
    RELEASED = "released"
    TRAINING = "training"
    OFFLOADED = "offloaded"
    SYNCED = "synced"

    @property
    def next(self) -> Stage:
        """The only stage that may follow."""
        order = list(Stage)
        return order[(order.index(self) + 1) % len(order)]


class Shared:
    """One pool of devices, by turns.

    Args:
        engine: started; can give its memory up.
        sink: the same engine.
        timer: the phase `switch` holds what a turn costs besides work that a run with pools of its own has too.
        device: of the trainer, whose memory is watched.

    Raises:
        CapabilityError: the engine is of a kind that keeps its memory.
    """

    def __init__(self, engine: Engine, sink: Sink, timer: PhaseTimer, device: str) -> None:
        if not isinstance(engine, Yielding):
            raise CapabilityError(
                f"{engine.name} cannot give up its memory, which placement.colocate asks for",
                hint="use rollout.engine = 'sglang' or 'embedded', or placement.colocate = false",
            )
        self._engine, self._sink, self._timer, self._device = engine, sink, timer, device
        self._trainer: Trainer | None = None
        self._critic: Critic | None = None
        self._beside: Beside | None = None
        self._figures: dict[str, float] = {}
        self.stage = Stage.SERVING

    async def vacate(self) -> None:
        """The engine gives the devices up. Before the trainer is made, which takes them."""
        await self._enter(Stage.DRAINING, self._engine.drain)
        await self._enter(Stage.RELEASED, self._engine.release_memory)

    async def occupied(self, trainer: Trainer, critic: Critic | None, beside: Beside) -> None:
        """See `Pool.occupied`."""
        self._trainer, self._critic, self._beside = trainer, critic, beside
        await self._enter(Stage.TRAINING, self._onload)  # nothing to move: it says that both are there

    async def train(self) -> None:
        """See `Pool.train`."""
        with self._timer.phase("switch"):
            self._note("memory/serving_gib")
            await self.vacate()
            self._note("memory/released_gib")
            await self._enter(Stage.TRAINING, self._onload)

    async def rest(self) -> None:
        """See `Pool.rest`."""
        with self._timer.phase("switch"):
            self._note("memory/trained_gib")
            await self._enter(Stage.OFFLOADED, self._offload)
            self._note("memory/offloaded_gib")

    async def serve(self, published: Published) -> None:
        """See `Pool.serve`. Weights first: the KV cache is taken when nothing else has to be loaded."""
        with self._timer.phase("switch"):
            began = time.perf_counter()
            await self._engine.resume_memory(Memory.WEIGHTS)
            self._figures["switch/weights_seconds"] = time.perf_counter() - began
        await self._enter(Stage.SYNCED, lambda: activate(published, [self._sink]))
        with self._timer.phase("switch"):
            await self._enter(Stage.SERVING, self._go_on)

    def figures(self) -> dict[str, float]:
        """Seconds of every transition of this batch, and memory of the device between them."""
        figures, self._figures = self._figures, {}
        if self._trainer is not None:
            figures["memory/trainer_peak_gib"] = max(self._trainer.peak_memory()) / GIB
        return figures

    async def _go_on(self) -> None:
        devices.free_cached(self._device)  # weights on their way to the engine lay there
        await self._engine.resume_memory(Memory.KV)
        await self._engine.resume()

    async def _offload(self) -> None:
        for each in self._learners():
            await self._compute(each.offload)

    async def _onload(self) -> None:
        for each in self._learners():
            await self._compute(each.onload)

    def _learners(self) -> list[Trainer | Critic]:
        assert self._trainer is not None  # `occupied` comes before any of these
        return [self._trainer, *([self._critic] if self._critic else [])]

    async def _compute(self, work: Callable[[], None]) -> None:
        assert self._beside is not None
        await self._beside(work)

    async def _enter(self, stage: Stage, work: Callable[[], Awaitable[None]]) -> None:
        """Do what leads to a stage, and be there when it is acknowledged.

        Raises:
            RuntimeError: another stage must come first.
            What `work` raises, with a note that names the transition. The stage is then the one before.
        """
        if self.stage.next is not stage:
            raise RuntimeError(f"the pool is {self.stage}; it goes on to {self.stage.next}, not to {stage}")
        began = time.perf_counter()
        try:
            await work()
        except Exception as error:
            error.add_note(f"while the shared devices went from {self.stage} to {stage}")
            raise
        self.stage = stage
        self._figures[f"switch/{stage}_seconds"] = time.perf_counter() - began

    def _note(self, name: str) -> None:
        self._figures[name] = devices.memory_in_use(self._device) / GIB
