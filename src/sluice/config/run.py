"""The whole configuration of a run. Only `sluice.orchestrate` and the CLI see it; parts get their own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from sluice.config.algos import AlgorithmConfig, GRPOConfig
from sluice.config.base import Part
from sluice.config.critic import PPOConfig
from sluice.config.data import DataConfig
from sluice.config.model import ModelConfig
from sluice.config.obs import ObsConfig
from sluice.config.offline import refusals
from sluice.config.placement import PlacementConfig
from sluice.config.preferences import PreferenceConfig
from sluice.config.rewards import GivenReward, GroupRewardBase, RewardConfig
from sluice.config.rollout import RolloutConfig, SamplingConfig
from sluice.config.runners import CommandRunner, ExternalRunner, PythonRunner
from sluice.config.sft import SftConfig
from sluice.config.teachers import TeacherConfig
from sluice.config.train import TrainConfig


class EvalConfig(Part):
    """Evaluation on held-out prompts, with sampling of its own."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 evaluates before and after only."""
    beside: bool = True
    """The loop goes on while held-out prompts are answered, and waits for their end before it changes the engine's
    weights. False waits at once."""
    servers: int = Field(default=0, ge=0)
    """Engine servers of the evaluation's own, like those of the run: it is then not waited for before weights change,
    only before the next evaluation. 0 asks the run's engine."""
    samples: int = Field(default=1, ge=1)
    """Answers a prompt."""
    sampling: SamplingConfig | None = None
    """None takes the sampling of training."""
    greedy: bool = False
    """Also measure the greedy answer, once a prompt."""
    rewards: tuple[RewardConfig, ...] | None = None
    """Rewards of the evaluation; None takes those of training. The mean total is the accuracy."""
    show: int = Field(default=3, ge=0)
    """Prompts whose answers are shown side by side, before and after."""


class CheckpointConfig(Part):
    """Atomic checkpoints of the whole run."""

    every: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0 writes one at the end only."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints that are kept; older ones are removed."""
    background: bool = True
    """Train on while a checkpoint is written. Until it is, host memory holds a copy of weights and moments; false does
    without the copy, and the run waits for the disk."""


class LogConfig(Part):
    """The durable episode log."""

    rotate_bytes: int = Field(default=256 * 1024**2, ge=64 * 1024)
    """A new file is begun beyond this size."""
    power_safe: bool = False
    """Also survive power loss, at the price of one disk flush a record; a killed process loses nothing
    either way."""


class LimitsConfig(Part):
    """Ceilings that stop a run rather than let it go wrong."""

    max_mismatch: float = Field(default=0.1, gt=0)
    """Mean |engine log-prob - trainer log-prob| of a batch at lag 0, in nats, beyond which the run stops."""
    max_infra_failures: float = Field(default=0.5, gt=0, le=1)
    """Share of infra failures among a step's episodes beyond which the run stops."""
    restarts: int = Field(default=2, ge=0)
    """How often a run that lost a trainer rank goes on by itself, from its last checkpoint and its log."""
    stall_seconds: float = Field(default=1_800.0, gt=0)
    """Stop when no episode has finished for this long."""


