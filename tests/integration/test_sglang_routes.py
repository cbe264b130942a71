"""Routing replay from end to end: a real SGLang on the CPU records its experts, the trainer trains through them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.sglang_server import running_sglang
from tests.tiny import SCRATCH, merge, tiny

from sluice.config import RunConfig
from sluice.config.model import ScratchConfig
from sluice.models.build import make_scratch
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 4
LAYERS, EXPERTS, CHOSEN = 2, 16, 4
MOE = merge(
    SCRATCH,
    {
        "architecture": {
            "model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
            "moe_intermediate_size": 16, "norm_topk_prob": True, "initializer_range": 0.2,
            "tie_word_embeddings": False,  # SGLang's qwen3_moe does not tie
        }
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("sglang")
    make_scratch(ScratchConfig.model_validate(MOE), folder / "model", seed=0)
    arguments = ("--context-length", "64", "--enable-return-routed-experts")
    with running_sglang(folder / "model", extra_args=arguments, log_path=folder / "server.log") as running:
        yield running


def recipe(folder: Path, url: str, *, replay: bool, **train: Any) -> RunConfig:
    return tiny(
        folder,
        model={"scratch": MOE},
        steps=STEPS,
        rollout={"engine": url, "sampling": {"temperature": 0.9}, "sglang": {"routed_experts": True}},
        train={"optimizer": {"lr": 1e-2}, "routing_replay": replay, **train},
        evaluation={"every": 0, "greedy": False},
    )


def trained(config: RunConfig, *names: str) -> dict[str, list[float]]:
    """The metrics of a run that were asked for, a number a step."""
    api.train(config)
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return {name: [float(row[name]) for row in rows] for name in names}


MISMATCH, AGREEMENT, RECORDED = "mismatch/mean_abs", "train/routing/agreement", "train/routing/recorded"


def test_every_token_is_trained_through_recorded_experts(
    server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained(recipe(tmp_path, server.url, replay=True), MISMATCH, AGREEMENT, RECORDED, "train/grad_norm")
    with capsys.disabled():
        print(json.dumps(found))
    assert max(found[MISMATCH]) <= 1e-5
    assert min(found[RECORDED]) == 1.0, "every trained token has a record"
    assert min(found[AGREEMENT]) >= 0.99, "in float32 hardly any router sits on an edge"
    assert min(found["train/grad_norm"]) > 0, "the weights must move, or agreement proves nothing"


def test_replay_takes_away_what_other_experts_add_to_the_mismatch(
    server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer computes in bfloat16 and the server in float32: routers near an edge choose differently."""
    free = trained(recipe(tmp_path / "free", server.url, replay=False, dtype="bfloat16"), MISMATCH)
    directed = trained(
        recipe(tmp_path / "directed", server.url, replay=True, dtype="bfloat16"), MISMATCH, AGREEMENT, RECORDED
    )
    with capsys.disabled():
        print(json.dumps({"free": free, "directed": directed}))
    assert min(directed[RECORDED]) == 1.0
    assert min(directed[AGREEMENT]) < 1.0, "some experts differ, and the recorded ones were taken"
    assert sum(directed[MISMATCH]) < sum(free[MISMATCH])
