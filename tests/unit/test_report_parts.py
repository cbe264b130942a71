"""The report's parts: what is read of a folder, what is said of it, which episodes go in, and how they are packed."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sluice.cli import run as sluice
from sluice.errors import LogError
from sluice.log import (
    CheckpointRecord,
    Disposition,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    EvalRecord,
    FaultRecord,
    LogReader,
    LogWriter,
    ResumeRecord,
    RewardRecord,
    RunRecord,
    VersionRecord,
)
from sluice.obs.report.build import Wish, build
from sluice.obs.report.choose import chapters, in_turns, spread
from sluice.obs.report.compact import Compact, Spelled
from sluice.obs.report.findings import Finding, findings
from sluice.obs.report.folder import RunFolder, read_run
from sluice.obs.report.history import category
from sluice.obs.report.page import embedded, render
from sluice.orchestrate.fates import with_advantages
from sluice.types import (
    Author,
    Episode,
    Fork,
    Message,
    Outcome,
    Prompt,
    Reward,
    SamplingParams,
    Segment,
    Turn,
    Version,
    VersionSpan,
    expand,
    observed,
)

EVIL = "</script><script>alert(1)</script><!--<b>&amp;\u202e\u0000\x1b[31m\ud800"
SAMPLING = SamplingParams(temperature=0.7)
PROMPT = Prompt("p", "calc", (Message("system", "add"), Message("user", EVIL)), "2")


def sampled(ids: list[int], *versions: tuple[int, int, int], finish: str = "stop") -> Turn:
    spans = tuple(VersionSpan(start, end, Version(version)) for start, end, version in versions)
    return Turn(
        Author.SAMPLED, np.array(ids, np.int32), -np.arange(len(ids), dtype=np.float32), spans, SAMPLING, finish
    )


def episode(id: str, group: str, *versions: tuple[int, int, int], outcome: Outcome = Outcome.COMPLETED) -> Episode:
    turns = (observed([3, 4]), sampled([5, 6, 7], *(versions or ((0, 3, 0),))))
    return Episode(id, group, PROMPT, (Segment(turns),), outcome)


def trained(id: str, step: int, *, masked: int = 0, advantage: list[float] | None = None) -> DispositionRecord:
    given = None if advantage is None else np.array(advantage, np.float32)
    return DispositionRecord(
        id, id.partition(".")[0], Disposition.TRAINED, step, masked_tokens=masked, advantage=given
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three steps; step 3 was trained twice, because the run was resumed from step 2."""
    path = tmp_path / "run"
    path.mkdir()
    reward = Reward({"exact": 1.0}, {"exact": 2.0})
    with LogWriter(path / "log", clock=iter(range(1000, 2000)).__next__) as log:
        log.append(RunRecord("digest", 7, "0.1.0"))
        for step in (0, 3):
            ids = tuple(f"eval-{step:06d}.p.{sample}" for sample in range(2))
            log.append_many([EpisodeRecord(episode(id, f"eval-{step:06d}")) for id in ids])
            log.append(EvalRecord(step, Version(step), {"eval/accuracy": 0.25 + step / 4}, ids))
            if step == 0:
                _steps(log, reward)
        log.append(FaultRecord("RewardError: timeout", "reward of g000005.0"))
    rows = [
        {"step": step, "reward/mean": step / 10, "train/entropy": None if step == 2 else 0.5, "version/step": step,
         "time/rollout": 2.0, "time/train": 1.0, "gate/lag_max": 0.0, "mismatch/mean_abs": 1e-7}
        for step in (1, 2, 3)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.json").write_text(json.dumps({"name": "run", "steps": 3, "seed": 7}))
    (path / "summary.json").write_text(json.dumps({"steps": 3}))
    return path


def _steps(log: LogWriter, reward: Reward) -> None:
    members = [f"g00000{group}.{sample}" for group in range(6) for sample in range(2)]
    log.append_many([EpisodeRecord(episode(id, id[:7])) for id in members])
    log.append_many([RewardRecord(id, reward) for id in members])
    log.append_many([trained("g000000.0", 1, advantage=[1.5]), trained("g000000.1", 1, advantage=[0.0])])
    log.append(VersionRecord(Version(1), Version(0), "a"))
    log.append(DispositionRecord("g000001.0", "g000001", Disposition.DROPPED, reason="filter: equal_rewards: 0.5"))
    log.append(DispositionRecord("g000001.1", "g000001", Disposition.DROPPED, reason="filter: equal_rewards: 0.5"))
    log.append_many([trained("g000002.0", 2), trained("g000002.1", 2, masked=2)])
    log.append(VersionRecord(Version(2), Version(1), "b"))
    cursor = log.append(CheckpointRecord(2, Version(2)))
    log.append_many([trained("g000003.0", 3), trained("g000003.1", 3)])
    log.append(ResumeRecord(2, cursor))
    log.append(RunRecord("digest", 7, "0.1.0"))
    excluded = DispositionRecord("g000003.0", "g000003", Disposition.EXCLUDED, 3, "infra_failure: HTTP 502 from b:31")
    log.append_many([excluded, trained("g000003.1", 3)])
    log.append(VersionRecord(Version(3), Version(2), "c"))


def said(run: RunFolder) -> dict[str, Finding]:
    return {finding.text: finding for finding in findings(run)}


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_log_is_folded_to_the_surviving_lineage(folder: Path) -> None:
    run = read_run(folder, now=1e9)
    history = run.history
    assert history is not None
    assert [(fate.record.episode_id, fate.step, str(fate.record.disposition)) for fate in history.fates] == [
        ("g000000.0", 1, "trained"), ("g000000.1", 1, "trained"), ("g000001.0", 2, "dropped"),
        ("g000001.1", 2, "dropped"), ("g000002.0", 2, "trained"), ("g000002.1", 2, "trained"),
        ("g000003.0", 3, "excluded"), ("g000003.1", 3, "trained"),
    ]  # fmt: skip
    assert history.abandoned == 2
    assert [fate.idle for fate in history.fates[:3]] == [False, True, None]
    assert [(event.kind, event.step) for event in history.resumes + history.faults] == [("resume", 2), ("fault", 3)]
    assert [(row["reason"], row["count"], row["example"]) for row in history.reasons()] == [
        ("filter: equal_rewards", 2, "g000001.0"), ("infra_failure: HTTP n from b", 1, "g000003.0"),
    ]  # fmt: skip
    assert run.state == "finished"
    assert not run.notices


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("filter: equal_rewards: 0.25", "filter: equal_rewards"),
        ("stale: lag 3 > 1", "stale: beyond max_lag"),
        ("stale: all of its 12 tokens", "stale: all of its tokens"),
        ("infra_failure: HTTP 500 at 127.0.0.1", "infra_failure: HTTP n at n"),
        ("abandoned version 3.1", "abandoned version n"),
    ],
)
def test_reasons_are_counted_without_their_numbers(reason: str, expected: str) -> None:
    assert category(reason) == expected


