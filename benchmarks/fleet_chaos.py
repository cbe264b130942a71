"""Many agents on two SGLang engines, weights swapped every two seconds, one engine killed: is every token where it was?

    python -m benchmarks.fleet_chaos [--sessions 100] [--questions 3] [--every 2] [--out FILE]

A tiny model that calls a tool rightly is served by two real SGLang servers (CPU build) behind the real router and the
gateway. Each agent is an HTTP client that asks, calls the tool and asks on, several turns, and keeps the token ids it
was shown. Meanwhile versions of the weights with a little noise are published, and one engine is killed with SIGKILL.
Afterwards four things must hold for every session, or the command fails:

* it is one segment without a fork, and its sampled turns are, in number, order and tokens, what its client was shown;
* the engines' own request logs hold that turn: its context went in, its tokens came out, in one piece or in the pieces
  that a swap cut it into;
* the log-prob of every sampled token is that of Hugging Face's model under the version that its span names, given all
  tokens before it, to 1e-4: nothing was sampled in another context, or by other weights, than what is recorded;
* every turn was asked for once: as many turns as model calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from benchmarks.rig import command_line, machine, parser, report, say, spread
from safetensors.torch import load_file
from tests import tool_model

from sluice.config.gateway import ChatConfig, GatewayConfig
from sluice.config.rollout import RolloutConfig
from sluice.config.sglang import Flag
from sluice.models.build import load_model, load_tokenizer
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.sglang.fleet import SGLangFleet
from sluice.rollout.engines.sglang.make import make_fleet
from sluice.rollout.gateway.desk import Lease
from sluice.rollout.gateway.server import Gateway
from sluice.rollout.runners.base import turn_noise
from sluice.rollout.session import Limits
from sluice.types import Author, Episode, Prompt, SamplingParams, Version
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore, activate

CONTEXT = 512
NOISE = 1e-3
"""Standard deviation of what each version adds to the weights: log-probs move by more than `TOLERANCE`."""
TOLERANCE = 1e-4
LOGGED: dict[str, Flag] = {"log-requests": True, "log-requests-level": 3, "log-requests-format": "json"}
"""The servers write input and output ids of every request into their logs."""
SECONDS = 420
"""Deadline of the agents' part."""


@dataclass(slots=True)
class Noisy:
    """Weights of a version: those of the folder, and noise keyed by the step. Step 0 has none."""

    base: Mapping[str, torch.Tensor]
    step: int = 0

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        draw = torch.Generator().manual_seed(self.step)
        for name, tensor in self.base.items():
            noise = torch.randn(tensor.shape, generator=draw) * NOISE
            yield name, tensor + noise if self.step else tensor.clone()


@dataclass(slots=True)
class Seen:
    """What the clients saw. `enough` is set when they have seen `wanted` answers."""

    wanted: int
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    enough: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def calls(self) -> int:
        return sum(len(each) for each in self.tokens.values())


async def agent(client: httpx.AsyncClient, name: str, key: str, number: int, questions: int, seen: Seen) -> None:
    """Questions one after the other; a call is answered by adding, as often as the model calls."""
    tokens = seen.tokens.setdefault(name, [])
    messages: list[dict[str, Any]] = []
    for question in range(questions):
        a, b = (number + question) % 10, (3 * number + 7 * question + 1) % 10
        messages.append({"role": "user", "content": f"add {a} {b}"})
        for _ in range(3):
            begin = time.monotonic()
            answer = await client.post(
                "/v1/chat/completions",
                headers={"Authorization": f"Bearer {key}"},
                json={"model": "actor", "messages": messages, "tools": [tool_model.ADD], "return_token_ids": True},
            )
            if not answer.is_success:
                raise SystemExit(f"{name} was answered {answer.status_code}: {answer.text}")
            seen.seconds.append(time.monotonic() - begin)
            choice = answer.json()["choices"][0]
            tokens.append(choice["token_ids"])
            if seen.calls >= seen.wanted:
                seen.enough.set()
            messages.append(choice["message"])
            calls = choice["message"].get("tool_calls") or []
            if not calls:
                break
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": added(call)} for call in calls]


