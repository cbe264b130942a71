"""A run whose parts are killed, frozen and slowed at random moments: is anything lost, and how long until it goes on?

    python -m benchmarks.chaos [--faults 20] [--seed 0] [--out FILE]

A small recipe with two engine servers behind the real router, two trainer ranks and lag 2 runs as a process of its own.
At random places of its log one of its parts meets a fault, until there were as many as asked for:

* parts: an engine server, a trainer rank, the router, and the controller, which holds the loop, the gateway and the
  agents' runner. A controller that was killed is started again with `--resume`; everything else is up to the run.
* faults: `kill` is SIGKILL; `freeze` is SIGSTOP, and SIGCONT some seconds later; `slow` is many short freezes in a row,
  so that the part gets a tenth of its time.

The plan follows from the seed; what the parts do at that moment does not. The run must then complete, and its log must
show, or the command fails: every finished episode has one fate in the surviving lineage, none was trained twice, every
step had a whole batch, and no token was trained with more lag than allowed. Recovery is the time from a fault to the
next episode that finished, and to the next update, by the times in the log. A run that completes before it has met
all faults is resumed with more steps. Cut connections, and agents that run elsewhere, are not part of this.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import psutil
from benchmarks.rig import command_line, machine, parser, report, say
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.log import (
    ACCOUNTED,
    Disposition,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    Kind,
    LogReader,
    VersionRecord,
    account,
)
from sluice.types import VersionSpan
from sluice.weights.lineage import Born, Lineage

WORDS = {"engine": "embedded.server", "rank": "ranks.program", "router": "smg::router"}
"""What the command lines of the controller's children hold once they serve: the router renames itself then."""
PARTS = (*WORDS, "controller")
KINDS = ("kill", "freeze", "slow")
LAG = 2
GROUPS, SAMPLES = 4, 4
GAP = (10, 60)
"""Records of the log between the recovery from one fault and the next fault, at least and at most."""
FREEZE = (0.5, 3.0)
"""Seconds of a fault that is not a kill."""
SLICE = 0.1
"""Seconds of one turn of `slow`: nine tenths of it frozen."""
DEADLINE = 240.0
"""Seconds until a fault must be recovered from, and until the run must end afterwards."""
POLL = 0.02


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to which part, `gap` records after the last recovery; `choice` in [0, 1) picks among several."""

    part: str
    kind: str
    gap: int
    seconds: float
    choice: float


@dataclass(frozen=True, slots=True)
class Met:
    """A fault that was met: when, and the last record of the log before it."""

    fault: Fault
    at: float
    cursor: int


def plan(faults: int, seed: int) -> list[Fault]:
    """Every pair of part and fault before any of them comes again."""
    return list(islice(_endless(random.Random(seed)), faults))


def _endless(chance: random.Random) -> Iterator[Fault]:
    while True:
        deck = list(product(PARTS, KINDS))
        chance.shuffle(deck)
        for part, kind in deck:
            yield Fault(part, kind, chance.randint(*GAP), chance.uniform(*FREEZE), chance.random())


def recipe(folder: Path, faults: int) -> RunConfig:
    """Small, with all parts in processes of their own, and as many restarts as there are faults."""
    return tiny(
        folder,
        rollout={"embedded": {"servers": 2}, "sglang": {"restarts": faults, "start_seconds": 120}},
        train={"ranks": 2, "rank_seconds": 120},
        limits={"restarts": faults},
        data={"gate": {"max_lag": LAG}, "eval_prompts": 0, "strategy": {"type": "groups", "samples": SAMPLES}},
        groups_per_step=GROUPS,
        checkpoint={"every": 1},
        evaluation={"every": 0},
        steps=5 * faults,
    )


class Controller:
    """The run's process, and the parts below it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.starts = 0
        self._output = config.runs_dir / "output.txt"
        config.runs_dir.mkdir(parents=True, exist_ok=True)
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        recipe = self.config.runs_dir / "recipe.json"
        recipe.write_text(self.config.model_dump_json())
        words = ["-c", "from sluice.cli import main; main()", "train", str(recipe), *(["--resume"] * bool(self.starts))]
        self.starts += 1
        with self._output.open("ab") as output:
            return subprocess.Popen([sys.executable, *words], stdout=output, stderr=output, start_new_session=True)

    def resume(self, *, steps: int = 0) -> None:
        """Go on, with more steps if it is over."""
        self.config = self.config.model_copy(update={"steps": self.config.steps + steps})
        self._process = self._start()

    @property
    def over(self) -> bool:
        """Whether the run has completed. SystemExit when it ended otherwise."""
        code = self._process.poll()
        if code:
            raise SystemExit(f"the run ended with {code}:\n{self._output.read_text(errors='replace')[-6000:]}")
        return code == 0

    def find(self, part: str) -> list[psutil.Process]:
        """Processes of a part that are alive."""
        with suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self._process.pid)
            if part == "controller":
                return [whole] if whole.status() != psutil.STATUS_ZOMBIE else []
            children = sorted(whole.children(recursive=True), key=lambda each: each.pid)
            return [each for each in children if WORDS[part] in _command(each)]
        return []

    def killed(self) -> None:
        """Wait for the end of a process that was killed."""
        self._process.wait(DEADLINE)

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def end(self) -> None:
        """Harmless when it is over."""
        self._process.kill()
        self._process.wait()