def test_a_torn_folder_is_read_as_far_as_it_goes(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\nno row\n{"step": 4, "reward/mean": 1.0, "x": "text"}\n{"step": 5, "rew')
    (folder / "config.json").write_text('{"name": "ru')
    (folder / "summary.json").unlink()
    run = read_run(folder, now=1e9)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4]
    assert run.rows[-1] == {"step": 4, "reward/mean": 1.0}
    assert (run.name, run.state, run.planned) == ("run", "stopped", None)
    assert len(run.notices) == 2
    assert "2 lines are no rows of metrics and were left out (line 4, 5)" in run.notices[1]
    assert "config.json could not be read" in run.notices[0]
    build([run], lambda run: None)


def _newer_schema(log: Path) -> None:
    import sqlite3

    with sqlite3.connect(log / "000001.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


def _damaged_row(log: Path) -> None:
    import sqlite3

    with sqlite3.connect(log / "000001.sqlite") as connection:
        connection.execute("UPDATE record SET body = x'00' WHERE kind = 'disposition' AND seq > 40")
    connection.close()


def _truncated(log: Path) -> None:
    file = log / "000001.sqlite"
    file.write_bytes(file.read_bytes()[:5000])


def _no_log(log: Path) -> None:
    for file in log.iterdir():
        file.unlink()


@pytest.mark.parametrize("harm", [_newer_schema, _damaged_row, _truncated, _no_log])
def test_a_log_that_cannot_be_read_is_a_notice(folder: Path, harm: Callable[[Path], None]) -> None:
    harm(folder / "log")
    run = read_run(folder, now=1e9)
    assert any("The log could not be read" in notice for notice in run.notices)
    assert (run.history is not None) == (harm is _damaged_row)
    assert "reward/mean" in build([run], lambda run: None)


def test_a_run_without_a_step_is_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "fresh"
    with LogWriter(folder / "log") as log:
        log.append(RunRecord("digest", 0, "0.1.0"))
        run = read_run(folder)  # while the writer is open
        assert run.state == "running"
        assert "No step has been trained yet." in said(run)
        build([run], lambda run: None)
        assert log.append(RunRecord("digest", 0, "0.1.0")) == 2
    with LogWriter(folder / "log") as log:
        log.append(FaultRecord("EngineError: gone", "inline, batch 1, version 0.0"))
    failed = read_run(folder)
    assert failed.state == "failed"
    assert any("The run failed after 0 steps: EngineError: gone" in text for text in said(failed))


def test_what_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LogError, match="is no run folder"):
        read_run(tmp_path)
    assert sluice(["report", str(tmp_path / "none")]) == 9
    assert "there is no run in" in capsys.readouterr().err
    assert sluice(["report", str(tmp_path), "--steps", "1,x"]) == 2
    assert (
        capsys.readouterr().err == "error: --steps 1,x: not a list of steps\n  → numbers with commas: --steps 1,20,55\n"
    )


# ── what is said ────────────────────────────────────────────────────────────────────────────────────────


def test_findings_of_a_small_run(folder: Path) -> None:
    found = said(read_run(folder, now=1e9))
    assert "Held-out accuracy rose from 0.250 to 1.000 in 3 steps." in found
    assert "Time went into: 67% rollout, 33% train, of 9s." in found
    assert (
        "Of 8 episodes decided: 5 trained, 1 excluded, 2 dropped. Most often not trained because: "
        "filter: equal_rewards (2)." in found
    )
    assert "The run was resumed once; what became of 2 episodes was decided again." in found
    assert found["train/entropy was not a finite number in 1 step."].level == "warning"
    assert found["Engine and trainer agree: 1e-07 nats a token on average."].level == "good"
    assert all(finding.rule for finding in found.values())


def made(**columns: list[float | None]) -> RunFolder:
    """A run that has these metrics; `__` stands for the slash."""
    length = len(next(iter(columns.values())))
    rows = [
        {"step": index + 1, **{name.replace("__", "/"): values[index] for name, values in columns.items()}}
        for index in range(length)
    ]
    return RunFolder(Path("x"), {"limits": {"max_mismatch": 0.1}}, rows, {"steps": length}, None)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (made(train__entropy=[1.0] * 10 + [0.1] * 10), "Entropy fell from 1 to 0.1 nats"),
        (made(train__grad_norm=[1.0] * 12 + [50.0]), "The gradient norm jumped at step 13."),
        (made(gate__masked_tokens=[20.0], train__tokens=[80.0]), "20% of the tokens were too old"),
        (made(rollout__episodes=[100.0], rollout__infra_failure=[2.0]), "2 of 100 episodes were lost to infra"),
        (made(rollout__episodes=[100.0], rollout__truncated=[30.0]), "30% of the answers are cut off"),
        (made(mismatch__mean_abs=[0.06], gate__lag_max=[0.0]), "Engine and trainer disagree by up to 0.06"),
    ],
)
def test_every_warning_has_its_rule(run: RunFolder, expected: str) -> None:
    warnings = [finding for finding in findings(run) if finding.level == "warning"]
    assert len(warnings) == 1
    assert expected in warnings[0].text
    assert warnings[0].rule


