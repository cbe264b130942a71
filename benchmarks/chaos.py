"""A run whose parts are killed, frozen and slowed at random moments: is anything lost, and how long until it goes on?

    python -m benchmarks.chaos [--faults 20] [--seed 0] [--out FILE]

A small recipe with two engine servers behind the real router, two trainer ranks and lag 2 runs as a process of its own.
At random places of its log one of its parts meets a fault, until there were as many as asked for:

* parts: an engine server, a trainer rank, the router, and the controller, which holds the loop, the gateway and the
  agents' runner. A controller that was killed is started again with `--resume`; everything else is up to the run.
* faults: `kill` is SIGKILL; `freeze` is SIGSTOP, and SIGCONT some seconds later; `slow` is many short freezes in a row,
  so that the part gets a tenth of its time; `cut` ends one of its connections or all of them, closed or reset, while
  both ends live (`benchmarks.cut`): those between controller, router and servers, the mesh of the ranks, or a rank's
  connection to the controller.

The plan follows from the seed; what the parts do at that moment does not. The run must then complete, and its log must
show, or the command fails: every finished episode has one fate in the surviving lineage, none was trained twice, every
step had a whole batch, and no token was trained with more lag than allowed. Recovery is the time from a fault to the
next episode that finished, and to the next update, by the times in the log. A run that completes before it has met
all faults is resumed with more steps. Agents that run elsewhere are not
part of this.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import psutil
from benchmarks.chaos_log import figures, prove, recovery
from benchmarks.cut import connections, end_connection
from benchmarks.rig import command_line, machine, parser, report, say
from tests.tiny import tiny

from sluice.config.run import RunConfig
from sluice.log import LogReader

WORDS = {"engine": "embedded.server", "rank": "ranks.program", "router": "smg::router"}
"""What the command lines of the controller's children hold once they serve: the router renames itself then."""
PARTS = (*WORDS, "controller")
KINDS = ("kill", "freeze", "slow", "cut")
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
    """What happens to which part, `gap` records after the last recovery; `seed` picks what there is several of."""

    part: str
    kind: str
    gap: int
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Met:
    """A fault that was met.

    Attributes:
        at: Unix time.
        cursor: last record of the log before it.
        connections: that were cut.
    """

    fault: Fault
    at: float
    cursor: int
    connections: int = 0


def plan(faults: int, seed: int) -> list[Fault]:
    """Every pair of part and fault before any of them comes again."""
    return list(islice(_endless(random.Random(seed)), faults))


def _endless(chance: random.Random) -> Iterator[Fault]:
    while True:
        deck = list(product(PARTS, KINDS))
        chance.shuffle(deck)
        for part, kind in deck:
            yield Fault(part, kind, chance.randint(*GAP), chance.uniform(*FREEZE), chance.getrandbits(32))


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
            met = self._bring(fault)
            self.met.append(met)
            self._wait(lambda met=met: None not in recovery(self._log, met.at, met.cursor), f"to recover from {fault}")
            told = " and ".join(f"{seconds or 0:.1f}" for seconds in recovery(self._log, met.at, met.cursor))
            many = f" ({met.connections} connections)" if met.connections else ""
            say(f"{number}/{len(faults)}: {fault.kind} {fault.part}{many}; an episode and an update after {told} s")
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

    def _victim(self, fault: Fault, chance: random.Random) -> psutil.Process:
        """One process of the part, `gap` records from now, of a run that did not have to be extended meanwhile."""
        while True:
            begin, starts = self._latest(), self._controller.starts
            self._wait(lambda at=begin + fault.gap: self._latest() >= at, f"to log {fault.gap} records")
            alive = self._controller.find(fault.part)
            if alive and starts == self._controller.starts:
                return chance.choice(alive)

    def _bring(self, fault: Fault) -> Met:
        """Do it, and again when what was to be cut was not there."""
        chance = random.Random(fault.seed)
        while True:
            victim = self._victim(fault, chance)
            met = Met(fault, time.time(), self._latest())
            with suppress(psutil.NoSuchProcess):
                if fault.kind == "cut":
                    met = replace(met, connections=cut(fault.part, victim, chance))
                else:
                    self._disturb(fault, victim)
            if met.connections or fault.kind != "cut":
                return met

    def _disturb(self, fault: Fault, victim: psutil.Process) -> None:
        if fault.kind == "freeze":
            freeze(victim, fault.seconds)
        elif fault.kind == "slow":
            for _ in range(round(fault.seconds / SLICE)):
                freeze(victim, SLICE * 0.9)
                time.sleep(SLICE * 0.1)
        else:
            victim.kill()
            if fault.part == "controller":
                self._controller.killed()
                self._controller.resume()


def cut(part: str, victim: psutil.Process, chance: random.Random) -> int:
    """End one of a process's connections or all of them, closed or reset. Returns how many there were.

    Those of a rank are its control connection, a socket pair whose number is its last argument, and the mesh.
    """
    if part == "rank" and chance.random() < 0.5:
        return end_connection(victim.pid, int(victim.cmdline()[-1]))
    found = connections(victim.pid)
    chosen = found if chance.random() < 0.5 else found and [chance.choice(found)]
    reset = chance.random() < 0.5
    return sum(end_connection(victim.pid, each, reset=reset) for each in chosen)


def freeze(process: psutil.Process, seconds: float) -> None:
    process.suspend()
    try:
        time.sleep(seconds)
    finally:
        process.resume()


def run(folder: Path, *, faults: int, seed: int) -> dict[str, Any]:
    """The whole storm in a folder. Returns the proof and the times."""
    begin = time.monotonic()
    controller = Controller(recipe(folder, faults))
    storm = Storm(controller)
    try:
        storm.blow(plan(faults, seed))
    finally:
        controller.end()
    proof = prove(controller.config, steps_of=GROUPS * SAMPLES, bound=LAG)
    log = LogReader(controller.config.folder / "log")
    rows: list[tuple[str, float, float]] = []
    for met in storm.met:
        episode, update = recovery(log, met.at, met.cursor)
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
