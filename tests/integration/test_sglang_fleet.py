"""Real SGLang servers behind the real router, from ordinary recipes: training, a death, prefill/decode, experts.

Each test starts what it needs, two servers at most, and ends exactly that.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.sglang_server import write_tiny_model
from tests.integration.sglang_weights import PROMPT, TOLERANCE, Weights, check
from tests.tiny import tiny
from transformers import AutoModelForCausalLM

from sluice.config import RunConfig
from sluice.config.rollout import RolloutConfig
from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api
from sluice.rollout.engines.base import GenerateRequest, Generation
from sluice.rollout.engines.sglang import make_fleet
from sluice.rollout.engines.sglang.member import Member, State
from sluice.types import Episode, SamplingParams, Version

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,  # SGLang's Qwen3-MoE has a head of its own, whatever the config says
}


def recipe(folder: Path, *, sglang: dict[str, Any], **changes: Any) -> RunConfig:
    rollout = {"engine": "sglang", "context_length": 64, "sampling": {"temperature": 0.9}, "sglang": sglang}
    base = {"steps": 5, "rollout": rollout, "train": {"optimizer": {"lr": 1e-2}}, "evaluation": {"every": 0}}
    return tiny(folder, **(base | changes))


def episodes(config: RunConfig) -> Iterator[Episode]:
    for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,), from_ordinal=0):
        assert isinstance(entry.record, EpisodeRecord)
        yield entry.record.episode


def check_training(config: RunConfig) -> list[dict[str, Any]]:
    """Every episode is accounted for, the weights moved, and engine and trainer agree."""
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, config.steps + 1))
    assert 0 < max(row["mismatch/mean_abs"] for row in rows) <= TOLERANCE
    assert all(row["train/grad_norm"] > 0 for row in rows), "the weights must move, or agreement proves nothing"
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete
    return rows


def test_five_steps_behind_the_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, sglang={})
    config = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(
                update={"router": config.rollout.router.model_copy(update={"use": "always"})}
            )
        }
    )
    api.train(config)
    rows = check_training(config)
    logs = {path.name for path in (config.folder / "engines").iterdir()}
    assert logs == {"regular-0.log", "router.log"}
    with capsys.disabled():
        print(json.dumps({"behind_the_router": {"mismatch_mean_abs": max(row["mismatch/mean_abs"] for row in rows)}}))


def test_five_steps_with_a_prefill_and_a_decode_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = [{"role": "prefill"}, {"role": "decode"}]
    config = recipe(tmp_path, sglang={"groups": groups, "transfer_backend": "mooncake_tcp"})
    api.train(config)
    rows = check_training(config)
    with capsys.disabled():
        print(json.dumps({"prefill_decode": {"mismatch_mean_abs": max(row["mismatch/mean_abs"] for row in rows)}}))


def test_routed_experts_come_back_in_the_log(tmp_path: Path) -> None:
    model = tiny(tmp_path).model.scratch
    assert model is not None
    scratch = {"architecture": MOE, "tokenizer": model.tokenizer.model_dump()}
    config = recipe(tmp_path, sglang={"routed_experts": True}, steps=2)
    config = config.model_copy(update={"model": config.model.model_validate({"scratch": scratch})})
    api.train(config)
    check_training(config)
    hf: Any = AutoModelForCausalLM.from_pretrained(config.folder / "model-init", dtype=torch.float32).eval()
    seen = 0
    for episode in episodes(config):
        (turn,) = list(episode.sampled_turns())
        routes, ids = turn.routes, episode.ids(0)
        assert routes is not None
        assert (routes.start, routes.end, routes.layers, routes.top_k) == (0, len(ids) - 1, 3, 2)
        if {span.version for span in turn.spans} != {Version(0)}:
            continue
        with torch.no_grad():
            logits = hf(torch.tensor(ids[None].astype(np.int64)), output_router_logits=True).router_logits
        expected = torch.stack([layer.topk(2, -1).indices for layer in logits], 1)[:-1].sort(-1).values
        found = np.sort(routes.experts.reshape(-1, 3, 2), -1)
        np.testing.assert_array_equal(found, expected.numpy())
        seen += 1
    assert seen >= config.groups_per_step * 4


# ── a death ─────────────────────────────────────────────────────────────────────────────────────────────────


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until `condition` holds; the test's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - it looks at state that has no event
        await asyncio.sleep(0.02)


def kill(member: Member) -> None:
    process: Any = member.process
    os.killpg(process.pid, signal.SIGKILL)


def test_a_killed_server_loses_no_turn_and_serves_again_only_with_the_weights_of_the_run(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    weights = Weights(tmp_path / "model", tmp_path / "weights")
    lines: list[str] = []
    config = RolloutConfig.model_validate(
        {"engine": "sglang", "context_length": 512, "sglang": {"groups": [{"engines": 2}]}}
    )
    fleet = make_fleet(config, model=tmp_path / "model", folder=tmp_path, device="cpu", progress=lines.append)

    def turn(name: str, count: int, told: list[int] | None = None) -> Awaitable[Generation]:
        sampling = SamplingParams(max_new_tokens=count)
        tell = None if told is None else told.extend
        ids = np.array(PROMPT, np.int32)
        return fleet.generate(GenerateRequest(name, ids, sampling, routing_key=name, on_tokens=tell))

    async def main() -> None:
        await fleet.start()
        await fleet.apply(weights.publish())
        told: list[list[int]] = [[] for _ in range(4)]
        turns = [asyncio.ensure_future(turn(f"told{n}", 200, told[n])) for n in range(4)]
        turns += [asyncio.ensure_future(turn(f"silent{n}", 200)) for n in range(4)]
        await until(lambda: all(len(each) > 10 for each in told))
        victim = max(fleet.members(), key=lambda member: member.in_flight)
        kill(victim)
        found = await asyncio.gather(*turns)
        for got in found:
            assert len(got.ids) == 200
            check(weights, got, Version(weights.step))
        assert [got.ids.tolist() for got in found[:4]] == told
        assert fleet.figures()["engine/resumed_turns"] >= 1
        await fleet.apply(weights.publish())  # the victim is not back yet, or is: it has this version in either case
        await until(lambda: victim.state is State.SERVING)
        assert victim.life == 2
        assert victim.control.label.startswith("1.0+")
        after = await asyncio.gather(*(turn(f"after{n}", 30) for n in range(6)))
        for got in after:
            check(weights, got, Version(weights.step))
        assert victim.name in {got.engine for got in after}
        assert fleet.figures()["engine/restarts"] == 1

    async def run() -> None:
        try:
            await asyncio.wait_for(main(), 600)
        finally:
            await fleet.close()

    asyncio.run(run())
    assert f"{victim_of(lines)}: serving again" in lines


def victim_of(lines: list[str]) -> str:
    return next(line.partition(":")[0] for line in lines if ": lost: " in line)
