"""Prompts, the strategy that asks for groups, the filters that judge them, and the gate."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sluice.config.base import Part
from sluice.config.template import template_fields

ImportPath = Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_][A-Za-z0-9_.]*$")]
"""`package.module:name` or `path/to/file.py:name`."""


class Columns(Part):
    """Which field of a row holds what. Missing optional fields stay empty.

    A dot leads into nested fields, and a number into lists: `reward_model.ground_truth`, `choices.0`.
    """

    prompt: str = "prompt"
    """The question as a string, or a list of chat messages with `role` and `content`."""
    answer: str = "answer"
    """The ground truth."""
    id: str = "id"
    """A stable name; rows without one are named by their content."""


class RowSource(Part):
    """What sources of rows share: how a row becomes a prompt."""

    columns: Columns = Columns()
    """Column mapping."""
    template: str = ""
    """The question made of several columns, as a Python format string: `"{question}\\nChoices: {choices}"`. Takes
    the place of `columns.prompt`; dots lead into nested fields, lists and tables are written as JSON."""
    task: str = "default"
    """Task name of these prompts; rewards may be limited to tasks."""
    system: str = ""
    """System message put before each question."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at an unreadable row, naming its place, or skip and count it."""

    @field_validator("template")
    @classmethod
    def _template_can_be_filled(cls, value: str) -> str:
        template_fields(value)
        return value

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if self.template and self.columns.prompt != Columns.model_fields["prompt"].default:
            raise ValueError("template makes the question, so columns.prompt would not be read; leave one of them out")
        return self


class JsonlSource(RowSource):
    """One JSON object a line."""

    type: Literal["jsonl"] = "jsonl"
    path: Path
    """The file."""


class ParquetSource(RowSource):
    """Rows of Parquet files; needs `sluice-rl[data]`."""

    type: Literal["parquet"] = "parquet"
    path: Path
    """The file, or a folder whose `*.parquet` files are read in the order of their names."""


class DatasetsSource(RowSource):
    """A folder of the Hugging Face `datasets` library on this machine; needs `sluice-rl[data]`.

    Either what `save_to_disk` wrote, or a data set's own folder of Parquet, JSON or CSV files. Nothing is fetched.
    """

    type: Literal["datasets"] = "datasets"
    path: Path
    """The folder."""
    split: str = "train"
    """Which part of it."""
    subset: str = ""
    """Which configuration of a folder that has several; empty takes the default one."""


class ReasoningGymSource(Part):
    """Any task of the `reasoning-gym` package, with its own scorer as the reward."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    """Name of the task, such as `chain_sum`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task's own config."""
    size: int = Field(default=1_000, ge=1)
    """Instances to generate."""
    seed: int = 0
    """Seed of the generator."""
    task: str = ""
    """Task name; empty takes the dataset's name."""
    system: str = ""
    """System message put before each question."""


class PythonSource(Part):
    """A function of your own, such as a generator, that yields `sluice.types.Prompt`."""

    type: Literal["python"] = "python"
    path: ImportPath
    """The function: `file.py:name` or `module:name`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""


_OneTask = JsonlSource | ParquetSource | DatasetsSource | ReasoningGymSource | PythonSource
SourceConfig = Annotated[_OneTask, Field(discriminator="type")]


class MixPart(Part):
    """One task of a mix."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The task of all its prompts: what rewards are limited to, and what metrics are called by."""
    source: SourceConfig
    """Its prompts; their own task names are replaced."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the groups, relative to the other parts."""
    samples: int | None = Field(default=None, ge=1)
    """Episodes of one of its prompts; None takes `data.strategy.samples`."""
    eval: SourceConfig | None = None
    """Its held-out prompts; None splits them off `source`."""
    eval_prompts: int | None = Field(default=None, ge=0)
    """How many to split off; None takes an equal share of `data.eval_prompts`."""

    @model_validator(mode="after")
    def _one_name_for_its_task(self) -> Self:
        for key, source in (("source", self.source), ("eval", self.eval)):
            own = getattr(source, "task", "")
            if own not in ("", self.name, RowSource.model_fields["task"].default):
                raise ValueError(f"{key}.task = {own!r}, but the part's name is the task: {self.name!r}; leave it out")
        if self.eval is not None and self.eval_prompts is not None:
            raise ValueError("eval brings the held-out prompts, so eval_prompts would not be read; leave one out")
        return self


