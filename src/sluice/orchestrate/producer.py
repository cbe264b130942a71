"""Episodes: sampled, logged, rewarded, in that order, and handed to the loop as they finish.

Members of a group that is compared are scored one by one as they finish, too, but rewarded and handed over together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sluice.errors import LogError
from sluice.log.records import Disposition, DispositionRecord, EpisodeRecord, FaultRecord, RewardRecord
from sluice.orchestrate.comparing import Member, Table, failed
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.refusal import Refusal
from sluice.orchestrate.stall import Stall
from sluice.rewards.base import VerifierFailure
from sluice.rewards.rubric import Response, Rubric
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.continuing import Continuing
from sluice.rollout.runners.base import EpisodeRequest, Runner
from sluice.types import Episode, GroupRequest, Outcome, Reward, Scored, expand


@dataclass(frozen=True, slots=True)
class Recovered:
    """A finished episode found in the log of an earlier, interrupted run, and its reward if it had one."""

    episode: Episode
    reward: Reward | None


@dataclass(frozen=True, slots=True)
class Found:
    """What the log of an interrupted run holds beyond its checkpoint.

    Attributes:
        episodes: finished ones by id, of groups from `first_group` on.
        first_group: ordinal of the oldest group that is not over.
    """

    episodes: Mapping[str, Recovered] = field(default_factory=dict[str, Recovered])
    first_group: int = 0


class Producer:
    """Runs episodes as asyncio tasks.

    Waits for: engine, verifiers, log. Unblocked by: the loop calling `next`. The first failure of any
    episode is raised by `next`; an episode never dies quietly.

    Args:
        runner: executes one episode.
        rubric: its reward.
        renderer: turns sampled ids into the text that is judged.
        journal: the log.
        seed: of the run; with prompt, group and sample it keys the sampling noise.
        recovered: episodes of an interrupted run by id; used instead of generating them again.
        refusal: asked for each version that drew tokens of a recovered episode; with a reason it is sampled again.
        stall: deadline of `next`.
        retries: how often an infra failure is run again.
        turns: the engine of the runner, where it keeps the turns of unfinished episodes.
    """

    def __init__(
        self,
        runner: Runner,
        rubric: Rubric,
        renderer: ChatRenderer,
        journal: Journal,
        *,
        seed: int,
        recovered: Mapping[str, Recovered],
        refusal: Refusal,
        stall: Stall,
        retries: int = 0,
        turns: Continuing | None = None,
    ) -> None:
        self._runner, self._rubric, self._renderer, self._journal = runner, rubric, renderer, journal
        self._seed = seed
        self._recovered = dict(recovered)
        self._refusal = refusal
        self._stall = stall
        self._retries = retries
        self._turns = turns
        self._tasks: set[asyncio.Task[Scored]] = set()
        self._finished: asyncio.Queue[asyncio.Task[Scored]] = asyncio.Queue()

    @property
    def running(self) -> int:
        """Episodes under way."""
        return len(self._tasks)

    def start(self, request: GroupRequest, samples: Iterable[int], *, due: int = 0) -> None:
        """Begin episodes of a group: all of it, or those that a resumed run has not got yet.

        Args:
            due: step of the weights in use when the group's batch is taken, at most: until then recovered episodes
                grow older.
        """
        samples = list(samples)
        table = Table(len(samples), self._compare) if self._rubric.compares(request.prompt.task) else None
        for sample in samples:
            place = request, sample, due
            work = self._episode(*place) if table is None else self._member(*place, table, samples)
            task = asyncio.create_task(work, name=request.episode_id(sample))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Scored]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._stall.finished()
            self._finished.put_nowait(task)

    async def next(self) -> Scored:
        """The next finished episode.

        Raises:
            EngineError: nothing finished within the deadline. Any failure of an episode is raised as it is.
        """
        async with self._stall.deadline(lambda: f"{self.running} are under way"):
            task = await self._finished.get()
        return task.result()

    async def _episode(self, request: GroupRequest, sample: int, due: int) -> Scored:
        episode, reward = await self._run(request, sample, due)
        if episode.outcome.counts and reward is None:
            episode, reward = await self.judge(episode)
        return _scored(episode, reward)

    async def _member(
        self, request: GroupRequest, sample: int, due: int, table: Table, started: Sequence[int]
    ) -> Scored:
        """An episode of a group that is compared. In the log it has a reward when all of its group have."""
        episode, reward = await self._run(request, sample, due)
        whole = reward is not None
        if episode.outcome.counts and reward is None:
            if len(started) == request.n:
                episode, reward = await self._score(episode)
            else:  # the others were compared without it before the interruption, see `logged_episodes`
                episode = failed(episode, "its group was compared without it before the interruption")
        member = await table.join(Member(episode, reward, whole))
        return _scored(member.episode, member.reward)

    async def _run(self, request: GroupRequest, sample: int, due: int) -> tuple[Episode, Reward | None]:
        """The finished episode, logged; with its reward when an earlier run has logged that too."""
        found = await self._recover(request, sample, due)
        if found is not None:
            return found.episode, found.reward
        failures = 0
        while (episode := await self._attempt(request, sample, failures)) is None:
            failures += 1
        return episode, None

    async def _attempt(self, request: GroupRequest, sample: int, failures: int) -> Episode | None:
        """The episode, logged; None for an infra failure that is tried again: then the log has a fault."""
        began = time.monotonic()
        asked = EpisodeRequest.member(request, sample, seed=self._seed)
        if self._turns is not None:
            self._turns.begin(asked.id)
        try:
            episode = await self._runner.run(asked)
            again = episode.outcome is Outcome.INFRA_FAILURE and failures < self._retries
            if again:
                where = f"attempt {failures + 1} of {episode.id}"
                await self._journal.write(FaultRecord(f"infra_failure: {episode.reason}", where))
            else:
                facts = {"seconds": round(time.monotonic() - began, 3)} | ({"failures": failures} if failures else {})
                episode = replace(episode, info={**episode.info, **facts})
                await self._journal.write(EpisodeRecord(episode))
                if self._turns is not None:
                    self._turns.end(asked.id)
            asked.receipt.settle(logged=True)
        finally:
            asked.receipt.settle(logged=False)
        return None if again else episode

    async def _recover(self, request: GroupRequest, sample: int, due: int) -> Recovered | None:
        found = self._recovered.pop(request.episode_id(sample), None)
        if found is None:
            return None
        versions = {span.version for turn in found.episode.sampled_turns() for span in turn.spans}
        reason = next((reason for version in sorted(versions) if (reason := self._refusal(version, due))), "")
        if not reason and found.episode.prompt.id != request.prompt.id:
            reason = "another prompt has this place now"
        if not reason:
            return found
        await self._journal.write(
            DispositionRecord(found.episode.id, found.episode.group_id, Disposition.DROPPED, reason=reason)
        )
        return None

    async def judge(self, episode: Episode) -> tuple[Episode, Reward | None]:
        """Reward an episode and log it. A verifier that fails makes it an infra failure, never a 0."""
        episode, reward = await self._score(episode)
        if reward is not None:
            await self._journal.write(RewardRecord(episode.id, reward))
        return episode, reward

    async def _score(self, episode: Episode) -> tuple[Episode, Reward | None]:
        """What the components that look at one episode alone give it."""
        try:
            reward = await self._rubric.reward(
                episode.prompt, self._response(episode), episode_id=episode.id, info=episode.info
            )
        except VerifierFailure as failure:
            await self._journal.write(FaultRecord(str(failure), f"reward of {episode.id}"))
            return failed(episode, str(failure)), None
        return episode, reward

    async def _compare(self, members: Sequence[Member]) -> Sequence[Member]:
        """The members of a complete group with their whole rewards, logged together."""
        responses = [
            Response(m.episode.id, self._response(m.episode), m.episode.info, m.reward)
            for m in members
            if m.reward is not None
        ]
        try:
            rewards = await self._rubric.compare(members[0].episode.prompt, responses)
        except VerifierFailure as failure:
            group = members[0].episode.group_id
            await self._journal.write(FaultRecord(str(failure), f"reward of {group}"))
            return [Member(failed(m.episode, str(failure)), None) for m in members]
        await self._journal.write(
            *(RewardRecord(m.episode.id, reward) for m, reward in zip(members, rewards, strict=True))
        )
        return [Member(m.episode, reward, whole=True) for m, reward in zip(members, rewards, strict=True)]

    def _response(self, episode: Episode) -> str:
        return "".join(self._renderer.text(turn.ids) for turn in list(episode.sampled_turns())[-1:])

    async def close(self) -> None:
        """Cancel what is under way and wait for it to end; turns that were drawn are kept."""
        if self._turns is not None:
            with suppress(LogError):  # something else ended the run, and that is raised
                await self._turns.keep()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _scored(episode: Episode, reward: Reward | None) -> Scored:
    return Scored(episode, reward, expand(episode) if episode.outcome.counts else ())
