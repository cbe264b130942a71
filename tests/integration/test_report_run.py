"""A real run writes its report, and what the page holds is what the run's log and metrics hold."""

from __future__ import annotations

import json
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import tiny

from sluice.errors import RewardError
from sluice.log import Disposition, DispositionRecord, EpisodeRecord, Kind, LogReader
from sluice.models.build import load_tokenizer
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api
from sluice.orchestrate.reporting import write_report
from sluice.types import Author


class Said(NullView):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at lag 1 with a filter; the report is written by the run itself."""
    view = Said()
    config = tiny(
        tmp_path_factory.mktemp("report"),
        steps=4,
        data={"gate": {"max_lag": 1}, "filters": [{"type": "spread"}]},
        obs={"report": True},
    )
    api.train(config, view=view)
    assert view.lines[-1] == f"report   {config.folder / 'report.html'}"
    return config.folder


def data_of(page: Path) -> Any:
    text = page.read_text(encoding="utf-8")
    return json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])


def test_curves_and_fates_are_those_of_the_run(run: Path) -> None:
    data = data_of(run / "report.html")["runs"][0]
    rows = read_metrics(run / "metrics.jsonl")
    assert data["steps"] == [row["step"] for row in rows] == [1, 2, 3, 4]
    assert data["metrics"]["train/loss"] == pytest.approx([row["train/loss"] for row in rows], rel=1e-4)
    assert data["evaluations"]["steps"] == [0, 3, 4]
    assert data["state"] == "finished"
    records = [entry.record for entry in LogReader(run / "log").read(kinds=(Kind.DISPOSITION,))]
    for kind in Disposition:
        expected = sum(isinstance(r, DispositionRecord) and r.disposition is kind for r in records)
        assert sum(data["fates"]["counts"][kind]) == expected
    dropped = sum(row["rollout/groups_dropped"] for row in rows)
    assert sum(data["fates"]["counts"]["dropped"]) == 4 * dropped
    assert data["notices"] == []


def test_tokens_are_those_of_the_log(run: Path) -> None:
    shown = data_of(run / "report.html")["runs"][0]["episodes"]
    reader = LogReader(run / "log")
    tokenizer = load_tokenizer(run / "model-init")
    vocabulary = shown["tokens"]
    assert len(shown["episodes"]) > 20
    for packed in shown["episodes"]:
        records = [entry.record for entry in reader.about(packed["id"])]
        episode = next(record.episode for record in reversed(records) if isinstance(record, EpisodeRecord))
        segment = packed["segments"][0]
        places = np.frombuffer(b64decode(segment["ids"][1:]), "<u2")
        assert [vocabulary["ids"][place] for place in places] == episode.ids(0).tolist()
        text = "".join(vocabulary["texts"][place] for place in places)
        assert text == tokenizer.decode(episode.ids(0).tolist(), skip_special_tokens=False)
        turn = next(turn for turn in episode.segments[0].turns if turn.author is Author.SAMPLED)
        assert turn.logprobs is not None
        assert b64decode(segment["lp"]) == turn.logprobs.astype("<f4").tobytes()
    fates = [packed["fate"] for packed in shown["episodes"] if packed.get("fate", {}).get("kind") == "trained"]
    assert fates
    assert all("adv" in fate for fate in fates)


def test_the_command_overlays_runs_and_leaves_them_alone(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and "-shm" not in path.name}
    page = write_report([run, run], tmp_path / "both.html")
    assert [one["name"] for one in data_of(page)["runs"]] == [f"tiny ({run})"] * 2
    assert {path: path.read_bytes() for path in before} == before


def test_without_a_tokenizer_there_are_ids(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model-init")
    shutil.rmtree(copy / "checkpoints")
    data = data_of(write_report([copy]))["runs"][0]
    assert data["notices"] == ["Tokens are shown as ids: no model folder is left."]
    assert set(data["episodes"]["tokens"]["texts"]) == {None}


def test_a_run_that_fails_has_a_report_and_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def broken(prompt, answer):\n    raise ValueError('no scorer')\n")
    rewards = [{"type": "python", "path": f"{tmp_path / 'broken.py'}:broken"}]
    changes: dict[str, Any] = {"rewards": rewards, "obs": {"report": True}, "data": {"eval_prompts": 0}}
    config = tiny(tmp_path, **changes, evaluation={"every": 0})
    view = Said()
    with pytest.raises(RewardError, match="infra failures"):
        api.train(config, view=view)
    data = data_of(config.folder / "report.html")["runs"][0]
    assert data["state"] == "failed"
    assert "The run failed after 0 of 6 steps" in "".join(finding["text"] for finding in data["findings"])


def test_a_report_that_cannot_be_written_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sluice.orchestrate.reporting.write_atomic", full)
    view = Said()
    summary = api.train(tiny(tmp_path, steps=1, obs={"report": True}), view=view)
    assert summary.steps == 1
    assert view.lines[-1].startswith("report.html was not written, the run is not affected: LogError: the report could")
    assert "No space left on device" in view.lines[-1]
