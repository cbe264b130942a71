"""From a run's configuration to the parts that the loop drives, in one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.algos.base import ActorCritic, Algorithm
from sluice.config.data import Curriculum, DataConfig, GroupSampling, MixSource, PythonStrategy
from sluice.config.rollout import EmbeddedConfig, RolloutConfig
from sluice.config.run import RunConfig
from sluice.data.filters import GroupFilter, make_filter
from sluice.data.mix import MixStrategy
from sluice.data.padding import mostly_failed
from sluice.data.sources import load_prompts, mix, split
from sluice.data.strategy import CurriculumStrategy, GroupStrategy, Strategy
from sluice.errors import ConfigError, DataError
from sluice.models.build import load_model, make_scratch, read_config
from sluice.models.chat_template import TEMPLATE_FILE, put_chat_template, read_chat_template
from sluice.plugins import check_protocol, load_object
from sluice.rollout.engines.base import Engine
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.engines.embedded.fit import check_config
from sluice.rollout.engines.embedded.launch import make_fleet as embedded_fleet
from sluice.rollout.engines.sglang import SGLangEngine, make_fleet
from sluice.rollout.engines.sglang.hosting import Hosts
from sluice.rollout.runners.base import Runner
from sluice.train.backends.critic import TorchCritic
from sluice.train.base import Critic, Trainer
from sluice.train.ranks.critic import RankedCritic
from sluice.train.ranks.trainer import RankedTrainer
from sluice.types import Prompt, Version
from sluice.weights.base import Sink

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Data:
    """Prompts of a run: the training source, the further curriculum levels, the held-out ones."""

    train: list[Prompt]
    levels: list[list[Prompt]]
    held_out: list[Prompt]

    @property
    def trained(self) -> list[Prompt]:
        """Every prompt that may be trained on."""
        return [prompt for prompts in (self.train, *self.levels) for prompt in prompts]

    @property
    def tasks(self) -> set[str]:
        return {prompt.task for prompts in (self.train, self.held_out, *self.levels) for prompt in prompts}


def load_data(config: DataConfig, *, seed: int) -> Data:
    """Read every source; held-out prompts are split off the training source when they have none of their own.

    A training prompt with the text of a held-out one is left out.

    Raises:
        DataError: a source cannot be read, or nothing is left to train on, of a mix's task too.
    """
    apart = 0 if config.eval is not None else config.eval_prompts
    if isinstance(config.train, MixSource):
        train, held_out = mix.load(config.train, eval_prompts=apart, seed=seed)
    else:
        train, held_out = split(load_prompts(config.train), apart, seed)
    if config.eval is not None:
        held_out = load_prompts(config.eval)
    texts = {prompt.messages for prompt in held_out}
    train = [prompt for prompt in train if prompt.messages not in texts]
    if isinstance(config.train, MixSource):
        mix.check_tasks(config.train, train)
    levels: list[list[Prompt]] = []
    if isinstance(config.strategy, Curriculum):
        for source in config.strategy.levels:
            levels.append([prompt for prompt in load_prompts(source) if prompt.messages not in texts])
    return Data(train, levels, held_out)


def make_filters(config: DataConfig) -> list[GroupFilter]:
    """What is asked about a complete group, in order. Raises ConfigError when a function cannot be loaded."""
    first = [mostly_failed(config.padding.min_share)] if config.padding is not None else []
    return [*first, *(make_filter(each) for each in config.filters)]


def make_strategy(config: DataConfig, data: Data, *, seed: int) -> Strategy:
    """The strategy that `config` names. Raises ConfigError when a class of the user's own does not fit."""
    match config.strategy:
        case GroupSampling(samples=samples) if isinstance(config.train, MixSource):
            parts = config.train.parts
            return MixStrategy(
                {part.name: [prompt for prompt in data.train if prompt.task == part.name] for part in parts},
                weights={part.name: part.weight for part in parts},
                samples={part.name: part.samples or samples for part in parts},
                seed=seed,
                shuffle=config.shuffle,
            )
        case GroupSampling(samples=samples):
            return GroupStrategy(data.train, samples=samples, seed=seed, shuffle=config.shuffle)
        case Curriculum() as chosen:
            return CurriculumStrategy(
                [data.train, *data.levels],
                samples=chosen.samples,
                seed=seed,
                threshold=chosen.threshold,
                window=chosen.window,
                review=chosen.review,
                shuffle=config.shuffle,
            )
        case PythonStrategy(path=path, samples=samples, params=params):
            built = load_object(path, expects="a strategy class")(data.train, samples=samples, seed=seed, **params)
            check_protocol(built, Strategy, path)
            return built