def _command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    return ""


class Storm:
    """Brings the faults of a plan over a run."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._log = LogReader(controller.config.folder / "log")
        self.met: list[Met] = []

    def blow(self, faults: Sequence[Fault]) -> None:
        """Bring them, one after the recovery from the other, and let the run complete."""
        for number, fault in enumerate(faults, start=1):
            met = self._bring(fault, self._victim(fault))
            self.met.append(met)
            self._wait(lambda met=met: None not in recovery(self._log, met), f"to recover from {fault}")
            told = " and ".join(f"{seconds or 0:.1f}" for seconds in recovery(self._log, met))
            say(f"{number}/{len(faults)}: {fault.kind} {fault.part}; an episode and an update after {told} s")
        self._wait(lambda: self._controller.over, "to complete", more=0)

    def _latest(self) -> int:
        return self._log.latest if any(self._log.folder.glob("*.sqlite")) else 0

    def _wait(self, true: Any, what: str, more: int = 30) -> None:
        """Until something holds. A run that completes before that gets more steps."""
        deadline = time.monotonic() + DEADLINE
        while not true():
            if more and self._controller.over:
                self._controller.resume(steps=more)
            if time.monotonic() > deadline:
                raise SystemExit(f"the run took too long {what}:\n{self._controller.output()[-6000:]}")
            time.sleep(POLL)

    def _victim(self, fault: Fault) -> psutil.Process:
        """One process of the part, `gap` records from now, of a run that did not have to be extended meanwhile."""
        while True:
            begin, starts = self._latest(), self._controller.starts
            self._wait(lambda at=begin + fault.gap: self._latest() >= at, f"to log {fault.gap} records")
            alive = self._controller.find(fault.part)
            if alive and starts == self._controller.starts:
                return alive[int(fault.choice * len(alive))]

    def _bring(self, fault: Fault, victim: psutil.Process) -> Met:
        """Do it."""
        met = Met(fault, time.time(), self._latest())
        with suppress(psutil.NoSuchProcess):
            if fault.kind == "kill":
                victim.kill()
            elif fault.kind == "freeze":
                freeze(victim, fault.seconds)
            else:
                for _ in range(round(fault.seconds / SLICE)):
                    freeze(victim, SLICE * 0.9)
                    time.sleep(SLICE * 0.1)
        if (fault.part, fault.kind) == ("controller", "kill"):
            self._controller.killed()
            self._controller.resume()
        return met


def freeze(process: psutil.Process, seconds: float) -> None:
    process.suspend()
    try:
        time.sleep(seconds)
    finally:
        process.resume()


def recovery(log: LogReader, met: Met) -> tuple[float | None, float | None]:
    """Seconds from a fault to the next finished episode and to the next update; None for what did not happen yet."""
    episode: float | None = None
    update: float | None = None
    for entry in log.read(after=met.cursor, kinds=(Kind.EPISODE, Kind.DISPOSITION)):
        record, seconds = entry.record, entry.at - met.at
        if seconds < 0:
            continue
        if isinstance(record, EpisodeRecord) and episode is None:
            episode = seconds
        if isinstance(record, DispositionRecord) and record.disposition is Disposition.TRAINED and update is None:
            update = seconds
        if episode is not None and update is not None:
            break
    return episode, update


def lags(entries: Iterable[Entry], bound: int) -> Counter[int]:
    """How many sampled spans were trained with which lag, by the versions and the order of the log.

    Spans beyond the bound are left out where the record says that as many tokens were masked. Updates that a resume
    took back count as well. A step's dispositions stand before the version that it made.
    """
    found: Counter[int] = Counter()
    born: list[Born] = []
    lineage = Lineage()
    spans: dict[str, list[VersionSpan]] = {}
    for entry in entries:
        match entry.record:
            case VersionRecord(version, parent, checksum):
                born.append(Born(version, parent, checksum))
                lineage = Lineage(born)
                lineage.current = version
            case EpisodeRecord(episode):
                spans[episode.id] = [span for turn in episode.sampled_turns() for span in turn.spans]
            case DispositionRecord(episode_id=id, disposition=Disposition.TRAINED, masked_tokens=masked):
                rows = [(lineage.lag(span.version), span.end - span.start) for span in spans[id]]
                spared = sum(tokens for lag, tokens in rows if lag > bound) == masked
                found.update(lag for lag, _ in rows if lag <= bound or not spared)
            case _:
                pass
    return found


def prove(config: RunConfig) -> dict[str, Any]:
    """What the log of a run that is over shows. SystemExit when it is not what it must be."""
    log = LogReader(config.folder / "log")
    fate = account(log.read(kinds=ACCOUNTED))
    trained = lags(log.read(kinds=(Kind.VERSION, Kind.EPISODE, Kind.DISPOSITION)), LAG)
    records = [record for each in fate.surviving.values() for record in each]
    batches = Counter(record.step for record in records)  # trained, or with a reason why not
    partial = [step for step in range(1, config.steps + 1) if batches[step] != GROUPS * SAMPLES]
    shown = {
        "records": log.latest,
        "steps": config.steps,
        "finished_episodes": len(fate.surviving) + len(fate.undecided),
        "lost": len(fate.undecided),
        "decided_twice": len(fate.decided_twice),
        "consumed_before_logged": len(fate.unlogged),
        "steps_without_their_batch": len(partial),
        "fates": dict(Counter(f"{each.disposition}: {each.reason}".rstrip(": ") for each in records)),
        "lag_bound": LAG,
        "trained_spans_by_lag": {str(lag): trained[lag] for lag in sorted(trained)},
        "updates_taken_back": len({record.step for record in fate.abandoned if record.step is not None}),
        "sampled_again": len(fate.logged_twice),
        "resumes": sum(1 for _ in log.read(kinds=(Kind.RESUME,))),
    }
    broken = fate.undecided or fate.decided_twice or fate.unlogged or partial
    if broken or max(trained) > LAG or not (config.folder / "summary.json").exists():
        raise SystemExit(f"the log does not hold what it must: {shown}, {partial=}")
    return shown


def figures(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and largest, in seconds."""
    ordered = sorted(seconds)
    at = lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)  # noqa: E731
    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)}


