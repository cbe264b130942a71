"""The log of an earlier run as the data source: the batches that its surviving lineage trained, in that order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sluice.checkpoint.store import CheckpointStore
from sluice.config.data import GateConfig, OnStale, Order
from sluice.data.gate import Gate
from sluice.data.pacing import Pacing
from sluice.errors import ConfigError, DataError
from sluice.log.lineage import account
from sluice.log.reader import LogReader
from sluice.log.records import Disposition, GroupRecord, Kind
from sluice.models.build import read_config
from sluice.models.teacher import check_same_tokens
from sluice.orchestrate.comparing import failed
from sluice.orchestrate.producer import Producer, Recovered
from sluice.orchestrate.recovery import logged_episodes, logged_versions
from sluice.rollout.runners.base import EpisodeRequest
from sluice.types import Episode, Group, Prompt, Reward, Turn, Version
from sluice.weights.base import Published
from sluice.weights.lineage import Lineage


@dataclass(frozen=True, slots=True)
class RecordedGroup:
    """A group as it was trained: its members in the order of their samples, and how old each version was then.

    Attributes:
        lags: optimizer steps between a version and the one in use when the group's batch was trained.
    """

    prompt: Prompt
    members: tuple[Recovered, ...]
    lags: Mapping[Version, int]


def recorded_groups(
    run: Path, count: int, model_folder: Path, *, groups_per_step: int, updates: int
) -> list[RecordedGroup]:
    """The first `count` groups that the run trained, or kept for that. They are held in memory.

    What a run kept that trains nothing was sampled by first weights: it is as old as steps will have been made when its
    turn comes, `updates` for every `groups_per_step` groups before it.

    Raises:
        DataError: there is no log, or it holds fewer groups, or token ids that the model does not have.
        ConfigError: the run's tokenizer is not the model's; checked where the run has a checkpoint.
    """
    log = run / "log"
    if not log.is_dir():
        raise DataError(f"{run} holds no log of a run", hint="give the folder of an earlier run, such as runs/demo")
    checkpoints = CheckpointStore(run / "checkpoints", keep=1).all()
    if checkpoints:
        hint = "replay a run with the same tokenizer"
        check_same_tokens(f"the run in {run}", checkpoints[-1].model, model_folder, hint=hint)
    steps: dict[str, int] = {}
    for records in account(LogReader(log).read()).surviving.values():
        last = records[-1]
        if last.step is not None or last.disposition is Disposition.KEPT:
            steps.setdefault(last.group_id, last.step or 0)
    if len(steps) < count:
        raise DataError(
            f"the log of {run} holds {len(steps)} groups that were trained, or kept to be, and steps × groups_per_step "
            f"asks for {count}",
            hint="lower steps or groups_per_step",
        )
    in_use = dict(zip(ordered := sorted(set(steps.values())), [0, *ordered[:-1]], strict=True))
    chosen = sorted(steps, key=steps.__getitem__)[:count]
    groups = _read(log, {id: in_use[steps[id]] for id in chosen}, run, model_folder)
    return [
        replace(group, lags=dict.fromkeys(group.lags, at // groups_per_step * updates)) if not steps[id] else group
        for at, (id, group) in enumerate(zip(chosen, groups, strict=True))
    ]


def _read(log: Path, in_use: Mapping[str, int], run: Path, model_folder: Path) -> list[RecordedGroup]:
    """The groups with these ids, each with the step of the version in use when it was trained."""
    records = (entry.record for entry in LogReader(log).read(kinds=(Kind.GROUP,)))
    requests = {r.request.id: r.request for r in records if isinstance(r, GroupRecord) and r.request.id in in_use}
    episodes = logged_episodes(log, 0)
    born = logged_versions(log)
    lineage = Lineage(born)
    line = {version.step: version for version in lineage.ancestry(born[-1].version)} if born else {}
    rows = read_config(model_folder).get_text_config().vocab_size
    groups: list[RecordedGroup] = []
    for id, step in in_use.items():
        request = requests.get(id)
        ids = [request.episode_id(sample) for sample in range(request.n)] if request is not None else []
        if request is None or step not in line or not all(each in episodes for each in ids):
            raise DataError(
                f"the log of {run} no longer holds the whole group {id}, which it trained",
                hint="its oldest files may have been removed; replay a run with a whole log",
            )
        members = tuple(episodes[each] for each in ids)
        largest = max((int(turn.ids.max()) for m in members for turn in _turns(m.episode) if len(turn)), default=0)
        if largest >= rows:
            raise DataError(
                f"the log of {run} holds token id {largest}, and the model has {rows}",
                hint="replay a run with the same tokenizer",
            )
        lineage.current = line[step]
        spans = [span for m in members for turn in m.episode.sampled_turns() for span in turn.spans]
        groups.append(RecordedGroup(request.prompt, members, {s.version: lineage.lag(s.version) for s in spans}))
    return groups


def _turns(episode: Episode) -> list[Turn]:
    return [turn for segment in episode.segments for turn in segment.turns]


def check_lag(config: GateConfig, groups: Sequence[RecordedGroup]) -> None:
    """Refuse recorded tokens that are older than a gate that discards nothing admits."""
    oldest = max((lag for group in groups for lag in group.lags.values()), default=0)
    if oldest > config.max_lag and config.effective_on_stale is OnStale.WAIT:
        raise ConfigError(
            f"the recorded tokens are up to {oldest} steps old, and data.gate.max_lag = {config.max_lag} discards none",
            hint=f"set data.gate.max_lag={oldest}",
        )


def replay_gate(config: GateConfig, groups_per_step: int, updates: int) -> ReplayGate:
    """The recipe's bound on age; the order is the recorded one."""
    change = {"order": Order.DISPATCH, "on_stale": config.effective_on_stale}
    if config.max_lag == 0:
        change["on_stale"] = OnStale.WAIT
    return ReplayGate(config.model_copy(update=change), groups_per_step, updates)


