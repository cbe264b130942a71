"""What a user calls: train, fine-tune, evaluate, generate. The CLI and `import sluice` are thin over it."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sluice import device
from sluice.config.rollout import EmbeddedConfig, SamplingConfig
from sluice.config.run import RunConfig
from sluice.config.sft import PhaseConfig
from sluice.errors import ConfigError, RanksLost
from sluice.models.build import load_tokenizer
from sluice.models.offline import go_offline
from sluice.obs.summary import Summary
from sluice.obs.view import View, make_view
from sluice.orchestrate.collecting import CollectRun
from sluice.orchestrate.folder import open_folder
from sluice.orchestrate.inline import InlineRun, evaluate_model
from sluice.orchestrate.placement import place
from sluice.orchestrate.replaying import ReplayRun
from sluice.orchestrate.reporting import report_run
from sluice.orchestrate.running import run_to_end
from sluice.orchestrate.setup import embedded_engine, initial_model, load_data
from sluice.orchestrate.trainers import Trainers
from sluice.orchestrate.warm_start import fine_tune, prefer
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.runners.base import EpisodeRequest, turn_noise
from sluice.rollout.runners.single import SingleTurn
from sluice.train.backends.installed import check_installed
from sluice.types import Message, Prompt, Version

_LOG = logging.getLogger(__name__)


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False, view: View | None = None) -> Summary:
    """Run the whole ring until `config.steps` batches are trained.

    Args:
        config: the run.
        resume: continue an interrupted run from its newest checkpoint and its log.
        overwrite: replace an existing run folder of the same name.
        view: where progress is shown; None chooses by `config.obs.live` and the terminal.

    Returns:
        The summary that is also written to `summary.json`.

    Raises:
        SluiceError: see `sluice.errors`; whatever was finished before is in the run folder's log.
    """
    _prepare(config)
    trained = [] if config.rollout_only else [config.train]
    for each in (*trained, *(phase.train for phase in (config.warm_start, config.preferences) if phase is not None)):
        check_installed(each)
    folder = open_folder(config, resume=resume, overwrite=overwrite)
    shown = view or make_view(config.obs.live)
    try:
        summary = _run(config, folder, shown, resume=resume)
    except Exception:
        if config.obs.report:
            report_run(folder, shown.log)
        raise
    if config.obs.report:
        report_run(folder, shown.log)
    return summary


def _run(config: RunConfig, folder: Path, shown: View, *, resume: bool) -> Summary:
    """Run to the end. A run that lost a rank goes on from its last checkpoint, `limits.restarts` times."""
    chosen = device.resolve(config.device)
    for left in range(config.limits.restarts, -1, -1):
        try:
            with place(config, folder, chosen, shown.log) as placement:
                kind = ReplayRun if config.replay else CollectRun if config.rollout_only else InlineRun
                return run_to_end(kind(config, folder, shown, resume=resume, placement=placement).run())
        except RanksLost as error:
            if not left:
                raise
            shown.log(f"{error.args[0]}; going on from the last checkpoint, {left - 1} further tries are left")
            resume = True
    raise AssertionError("unreachable")


def sft(config: RunConfig, out: Path | None = None) -> Path:
    """Run the recipe's `warm_start` alone and write the model to `out` (default: `runs_dir/NAME-sft`).

    Returns:
        The Hugging Face folder.

    Raises:
        ConfigError: the recipe has no `warm_start`, or `out` is not empty.
    """
    chosen = config.warm_start
    if chosen is None:
        raise ConfigError("this recipe has no warm_start", hint="add one; see `sluice config schema`")
    check_installed(chosen.train)
    target = _target(config, "sft", out)
    _prepare(config)
    prompts = load_data(config.data, seed=config.seed).train
    return _alone(config, "sft", chosen, target, partial(fine_tune, chosen, prompts=prompts))


def dpo(config: RunConfig, out: Path | None = None) -> Path:
    """Run the recipe's `preferences` alone, on its initial model, and write the model to `out` (default:
    `runs_dir/NAME-dpo`).

    Returns:
        The Hugging Face folder.

    Raises:
        ConfigError: the recipe has no `preferences`, or `out` is not empty.
    """
    chosen = config.preferences
    if chosen is None:
        raise ConfigError("this recipe has no preferences", hint="add them; see `sluice config schema`")
    check_installed(chosen.train)
    target = _target(config, "dpo", out)
    _prepare(config)
    return _alone(config, "dpo", chosen, target, partial(prefer, chosen))


def _target(config: RunConfig, name: str, out: Path | None) -> Path:
    target = out or config.runs_dir / f"{config.name}-{name}"
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty", hint="choose another --out, or remove it yourself")
    return target


def _alone(config: RunConfig, name: str, phase: PhaseConfig, target: Path, run: Callable[..., float]) -> Path:
    """Run a phase on the recipe's initial model, outside any run folder."""
    view = make_view(config.obs.live)
    try:
        view.start(f"{config.name} {name}", phase.steps, str(target))
        with tempfile.TemporaryDirectory() as scratch:
            run(
                initial_model(config, Path(scratch)),
                target,
                seed=config.seed,
                trainers=Trainers(device.resolve(config.device), Path(scratch), config.threads),
                template_kwargs=config.model.chat_template_kwargs,
                view=view,
            )
    finally:
        view.close()
    return target


def evaluate(config: RunConfig, model: Path | None = None) -> dict[str, Any]:
    """Measure a model on the recipe's held-out prompts with the embedded engine.

    Args:
        config: the recipe.
        model: Hugging Face folder; None takes the newest checkpoint of the recipe's run folder.

    Returns:
        `EvalResult` as JSON.
    """
    _prepare(config)
    return run_to_end(evaluate_model(config, model, _LOG.info)).to_json()


def generate(
    model: Path, prompts: Sequence[str], *, n: int = 1, sampling: SamplingConfig | None = None, seed: int = 0
) -> list[list[str]]:
    """Answer questions with the embedded engine.

    Args:
        model: Hugging Face folder.
        prompts: user messages, one conversation each.
        n: answers to each.
        seed: keys the sampling noise.

    Returns:
        `n` answers per prompt.
    """
    return run_to_end(_generate(model, prompts, n, sampling or SamplingConfig(), seed))


def _prepare(config: RunConfig) -> None:
    """What a recipe asks of the process as a whole."""
    device.set_threads(config.threads)
    if config.offline:
        go_offline()


async def _generate(
    model: Path, prompts: Sequence[str], n: int, sampling: SamplingConfig, seed: int
) -> list[list[str]]:
    tokenizer = load_tokenizer(model)
    engine = embedded_engine(EmbeddedConfig(), model, tokenizer, device=device.resolve("auto"), version=Version(0))
    capabilities = await engine.start()
    renderer = ChatRenderer(tokenizer)
    runner = SingleTurn(engine, renderer, context_length=capabilities.context_length)
    params = sampling.params(eos=renderer.eos)
    try:
        answers: list[list[str]] = []
        for number, text in enumerate(prompts):
            prompt = Prompt(f"p{number}", "generate", (Message("user", text),))
            jobs = [
                runner.run(EpisodeRequest(f"{prompt.id}.{k}", prompt.id, prompt, params, turn_noise(seed, number, k)))
                for k in range(n)
            ]
            episodes = await asyncio.gather(*jobs)
            answers.append(["".join(renderer.text(turn.ids) for turn in e.sampled_turns()) for e in episodes])
        return answers
    finally:
        await engine.close()
