"""Evaluation: held-out prompts, sampling of its own, every answer in the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from sluice.errors import EngineError
from sluice.log.records import EpisodeRecord, EvalRecord
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.producer import Producer
from sluice.orchestrate.stall import Stall
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.runners.base import EpisodeRequest, Runner, turn_noise
from sluice.types import Episode, Prompt, SamplingParams, Version
from sluice.weights.base import Sink


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluated answer, for people."""

    prompt: str
    truth: str
    response: str
    score: float


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Mean total reward over the held-out prompts.

    Attributes:
        accuracy: mean over all sampled answers; a verifier or engine failure is left out, never a 0.
        greedy: mean over one greedy answer a prompt; None when not asked for.
        answers: the first prompts' answers, for people.
        seconds: from the first prompt to the last score. What the loop waited is in the metrics as `time/evaluate`.
        counted, failed: answers in the mean, and answers left out.
        tasks: accuracy, greedy, response_tokens and failed by task, when there are several.
    """

    accuracy: float
    greedy: float | None
    response_tokens: float
    counted: int
    failed: int
    answers: tuple[Answer, ...]
    tasks: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> EvalResult:
        return cls(**{**state, "answers": tuple(Answer(**answer) for answer in state["answers"])})

    def metrics(self) -> dict[str, float]:
        """By metric name."""
        rows = {"eval/accuracy": self.accuracy, "eval/response_tokens": self.response_tokens}
        rows |= {"eval/failed": float(self.failed), "eval/seconds": self.seconds}
        if self.greedy is not None:
            rows["eval/greedy"] = self.greedy
        rows |= {f"eval/{task}/{name}": value for task, mine in self.tasks.items() for name, value in mine.items()}
        return rows


class Evaluator:
    """Measures the weights that the engine is serving.

    Args:
        runner: asks the engine.
        judge: a producer's reward path, with the evaluation's own rubric.
        seed: keys the sampling noise; the same at every evaluation, so that two differ by the weights only.
        stall: of the runner's engine; told of every answer.
        sink: takes the weights to be measured, where the runner's engine is the evaluation's own; None where it is the
            run's, which serves them.
    """

    def __init__(
        self,
        runner: Runner,
        judge: Producer,
        renderer: ChatRenderer,
        journal: Journal,
        prompts: Sequence[Prompt],
        *,
        sampling: SamplingParams,
        samples: int,
        greedy: bool,
        show: int,
        seed: int,
        stall: Stall,
        sink: Sink | None = None,
    ) -> None:
        self.stall, self.sink = stall, sink
        self._runner, self._judge, self._renderer, self._journal = runner, judge, renderer, journal
        self._prompts = prompts
        self._sampling = sampling
        self._samples, self._greedy, self._show, self._seed = samples, greedy, show, seed

    async def __call__(self, step: int, version: Version) -> EvalResult:
        """Answer and score every prompt; log episodes and the result. Nobody changes the weights meanwhile.

        Raises:
            EngineError: an answer is of other weights than `version`. Failures of the runner are raised as they are.
        """
        began = time.monotonic()
        sampled = await self._measure(f"eval-{step:06d}", version, self._sampling, self._samples)
        greedy: list[tuple[Episode, float | None]] | None = None
        if self._greedy:
            once = replace(self._sampling, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0)
            greedy = await self._measure(f"greedy-{step:06d}", version, once, 1)
        first = sampled[:: self._samples][: self._show]
        whole = _figures(sampled, greedy)
        names = sorted({prompt.task for prompt in self._prompts})
        result = EvalResult(
            accuracy=whole["accuracy"],
            greedy=whole.get("greedy"),
            response_tokens=whole["response_tokens"],
            counted=len(sampled) - int(whole["failed"]),
            failed=int(whole["failed"]),
            answers=tuple(self._answer(episode, score) for episode, score in first),
            tasks={name: _figures(_of_task(sampled, name), greedy and _of_task(greedy, name)) for name in names}
            if len(names) > 1
            else {},
            seconds=round(time.monotonic() - began, 3),
        )
        await self._journal.write(EvalRecord(step, version, result.metrics(), tuple(e.id for e, _ in sampled)))
        return result

    async def _measure(
        self, group: str, version: Version, sampling: SamplingParams, samples: int
    ) -> list[tuple[Episode, float | None]]:
        """Every prompt's answers. At the first failure, or when cancelled, nothing is left running."""
        jobs = [
            asyncio.ensure_future(self._one(group, version, prompt, sampling, sample))
            for prompt in self._prompts
            for sample in range(samples)
        ]
        try:
            return await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def _one(
        self, group: str, version: Version, prompt: Prompt, sampling: SamplingParams, sample: int
    ) -> tuple[Episode, float | None]:
        id = f"{group}.{prompt.id}.{sample}"
        noise = turn_noise(self._seed, "eval", prompt.id, sample)
        episode = await self._runner.run(EpisodeRequest(id, group, prompt, sampling, noise, measured=True))
        self.stall.finished()
        await self._journal.write(EpisodeRecord(episode))
        _check_version(episode, version)
        if not episode.outcome.counts:
            return episode, None
        episode, reward = await self._judge.judge(episode)
        return episode, reward.total if reward else None

    def _answer(self, episode: Episode, score: float | None) -> Answer:
        question = next((m.content for m in reversed(episode.prompt.messages) if m.role == "user"), "")
        response = "".join(self._renderer.text(turn.ids) for turn in episode.sampled_turns())
        return Answer(question, episode.prompt.answer, response, score if score is not None else float("nan"))


def _check_version(episode: Episode, version: Version) -> None:
    others = {span.version for turn in episode.sampled_turns() for span in turn.spans} - {version}
    if others:
        raise EngineError(
            f"{episode.id} was to be answered by version {version}; the engine answered with {min(others)}",
            hint="an engine may be out of step, or somebody else gives it weights; look at its log, then `--resume`",
        )


def _of_task(scored: Sequence[tuple[Episode, float | None]], task: str) -> list[tuple[Episode, float | None]]:
    return [(episode, score) for episode, score in scored if episode.prompt.task == task]


def _figures(
    sampled: Sequence[tuple[Episode, float | None]], greedy: Sequence[tuple[Episode, float | None]] | None
) -> dict[str, float]:
    lengths = [episode.num_sampled_tokens for episode, score in sampled if score is not None]
    figures = {
        "accuracy": _mean(sampled),
        "response_tokens": float(np.mean(lengths)) if lengths else 0.0,
        "failed": float(len(sampled) - len(lengths)),
    }
    return figures if greedy is None else figures | {"greedy": _mean(greedy)}


def _mean(scored: Sequence[tuple[Episode, float | None]]) -> float:
    counted = [score for _, score in scored if score is not None]
    return float(np.mean(counted)) if counted else float("nan")
