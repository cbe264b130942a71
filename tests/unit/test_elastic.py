"""A fleet that gets more and fewer servers while it serves. The servers are in memory; see `sglang_world`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from tests.unit.sglang_world import Published, World
from tests.unit.test_fleet import request, served, until, with_fleet

from sluice.errors import CapabilityError, EngineError
from sluice.rollout.engines.sglang import fleet, keeper
from sluice.rollout.engines.sglang.dispatch import Slots
from sluice.rollout.engines.sglang.member import State
from sluice.types import Version, VersionSpan


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LEASE_SECONDS", 0.01)
    monkeypatch.setattr(fleet, "VACATE_SECONDS", 0.05)  # servers in memory do not give turns back


async def settled(world: World) -> None:
    strength = lambda: world.fleet.elastic.strength  # noqa: E731
    await until(lambda: not strength().starting and not strength().leaving)


def names(world: World, members: Iterable[str] = ()) -> list[str]:
    return [member.name for member in world.fleet.members() if member.state is State.SERVING]


def test_from_one_to_three_and_newcomers_serve_the_version_of_the_run() -> None:
    """The router comes with the second server; an update while newcomers start reaches them before any request."""

    async def body(world: World) -> None:
        await served(world)
        assert world.router.events == []
        world.ready.clear()
        world.fleet.elastic.scale(3)
        assert world.fleet.elastic.strength.starting == 2
        await until(lambda: world.started.get("s2") == 1)
        assert (await world.fleet.generate(request("r"))).engine == "a"
        second = Published(Version(1))
        await world.fleet.apply(second)
        world.ready.set()
        await settled(world)
        assert sorted(world.router.events) == [
            f"add http://{name}:1 serving {label}"
            for name, label in (("a", Published(Version(0)).label), ("s1", second.label), ("s2", second.label))
        ]
        turns = [world.fleet.generate(request(f"r{n}", f"e{n}")) for n in range(6)]
        got = await asyncio.gather(*turns)
        assert {each.engine for each in got} == {"a", "s1", "s2"}
        assert {each.spans for each in got} == {(VersionSpan(0, 8, Version(1)),)}
        assert world.fleet.figures()["engine/servers"] == 3
        assert world.lines == [
            "s1: starting, for 3 servers", "s2: starting, for 3 servers", "s1: serving", "s2: serving",
        ]  # fmt: skip
        world.kill("s1")  # a newcomer is watched over like the others
        await until(lambda: "s1: serving again" in world.lines)

    with_fleet("a", growth=True)(body)


def test_a_newcomer_that_does_not_come_up_is_let_go() -> None:
    async def body(world: World) -> None:
        await served(world)
        world.stillborn.add("s3")
        world.fleet.elastic.scale(4)
        await settled(world)
        assert names(world) == ["a", "b", "s2"]
        assert world.fleet.elastic.faults == ["s3 did not come up: s3 ended with exit code 1 while it started"]
        assert world.started["s3"] == 1
        assert world.fleet.elastic.strength.wanted == 4
        world.fleet.elastic.scale(4)  # asked again
        await settled(world)
        assert (names(world), world.fleet.elastic.faults) == (["a", "b", "s2", "s4"], [])

    with_fleet("a", "b", growth=True)(body)


def test_a_server_that_leaves_loses_no_turn_and_draws_no_token_twice() -> None:
    async def body(world: World) -> None:
        await served(world)
        for name in ("a", "b", "c"):
            world.server(name).go.clear()
        told: dict[str, list[int]] = {f"e{n}": [] for n in range(3)}
        turns = [asyncio.create_task(world.fleet.generate(request(key, key, told[key]))) for key in told]
        await until(lambda: all(len(tokens) == 2 for tokens in told.values()))
        world.fleet.elastic.scale(1)
        await until(lambda: len(list(world.fleet.members())) == 1)
        world.server("a").go.set()
        for got, tokens in zip(await asyncio.gather(*turns), told.values(), strict=True):
            assert got.ids.tolist() == tokens == list(range(102, 110))
            assert got.engine == "a"
        await settled(world)
        removed = [event for event in world.router.events if event.startswith("remove")]
        assert sorted(removed) == ["remove http://b:1", "remove http://c:1"]
        assert world.programs["b"].stopped
        assert world.programs["c"].stopped
        assert world.fleet.affinity.home("e1") == "a"

    with_fleet("a", "b", "c", growth=True)(body)


def test_those_that_do_not_serve_go_first() -> None:
    async def body(world: World) -> None:
        await served(world)
        world.ready.clear()
        world.kill("a")
        world.fleet.elastic.scale(3)
        await until(lambda: world.started["a"] == 2 and world.started["s2"] == 1)
        world.fleet.elastic.scale(1)
        world.ready.set()
        await settled(world)
        assert names(world) == ["b"]
        assert (await world.fleet.generate(request())).engine == "b"

    with_fleet("a", "b", growth=True)(body)


def test_devices_are_counted_and_come_back() -> None:
    async def body(world: World) -> None:
        await served(world)
        elastic = world.fleet.elastic
        with pytest.raises(EngineError, match="4 servers have no devices: there are devices for 3"):
            elastic.scale(4)
        with pytest.raises(EngineError, match="0 servers cannot serve"):
            elastic.scale(0)
        elastic.scale(3)
        await settled(world)
        assert [member.devices for member in world.fleet.members()] == ["", "2", "3"]
        elastic.scale(2)
        elastic.scale(3)  # waits for the device of the one that leaves
        await settled(world)
        assert [(member.name, member.devices) for member in world.fleet.members()][1:] == [("s1", "2"), ("s3", "3")]

    with_fleet("a", growth=True, free=["2", "3"])(body)


def test_servers_that_are_not_ours_stay() -> None:
    async def body(world: World) -> None:
        await served(world)
        with pytest.raises(CapabilityError, match="not started by this run"):
            world.fleet.elastic.scale(3)

    with_fleet("a", "b", owned=False)(body)


def test_slots_change_while_they_are_taken() -> None:
    async def main() -> None:
        slots, order = Slots(1), list[str]()

        async def take(name: str, until: asyncio.Event) -> None:
            async with slots:
                order.append(name)
                await until.wait()

        ends = {name: asyncio.Event() for name in "abcd"}
        tasks = [asyncio.create_task(take(name, end)) for name, end in ends.items()]
        await asyncio.sleep(0)
        slots.resize(3)
        await asyncio.sleep(0.01)
        assert order == ["a", "b", "c"]
        slots.resize(1)
        ends["a"].set()
        ends["b"].set()
        await asyncio.sleep(0.01)
        assert order == ["a", "b", "c"]
        ends["c"].set()
        await asyncio.sleep(0.01)
        assert order == ["a", "b", "c", "d"]
        ends["d"].set()
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_server_that_was_told_to_end_is_drained_and_replaced_and_that_counts_as_no_failure() -> None:
    async def body(world: World) -> None:
        published = await served(world)
        for _ in range(2):  # more often than it may be restarted
            world.lines.clear()
            world.server("a").leaving = True
            await until(lambda: "a: serving again" in world.lines)
        assert "a: lost: it was told to end" in world.lines
        assert world.started["a"] == 3
        assert world.fleet.figures()["engine/restarts"] == 0
        last = [event for event in world.router.events if "//a:" in event][-2:]
        assert last == ["remove http://a:2", f"add http://a:3 serving {published.label}"]

    with_fleet("a", "b", restarts=1)(body)
