"""The phases before RL: demonstrations to imitate (`sluice sft`), then pairs to tell apart (`sluice dpo`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sluice.algos.dpo import DPO
from sluice.algos.sft import SFT, demonstration
from sluice.config.preferences import JsonlPairs, PreferenceConfig
from sluice.config.sft import SftConfig
from sluice.data.sources.demonstrations import load_demonstrations
from sluice.data.sources.pairs import load_pairs
from sluice.errors import DataError
from sluice.models.build import load_tokenizer
from sluice.obs.view import View
from sluice.orchestrate.phase import run_phase
from sluice.orchestrate.recorded import recorded_pairs
from sluice.orchestrate.trainers import Trainers
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.types import Prompt, TrainSample


def fine_tune(
    config: SftConfig,
    model_folder: Path,
    out: Path,
    *,
    prompts: Sequence[Prompt],
    seed: int,
    trainers: Trainers,
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
    units = [
        (demonstration(f"demo-{index}", renderer.prompt_ids(prompt), renderer.response_ids(response)),)
        for index, (prompt, response) in enumerate(rows)
    ]
    if not units:
        raise DataError("there are no demonstrations", hint="check the demonstrations' source")
    return run_phase("sft", SFT(), units, config, model_folder, out, seed=seed, trainers=trainers, view=view)


def prefer(
    config: PreferenceConfig,
    model_folder: Path,
    out: Path,
    *,
    seed: int,
    trainers: Trainers,
    template_kwargs: dict[str, object],
    view: View,
) -> float:
    """Train the model in `model_folder` on pairs and write it to `out` as a Hugging Face folder.

    Args:
        seed: of the order.

    Returns:
        The DPO loss of the last step, before its update.

    Raises:
        DataError: there are no pairs, a row is no pair, or an answer is longer than a micro-batch.
        ConfigError: the recorded run's tokenizer is not the model's.
    """
    pairs = (
        _written(config.pairs, model_folder, template_kwargs)
        if isinstance(config.pairs, JsonlPairs)
        else recorded_pairs(config.pairs, model_folder)
    )
    objective = DPO(config.beta)
    return run_phase("dpo", objective, pairs, config, model_folder, out, seed=seed, trainers=trainers, view=view)


def _written(
    config: JsonlPairs, model_folder: Path, template_kwargs: dict[str, object]
) -> list[tuple[TrainSample, TrainSample]]:
    """Pairs of a file, tokenised."""
    renderer = ChatRenderer(load_tokenizer(model_folder), template_kwargs=template_kwargs)
    units: list[tuple[TrainSample, TrainSample]] = []
    for index, pair in enumerate(load_pairs(config)):
        ids = renderer.prompt_ids(pair.prompt)
        chosen, rejected = (renderer.response_ids(text) for text in (pair.chosen, pair.rejected))
        name = f"pair-{index}"
        units.append((demonstration(f"{name}-chosen", ids, chosen), demonstration(f"{name}-rejected", ids, rejected)))
    return units