@pytest.mark.parametrize(
    "run",
    [
        made(train__entropy=[1.0] * 10 + [0.3] * 10, train__grad_norm=[1.0] * 19 + [9.0]),
        made(gate__masked_tokens=[10.0], train__tokens=[90.0], rollout__episodes=[100.0], rollout__truncated=[20.0]),
        made(mismatch__mean_abs=[0.06], gate__lag_max=[1.0]),
    ],
)
def test_no_warning_within_the_bounds(run: RunFolder) -> None:
    assert [finding for finding in findings(run) if finding.level == "warning"] == []


# ── which episodes ──────────────────────────────────────────────────────────────────────────────────────


def test_chapters_and_turns(folder: Path) -> None:
    run = read_run(folder)
    assert run.history is not None
    found = chapters(run.history, run.batch_of(), None)
    assert [(chapter.kind, chapter.step, chapter.total) for chapter in found] == [
        ("reason", 2, 3), ("eval", 0, 2), ("eval", 3, 2), ("train", 1, 2), ("train", 2, 4), ("train", 3, 2),
    ]  # fmt: skip
    order = [(chapter.kind, chapter.step, ids) for chapter, ids in in_turns(found, 8)]
    assert order == [
        ("reason", 2, ["g000001.0"]),
        ("reason", 2, ["g000003.0"]),
        ("eval", 0, ["eval-000000.p.0", "eval-000000.p.1", "greedy-000000.p.0"]),
        ("eval", 3, ["eval-000003.p.0", "eval-000003.p.1", "greedy-000003.p.0"]),
    ]
    only = chapters(run.history, run.batch_of(), {2})
    assert [(chapter.kind, chapter.step) for chapter in only if chapter.kind == "train"] == [("train", 2)]


