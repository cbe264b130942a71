"""Pairs out of an earlier run's log: the best answer of a group against its worst."""

from __future__ import annotations

from pathlib import Path

from sluice.checkpoint.store import CheckpointStore
from sluice.config.preferences import RecordedPairs
from sluice.errors import DataError
from sluice.models.build import read_config
from sluice.models.teacher import check_same_tokens
from sluice.orchestrate.recovery import logged_episodes
from sluice.types import Episode, TrainSample, expand


def recorded_pairs(config: RecordedPairs, model_folder: Path) -> list[tuple[TrainSample, ...]]:
    """One pair for each group whose rewards are far enough apart: samples of the best episode, then of the worst.

    Tokens, temperatures and segments are those that were recorded. Failed and unrewarded episodes, and those in
    which nothing was sampled, are in no pair; of equal rewards the first in the log counts.

    Raises:
        DataError: there is no log, or it holds no pair, or token ids that the model does not have.
        ConfigError: the run's tokenizer is not the model's; checked where the run has a checkpoint.
    """
    log = config.path / "log"
    if not log.is_dir():
        raise DataError(
            f"{config.path} holds no log of a run", hint="give the folder of an earlier run, such as runs/demo"
        )
    checkpoints = CheckpointStore(config.path / "checkpoints", keep=1).all()
    if checkpoints:
        hint = "train on pairs of a run with the same tokenizer, or write them as text: pairs.type = 'jsonl'"
        check_same_tokens(f"the run in {config.path}", checkpoints[-1].model, model_folder, hint=hint)
    groups: dict[str, list[tuple[float, Episode]]] = {}
    for found in logged_episodes(log, 0).values():
        if found.reward is not None and found.episode.outcome.counts and found.episode.num_sampled_tokens:
            groups.setdefault(found.episode.group_id, []).append((found.reward.total, found.episode))
    pairs: list[tuple[TrainSample, ...]] = []
    for members in groups.values():
        (best, chosen), (worst, rejected) = (pick(members, key=_reward) for pick in (max, min))
        if best - worst > config.min_gap:
            pairs.append((*expand(chosen), *expand(rejected)))
    if not pairs:
        raise DataError(
            f"the log of {config.path} holds no pair: rewards in none of its {len(groups)} groups are more than "
            f"{config.min_gap:g} apart",
            hint="lower pairs.min_gap, or take a run with groups of several episodes",
        )
    _check_ids(pairs, config.path, model_folder)
    return pairs


def _reward(member: tuple[float, Episode]) -> float:
    return member[0]


def _check_ids(pairs: list[tuple[TrainSample, ...]], run: Path, model_folder: Path) -> None:
    rows = read_config(model_folder).get_text_config().vocab_size
    largest = max(int(sample.ids.max()) for pair in pairs for sample in pair)
    if largest >= rows:
        raise DataError(
            f"the log of {run} holds token id {largest}, and the model has {rows}",
            hint="train on pairs of a run with the same tokenizer",
        )