def run(folder: Path, *, faults: int, seed: int) -> dict[str, Any]:
    """The whole storm in a folder. Returns the proof and the times."""
    begin = time.monotonic()
    controller = Controller(recipe(folder, faults))
    storm = Storm(controller)
    try:
        storm.blow(plan(faults, seed))
    finally:
        controller.end()
    proof = prove(controller.config)
    log = LogReader(controller.config.folder / "log")
    rows: list[tuple[str, float, float]] = []
    for met in storm.met:
        episode, update = recovery(log, met)
        assert episode is not None
        assert update is not None
        rows.append((f"{met.fault.part} {met.fault.kind}", episode, update))
    return {
        "faults": len(rows),
        "seed": seed,
        "seconds": round(time.monotonic() - begin, 1),
        "proof": proof,
        "recovery_seconds": {
            what: {
                "count": len(chosen),
                "to_next_episode": figures([row[1] for row in chosen]),
                "to_next_update": figures([row[2] for row in chosen]),
            }
            for what in ("all", *sorted({row[0] for row in rows}))
            for chosen in [[row for row in rows if what in ("all", row[0])]]
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--faults", type=int, default=20)
    arguments_of.add_argument("--seed", type=int, default=0)
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = arguments_of.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        result = run(Path(name), faults=arguments.faults, seed=arguments.seed)
    report({"command": command_line("chaos"), **machine(), **result}, arguments.out)


if __name__ == "__main__":
    main()
