"""Idle time, masked and dropped tokens of a run that is not there: the gate of `data.gate` in virtual time.

    python -m benchmarks.simulate one [--engines 64] [--slots 8] [--groups 64] [--samples 8] [--max-lag 1]
        [--order dispatch|completion] [--on-stale wait|mask_tokens|drop] [--oversample 1.0] [--updates 1]
        [--median 1000] [--tail 8] [--limit 32768] [--shared 0.5] [--step-seconds 0.02] [--sequence-seconds 0]
        [--request-seconds 0] [--turns 1] [--tool-seconds 0] [--train-seconds 60] [--token-seconds 0]
        [--publish-seconds 0] [--sync-seconds 2] [--spread 1] [--batches 12] [--warmup 4] [--seed 0]

    python -m benchmarks.simulate table [--engines 8 64 256 1000] [--out FOLDER]
    python -m benchmarks.simulate check [--batches 12] [--out FOLDER]

What is simulated and what is not is said in `benchmarks/simulator.py`. `one` prints one JSON object: the world, and

* `engine_idle`: share of engine time with nothing to decode; `slot_idle`: the same of slots;
* `trainer_idle`: share of time in which the trainer waits for a batch; `syncing`: in which weights are activated;
* tokens trained, masked and dropped, groups that a filter dropped or that staleness left empty;
* `lag_histogram`: trained tokens by lag, `lag_max_seen`: the largest lag before the gate judged.

`table` holds pacing against discarding, and writes `simulate.md` and `table` in `simulate.json`: with pacing the gate
admits as many groups as can be trained within the bound; discarding is the same gate with a whole batch more under
way (`oversample = 2`), so that no slot is empty, and what has become too old is taken out of the loss. A batch is as
many episodes as engines have slots, and training one takes as long as sampling one with all slots full would.

`check` puts real runs beside simulated ones, see `benchmarks/simulated_runs.py`, in `check` of `simulate.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.simulated_runs import check
from benchmarks.simulator import NORMAL_P99, Lengths, World, simulate

from sluice.config.data import GateConfig, OnStale, Order

RESULTS = Path(__file__).parent / "results"
SLOTS, SAMPLES = 4, 8
WINDOW = 1600
"""Batches times engines that figures are taken from, and at least eight batches."""
LAGS = (0, 1, 4)
TAILS = (1.0, 2.0, 4.0, 8.0, 16.0)
WORK = 0.02
"""Seconds of a decoding step in the table."""
POLICIES: dict[str, dict[str, Any]] = {
    "pacing: dispatch, wait": {"order": Order.DISPATCH},
    "pacing: completion, mask_tokens": {"on_stale": OnStale.MASK_TOKENS},
    "pacing: completion, drop": {"on_stale": OnStale.DROP},
    "discarding: mask_tokens": {"on_stale": OnStale.MASK_TOKENS, "oversample": 2.0},
    "discarding: drop": {"on_stale": OnStale.DROP, "oversample": 2.0},
}


def described(world: World) -> dict[str, Any]:
    """A world as JSON."""
    lengths = {key: value for key, value in asdict(world.lengths).items() if key != "measured"}
    return asdict(world) | {"gate": world.gate.model_dump(mode="json", exclude_none=True), "lengths": lengths}


def world_of(args: argparse.Namespace) -> World:
    """The world that the flags of `one` describe."""
    return World(
        args.engines,
        args.slots,
        args.groups,
        GateConfig(max_lag=args.max_lag, order=args.order, on_stale=args.on_stale, oversample=args.oversample),
        samples=args.samples,
        updates=args.updates,
        lengths=Lengths(args.median, args.tail, args.limit, args.shared),
        step_seconds=args.step_seconds,
        sequence_seconds=args.sequence_seconds,
        request_seconds=args.request_seconds,
        turns=args.turns,
        tool_seconds=args.tool_seconds,
        train_seconds=args.train_seconds,
        token_seconds=args.token_seconds,
        publish_seconds=args.publish_seconds,
        sync_seconds=args.sync_seconds,
        spread=args.spread,
        batches=args.batches,
        warmup=args.warmup,
        seed=args.seed,
    )


def entry(engines: int, gate: GateConfig, tail: float) -> World:
    """A world of the table. Small ones are run for longer, since each batch of theirs says less."""
    lengths = Lengths(tail=tail)
    sigma = math.log(tail) / NORMAL_P99
    mean = lengths.median * math.exp(sigma * sigma / 2)
    warmup, window = 6, max(8, WINDOW // engines)
    return World(
        engines, SLOTS, engines * SLOTS // SAMPLES, gate, samples=SAMPLES, lengths=lengths, step_seconds=WORK,
        train_seconds=mean * WORK, sync_seconds=2.0, batches=warmup + window, warmup=warmup,
    )  # fmt: skip


@functools.cache
def row(engines: int, lag: int, policy: str, tail: float = 8.0) -> dict[str, Any]:
    """One line of the table."""
    gate = GateConfig(max_lag=lag, **(POLICIES[policy] if lag else {}))
    began = time.perf_counter()
    figures = simulate(entry(engines, gate, tail)).figures()
    print(f"{engines} engines, lag {lag}, {policy}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return {"engines": engines, "max_lag": lag, "policy": policy if lag else "dispatch, wait", "tail": tail, **figures}


def rows_of(engines: list[int], tails: tuple[float, ...]) -> list[dict[str, Any]]:
    """Lag 0 has one policy: nothing can be too old."""
    cases = [(lag, policy) for lag in LAGS for policy in (POLICIES if lag else ["pacing: dispatch, wait"])]
    return [row(number, lag, policy, tail) for tail in tails for number in engines for lag, policy in cases]


def table(rows: list[dict[str, Any]], first: str) -> str:
    """Markdown; `first` is the column that the lines are grouped by."""
    titles = [first, "lag", "gate", "slots idle", "trainer idle", "seconds a batch", "trained tokens/s an engine"]
    titles += ["of lag 0", "masked", "dropped", "oldest token seen"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    base = {each[first]: each["trained_tokens_per_second"] for each in rows if each["max_lag"] == 0}
    for each in rows:
        tokens = each["tokens_trained"] + each["tokens_masked"] + each["tokens_dropped"]
        cells = [f"{each[first]:g}", str(each["max_lag"]), each["policy"]]
        cells += [f"{max(0.0, each['slot_idle']):.0%}", f"{each['trainer_idle']:.0%}"]  # rounding may leave -0
        cells += [f"{each['seconds_per_batch']:.0f}"]
        cells += [f"{each['trained_tokens_per_second'] / each['engines']:.1f}"]
        cells += [f"{each['trained_tokens_per_second'] / base[each[first]]:.2f}"]
        cells += [f"{each['tokens_masked'] / tokens:.1%}", f"{each['tokens_dropped'] / tokens:.1%}"]
        lines.append(f"| {' | '.join(cells)} | {each['lag_max_seen']} |")
    return "\n".join(lines)


def write_table(engines: list[int], out: Path) -> None:
    """`simulate.md`, and the rows in `simulate.json`."""
    rows = rows_of(engines, (8.0,))
    by_tail = rows_of([64], TAILS)
    keep(out, "table", {"world": described(entry(64, GateConfig(), 8.0)), "by_engines": rows, "by_tail": by_tail})
    (out / "simulate.md").write_text(page(rows, by_tail))


def page(rows: list[dict[str, Any]], by_tail: list[dict[str, Any]]) -> str:
    """What `simulate.md` says."""
    note = (
        f"Simulated: `python -m benchmarks.simulate table`. {SLOTS} slots an engine, {WORK} s a decoding step,\n"
        f"groups of {SAMPLES}, as many episodes a batch as slots; lognormal lengths, median 1,000 tokens, 99th\n"
        "percentile 8 times that (in the second table: `tail` times), half of the variance shared by a group;\n"
        "training a batch takes as long as sampling it with all slots full; 2 s to activate weights. Assumed, not\n"
        "measured."
    )
    parts = [note, table(rows, "engines"), "64 engines, by how heavy the tail is:", table(by_tail, "tail")]
    return "\n\n".join(parts) + "\n"


def keep(out: Path, key: str, value: Any) -> None:
    """Put a result under `key` of `simulate.json`; what the other command found stays."""
    file = out / "simulate.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | {key: value}, indent=1) + "\n")


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("one", help="one world, described by flags")
    for name, value in (
        ("engines", 64), ("slots", 8), ("groups", 64), ("samples", 8), ("max-lag", 1), ("oversample", 1.0),
        ("updates", 1), ("median", 1000.0), ("tail", 8.0), ("limit", 32_768), ("shared", 0.5),
        ("step-seconds", 0.02), ("sequence-seconds", 0.0), ("request-seconds", 0.0), ("turns", 1),
        ("tool-seconds", 0.0),
        ("train-seconds", 60.0), ("token-seconds", 0.0), ("publish-seconds", 0.0), ("sync-seconds", 2.0),
        ("spread", 1.0), ("batches", 12), ("warmup", 4), ("seed", 0),
    ):  # fmt: skip
        one.add_argument(f"--{name}", type=type(value), default=value)
    one.add_argument("--order", type=Order, choices=list(Order))
    one.add_argument("--on-stale", type=OnStale, choices=list(OnStale))
    several = commands.add_parser("table", help="pacing against discarding")
    several.add_argument("--engines", type=int, nargs="+", default=[8, 64, 256, 1000])
    real = commands.add_parser("check", help="real runs beside simulated ones")
    real.add_argument("--batches", type=int, default=12)
    for each in (several, real):
        each.add_argument("--out", type=Path, default=RESULTS, help="folder of simulate.md and simulate.json")
    return parser


def main() -> None:
    args = command_line().parse_args()
    if args.command == "table":
        write_table(args.engines, args.out)
        return
    if args.command == "check":
        keep(args.out, "check", check(args.batches))
        return
    world = world_of(args)
    print(json.dumps({"world": described(world), "figures": simulate(world).figures()}, indent=1))


if __name__ == "__main__":
    main()