def initial_model(config: RunConfig, folder: Path) -> Path:
    """The model a run starts from: the configured folder, or one made inside the run folder.

    Made are a model from scratch, and a view of the configured folder that has `model.chat_template`.

    Raises:
        ConfigError: the template is none, or not the one that this run began with.
    """
    source, made = config.model.path, folder / "model-init"
    if source is not None and config.model.chat_template is None:
        return source
    text = read_chat_template(config.model.chat_template) if config.model.chat_template is not None else None
    if not made.exists():
        torn = folder / ".model-init.tmp"
        shutil.rmtree(torn, ignore_errors=True)
        if config.model.scratch is not None:
            make_scratch(config.model.scratch, torn, seed=config.seed)
        elif source is not None and text is not None:
            torn.mkdir(parents=True)
            put_chat_template(source, torn, text)
        torn.rename(made)  # a kill in between leaves nothing that looks like a model
    elif text is not None and text != (made / TEMPLATE_FILE).read_text(encoding="utf-8"):
        raise ConfigError(
            f"{config.model.chat_template} is not the template that this run began with, {made / TEMPLATE_FILE}",
            hint="restore the file to resume, or start a new run under another name",
        )
    return made


def total_updates(config: RunConfig, algorithm: Algorithm) -> int:
    """Optimizer steps of the policy in the whole run, for its schedule."""
    alone = algorithm.critic.warmup_batches if isinstance(algorithm, ActorCritic) else 0
    return max(config.steps - alone, 0) * algorithm.updates_per_batch


def make_critic(
    config: RunConfig, algorithm: Algorithm, start: Path, trainer: Trainer, *, device: str
) -> Critic | None:
    """The value model that starts as the policy does; None for an algorithm without one.

    Under Megatron it is over the ranks of `trainer`, the policy's.
    """
    if not isinstance(algorithm, ActorCritic):
        return None
    chosen = algorithm.critic
    total = config.steps * algorithm.updates_per_batch * chosen.updates
    if config.train.backend == "megatron" and isinstance(trainer, RankedTrainer):
        return RankedCritic(trainer.replicas, chosen, total_steps=total)
    return TorchCritic(chosen, config.train, start, total_steps=total, device=device)


def make_engine(
    config: RolloutConfig,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str,
    folder: Path,
    tell: Callable[[str], None],
    hosts: Hosts | None = None,
    shares: bool = False,
    spare: Sequence[str] | None = None,
) -> tuple[Engine, Sink]:
    """The engine that `rollout.engine` names; it is also the sink of weight updates.

    Args:
        folder: of the run; logs of servers that are started go there.
        tell: told in a line each what servers do while they start, and when one is lost.
        hosts: where servers are started; None takes this host.
        shares: the engine gives its memory up while the trainer computes.
        spare: devices of servers beyond the recipe's, see `make_fleet`.
    """
    if config.engine == "embedded" and config.embedded.servers:
        engine = embedded_fleet(
            config, model=model_folder, folder=folder, device=device, progress=tell, hosts=hosts, shares=shares,
            spare=spare,
        )  # fmt: skip
    elif config.engine == "embedded":
        engine = embedded_engine(config.embedded, model_folder, tokenizer, device=device)
    elif config.engine == "sglang":
        engine = make_fleet(
            config, model=model_folder, folder=folder, device=device, progress=tell, hosts=hosts, shares=shares,
            spare=spare,
        )  # fmt: skip
    else:
        engine = SGLangEngine(config.engine, config.sglang)
    return engine, engine


def embedded_engine(
    config: EmbeddedConfig,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str,
    version: Version | None = None,
) -> EmbeddedEngine:
    """An embedded engine on the model of a folder; with `version` it serves these weights at once."""
    check_config(read_config(model_folder), context_length=config.context_length)
    model = load_model(model_folder, dtype=config.dtype, attn_implementation="eager")
    return EmbeddedEngine(model, tokenizer, config, device=device, version=version)


def check_prompts(runner: Runner, data: Data, max_new_tokens: int) -> None:
    """Render every prompt once, so that one that does not fit is told before anything is trained."""
    for prompts in (data.train, data.held_out, *data.levels):
        for prompt in prompts:
            runner.admit(prompt, max_new_tokens)


def require(prompts: Sequence[Prompt], what: str) -> None:
    """Raise DataError when there are none."""
    if not prompts:
        raise DataError(f"there are no {what}", hint="set data.eval, or data.eval_prompts above 0")
