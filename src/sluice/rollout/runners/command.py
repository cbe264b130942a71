"""The command runner: any agent program, once per episode, with a URL, a key and a folder of its own.

<run folder>/agents/<episode>/
    log.txt         what agent and verifier printed, without the key
    prompt.json     SLUICE_PROMPT of the agent
    work/           its working directory; begins as `template`, removed in the end unless `keep`
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import xxhash

from sluice.config.runners import CommandRunner
from sluice.errors import ConfigError
from sluice.gym import KEY as GYM
from sluice.rollout.gateway.desk import Lease
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.runners.base import EpisodeRequest
from sluice.rollout.runners.program import Ended, run_program
from sluice.rollout.runners.toolkit import Toolkit
from sluice.types import Episode, Outcome, Prompt

ONE_NUMBER = "reward"
"""What a bare number is called."""
_NAME_BYTES = 200


class CommandAgent:
    """Starts the program, waits, finishes its session, and has the folder verified.

    Outcomes: exit code 0 leaves the outcome to the session: `completed`, `truncated` when the last answer was cut
    by its limit, `aborted` without a model call. Any other end of the program, its deadline included, is an
    `infra_failure`: what it would have earned is not known, so it earns nothing, not 0.

    Raises:
        ConfigError: a program or the template is not there.
    """

    def __init__(self, config: CommandRunner, kit: Toolkit, gateway: Gateway) -> None:
        self._config, self._kit, self._gateway = config, kit, gateway
        self._home = kit.folder.absolute() / "agents"
        self._slots = asyncio.Semaphore(config.parallel)
        for words in (config.command, config.verify):
            if words and shutil.which(words[0]) is None:
                raise ConfigError(f"there is no program {words[0]!r}", hint="give its path, or put it on PATH")
        if config.template is not None and not config.template.is_dir():
            raise ConfigError(f"there is no folder {config.template}, the template of the agents' folders")

    def admit(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise DataError when the prompt alone fills the context; what an agent adds is not known."""
        self._kit.admit(prompt, max_new_tokens)

    async def run(self, request: EpisodeRequest) -> Episode:
        """One agent, one session."""
        async with self._slots:
            home = self._home / folder_name(request.id)
            try:
                work = self._prepare(home, request.prompt)
                episode = await self._agent(request, home, work)
                if episode.outcome.counts and self._config.verify:
                    found = await self._verify(episode, home, work)
                    episode = replace(episode, info={**episode.info, **found})
            finally:
                if not self._config.keep:
                    shutil.rmtree(home / "work", ignore_errors=True)
            return episode

    def _prepare(self, home: Path, prompt: Prompt) -> Path:
        shutil.rmtree(home, ignore_errors=True)  # of an interrupted run
        work = home / "work"
        home.mkdir(parents=True)
        if self._config.template is None:
            work.mkdir()
        else:
            shutil.copytree(self._config.template, work, symlinks=True)
        write_prompt(home / "prompt.json", prompt, answer=False)
        return work

    async def _agent(self, request: EpisodeRequest, home: Path, work: Path) -> Episode:
        lease = Lease(request.id, request.group_id, request.prompt, request.sampling, request.noise)
        session, key = self._gateway.open(lease)
        try:
            ended = await run_program(
                self._config.command, folder=work, env=self._environment(home / "prompt.json", session.id, key),
                log=home / "log.txt", seconds=self._config.seconds, secret=key,
            )  # fmt: skip
        except OSError as error:
            ended = Ended(127, f"{self._config.command[0]}: {error.strerror}", "")
        except asyncio.CancelledError:
            await self._gateway.finish(session.id, Outcome.ABORTED, "cancelled")
            raise
        if ended.code == 0:
            return await self._gateway.finish(session.id)
        late = f"did not end within {self._config.seconds:g} s"
        why = f"the agent {late if ended.code is None else ended.fault}"
        return await self._gateway.finish(session.id, Outcome.INFRA_FAILURE, why)

    async def _verify(self, episode: Episode, home: Path, work: Path) -> dict[str, Any]:
        """What goes into `Episode.info`: the rewards, or why there are none."""
        write_prompt(home / "verify.json", episode.prompt, answer=True)
        env = {**self._scrubbed(), **self._config.env, "SLUICE_PROMPT": str(home / "verify.json")}
        env["SLUICE_EPISODE_ID"] = episode.id
        try:
            ended = await run_program(
                self._config.verify, folder=work, env=env, log=home / "log.txt", seconds=self._config.verify_seconds
            )
        except OSError as error:
            ended = Ended(127, f"{self._config.verify[0]}: {error.strerror}", "")
        finally:
            (home / "verify.json").unlink()
        if ended.code is None:
            return {"rewards_missing": f"verify did not end within {self._config.verify_seconds:g} s"}
        if ended.code:
            return {"rewards_missing": f"verify {ended.fault}"}
        return read_rewards(ended.output)

    def _environment(self, prompt: Path, episode_id: str, key: str) -> dict[str, str]:
        url = self._gateway.url
        return {
            **self._scrubbed(),
            "PYTHONUNBUFFERED": "1",  # what a program has printed when it is killed is in the log
            **self._config.env,
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": key,
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": key,
            "SLUICE_EPISODE_ID": episode_id,
            "SLUICE_PROMPT": str(prompt),
        }

    def _scrubbed(self) -> dict[str, str]:
        """This process's environment without keys: neither ours nor those of other services."""
        return {
            name: value
            for name, value in os.environ.items()
            if name not in self._kit.secrets and not name.endswith("_API_KEY")
        }


def folder_name(episode_id: str) -> str:
    """An episode's id as the name of a folder; ids of evaluations may hold any character."""
    name = quote(episode_id, safe=" ,;=+@")
    return name if len(name) <= _NAME_BYTES else f"{name[:_NAME_BYTES]}~{xxhash.xxh3_64_hexdigest(episode_id.encode())}"


def write_prompt(file: Path, prompt: Prompt, *, answer: bool) -> None:
    """The prompt as SLUICE_PROMPT has it. An agent's has neither the answer nor what a scorer keeps beside it."""
    metadata = {name: value for name, value in prompt.metadata.items() if answer or name != GYM}
    messages = [message._asdict() for message in prompt.messages]
    row: dict[str, Any] = {"id": prompt.id, "task": prompt.task, "messages": messages, "metadata": metadata}
    if answer:
        row["answer"] = prompt.answer
    file.write_text(json.dumps(row, ensure_ascii=False, default=str), encoding="utf-8")


def read_rewards(line: str) -> dict[str, Any]:
    """The last line of a verifier: a number or a JSON object of numbers, by name."""
    try:
        value = json.loads(line, parse_int=float)
    except ValueError:
        return {"rewards_missing": f"verify printed {line[:80]!r}, which is neither a number nor a JSON object"}
    rewards = cast("Mapping[str, Any]", value) if isinstance(value, dict) else {ONE_NUMBER: value}
    for name, number in rewards.items():
        if not isinstance(number, bool | int | float) or not math.isfinite(number):
            return {"rewards_missing": f"verify printed {name} = {number!r:.80}, which is no finite number"}
    return {"rewards": {name: float(number) for name, number in rewards.items()}}