def test_spread_keeps_both_ends() -> None:
    assert spread(range(1, 101), 5) == [1, 26, 51, 75, 100]
    assert spread([3, 4], 5) == [3, 4]


# ── packing ─────────────────────────────────────────────────────────────────────────────────────────────


def unpacked(text: str, dtype: str) -> list[float]:
    return np.frombuffer(b64decode(text), dtype).tolist()


def test_an_episode_is_packed_without_loss() -> None:
    main = Segment((observed([3, 4]), sampled([5, 6, 7], (0, 2, 1), (2, 3, 2)), observed([3])))
    fork = Segment((observed([4]), sampled([5], (0, 1, 2))), Fork(0, 4, "sub_agent"))
    one = Episode("g000001.0", "g000001", PROMPT, (main, fork), Outcome.COMPLETED, info={"counters": {"turns": 2}})
    entries = [Entry(1, 0.0, EpisodeRecord(one)), Entry(2, 0.0, RewardRecord(one.id, Reward({"a": 1.0}, {"a": 0.5})))]
    record = trained(one.id, 3, masked=2, advantage=[0.5, 0.5, -1.0, 0.25])
    compact = Compact(lambda id: Spelled({5: "é".encode()[:1], 6: "é".encode()[1:]}.get(id, b"x"), id == 7))
    from sluice.obs.report.history import Fate

    packed = compact.episode(entries, Fate(9, record, 3))
    assert packed is not None
    vocabulary = compact.vocabulary()
    first, second = packed["segments"]
    assert [vocabulary["ids"][place] for place in unpacked(first["ids"][1:], "<u2")] == [3, 4, 5, 6, 7, 3]
    assert unpacked(first["lp"], "<f4") == [0.0, -1.0, -2.0]
    assert first["turns"] == [
        {"n": 2}, {"n": 3, "v": [[0, 2, "1.0"], [2, 3, "2.0"]], "finish": "stop", "t": 0.7}, {"n": 1},
    ]  # fmt: skip
    assert second["fork"] == [0, 4, "sub_agent"]
    assert unpacked(packed["fate"]["adv"], "<f4") == [0.5, 0.5, -1.0, 0.25]
    assert packed["fate"]["masked"] == ["1.0"], "the two oldest tokens are those of version 1"
    assert (packed["reward"], packed["components"]) == (0.5, {"a": [1.0, 0.5]})
    assert packed["info"] == [["counters.turns", "2"]]
    places = {id: place for place, id in enumerate(vocabulary["ids"])}
    assert vocabulary["hex"] == {places[5]: "c3", places[6]: "a9"}
    assert vocabulary["special"] == [places[7]]
    json.loads(embedded({"episode": packed, "prompts": compact.prompts}))


