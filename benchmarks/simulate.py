"""Idle time, masked and dropped tokens of a run that is not there: the gate of `data.gate` in virtual time.

    python -m benchmarks.simulate one [--engines 64] [--slots 8] [--groups 64] [--samples 8] [--max-lag 1]
        [--order dispatch|completion] [--on-stale wait|mask_tokens|drop] [--oversample 1.0] [--updates 1]
        [--median 1000] [--tail 8] [--limit 32768] [--shared 0.5] [--step-seconds 0.02] [--sequence-seconds 0]
        [--turns 1] [--tool-seconds 0] [--train-seconds 60] [--token-seconds 0] [--publish-seconds 0]
        [--sync-seconds 2] [--spread 1] [--batches 12] [--warmup 4] [--seed 0]

What is simulated and what is not is said in `benchmarks/simulator.py`. Prints one JSON object: the world, and

* `engine_idle`: share of engine time with nothing to decode; `slot_idle`: the same of slots;
* `trainer_idle`: share of time in which the trainer waits for a batch; `syncing`: in which weights are activated;
* tokens trained, masked and dropped, groups that a filter dropped or that staleness left empty;
* `lag_histogram`: trained tokens by lag, `lag_max_seen`: the largest lag before the gate judged.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from benchmarks.simulator import Lengths, World, simulate

from sluice.config.data import GateConfig, OnStale, Order


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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("one", help="one world, described by flags")
    for name, value in (
        ("engines", 64), ("slots", 8), ("groups", 64), ("samples", 8), ("max-lag", 1), ("oversample", 1.0),
        ("updates", 1), ("median", 1000.0), ("tail", 8.0), ("limit", 32_768), ("shared", 0.5),
        ("step-seconds", 0.02), ("sequence-seconds", 0.0), ("turns", 1), ("tool-seconds", 0.0),
        ("train-seconds", 60.0), ("token-seconds", 0.0), ("publish-seconds", 0.0), ("sync-seconds", 2.0),
        ("spread", 1.0), ("batches", 12), ("warmup", 4), ("seed", 0),
    ):  # fmt: skip
        one.add_argument(f"--{name}", type=type(value), default=value)
    one.add_argument("--order", type=Order, choices=list(Order))
    one.add_argument("--on-stale", type=OnStale, choices=list(OnStale))
    return parser


def main() -> None:
    args = parser().parse_args()
    world = world_of(args)
    print(json.dumps({"world": described(world), "figures": simulate(world).figures()}, indent=1))


if __name__ == "__main__":
    main()
