"""A supervised phase: steps of one objective over samples that are there before it begins."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from sluice.algos.base import Objective, Unit
from sluice.config.sft import PhaseConfig
from sluice.obs.view import View
from sluice.orchestrate.trainers import Trainers
from sluice.train.base import Trainer
from sluice.train.packing import make_batch


def run_phase(
    name: str,
    objective: Objective,
    units: Sequence[Unit],
    config: PhaseConfig,
    model_folder: Path,
    out: Path,
    *,
    seed: int,
    trainers: Trainers,
    view: View,
) -> float:
    """Train the model in `model_folder` on `units` and write it to `out` as a Hugging Face folder.

    Args:
        name: of the phase, for the view; it keys the order too.
        objective: what is minimised.
        units: what there is to learn from, at least one.
        seed: of the order.
        trainers: where it is trained.

    Returns:
        The loss of the last step.

    Raises:
        DataError: a sample is longer than a micro-batch.
    """
    loss = float("nan")
    batches = _batches(units, config.batch, f"{seed}/{name}")
    with trainers.open(name, config.train, model_folder, total_steps=config.steps, seed=seed) as trainer:
        for step in range(1, config.steps + 1):
            figures = _step(trainer, objective, next(batches), config.train.micro_batch_tokens)
            loss = figures["loss"]
            view.progress(name, step, config.steps, figures)
        trainer.save_model(out)
    return loss


def _step(trainer: Trainer, objective: Objective, units: Sequence[Unit], budget: int) -> dict[str, float]:
    """One optimizer step, and its figures."""
    scored = _scored(trainer, objective, units)
    advantages = objective.credit(scored)
    batch = make_batch(
        [sample.with_streams(advantage=advantages[sample.key]) for unit in scored for sample in unit],
        budget=budget,
        normaliser=objective.normaliser,
        constant=objective.constant,
    )
    stats = trainer.step(batch, objective.loss)
    return {"loss": stats.loss, "grad_norm": stats.grad_norm, **objective.report(scored)}


def _scored(trainer: Trainer, objective: Objective, units: Sequence[Unit]) -> list[Unit]:
    """The units with the streams that the objective requires."""
    if not objective.requires:
        return list(units)
    samples = iter(trainer.score([sample for unit in units for sample in unit], objective.requires))
    return [tuple(next(samples) for _ in unit) for unit in units]


def _batches(units: Sequence[Unit], size: int, key: str) -> Iterator[list[Unit]]:
    """Endless batches; each pass in a new seeded order, across pass borders without a short batch."""
    number, order = 0, list[int]()
    while True:
        while len(order) < size:
            more = list(range(len(units)))
            random.Random(f"{key}/{number}").shuffle(more)
            order += more
            number += 1
        yield [units[index] for index in order[:size]]
        order = order[size:]
