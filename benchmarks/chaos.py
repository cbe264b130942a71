"""A run whose parts are killed, frozen, slowed and cut off at random moments: is anything lost, and when does it go on?

    python -m benchmarks.chaos [--faults 20] [--seed 0] [--out FILE] [--runs FOLDER]

A small recipe with two engine servers behind the real router, two trainer ranks, lag 2, and a gateway that agents
elsewhere come to runs as a process of its own; so do the agents (`benchmarks.chaos_agent`). At random places of its log
one of its parts meets a fault, until there were as many as asked for; after 22, which is every pair of part and fault
once, another such run begins. A plan that has no room for all pairs leaves out others than cuts.

* parts: an engine server, a trainer rank, the router, the controller, which holds the loop and the gateway, and an
  agent. A controller that was killed is started again with `--resume`, and an agent that was killed by its
  owner, which is this program; everything else is up to the run.
* faults: `kill` is SIGKILL; `freeze` is SIGSTOP, and SIGCONT some seconds later; `slow` is many short freezes in a row,
  so that the part gets a tenth of its time; `cut` ends one of its connections or all of them, closed or reset, while
  both ends live (`benchmarks.cut`): those between controller, router and servers, and an agent's to the gateway.
* Three more parts are in those processes, and can only be cut off: the mesh by which the ranks work together, the
  connection by which one of them is called, and the gateway, in the controller, where every connection that clients
  have to it is ended at once. The gateway that stands alone, `sluice serve`, is the same class without a run behind it
  that could go on, so it is no part here.

The plan follows from the seed; what the parts do at that moment does not. Every run must complete, and its log must
show, or the command fails: every finished episode has one fate in the surviving lineage, none was trained twice, every
step had a whole batch, no token was trained with more lag than allowed, an episode whose agent died is an infra failure
that was not trained, and what an agent was told to be finished is in the log with the reward that it gave. Recovery is
the time from a fault to the next episode that finished, and to the next update, by the times in the log. A run that
completes before it has met all its faults is resumed with more steps. After every run the results so far are written.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from benchmarks.chaos_log import Recovered, prove, recovery, summed
from benchmarks.chaos_parts import Parts, free_port
from benchmarks.rig import command_line, machine, parser, report, say
from tests.tiny import SCRATCH, tiny

from sluice.config.run import RunConfig
from sluice.log import LogReader

KINDS = ("kill", "freeze", "slow", "cut")
WHOLE = ("engine", "router", "controller", "agent")
PAIRS = (*product(WHOLE, KINDS), *product(("rank",), KINDS[:-1]), *product(("mesh", "calls", "gateway"), KINDS[-1:]))
"""Part and fault."""
PER_RUN = len(PAIRS)
LAG = 2
GROUPS, SAMPLES = 4, 4
IDLE = 8.0
"""Seconds until a session is given up whose agent is gone."""
GAP = (10, 60)
"""Records of the log between the recovery from one fault and the next fault, at least and at most."""
FREEZE = (0.5, 3.0)
"""Seconds of a fault that is neither a kill nor a cut."""
AGENT_FREEZE = (0.5, 2 * IDLE)
"""The same for an agent: its sessions may be over when it wakes up."""
SLICE = 0.1
"""Seconds of one turn of `slow`: nine tenths of it frozen."""
DEADLINE = 240.0
"""Seconds until a fault must be recovered from, and until the run must end afterwards."""
POLL = 0.02
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


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
    """Every pair of part and fault before any of them comes again; where there is no room for all, cuts go first."""
    chance = random.Random(seed)
    planned: list[Fault] = []
    while len(planned) < faults:
        deck = chance.sample(PAIRS, len(PAIRS))
        room = faults - len(planned)
        held = set(sorted(deck, key=lambda pair: pair[1] != "cut")[:room])
        for part, kind in deck:
            if (part, kind) in held:
                seconds = chance.uniform(*(AGENT_FREEZE if part == "agent" else FREEZE))
                planned.append(Fault(part, kind, chance.randint(*GAP), seconds, chance.getrandbits(32)))
    return planned


def recipe(folder: Path, faults: int) -> RunConfig:
    """Small, with all parts in processes of their own, and as many restarts as there are faults."""
    given = [{"type": "given"}, {"type": "given", "name": "mark", "component": "mark", "weight": 0.0}]
    return tiny(
        folder,
        model={"scratch": {"tokenizer": {**SCRATCH["tokenizer"], "chat_template": TEMPLATE}}},
        rollout={
            "embedded": {"servers": 2},
            "sglang": {"restarts": faults, "start_seconds": 120},
            "runner": {"type": "external", "lease_seconds": 120},
            "gateway": {"port": free_port(), "idle_seconds": IDLE},
        },
        rewards=[*given, {"type": "random"}],  # a coin by episode id: every batch has a gradient
        train={"ranks": 2, "rank_seconds": 120},
        limits={"restarts": faults, "max_infra_failures": 0.9, "stall_seconds": DEADLINE},
        data={"gate": {"max_lag": LAG}, "eval_prompts": 0, "strategy": {"type": "groups", "samples": SAMPLES}},
        groups_per_step=GROUPS,
        checkpoint={"every": 1},
        evaluation={"every": 0},
        steps=5 * faults,
    )


class Storm:
    """Brings the faults of a plan over a run."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._log = LogReader(parts.config.folder / "log")
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
        self._wait(lambda: self._parts.over, "to complete", more=0)

    def _latest(self) -> int:
        return self._log.latest if any(self._log.folder.glob("*.sqlite")) else 0

    def _wait(self, true: Callable[[], bool], what: str, more: int = 30) -> None:
        """Until something holds. A run that completes before that gets more steps."""
        deadline = time.monotonic() + DEADLINE
        while not true():
            if more and self._parts.over:
                self._parts.resume(steps=more)
            if time.monotonic() > deadline:
                raise SystemExit(f"the run took too long {what}:\n{self._parts.output()}")
            time.sleep(POLL)

    def _victim(self, fault: Fault, chance: random.Random) -> psutil.Process:
        """One process of the part, `gap` records from now, of a run that did not have to be extended meanwhile."""
        while True:
            begin, starts = self._latest(), self._parts.starts
            self._wait(lambda at=begin + fault.gap: self._latest() >= at, f"to log {fault.gap} records")
            alive = self._parts.find(fault.part)
            if alive and starts == self._parts.starts:
                return chance.choice(alive)

    def _bring(self, fault: Fault) -> Met:
        """Do it, and again when what was to be cut was not there."""
        chance = random.Random(fault.seed)
        while True:
            victim = self._victim(fault, chance)
            met = Met(fault, time.time(), self._latest())
            with suppress(psutil.NoSuchProcess):
                if fault.kind == "cut":
                    met = replace(met, connections=self._parts.cut(fault.part, victim, chance))
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
            self._parts.kill(fault.part, victim)


