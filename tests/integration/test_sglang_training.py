"""Five GRPO steps with a real SGLang server on the CPU, from the recipe that also runs embedded."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.integration.sglang_server import running_sglang
from tests.tiny import SCRATCH, tiny

from sluice.config import RunConfig
from sluice.config.dump import flatten
from sluice.config.model import ScratchConfig
from sluice.errors import EngineError
from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, account
from sluice.models.build import make_scratch
from sluice.obs.metrics import read_metrics
from sluice.orchestrate import api

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("sglang")
    make_scratch(ScratchConfig.model_validate(SCRATCH), folder / "model", seed=0)
    arguments = ("--context-length", "64")
    with running_sglang(folder / "model", extra_args=arguments, log_path=folder / "server.log") as running:
        yield running


def recipe(folder: Path, engine: str, **changes: Any) -> RunConfig:
    wanted: dict[str, Any] = {
        "steps": STEPS,
        "rollout": {"engine": engine, "sampling": {"temperature": 0.9}},
        "train": {"optimizer": {"lr": 1e-2}},
        "evaluation": {"every": 0, "greedy": False},
    }
    return tiny(folder, **wanted, **changes)


def versions_by_group(config: RunConfig) -> list[tuple[int, set[int]]]:
    """(batch, versions of its tokens) in dispatch order, groups_per_step groups a batch."""
    found: dict[int, set[int]] = {}
    for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,), from_ordinal=0):
        assert isinstance(entry.record, EpisodeRecord)
        episode = entry.record.episode
        batch = int(episode.group_id.removeprefix("g")) // config.groups_per_step
        for turn in episode.sampled_turns():
            found.setdefault(batch, set()).update(span.version.step for span in turn.spans)
    return sorted(found.items())


def test_five_steps_agree_with_the_trainer_to_1e_5(server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path / "tensor", server.url)
    summary = api.train(config)
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    worst = max(row["mismatch/mean_abs"] for row in rows)
    assert 0 < worst <= 1e-5
    assert summary.steps == STEPS
    assert versions_by_group(config) == [(batch, {batch}) for batch in range(STEPS)]
    assert all(row["train/grad_norm"] > 0 for row in rows), "the weights must move, or agreement proves nothing"
    with capsys.disabled():
        print(
            json.dumps(
                {"sglang_mismatch_mean_abs": worst, "rollout_tokens_per_second": summary.rollout_tokens_per_second}
            )
        )


def test_weights_also_travel_as_a_folder(server, tmp_path: Path) -> None:
    config = recipe(tmp_path / "disk", server.url).model_copy(update={"steps": 2})
    rollout = config.rollout.model_copy(update={"sglang": config.rollout.sglang.model_copy(update={"sync": "disk"})})
    config = config.model_copy(update={"rollout": rollout})
    api.train(config)
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert max(row["mismatch/mean_abs"] for row in rows) <= 1e-5
    assert versions_by_group(config) == [(0, {0}), (1, {1})]


def test_the_recipe_differs_from_the_embedded_one_in_one_value(server, tmp_path: Path) -> None:
    embedded, remote = (recipe(tmp_path / "same", engine) for engine in ("embedded", server.url))
    api.train(embedded)
    before, after = (flatten(json.loads(each.model_dump_json())) for each in (embedded, remote))
    assert {key for key in before | after if before.get(key) != after.get(key)} == {"rollout.engine"}


def test_turns_that_a_swap_interrupts_go_on_under_the_new_version(server, tmp_path: Path) -> None:
    changes = {"data": {"gate": {"max_lag": 1}}}
    config = recipe(tmp_path / "lag", server.url, **changes)
    api.train(config)
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert max(row["gate/lag_max"] for row in rows) == 1, "with a lag of one the second batch is a step old"
    assert len(rows) == STEPS


def test_a_server_that_dies_is_an_error_with_its_address_and_the_run_goes_on_with_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_scratch(ScratchConfig.model_validate(SCRATCH), tmp_path / "model", seed=0)
    arguments = ("--context-length", "64")
    with running_sglang(tmp_path / "model", extra_args=arguments, log_path=tmp_path / "first.log") as first:
        config = recipe(tmp_path / "dies", first.url)
        log = config.folder / "log"

        def kill_in_the_middle() -> None:
            until = time.monotonic() + 120
            while time.monotonic() < until:
                if log.exists() and any(log.glob("*.sqlite")) and LogReader(log).latest > 60:
                    os.killpg(first.pid, signal.SIGKILL)
                    return
                time.sleep(0.01)

        killer = threading.Thread(target=kill_in_the_middle)
        killer.start()
        with pytest.raises(EngineError, match=re.escape(first.url)):
            api.train(config)
        killer.join()
    finished = len(LogReader(log).episodes([f"g{g:06d}.{s}" for g in range(20) for s in range(4)]))
    assert 0 < finished < 80
    with running_sglang(tmp_path / "model", extra_args=arguments, log_path=tmp_path / "second.log") as second:
        rollout = config.rollout.model_copy(update={"engine": second.url})
        api.train(config.model_copy(update={"rollout": rollout}), resume=True)
    fate = account(LogReader(log).read(kinds=ACCOUNTED))
    assert fate.complete, "an episode was lost, or trained twice"
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert max(row["mismatch/mean_abs"] for row in rows) <= 1e-5