class ReplayGate(Gate):
    """One batch is alive at a time: nothing is gained by reading ahead, and versions are named when it is read."""

    @property
    def pacing(self) -> Pacing:
        return Pacing(0, self.groups_per_step)


class RecordedStrategy:
    """The recorded groups, in order. The state is how many were asked for."""

    def __init__(self, groups: Sequence[RecordedGroup]) -> None:
        self._groups = groups
        self._at = 0

    def next(self) -> tuple[Prompt, int]:
        group = self._groups[self._at]
        self._at += 1
        return group.prompt, len(group.members)

    def observe(self, group: Group) -> None:
        """Nothing to learn: what comes next is recorded."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._at = int(state["at"])


class Recording:
    """A runner that hands out recorded episodes under the names of this run.

    The group with ordinal i is the i-th recorded one. A token that was L steps old when it was trained is L steps
    old here: its version is the one L steps before the version in use, or the first where there are not so many.
    """

    def __init__(self, groups: Sequence[RecordedGroup], lineage: Lineage) -> None:
        self._groups = groups
        self._lineage = lineage

    def admit(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Every recorded prompt was answered already."""

    def member(self, id: str) -> tuple[RecordedGroup, Recovered]:
        """What is recorded in the place of this run's episode `id`."""
        ordinal, sample = id.removeprefix("g").split(".")
        group = self._groups[int(ordinal)]
        return group, group.members[int(sample)]

    async def run(self, request: EpisodeRequest) -> Episode:
        group, found = self.member(request.id)
        assert self._lineage.current is not None  # published before the first group is asked for
        line = {version.step: version for version in self._lineage.ancestry(self._lineage.current)}
        names = {version: _behind(line, self._lineage.current, lag) for version, lag in group.lags.items()}
        episode = found.episode
        segments = tuple(
            replace(
                segment,
                turns=tuple(
                    replace(turn, spans=tuple(span._replace(version=names[span.version]) for span in turn.spans))
                    for turn in segment.turns
                ),
            )
            for segment in episode.segments
        )
        info = {**episode.info, "replayed": episode.id}
        return replace(episode, id=request.id, group_id=request.group_id, segments=segments, info=info)


def _behind(line: Mapping[int, Version], current: Version, lag: int) -> Version:
    """The newest version of the line that is at least `lag` steps behind `current`, or the first."""
    older = [step for step in line if step <= current.step - lag]
    return line[max(older)] if older else line[min(line)]


class ReplayProducer(Producer):
    """Recorded episodes. Nothing is sampled; rewards are the recorded ones, or the rubric's.

    Args:
        again: ask the rubric.
    """

    def __init__(self, recording: Recording, *args: Any, again: bool, **options: Any) -> None:
        super().__init__(recording, *args, **options)
        self._recording, self._again = recording, again

    async def _score(self, episode: Episode) -> tuple[Episode, Reward | None]:
        if self._again:
            return await super()._score(episode)
        reward = self._recording.member(episode.id)[1].reward
        return (episode, reward) if reward is not None else (failed(episode, "recorded without a reward"), None)


class NoEngine:
    """A sink for weights that nobody serves."""

    name = "replay"

    async def apply(self, published: Published) -> None:
        """Nothing is sampled."""
