"""Asking a run for more or fewer servers: the files between the command and the run, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny
from tests.unit.sglang_world import World
from tests.unit.test_elastic import names, settled, short_waits  # noqa: F401  (a fixture)
from tests.unit.test_fleet import served, with_fleet

from sluice.cli import run as sluice
from sluice.errors import ConfigError, EngineError, SluiceError
from sluice.log import FaultRecord, Kind, LogReader
from sluice.log.lock import holder
from sluice.log.writer import LogWriter
from sluice.orchestrate import control
from sluice.orchestrate.control import Standing, Wish
from sluice.orchestrate.journal import Journal
from sluice.orchestrate.scaling import Scaler

SERVERS: dict[str, Any] = {"rollout": {"embedded": {"servers": 2}}}


def folder(tmp_path: Path, **changes: Any) -> Path:
    """A run folder with its configuration and its log, nobody in it."""
    config = tiny(tmp_path, **(changes or SERVERS))
    LogWriter(config.folder / "log").close()
    (config.folder / "config.json").write_text(config.model_dump_json())
    return config.folder


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[tuple[Path, Journal]]:
    place = folder(tmp_path)
    with LogWriter(place / "log") as writer:
        yield place, Journal(writer)


def test_the_lock_says_who_writes_and_asking_does_not_take_it(tmp_path: Path) -> None:
    place = folder(tmp_path)
    assert holder(place) is None
    assert holder(place / "log") is None
    with LogWriter(place / "log"):
        assert (holder(place / "log") or "").startswith("process ")
    assert holder(place / "log") is None


def test_a_run_is_scaled_through_its_folder(alive: tuple[Path, Journal]) -> None:
    """Up, down, one that does not come up, an impossible number, and a word that is no wish."""
    place, journal = alive
    told: list[str] = []

    async def ask(count: int) -> Standing:
        return await asyncio.to_thread(control.scale, place, count, seconds=20)

    async def body(world: World) -> None:
        await served(world)
        scaler = Scaler(place, world.fleet.elastic, journal, told.append)

        async def watch() -> None:
            while True:
                scaler.look()
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.05)
        assert str(control.standing(place)) == "2 of 2 servers serve"
        assert str(await ask(3)) == "3 of 3 servers serve"
        world.stillborn.add("s3")
        with pytest.raises(EngineError, match="3 of 4 servers serve\ns3 did not come up: s3 ended with exit code 1"):
            await ask(4)
        assert (await ask(1)).serving == 1
        assert names(world) == ["a"]
        with pytest.raises(ConfigError, match="at least one stays"):
            await ask(0)
        assert (Wish.read(place) or Wish("", "", 0)).servers == 1, "nothing was written"
        (place / control.FOLDER / "wish.json").write_text("{}")
        Wish("x", "another process", 9).write(place)
        world.ready.clear()
        slow = await asyncio.to_thread(control.scale, place, 2, seconds=1)
        assert (slow.wanted, slow.serving, slow.starting, slow.settled) == (2, 1, 1, False)
        assert str(slow) == "1 of 2 servers serve, 1 starting"
        world.ready.set()
        await settled(world)
        watching.cancel()

    with_fleet("a", "b", growth=True)(body)
    assert told == [f"servers: {count} are wanted" for count in (3, 4, 1, 2)]
    faults = [entry.record for entry in LogReader(place / "log").read(kinds=(Kind.FAULT,))]
    assert faults == [FaultRecord("s3 did not come up: s3 ended with exit code 1 while it started", "servers")]


def test_what_the_run_refuses_is_told(alive: tuple[Path, Journal]) -> None:
    place, journal = alive

    async def body(world: World) -> None:
        await served(world)
        scaler = Scaler(place, world.fleet.elastic, journal, lambda line: None)
        scaler.look()
        with pytest.raises(ConfigError, match="4 servers have no devices: there are devices for 3"):
            control.scale(place, 4, seconds=0)
        Wish("late", control.PROCESS, 4).write(place)
        scaler.look()
        assert control.standing(place).refused.startswith("4 servers have no devices")
        with pytest.raises(EngineError, match="has not taken the wish within 0 s"):
            control.scale(place, 3, seconds=0)

    with_fleet("a", growth=True, free=["2", "3"])(body)


def test_a_wish_counts_for_the_process_that_it_was_addressed_to(alive: tuple[Path, Journal]) -> None:
    place, journal = alive

    async def body(world: World) -> None:
        from contextlib import AsyncExitStack

        await served(world)
        for process, count in (("another", 1), (control.PROCESS, 3)):
            Wish("earlier", process, 3).write(place)
            async with AsyncExitStack() as stack:
                Scaler(place, world.fleet.elastic, journal, lambda line: None).open(stack)
                assert (Wish.read(place) is None) == (process == "another")
                await settled(world)
                assert len(names(world)) == count
            assert Standing.read(place) is None, "it does not outlive the run"

    with_fleet("a", growth=True)(body)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "its engine is in the run's own process"),
        ({"rollout": {"engine": "http://127.0.0.1:1"}}, "its servers were not started by it"),
        ({"rollout": {"engine": "sglang", "sglang": {"urls": ["http://127.0.0.1:1"]}}}, "not started by it"),
        ({**SERVERS, "placement": {"colocate": True}}, "its servers sit on the devices of the trainer's ranks"),
        (
            {"rollout": {"engine": "sglang", "sglang": {"groups": [{"role": "prefill"}, {"role": "decode"}]}}},
            "not of one kind",
        ),
    ],
)
def test_runs_whose_servers_are_fixed(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    place = folder(tmp_path, steps=1, **changes)
    with LogWriter(place / "log"), pytest.raises(ConfigError, match=why):
        control.scale(place, 2, seconds=0)
    assert not (place / control.FOLDER).exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folder(tmp_path)
    said = lambda *words: (sluice(["scale", str(place), *words]), capsys.readouterr())  # noqa: E731
    code, out = said("--engines", "3")
    assert (code, out.out) == (2, "")
    assert out.err.startswith(f"error: no run is under way in {place}\n  → ")
    assert not (place / control.FOLDER).exists()
    with LogWriter(place / "log"):
        code, out = said()
        assert code == EngineError.exit_code
        assert "has not started its servers yet" in out.err
        pid = int((holder(place / "log") or "").split()[1])
        Standing("p", pid, "", "", 2, 1, 1, 0, 4).write(place)
        assert said() == (0, ("1 of 2 servers serve, 1 starting\n", ""))
        code, out = said("--json")
        assert json.loads(out.out)["limit"] == 4
        assert said("--engines", "0")[0] == ConfigError.exit_code
        assert said("--engines", "5")[0] == ConfigError.exit_code
        assert not (place / control.FOLDER / "wish.json").exists()
        assert said("--engines", "3", "--wait", "0")[0] == EngineError.exit_code  # nobody is there to take it
    with pytest.raises(SluiceError, match="is not a run folder"):
        control.standing(tmp_path)
