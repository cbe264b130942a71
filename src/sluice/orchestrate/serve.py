"""`sluice serve`: engines, router and gateway without a training loop, for pointing a client at them.

Sessions are opened over HTTP with the owner's key, for a named task and group or for nothing in particular; what was
sampled in them is written to the folder's log when they end, with the rewards that were given.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash
from safetensors import safe_open
from torch import Tensor

from sluice import __version__, device
from sluice.config.rollout import RolloutConfig
from sluice.config.runners import SingleTurnRunner
from sluice.errors import ConfigError
from sluice.log.reader import LogReader
from sluice.log.records import EpisodeRecord, Kind, RewardRecord, RunRecord
from sluice.log.writer import LogWriter
from sluice.models.build import load_tokenizer
from sluice.orchestrate.agents import open_gateway
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.serving import make_kit, start_engine
from sluice.orchestrate.setup import embedded_engine, make_engine
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.gateway.desk import Lease, Wanted
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.runners.base import turn_noise
from sluice.types import Episode, Prompt, Reward, SamplingParams, Version
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore, activate

Tell = Callable[[str], None]
_NAME = re.compile(r"serve-(\d{6,})")


class OpenDesk:
    """Hands out a session to whoever holds the owner's key, and logs what it became.

    Args:
        first: number of the first session.
        seed: keys the sampling noise, with the session's number.
    """

    def __init__(self, journal: Journal, sampling: SamplingParams, *, first: int, seed: int) -> None:
        self._journal, self._sampling, self._seed = journal, sampling, seed
        self._next = first

    async def lease(self, wanted: Wanted) -> Lease:
        """A session of its own for every caller; `task` and `group` are names of the caller's choice."""
        id = f"serve-{self._next:06d}"
        self._next += 1
        task, group = wanted.task or "serve", wanted.group or id
        prompt = Prompt(id, task, wanted.messages or (), metadata=wanted.metadata)
        return Lease(id, group, prompt, self._sampling, turn_noise(self._seed, id))

    async def finished(self, episode: Episode, rewards: Mapping[str, float]) -> None:
        """Log the episode, and its reward when one was given: every component with weight 1."""
        await self._journal.write(EpisodeRecord(episode))
        if rewards and episode.outcome.counts:
            await self._journal.write(RewardRecord(episode.id, Reward(dict(rewards), dict.fromkeys(rewards, 1.0))))


@dataclass(frozen=True, slots=True)
class FolderSource:
    """The weights of a Hugging Face folder, for engines that are given their weights."""

    folder: Path

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of its safetensors files."""
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping, it has no other way
                    yield name, tensors.get_tensor(name)


async def serve(
    model: Path, config: RolloutConfig, folder: Path, *, open_session: bool, tell: Tell, seed: int = 0
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        model: Hugging Face folder.
        folder: log and logs of engines go there.
        open_session: open a session at once and tell its key.
        tell: shown to the person who started it.

    Raises:
        SluiceError: an engine, the router or the gateway did not come up.
    """
    if not (model / "config.json").is_file():
        raise ConfigError(f"there is no model folder {model}", hint="give a folder with config.json and weights")
    if not isinstance(config.runner, SingleTurnRunner):
        raise ConfigError(
            "rollout.runner executes the episodes of a run; here clients open sessions themselves",
            hint="leave it out, or train with it",
        )
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
            stack.callback(loop.remove_signal_handler, number)
        starting = asyncio.ensure_future(_open(stack, model, config, folder, seed, tell))
        ending = asyncio.ensure_future(stopped.wait())
        stack.callback(ending.cancel)
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # stopped while engines were starting
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return
        gateway = starting.result()
        await _introduce(gateway, open_session, tell)
        await ending
        tell("stopping: open sessions end as aborted and are logged")


async def _open(
    stack: AsyncExitStack, model: Path, config: RolloutConfig, folder: Path, seed: int, tell: Tell
) -> Gateway:
    log = folder / "log"
    first = next_number(log)
    writer = stack.enter_context(LogWriter(log))
    journal = Journal(writer)
    journal.write_now(RunRecord(xxhash.xxh3_128_hexdigest(config.model_dump_json().encode()), seed, __version__))
    where = device.resolve("auto")
    tokenizer = load_tokenizer(model)
    if config.engine == "embedded":
        engine = embedded_engine(config.embedded, model, tokenizer, device=where, version=Version(0))
        context_length = await start_engine(stack, config, engine)
    else:
        engine, sink = make_engine(config, model, tokenizer, device=where, folder=folder, tell=tell)
        context_length = await start_engine(stack, config, engine)
        published = WeightStore(folder / "weights", model, Lineage()).publish(FolderSource(model), 0)
        await activate(published, [sink])
    chat = ChatRenderer(tokenizer, config.chat)
    kit = make_kit(config, engine, chat, context_length, folder=folder, tell=tell)
    desk = OpenDesk(journal, config.sampling.params(eos=chat.eos), first=first, seed=seed)
    return await open_gateway(stack, config, kit, desk)


async def _introduce(gateway: Gateway, open_session: bool, tell: Tell) -> None:
    """Where it is, who may do what, and two commands to begin with."""
    url, variable = gateway.url, gateway.config.owner_key_env
    tell(f"serving {gateway.policy} at {url}  (sessions in a browser: {url}/)")
    if gateway.owner.fresh:
        tell(f"owner's key, shown only here: export {variable or 'SLUICE_OWNER_KEY'}={gateway.owner.fresh}")
    else:
        tell(f"owner's key: the value of {variable}")
    if open_session:
        session, key = await gateway.lease(Wanted())
        tell(f"session {session.id}: export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}")
        tell(f"session {session.id}: export ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY={key}")
    else:
        tell(f'open a session: curl -X POST {url}/sessions -H "Authorization: Bearer ${variable}" -d "{{}}"')
    body = f'{{"model": "{gateway.policy}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    tell(f"""talk in it: curl {url}/v1/chat/completions -H "Authorization: Bearer $OPENAI_API_KEY" -d '{body}'""")


def next_number(log: Path) -> int:
    """The first number that no session in the log has."""
    if not log.is_dir():
        return 1
    taken = [0]
    for entry in LogReader(log).read(kinds=(Kind.EPISODE,)):
        if isinstance(entry.record, EpisodeRecord) and (found := _NAME.fullmatch(entry.record.episode.id)):
            taken.append(int(found[1]))
    return max(taken) + 1