class MixSource(Part):
    """Several tasks at once, each with its weight, its samples and a cursor of its own."""

    type: Literal["mix"] = "mix"
    parts: tuple[MixPart, ...] = Field(min_length=1)
    """The tasks."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [part.name for part in self.parts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two parts are called {twice!r}; a task's name tells its prompts and metrics apart")
        return self


TrainSourceConfig = Annotated[_OneTask | MixSource, Field(discriminator="type")]


class GroupSampling(Part):
    """GRPO sampling: pass over the prompts, n episodes each."""

    type: Literal["groups"] = "groups"
    samples: int = Field(default=8, ge=1)
    """Episodes of one prompt."""


class Curriculum(Part):
    """Levels in order; the next one opens when the last `window` groups of this one are good enough.

    `data.train` is the first level, `levels` the further ones. Once a level is open, a share of the groups
    still comes from the levels before it.
    """

    type: Literal["curriculum"] = "curriculum"
    samples: int = Field(default=8, ge=1)
    """Episodes of one prompt."""
    levels: tuple[SourceConfig, ...] = Field(min_length=1)
    """The levels after the first."""
    threshold: float = 0.8
    """Mean reward that opens the next level."""
    window: int = Field(default=64, ge=1)
    """Groups over which the mean is taken."""
    review: float = Field(default=0.2, ge=0, lt=1)
    """Share of groups drawn from mastered levels."""


class PythonStrategy(Part):
    """A strategy of your own: a class that satisfies `sluice.data.strategy.Strategy`."""

    type: Literal["python"] = "python"
    path: ImportPath
    """The class: `file.py:Name` or `module:Name`."""
    samples: int = Field(default=8, ge=1)
    """Episodes of one prompt; passed to the class."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""


StrategyConfig = Annotated[GroupSampling | Curriculum | PythonStrategy, Field(discriminator="type")]


class SpreadFilter(Part):
    """Dynamic sampling: drop a group whose rewards are all equal, and refill (DAPO)."""

    type: Literal["spread"] = "spread"
    min_std: float = Field(default=1e-6, gt=0)
    """Population standard deviation below which a group teaches nothing."""


class MinValidFilter(Part):
    """Drop a group with too few valid episodes."""

    type: Literal["min_valid"] = "min_valid"
    count: int = Field(default=2, ge=1)
    """Episodes that must have completed or been truncated."""


class PythonFilter(Part):
    """A function of your own: `(Group) -> str`, empty to keep the group, else the reason to drop it."""

    type: Literal["python"] = "python"
    path: ImportPath
    """The function."""


class Padding(Part):
    """GLM-5's rule for groups in which episodes failed: fill up with repeats of valid ones, or drop."""

    min_share: float = Field(default=0.5, ge=0, lt=1)
    """A group of which no more than this share is valid is dropped."""


FilterConfig = Annotated[SpreadFilter | MinValidFilter | PythonFilter, Field(discriminator="type")]


class Order(StrEnum):
    """In which order finished groups are trained: as they were dispatched, or as they finish."""

    DISPATCH = "dispatch"
    COMPLETION = "completion"


class OnStale(StrEnum):
    """What happens to tokens older than `max_lag`."""

    WAIT = "wait"
    MASK_TOKENS = "mask_tokens"
    DROP = "drop"