def test_advantages_are_recorded_as_the_trainer_got_them() -> None:
    main = Segment((observed([3]), sampled([5, 6], (0, 2, 1))))
    fork = Segment((sampled([7], (0, 1, 1)),), Fork(0, 2, "branch"))
    one = Episode("g000001.0", "g000001", PROMPT, (main, fork), Outcome.COMPLETED)
    other = episode("g000001.1", "g000001")
    given: list[Any] = []
    for sample, values in zip(expand(one), ([9.0, 1.0, 2.0], [9.0, 9.0, 3.0]), strict=True):
        given.append(sample.with_streams(advantage=np.array(values)))
    given += [sample.with_streams(advantage=np.full(len(sample), -0.5)) for sample in expand(other)]
    excluded = DispositionRecord("g000001.2", "g000001", Disposition.EXCLUDED, 1, "infra_failure")
    first, second, third = with_advantages([trained(one.id, 1), trained(other.id, 1), excluded], [given])
    assert first.advantage is not None
    assert second.advantage is not None
    assert (first.advantage.tolist(), second.advantage.tolist(), third.advantage) == ([1.0, 2.0, 3.0], [-0.5], None)


def test_recorded_advantages_survive_the_log(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "log") as log:
        log.append_many([trained("a", 1, advantage=[0.1, -2.0]), trained("b", 1)])
    first, second = (entry.record for entry in LogReader(tmp_path / "log").read())
    assert isinstance(first, DispositionRecord)
    assert isinstance(second, DispositionRecord)
    assert first.advantage is not None
    assert first.advantage.tobytes() == np.array([0.1, -2.0], np.float32).tobytes()
    assert second.advantage is None


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────


def data_of(page: str) -> Any:
    return json.loads(page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])


def test_nothing_in_the_data_ends_the_data(folder: Path) -> None:
    run = read_run(folder)
    run.config = {"name": EVIL, "steps": 3}
    page = build([run], lambda run: lambda id: Spelled(EVIL.encode("utf-8", "replace")))
    page.encode()
    assert page.count("</script>") == 2
    assert "<script>alert" not in page
    assert "<b>" not in page
    assert "<!--" not in page
    data = data_of(page)
    assert data["runs"][0]["name"] == EVIL
    assert data["runs"][0]["episodes"]["prompts"][0]["question"] == EVIL


def test_the_page_asks_nobody(folder: Path) -> None:
    page = build([read_run(folder)], lambda run: None)
    policy = page.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    for word in ("http://", "https://", "src=", "@import", "url(", "fetch(", "XMLHttpRequest", "innerHTML"):
        assert word not in page.replace("http://www.w3.org/2000/svg", ""), word


def test_what_is_left_out_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data_of(build([read_run(folder)], lambda run: None))["runs"][0]["episodes"]
    assert (len(whole["episodes"]), whole["total"], whole["too_large"]) == (12, 12, 0)
    few = data_of(build([read_run(folder)], lambda run: None, Wish(episodes=5)))["runs"][0]["episodes"]
    assert len(few["episodes"]) == 4, "the greedy answer that was chosen is not in this log"
    none = data_of(build([read_run(folder)], lambda run: None, Wish(episodes=0)))["runs"][0]["episodes"]
    assert none is None
    monkeypatch.setattr("sluice.obs.report.build.EPISODE_BYTES", 2_000)
    small = data_of(build([read_run(folder)], lambda run: None))["runs"][0]["episodes"]
    assert 0 < len(small["episodes"]) < 12
    assert small["too_large"] == 12 - len(small["episodes"])


def test_a_long_run_has_bounded_curves() -> None:
    run = made(reward__mean=[float(step) for step in range(2500)])
    data = data_of(build([run], lambda run: None))["runs"][0]
    assert data["stride"] == 3
    assert data["metrics"]["reward/mean"][:2] == [1.0, 4.0]
    assert (len(data["steps"]), data["steps"][-1]) == (834, 2500)


def test_numbers_that_are_none_are_null() -> None:
    run = made(train__loss=[1.0, None, 2.0])
    data = data_of(render({"runs": [], "x": [1.0, None]}, title="t"))
    assert data["x"] == [1.0, None]
    assert data_of(build([run], lambda run: None))["runs"][0]["metrics"]["train/loss"] == [1.0, None, 2.0]
