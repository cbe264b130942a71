"""Supervised steps: the warm start of a run, or `sluice sft`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from sluice.algos.sft import SFT, demonstration
from sluice.config.sft import SftConfig
from sluice.data.sources.demonstrations import load_demonstrations
from sluice.errors import DataError
from sluice.models.build import load_tokenizer
from sluice.obs.view import View
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import Prompt, TrainSample


def fine_tune(
    config: SftConfig,
    model_folder: Path,
    out: Path,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    device: str,
    template_kwargs: dict[str, object],
    view: View,
) -> float:
    """Train the model in `model_folder` on demonstrations and write it to `out` as a Hugging Face folder.

    Args:
        prompts: training prompts that a demonstration function may draw from.
        seed: of demonstrations and order.

    Returns:
        The loss of the last step, in nats a token.

    Raises:
        DataError: there are no demonstrations, or one is longer than a micro-batch.
    """
    renderer = ChatRenderer(load_tokenizer(model_folder), template_kwargs=template_kwargs)
    rows = load_demonstrations(config.demonstrations, prompts, seed=seed)
    samples = [
        demonstration(f"demo-{index}", renderer.prompt_ids(prompt), renderer.response_ids(response))
        for index, (prompt, response) in enumerate(rows)
    ]
    if not samples:
        raise DataError("there are no demonstrations", hint="check the demonstrations' source")
    trainer = TorchTrainer(config.train, model_folder, total_steps=config.steps, seed=seed, device=device)
    objective = SFT()
    loss = float("nan")
    batches = _batches(samples, config.batch, seed)
    for step in range(1, config.steps + 1):
        batch = make_batch(next(batches), budget=config.train.micro_batch_tokens, normaliser=objective.normaliser)
        stats = trainer.step(batch, objective.loss)
        loss = stats.loss
        view.progress("sft", step, config.steps, {"loss": loss, "grad_norm": stats.grad_norm})
    trainer.save_model(out)
    return loss


def _batches(samples: Sequence[TrainSample], size: int, seed: int) -> Iterator[list[TrainSample]]:
    """Endless batches; each pass in a new seeded order, across pass borders without a short batch."""
    number, order = 0, list[int]()
    while True:
        while len(order) < size:
            more = list(range(len(samples)))
            random.Random(f"{seed}/sft/{number}").shuffle(more)
            order += more
            number += 1
        yield [samples[index] for index in order[:size]]
        order = order[size:]