class GateConfig(Part):
    """The bound between rollout and training."""

    max_lag: int = Field(default=0, ge=0)
    """Optimizer steps that a trained token may lie behind the weights in use. 0 is synchronous.

    Rollout runs ahead by whole batches: below `algorithm.updates_per_batch` it does not overlap training at all."""
    order: Order | None = None
    """Default: `dispatch` at lag 0, `completion` otherwise."""
    on_stale: OnStale | None = None
    """Default: `wait` in dispatch order, `mask_tokens` in completion order."""
    oversample: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """Groups under way for a batch, as a multiple of `groups_per_step`. Above 1 a batch trains the groups that finish
    first, and the rest are carried over to the next; needs `completion` order."""
    refill_limit: int = Field(default=20, ge=1)
    """Give up a step when filters have dropped this many times `groups_per_step` groups for it."""

    @model_validator(mode="after")
    def _lag_zero_waits(self) -> Self:
        if self.max_lag == 0 and self.order is Order.COMPLETION:
            raise ValueError(
                "gate.max_lag = 0 trains the next groups in dispatch order, so that a run is reproducible; "
                "gate.order = 'completion' needs gate.max_lag >= 1"
            )
        if self.max_lag == 0 and self.on_stale not in (None, OnStale.WAIT):
            raise ValueError(f"gate.on_stale = {self.on_stale!s:.20} needs gate.max_lag >= 1: at 0 nothing is stale")
        if self.effective_order is Order.COMPLETION and self.on_stale is OnStale.WAIT:
            raise ValueError(
                "gate: a hard bound, completion order and no discard cannot all hold, since a slow group can be "
                "overtaken for ever; set gate.order = 'dispatch', or gate.on_stale = 'mask_tokens' or 'drop'"
            )
        if self.oversample > 1 and self.effective_order is Order.DISPATCH:
            raise ValueError(
                f"gate.oversample = {self.oversample:g} trains the groups that finish first, which dispatch order does "
                "not; it needs gate.order = 'completion' and gate.max_lag >= 1"
            )
        return self

    @property
    def effective_order(self) -> Order:
        return self.order or (Order.DISPATCH if self.max_lag == 0 else Order.COMPLETION)

    @property
    def effective_on_stale(self) -> OnStale:
        if self.on_stale is not None:
            return self.on_stale
        return OnStale.WAIT if self.effective_order is Order.DISPATCH else OnStale.MASK_TOKENS


class DataConfig(Part):
    """Where prompts come from and how groups are asked for."""

    train: TrainSourceConfig
    """Prompts to train on."""
    eval: SourceConfig | None = None
    """Held-out prompts; without it `eval_prompts` are split off the training source."""
    eval_prompts: int = Field(default=128, ge=0)
    """Held-out prompts, chosen by a hash of their text: an equal text is never on both sides."""
    shuffle: bool = True
    """Shuffle each pass with a seed of its own."""
    strategy: StrategyConfig = GroupSampling()
    """Which prompts, how many samples."""
    filters: tuple[FilterConfig, ...] = ()
    """Asked in order; the first that objects drops the group."""
    padding: Padding | None = None
    """What is done with groups in which episodes failed, before the filters are asked; None trains the members that are
    left, and such a group weighs less than a whole one."""
    gate: GateConfig = GateConfig()
    """Staleness bound and order."""

    @property
    def holds_out(self) -> bool:
        """Whether there are prompts to evaluate on."""
        parts = self.train.parts if isinstance(self.train, MixSource) else ()
        return self.eval is not None or self.eval_prompts > 0 or any(part.eval or part.eval_prompts for part in parts)

    @model_validator(mode="after")
    def _a_mix_decides_whose_turn_it_is(self) -> Self:
        if not isinstance(self.train, MixSource):
            return self
        if not isinstance(self.strategy, GroupSampling):
            raise ValueError(
                f"strategy.type = {self.strategy.type!r} would not see the weights of train.type = 'mix', which decide "
                "whose turn it is; use strategy.type = 'groups', or one source"
            )
        if self.eval is not None and any(part.eval or part.eval_prompts is not None for part in self.train.parts):
            raise ValueError(
                "eval brings all held-out prompts, so those of train.parts would not be read; leave one out"
            )
        return self
