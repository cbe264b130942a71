"""A fleet of SGLang servers: updates, deaths, strangers, keys. The servers are in memory; see `sglang_world`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from tests.unit.sglang_world import Published, World

from sluice.errors import EngineError, Unroutable, WeightsError
from sluice.rollout.engines.base import Finish, GenerateRequest, PauseMode
from sluice.rollout.engines.sglang import keeper, routed
from sluice.types import SamplingParams, Version, VersionSpan


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LEASE_SECONDS", 0.01)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until `condition` holds; the test's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - it looks at state that has no event
        await asyncio.sleep(0.001)


def request(
    rid: str = "r", key: str = "", told: list[int] | None = None, n: int = 8, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(max_new_tokens=n, **sampling)
    tell = None if told is None else told.extend
    return GenerateRequest(rid, np.array([1, 2], np.int32), params, routing_key=key, on_tokens=tell)


async def served(world: World, version: int = 0) -> Published:
    published = Published(Version(version))
    await world.fleet.start()
    await world.fleet.apply(published)
    return published


def with_fleet(*names: str, **config: Any) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Run a test body with a fleet that is closed at its end."""

    def execute(body: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            world = World(*names, **config)
            try:
                await body(world)
            finally:
                await world.fleet.close()
            assert all(program.stopped for program in world.programs.values() if world.owned)

        run(main())

    return execute


def test_nobody_is_routed_to_before_the_first_version() -> None:
    async def body(world: World) -> None:
        found = await world.fleet.start()
        assert found.context_length == 64
        assert world.router.workers == []
        with pytest.raises(Unroutable, match="no weights have been applied"):
            await world.fleet.generate(request())
        published = Published(Version(0))
        await world.fleet.apply(published)
        assert sorted(world.router.events) == [f"add http://{name}:1 serving {published.label}" for name in ("a", "b")]
        got = await world.fleet.generate(request())
        assert got.ids.tolist() == list(range(102, 110))
        assert got.spans == (VersionSpan(0, 8, Version(0)),)
        assert got.engine in {"a", "b"}

    with_fleet("a", "b")(body)


@pytest.mark.parametrize("cumulative", [False, True])
def test_a_streamed_turn_goes_on_elsewhere_after_a_death_and_takes_nothing_back(cumulative: bool) -> None:
    async def body(world: World) -> None:
        published = await served(world)
        for server in world.servers.values():
            server.cumulative = cumulative
            server.go.clear()
        told: list[int] = []
        turn = asyncio.create_task(world.fleet.generate(request(key="e1", told=told)))
        await until(lambda: len(told) == 2)
        home = next(member.name for member in world.members if member.in_flight)
        world.kill(home)
        for server in world.servers.values():
            server.go.set()
        got = await turn
        assert got.ids.tolist() == told == list(range(102, 110))
        assert got.logprobs.tolist() == [-1.0] * 8
        assert got.spans == (VersionSpan(0, 8, Version(0)),)
        assert got.finish is Finish.LENGTH
        assert got.engine != home
        await until(lambda: f"{home}: serving again" in world.lines)
        added = [event for event in world.router.events if f"//{home}:" in event]
        assert added == [
            f"add http://{home}:1 serving {published.label}",
            f"remove http://{home}:1",
            f"add http://{home}:2 serving {published.label}",
        ]
        assert world.fleet.figures()["engine/resumed_turns"] == 1
        assert world.fleet.figures()["engine/restarts"] == 1

    with_fleet("a", "b")(body)


def test_the_only_server_dies_and_the_turn_waits_for_its_restart() -> None:
    async def body(world: World) -> None:
        await served(world)
        world.server("a").go.clear()
        turn = asyncio.create_task(world.fleet.generate(request()))
        await world.server("a").drawing.wait()
        world.kill("a")
        got = await turn
        assert got.ids.tolist() == list(range(102, 110))
        assert world.started["a"] == 2
        second = world.servers["http://a:2"]
        names = [path for path, body in second.calls if path != "/generate" or "rid" in body]
        assert names.index("/update_weights_from_disk") < names.index("/generate")

    with_fleet("a")(body)


def test_a_server_that_dies_too_often_is_given_up_and_the_last_one_ends_the_run() -> None:
    async def body(world: World) -> None:
        await served(world)
        world.kill("a")
        await until(lambda: world.started["a"] == 2 and "a: serving again" in world.lines)
        world.kill("a")
        await until(lambda: any("given up" in line for line in world.lines))
        with pytest.raises(Unroutable, match="a is lost"):
            await world.fleet.generate(request())

    with_fleet("a", restarts=1)(body)


def test_a_server_that_was_restarted_by_somebody_serves_nothing_until_it_has_the_weights() -> None:
    async def body(world: World) -> None:
        await served(world)
        for name in ("a", "b"):
            world.server(name).label = "default"  # as after a restart behind our back
        told: list[int] = []
        got = await world.fleet.generate(request(told=told))
        assert told == got.ids.tolist() == list(range(102, 110))
        assert got.spans == (VersionSpan(0, 8, Version(0)),)
        assert any("'default'" in line for line in world.lines)

    with_fleet("a", "b", owned=False)(body)


def test_a_unit_that_fails_is_out_of_routing_until_a_later_version_agrees_by_checksum() -> None:
    async def body(world: World) -> None:
        first = await served(world)
        world.server("b").refuses = True
        second = Published(Version(1))
        await world.fleet.apply(second)
        assert world.router.workers == ["http://a:1"]
        assert world.fleet.version == Version(1)
        assert (first.holders, second.holders) == (1, 2)
        assert (await world.fleet.generate(request())).engine == "a"
        world.server("b").refuses = False
        world.server("b").checksum = "other bits"
        await world.fleet.apply(Published(Version(2)))
        assert world.router.workers == ["http://a:1"]
        assert any("has" in line and "other bits" in line for line in world.lines)
        world.server("b").checksum = ""
        await world.fleet.apply(Published(Version(3)))
        assert sorted(world.router.workers) == ["http://a:1", "http://b:1"]

    with_fleet("a", "b")(body)


def test_when_no_unit_takes_a_version_it_is_an_error_and_nothing_is_served() -> None:
    async def body(world: World) -> None:
        await served(world)
        for name in ("a", "b"):
            world.server(name).refuses = True
        with pytest.raises(WeightsError, match="no such folder"):
            await world.fleet.apply(Published(Version(1)))
        assert world.fleet.version is None
        with pytest.raises(Unroutable, match="could not be applied"):
            await world.fleet.generate(request())

    with_fleet("a", "b")(body)


def test_others_serve_while_a_unit_is_updated() -> None:
    async def body(world: World) -> None:
        await served(world)
        a, b = world.server("a"), world.server("b")
        b.go.clear()
        await world.fleet.generate(request("first", "k1"))
        turn = asyncio.create_task(world.fleet.generate(request("second", "k2")))
        await b.drawing.wait()
        a.waits_at = "/update_weights_from_disk"
        update = asyncio.create_task(world.fleet.apply(Published(Version(1))))
        await until(lambda: len(a.named("/update_weights_from_disk")) == 2)
        b.go.set()
        assert (await turn).spans == (VersionSpan(0, 8, Version(0)),)
        assert not update.done()
        assert world.router.workers == ["http://a:1", "http://b:1"]
        a.proceed.set()
        await update
        assert a.label == b.label == Published(Version(1)).label

    with_fleet("a", "b")(body)


def test_a_prefill_decode_set_takes_a_version_as_one() -> None:
    async def body(world: World) -> None:
        await served(world)
        assert len(world.router.workers) == 2
        world.server("d").refuses = True
        with pytest.raises(WeightsError):
            await world.fleet.apply(Published(Version(1)))
        assert world.router.workers == []
        for name in ("p", "d"):
            paused = [path for path, _ in world.server(name).calls]
            assert paused.count("/pause_generation") > paused.count("/nothing")
        probe = world.server("p").named("/generate")[0]
        assert probe["bootstrap_host"] == "2.2.2.2"
        world.server("d").refuses = False
        await world.fleet.apply(Published(Version(2)))
        assert len(world.router.workers) == 2

    with_fleet("p", "d", roles=("prefill", "decode"))(body)


def test_a_death_in_the_middle_of_an_update_is_not_the_end_of_the_run() -> None:
    async def body(world: World) -> None:
        await served(world)
        a = world.server("a")
        a.dies_at, a.die = "/update_weights_from_disk", lambda: world.kill("a")
        await world.fleet.apply(Published(Version(1)))
        assert world.fleet.version == Version(1)
        assert world.router.workers == ["http://a:2"]

    with_fleet("a")(body)


def test_a_server_that_is_ahead_of_its_update_is_not_taken_for_a_stranger() -> None:
    async def body(world: World) -> None:
        await served(world)
        a = world.server("a")
        a.lingers = True
        update = asyncio.create_task(world.fleet.apply(Published(Version(1))))
        await until(lambda: a.label == Published(Version(1)).label)
        looks = len(a.named("/model_info"))
        await until(lambda: len(a.named("/model_info")) >= looks + 3)
        a.proceed.set()
        await update
        assert not [line for line in world.lines if "lost" in line]
        assert world.fleet.version == Version(1)

    with_fleet("a")(body)


def test_a_prefill_server_that_dies_in_an_update_comes_back_to_its_decode_server() -> None:
    async def body(world: World) -> None:
        await served(world)
        p = world.server("p")
        p.dies_at, p.die = "/update_weights_from_disk", lambda: world.kill("p")
        await world.fleet.apply(Published(Version(1)))
        assert world.fleet.version == Version(1)
        assert sorted(world.router.workers) == ["http://d:1", "http://p:2"]
        assert (await world.fleet.generate(request())).finish is Finish.LENGTH

    with_fleet("p", "d", roles=("prefill", "decode"))(body)


def test_a_pause_holds_requests_and_a_server_that_comes_back_meanwhile_stays_paused() -> None:
    async def body(world: World) -> None:
        await served(world)
        await world.fleet.pause(PauseMode.RECOMPUTE)
        turn = asyncio.create_task(world.fleet.generate(request()))
        world.kill("a")
        await until(lambda: "a: serving again" in world.lines)
        paths = [path for path, _ in world.server("a").calls]
        assert paths.index("/pause_generation") > paths.index("/continue_generation")
        assert paths[-1] != "/continue_generation"
        assert not turn.done()
        await world.fleet.resume()
        assert (await turn).finish is Finish.LENGTH

    with_fleet("a", "b")(body)


def test_an_episode_leaves_a_server_that_drowns() -> None:
    async def body(world: World) -> None:
        await served(world)
        await asyncio.gather(*(world.fleet.generate(request(f"w{n}", f"k{n}")) for n in range(8)))
        homes = {f"k{n}": world.fleet.affinity.home(f"k{n}") for n in range(8)}
        crowd = [key for key, home in homes.items() if home == "a"]
        assert len(crowd) == 4
        a, b = world.server("a"), world.server("b")
        a.go.clear()
        b.go.clear()
        turns = [
            asyncio.create_task(world.fleet.generate(request(f"{key}.{m}", key))) for m in range(2) for key in crowd
        ]
        await until(lambda: world.fleet.affinity.rekeyed > 0)
        a.go.set()
        b.go.set()
        await asyncio.gather(*turns)
        assert b.named("/generate")[-1]
        keys = [key for key in world.router.homes if key.endswith("/1")]
        assert keys
        await world.fleet.release(crowd[0])
        assert world.fleet.affinity.home(crowd[0]) is None

    with_fleet("a", "b")(body)


def test_a_refusal_of_the_request_itself_is_not_tried_again() -> None:
    async def body(world: World) -> None:
        await served(world)
        with pytest.raises(EngineError, match="context tokens"):
            await world.fleet.generate(GenerateRequest("long", np.ones(64, np.int32), SamplingParams(max_new_tokens=1)))

    with_fleet("a", "b")(body)


def test_a_router_that_ends_is_started_again_while_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies twice more as it starts; nobody goes past it, and no request runs out of patience meanwhile."""
    monkeypatch.setattr(routed, "PATIENCE", 1)

    async def body(world: World) -> None:
        published = await served(world)
        for server in world.servers.values():
            server.go.clear()
        asked = lambda: sum(len(server.named("/generate")) for server in world.servers.values())  # noqa: E731
        before = asked()
        begun = [asyncio.create_task(world.fleet.generate(request(f"r{n}", key=f"e{n}"))) for n in range(3)]
        await until(lambda: asked() == before + 3)
        begin, seen = world.router.start, list[int]()

        async def start() -> None:
            await asyncio.sleep(0.3)  # longer than a request that finds nobody waits before it tries again
            seen.append(asked() - before)
            await begin()

        monkeypatch.setattr(world.router, "start", start)
        world.router.events.clear()
        world.router.kill(stillborn=2)
        await until(lambda: world.router.stillborn == 1)
        late = asyncio.create_task(world.fleet.generate(request("late", key="e9")))
        await until(lambda: "router: serving again" in world.lines)
        for server in world.servers.values():
            server.go.set()
        for got in await asyncio.gather(*begun, late):
            assert got.ids.tolist() == list(range(102, 110))
        assert seen == [3, 3, 3]
        assert [line for line in world.lines if line.startswith("router: ")] == [
            "router: lost: it was killed",
            "router: lost: the router ended while it started",
            "router: lost: the router ended while it started",
            "router: serving again",
        ]
        assert sorted(world.router.events) == [f"add http://{name}:1 serving {published.label}" for name in ("a", "b")]

    with_fleet("a", "b", restarts=3)(body)


def test_a_router_that_ends_too_often() -> None:
    async def body(world: World) -> None:
        await served(world)
        world.router.kill(stillborn=9)
        await until(lambda: world.fleet.version is None)
        with pytest.raises(Unroutable, match="the router ended too often: the router ended while it started"):
            await world.fleet.generate(request())
        await world.fleet.apply(Published(Version(1)))  # the servers take it, and nobody leads there
        with pytest.raises(Unroutable, match="the router ended too often"):
            await world.fleet.generate(request("again"))

    with_fleet("a", "b", restarts=2)(body)