class RunConfig(Part):
    """One run: from prompts to a trained model."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run and its folder."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn at random: initial weights, order, sampling noise."""
    runs_dir: Path = Path("runs")
    """Folder that holds run folders."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the trainer; None leaves the default."""
    offline: bool = False
    """Talk to this machine and `allow_hosts` only: any other host in the configuration is refused before the run
    starts, and Hugging Face libraries are kept from the network. Code of your own is not watched."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that `offline` lets through: a name, `*.name` with all below it, an address, or a network in CIDR
    form."""
    replay: Path | None = None
    """Folder of an earlier run whose log is trained instead of new episodes: no engine, filter, reward or evaluation
    is asked."""
    replay_rewards: Literal["recorded", "again"] = "recorded"
    """With `replay`: the rewards that are in that log, or this recipe's, computed anew from the recorded answers."""
    rollout_only: bool = False
    """Train nothing: sample, reward, filter and log `steps` batches with the first weights, for `replay` to train. No
    evaluation is made."""

    model: ModelConfig
    """The policy."""
    data: DataConfig
    """Prompts, strategy, filters, gate."""
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    """Components of the reward."""
    warm_start: SftConfig | None = None
    """Supervised steps before the first RL step."""
    preferences: PreferenceConfig | None = None
    """Steps on pairs of a better and a worse answer, after the warm start and before the first RL step."""
    algorithm: AlgorithmConfig = GRPOConfig()
    """The RL method."""
    teachers: tuple[TeacherConfig, ...] = ()
    """Frozen policies that the algorithm asks for by name."""
    rollout: RolloutConfig = RolloutConfig()
    """Engine and sampling."""
    steps: int = Field(default=100, ge=0)
    """Batches to train on."""
    groups_per_step: int = Field(default=32, ge=1)
    """Groups of one batch."""
    train: TrainConfig = TrainConfig()
    """Optimizer and memory."""
    placement: PlacementConfig = PlacementConfig()
    """Where trainer ranks and engines are."""
    evaluation: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints and retention."""
    log: LogConfig = LogConfig()
    """Durable episode log."""
    obs: ObsConfig = ObsConfig()
    """Metrics and live view."""
    limits: LimitsConfig = LimitsConfig()
    """When to stop."""

    @property
    def folder(self) -> Path:
        """The run's folder: `runs_dir/name`."""
        return self.runs_dir / self.name

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.rollout.sampling.params().is_plain:
            raise ValueError(
                "rollout.sampling: training with top_p, top_k or min_p needs the kept tokens to be replayed in "
                "the trainer, which is not there yet; leave them at 1, -1 and 0 for training (evaluation is free)"
            )
        if self.rollout.sampling.temperature == 0:
            raise ValueError("rollout.sampling.temperature = 0 is greedy: all episodes of a group would be equal")
        names = [reward.name or reward.type for reward in self.rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rewards: the name {twice[0]!r} is used twice; set rewards[i].name")
        teachers = [teacher.name for teacher in self.teachers]
        twice = sorted({name for name in teachers if teachers.count(name) > 1})
        if twice:
            raise ValueError(f"teachers: the name {twice[0]!r} is used twice")
        updates = getattr(self.algorithm, "updates_per_batch", 1)
        if self.groups_per_step % updates:
            raise ValueError(
                f"groups_per_step = {self.groups_per_step} is not divisible by algorithm.updates_per_batch = {updates}"
            )
        if not self.data.holds_out and self.evaluation.every:
            raise ValueError("evaluation.every needs held-out prompts: set data.eval or data.eval_prompts")
        return self

    @model_validator(mode="after")
    def _replays_another_run(self) -> Self:
        if self.replay is not None and self.replay.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"replay: {self.replay} is this run's own folder; give the run another name")
        if self.replay is None and self.replay_rewards == "again":
            raise ValueError("replay_rewards = 'again' needs a run whose answers are judged: set replay")
        if self.rollout_only and self.replay is not None:
            raise ValueError("rollout_only samples and trains nothing, replay trains and samples nothing; choose one")
        if self.rollout_only and self.placement.colocate:
            raise ValueError("rollout_only has no trainer to take turns with; set placement.colocate = false")
        return self

    @model_validator(mode="after")
    def _routes_are_recorded(self) -> Self:
        if self.train.routing_replay and (self.rollout.engine == "embedded" or not self.rollout.sglang.routed_experts):
            raise ValueError(
                "train.routing_replay trains through recorded experts, and nobody records them: set rollout.engine = "
                "'sglang' and rollout.sglang.routed_experts = true"
            )
        if self.warm_start is not None and self.warm_start.train.routing_replay:
            raise ValueError("warm_start.train.routing_replay: demonstrations have no recorded experts; leave it out")
        return self

    @model_validator(mode="after")
    def _adapters_have_no_critic(self) -> Self:
        if self.train.lora is not None and isinstance(self.algorithm, PPOConfig):
            raise ValueError("train.lora: PPO's critic is trained whole and has no adapters; leave train.lora out")
        return self

    @model_validator(mode="after")
    def _stays_where_it_is_told(self) -> Self:
        if self.allow_hosts and not self.offline:
            raise ValueError("allow_hosts is read with offline = true; set it, or leave allow_hosts out")
        found = refusals(self, self.allow_hosts) if self.offline else []
        if found:
            raise ValueError(
                f"offline = true, but {'; '.join(found)}: leave it out, or name the host in allow_hosts if it may be "
                "talked to"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_scores_one_by_one(self) -> Self:
        held_out = self.data.eval is not None or bool(self.data.eval_prompts)
        compares = [r for r in self.evaluation.rewards or self.rewards if isinstance(r, GroupRewardBase)]
        if held_out and compares:
            raise ValueError(
                f"evaluation: the reward {compares[0].name or compares[0].type!r} compares the members of a group, and "
                "a comparison is no accuracy; set evaluation.rewards to rewards that look at one answer"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_can_have_servers(self) -> Self:
        if not self.evaluation.servers:
            return self
        rollout, (group, *others) = self.rollout, self.rollout.sglang.groups
        embedded = rollout.engine == "embedded" and rollout.embedded.servers > 0
        if not self.data.holds_out:
            raise ValueError("evaluation.servers needs held-out prompts: set data.eval or data.eval_prompts")
        if not embedded and (rollout.engine != "sglang" or rollout.sglang.urls):
            raise ValueError(
                "evaluation.servers are started like those of the run, and it starts none: set "
                "rollout.embedded.servers, or rollout.engine = 'sglang' without urls"
            )
        if rollout.engine == "sglang" and (others or group.devices or group.nodes > 1):
            raise ValueError(
                "evaluation.servers are like the run's, and are placed behind them: leave one group in "
                "rollout.sglang.groups, of one host and without devices"
            )
        return self

    @model_validator(mode="after")
    def _runner_and_rewards_fit(self) -> Self:
        runner = self.rollout.runner
        given = any(isinstance(reward, GivenReward) for reward in self.rewards)
        verifies = isinstance(runner, CommandRunner) and bool(runner.verify)
        if given and not verifies and not isinstance(runner, ExternalRunner | PythonRunner):
            missing = "without `verify` " if isinstance(runner, CommandRunner) else ""
            raise ValueError(
                f"rewards: nobody gives a reward of type 'given': the runner {runner.type!r} {missing}gives none; "
                "give the command runner a `verify` program, use the external runner, or choose another reward"
            )
        if verifies and not given:
            raise ValueError("rollout.runner.verify measures what no reward reads; add a reward of type 'given'")
        if isinstance(runner, ExternalRunner) and self.data.holds_out:
            raise ValueError(
                "rollout.runner = 'external': agents elsewhere cannot be asked for the held-out prompts; set "
                "data.eval_prompts = 0 and leave data.eval out"
            )
        return self