def added(call: dict[str, Any]) -> str:
    """What the tool says."""
    try:
        arguments = json.loads(call["function"]["arguments"])
        return str(arguments["a"] + arguments["b"])
    except (ValueError, KeyError, TypeError):
        return "use the tool with numbers"


async def update(fleet: SGLangFleet, store: WeightStore, source: Noisy, every: float) -> None:
    """Another version every `every` seconds."""
    while True:
        begin = time.monotonic()
        source.step += 1
        await activate(store.publish(source, source.step), [fleet])
        await asyncio.sleep(max(0.0, every - (time.monotonic() - begin)))


async def kill_one(fleet: SGLangFleet, seen: Seen) -> str:
    """SIGKILL to the main process of one server once the clients have seen enough; its name."""
    await seen.enough.wait()
    victim = next(member for member in fleet.members() if member.in_flight)
    process: Any = victim.process
    say(f"killing {victim.name}, which serves {victim.in_flight} requests")
    os.kill(process.pid, signal.SIGKILL)
    return victim.name


@dataclass(frozen=True, slots=True)
class Happened:
    """The record of a run."""

    episodes: dict[str, Episode]
    seen: Seen
    base: Mapping[str, torch.Tensor]
    model: Path
    killed: str
    updates: int
    seconds: float
    figures: dict[str, float]
    logged: dict[tuple[int, ...], list[tuple[int, ...]]]


async def run(folder: Path, *, sessions: int, questions: int, every: float) -> Happened:
    """Teach the model, start everything, let the agents work, finish their sessions."""
    model = await asyncio.to_thread(tool_model.teach, folder / "taught")
    say("the model is taught")
    config = RolloutConfig.model_validate(
        {
            "engine": "sglang",
            "context_length": CONTEXT,
            "sglang": {
                "build": "cpu",
                "groups": [{"engines": 2, "args": LOGGED}],
                "restarts": 0,
                "start_seconds": 300,
            },
            "router": {"use": "always"},
            "chat": {"format": "qwen"},
        }
    )
    base = load_file(model / "model.safetensors")
    seen, source = Seen(wanted=sessions * questions // 2), Noisy(base)
    async with AsyncExitStack() as stack:
        fleet = make_fleet(config, model=model, folder=folder, device="cpu", progress=say)
        stack.push_async_callback(fleet.close)
        await fleet.start()
        store = WeightStore(folder / "weights", model, Lineage())
        await activate(store.publish(source, 0), [fleet])
        chat = ChatRenderer(load_tokenizer(model), ChatConfig(format="qwen"))
        gateway = Gateway(GatewayConfig(), engine=fleet, chat=chat, limits=Limits(context_length=CONTEXT))
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        sampling = SamplingParams(max_new_tokens=64, stop_token_ids=chat.eos)
        keys: dict[str, str] = {}
        for number in range(sessions):
            prompt = Prompt(f"p{number}", "add", ())
            lease = Lease(f"e{number}", f"g{number}", prompt, sampling, turn_noise(0, number))
            session, keys[f"e{number}"] = gateway.open(lease)
            assert session.id == f"e{number}"
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=gateway.url, timeout=SECONDS, limits=httpx.Limits(max_connections=None))
        )
        begin = time.monotonic()
        swaps = asyncio.create_task(update(fleet, store, source, every))
        killer = asyncio.create_task(kill_one(fleet, seen))
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            for number, (name, key) in enumerate(keys.items()):
                group.create_task(agent(client, name, key, number, questions, seen))
        seconds = time.monotonic() - begin
        swaps.cancel()
        await asyncio.gather(swaps, return_exceptions=True)
        if not swaps.cancelled():
            swaps.result()  # an update that failed
        async with asyncio.timeout(5):
            killed = await killer
        episodes = {name: await gateway.finish(name) for name in keys}
        return Happened(episodes, seen, base, model, killed, source.step, seconds, fleet.figures(), logged(folder))