def freeze(process: psutil.Process, seconds: float) -> None:
    process.suspend()
    try:
        time.sleep(seconds)
    finally:
        process.resume()


def run(folder: Path, faults: Sequence[Fault]) -> tuple[dict[str, Any], list[Recovered]]:
    """One run in a folder. Returns what its log shows, and the times."""
    parts = Parts(recipe(folder, len(faults)), seconds=DEADLINE)
    storm = Storm(parts)
    try:
        storm.blow(faults)
    finally:
        parts.end()
    proof = prove(parts.config, parts.journal, of_a_step=GROUPS * SAMPLES, bound=LAG)
    log = LogReader(parts.config.folder / "log")
    times = [(met.fault, recovery(log, met.at, met.cursor)) for met in storm.met]
    return proof, [Recovered(f"{fault.part} {fault.kind}", *found) for fault, found in times]


def storms(folder: Path, *, faults: int, seed: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run after run of `PER_RUN` faults. `keep` is given the results so far after each; returns the last of them."""
    planned, begin = plan(faults, seed), time.monotonic()
    runs: list[tuple[dict[str, Any], list[Recovered]]] = []
    result: dict[str, Any] = {}
    for first in range(0, faults, PER_RUN):
        runs.append(run(folder / f"from-{first}", planned[first : first + PER_RUN]))
        shown = summed(runs)
        result = {
            "planned": faults,
            "seed": seed,
            "seconds": round(time.monotonic() - begin, 1),
            "lag_bound": LAG,
            **shown,
        }
        keep(result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--faults", type=int, default=20)
    arguments_of.add_argument("--seed", type=int, default=0)
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file, after every run")
    arguments_of.add_argument("--runs", type=Path, help="folder that the runs are kept in")
    arguments = arguments_of.parse_args(argv)
    keep = lambda result: report({"command": command_line("chaos"), **machine(), **result}, arguments.out)  # noqa: E731
    with tempfile.TemporaryDirectory() as name:
        storms(arguments.runs or Path(name), faults=arguments.faults, seed=arguments.seed, keep=keep)


if __name__ == "__main__":
    main()