def verify(happened: Happened) -> dict[str, Any]:
    """Raise AssertionError unless all of it holds; the figures otherwise."""
    for name, episode in happened.episodes.items():
        shown = happened.seen.tokens[name]
        recorded = [turn.ids.tolist() for turn in episode.sampled_turns()]
        assert [segment.fork for segment in episode.segments] == [None], f"{name} has {len(episode.segments)} segments"
        assert recorded == shown, f"{name}: {len(recorded)} turns recorded, {len(shown)} shown, or other tokens"
        for context, tokens in contexts(episode):
            assert drawn(happened.logged, context, tokens), f"{name}: a turn is in no engine's log"
    furthest, versions, mixed = compare(happened)
    assert furthest <= TOLERANCE, f"a log-prob is {furthest:.2g} from that of the recorded version and context"
    turns = happened.seen.calls
    return {
        "sessions": len(happened.episodes),
        "turns": turns,
        "sampled_tokens": sum(episode.num_sampled_tokens for episode in happened.episodes.values()),
        "updates": happened.updates,
        "versions_in_turns": versions,
        "turns_of_two_or_more_versions": mixed,
        "killed": happened.killed,
        "largest_logprob_difference": furthest,
        "seconds": round(happened.seconds, 1),
        "turn_seconds": spread(happened.seen.seconds),
        "prefix_hit_rate": happened.figures.get("engine/prefix_hit_rate"),
        "fleet": happened.figures,
    }


def logged(folder: Path) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """What went into the servers, and what came out, by their own logs: `input ids → output ids` of each answer."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for file in sorted((folder / "engines").glob("regular-*.log")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if '"event": "request.finished"' in line:
                event = json.loads(line[line.index("{") :])
                found.setdefault(tuple(event["obj"]["input_ids"]), []).append(tuple(event["out"]["output_ids"]))
    return found


def contexts(episode: Episode) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each sampled turn of the only segment: all ids before it, and its own."""
    before: tuple[int, ...] = ()
    for turn in episode.segments[0].turns:
        ids = tuple(turn.ids.tolist())
        if turn.author is Author.SAMPLED:
            yield before, ids
        before += ids


def drawn(found: Mapping[tuple[int, ...], Sequence[tuple[int, ...]]], context: tuple[int, ...], tokens: Any) -> bool:
    """Whether answers of the engines, each to the context that the one before it left, add up to `tokens`."""
    if not tokens:
        return True
    for answer in found.get(context, ()):
        fits = answer and answer == tokens[: len(answer)]
        if fits and drawn(found, context + answer, tokens[len(answer) :]):
            return True
    return False


def compare(happened: Happened) -> tuple[float, int, int]:
    """The largest |engine - Hugging Face| of all sampled tokens, versions in use, turns with more than one."""
    hf: Any = load_model(happened.model, dtype="float32", attn_implementation="sdpa")
    wanted: dict[Version, set[str]] = {}
    mixed = 0
    for name, episode in happened.episodes.items():
        for turn in episode.sampled_turns():
            mixed += len(turn.spans) > 1
            for span in turn.spans:
                wanted.setdefault(span.version, set()).add(name)
    furthest = 0.0
    for version, names in sorted(wanted.items()):
        hf.load_state_dict(dict(Noisy(happened.base, version.step).named_weights()), strict=False)
        hf.tie_weights()
        for name in sorted(names):
            furthest = max(furthest, largest(happened.episodes[name], version, hf))
    return furthest, len(wanted), mixed


@torch.no_grad()
def largest(episode: Episode, version: Version, hf: Any) -> float:
    """The largest difference among the tokens that `version` sampled."""
    ids = torch.from_numpy(episode.ids(0).astype(np.int64))
    scores = hf(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    at, found = 0, 0.0
    for turn in episode.segments[0].turns:
        if turn.author is Author.SAMPLED:
            assert turn.logprobs is not None
            for span in turn.spans:
                if span.version == version and span.end > span.start:
                    theirs = scores[at + span.start - 1 : at + span.end - 1]
                    found = max(found, float(np.abs(theirs - turn.logprobs[span.start : span.end]).max()))
        at += len(turn)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--sessions", type=int, default=100)
    arguments_of.add_argument("--questions", type=int, default=3)
    arguments_of.add_argument("--every", type=float, default=2.0, help="seconds between weight updates")
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = arguments_of.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        happened = asyncio.run(
            run(Path(name), sessions=arguments.sessions, questions=arguments.questions, every=arguments.every)
        )
        result = verify(happened)
    report({"command": command_line("fleet_chaos"), **machine(), **result}, arguments.out)


if __name__ == "__main__":
    main()
