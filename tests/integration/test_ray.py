"""The same run on a Ray cluster: real Ray, its own or one that is there already."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from tests.integration.test_elastic_run import gated, scaled_while_it_trains
from tests.integration.test_evaluation_beside import summary
from tests.integration.test_evaluation_servers import patient
from tests.tiny import tiny

from sluice.config import RunConfig
from sluice.errors import ConfigError
from sluice.log import ACCOUNTED, EpisodeRecord, Kind, LogReader, account
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api
from sluice.orchestrate.ray import token
from sluice.orchestrate.ray.cluster import Part, Room, cluster
from sluice.orchestrate.ray.engines import RayHosts
from sluice.orchestrate.ray.placement import by_turns

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def recipe(folder: Path, runtime: str, **changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "placement": {"runtime": runtime},
        "rollout": {"embedded": {"servers": 2}},
        "train": {"ranks": 2, "rank_seconds": 120},
        "steps": 3,
    }
    return tiny(folder, **{**base, **changes})


def logged(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,), from_ordinal=0):
        assert isinstance(entry.record, EpisodeRecord)
        episode = entry.record.episode
        found[episode.id] = [(turn.ids.tolist(), turn.spans) for turn in episode.sampled_turns()]
    return found


def ours() -> list[str]:
    """Processes of Ray, of servers and of ranks below this one."""
    words = ("raylet", "gcs_server", "ray::", "embedded.server", "ranks.program", "smg")
    found: list[str] = []
    for child in psutil.Process().children(recursive=True):
        try:
            line = " ".join(child.cmdline()) or child.name()
            if child.status() != psutil.STATUS_ZOMBIE and any(word in line for word in words):
                found.append(line)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_run_on_ray_is_the_run_in_one_process(tmp_path: Path) -> None:
    """Two ranks and two servers as actors, and as children: logged tokens identical, metrics within 1e-6."""
    runs = {name: recipe(tmp_path / name, name) for name in ("inline", "ray")}
    for config in runs.values():
        api.train(config, view=NullView())
    episodes = {name: logged(config) for name, config in runs.items()}
    assert episodes["ray"] == episodes["inline"]
    assert len(episodes["ray"]) >= 3 * 4 * 4
    rows = {name: read_metrics(config.folder / "metrics.jsonl") for name, config in runs.items()}
    assert len(rows["ray"]) == len(rows["inline"]) == 3
    for there, here in zip(rows["ray"], rows["inline"], strict=True):
        assert there.keys() == here.keys()
        for name in here:
            if not name.startswith(
                ("time/", "speed/", "checkpoint/", "eval/seconds", "engine/")
            ):  # which server answers is the router's choice
                np.testing.assert_allclose(there[name], here[name], rtol=1e-6, atol=1e-6, err_msg=name)
    fate = account(LogReader(runs["ray"].folder / "log").read(kinds=ACCOUNTED))
    assert fate.complete
    assert ours() == []


@pytest.mark.parametrize("lag", [0, 2])
def test_colocated_on_ray(tmp_path: Path, lag: int) -> None:
    """Servers sit in the room of the ranks: half the cores. At lag 0 the tokens are those of the run in one process."""
    options: dict[str, Any] = {"data": {"gate": {"max_lag": lag}}}
    shared = {"runtime": "ray", "colocate": True}
    config = recipe(tmp_path / "ray", "ray", **options, placement=shared)
    api.train(config, view=NullView())
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["switch/released_seconds"] > 0 for row in rows)
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete
    assert ours() == []
    if lag == 0:
        alone = recipe(tmp_path / "inline", "inline", **options)
        api.train(alone, view=NullView())
        assert logged(config) == logged(alone)


@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "by-turns"])
def test_evaluations_on_actors_of_their_own(tmp_path: Path, colocate: bool) -> None:
    """That of step 2 ends only when the run has sampled with the weights of step 3; results are those of one host."""
    options: dict[str, Any] = {"every": 2, "checkpoints": 2, "train": {"ranks": 2, "rank_seconds": 120}}
    place = {"runtime": "ray", "colocate": colocate}
    config = patient(tmp_path / "ray", servers=1, placement=place, **options)
    view = Listening()
    api.train(config, view=view)
    placed = sorted(line.partition(": at http")[0] for line in view.lines if ": at http" in line)
    assert placed == ["embedded-0", "evaluation: embedded-0"]
    assert (config.folder / "evaluation" / "engines" / "embedded-0.log").is_file()
    assert [row["step"] for row in read_metrics(config.folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert ours() == []
    alone = patient(tmp_path / "inline", servers=0, **options)
    api.train(alone, view=NullView())
    assert logged(config) == logged(alone)
    assert summary(config) == summary(alone)


def test_guests_ask_for_no_room_of_their_own() -> None:
    hosts, guests = by_turns([Part(1.0), Part(1.0)], [Part(2.0)] * 3)
    assert [part.bundle for part in hosts] == [{"CPU": 2.0}, {"CPU": 2.0}]
    assert [part.guest_of for part in guests] == [0, 1, 0]
    with pytest.raises(ConfigError, match="takes 2"):
        by_turns([Part(1.0, 1)], [Part(1.0, 2)])


@pytest.mark.parametrize("engines", [2, 4])
def test_a_guest_finds_the_accelerator_of_its_host(engines: int) -> None:
    """Ray hands out accelerators that a node says it has; that these are none makes no difference to who gets which."""
    hosts, guests = by_turns([Part(0.1, 1)] * 2, [Part(0.1, 1)] * engines)
    with token.as_it_was():
        ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, log_to_driver=False)
        try:
            room = Room([*hosts, *guests], seconds=60)
            kind = seeing()
            actors = [kind.options(**room.place(number)).remote() for number in range(2 + engines)]
            seen = ray.get([actor.accelerators.remote() for actor in actors], timeout=120)
            assert sorted(seen[:2]) == [["0"], ["1"]]
            assert [seen[part.guest_of or 0] for part in guests] == seen[2:]
            ray.kill(actors[2])
            again = kind.options(**room.place(2)).remote()  # a server that died is started again in its old place
            assert ray.get(again.accelerators.remote(), timeout=120) == seen[2]
            room.close()
        finally:
            ray.shutdown()


def seeing() -> Any:
    """A class of actors that say which accelerators they were given; local, so that Ray sends it along."""

    class Sees:
        def accelerators(self) -> list[str]:
            return os.environ["CUDA_VISIBLE_DEVICES"].split(",")

    return ray.remote(Sees)


def test_a_run_goes_on_elsewhere(tmp_path: Path) -> None:
    """Inline with one rank, then Ray with two and lag 2, then inline again: nothing lost, nothing trained twice."""
    source = tmp_path / "run"
    api.train(
        recipe(source, "inline", steps=2, train={"ranks": 1}, rollout={"embedded": {"servers": 0}}), view=NullView()
    )
    api.train(recipe(source, "ray", steps=4, data={"gate": {"max_lag": 2}}), view=NullView(), resume=True)
    last = recipe(source, "inline", steps=6, train={"ranks": 1})
    api.train(last, view=NullView(), resume=True)
    assert [row["step"] for row in read_metrics(last.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    fate = account(LogReader(last.folder / "log").read(kinds=ACCOUNTED))
    assert (fate.decided_twice, fate.logged_twice, fate.unlogged) == ((), (), ())
    assert ours() == []


KILL = '''
def loss_killer(prompt, answer):
    """A reward that ends an actor's process on its way, once."""
    import os, pathlib, psutil, signal
    done = pathlib.Path({done!r})
    if not done.exists():
        done.touch()
        for process in psutil.Process({tests}).children(recursive=True):
            try:
                line = " ".join(process.cmdline()) or process.name()
            except psutil.Error:
                continue
            if {word!r} in line and process.pid != os.getpid():
                os.kill(process.pid, signal.SIGKILL)
                break
    return float(len(answer) % 2)
'''


class Listening(NullView):
    """Keeps what the person who watches is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.parametrize(
    ("word", "train"),
    [("ray::ServerShell", {}), ("ray::RankShell", {}), ("ray::RankShell", {"backend": "megatron"})],
    ids=["server", "rank", "megatron-rank"],
)
def test_an_actor_that_is_killed(tmp_path: Path, word: str, train: dict[str, Any]) -> None:
    """A server's turns go on elsewhere; with a rank the run goes on from its checkpoint and its log, by itself."""
    (tmp_path / "kill.py").write_text(KILL.format(done=str(tmp_path / "done"), tests=os.getpid(), word=word))
    reward = {"type": "python", "path": f"{tmp_path / 'kill.py'}:loss_killer"}
    config = recipe(
        tmp_path, "ray", rewards=[reward], steps=4, checkpoint={"every": 1},
        train={"ranks": 2, "rank_seconds": 120, **train},
    )  # fmt: skip
    view = Listening()
    api.train(config, view=view)
    assert (tmp_path / "done").exists()
    told = "lost: " if word == "ray::ServerShell" else "of the trainer: was lost"
    assert [line for line in view.lines if told in line]
    assert [row["step"] for row in read_metrics(config.folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete
    assert ours() == []


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    """A cluster that somebody else started. Its tests stand last: while it runs, `ours` would find it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=4",
               "--include-dashboard=false", "--node-ip-address=127.0.0.1", "--block"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    ) as head:  # fmt: skip
        try:
            address = f"127.0.0.1:{port}"
            asked = [sys.executable, "-m", "ray.scripts.scripts", "health-check", f"--address={address}"]
            deadline = time.monotonic() + 120
            while subprocess.run(asked, check=False, capture_output=True, timeout=120).returncode:
                assert head.poll() is None, "ray start ended"
                assert time.monotonic() < deadline
            yield address
        finally:
            tree = psutil.Process(head.pid).children(recursive=True)
            os.killpg(head.pid, signal.SIGTERM)
            psutil.wait_procs(tree, timeout=20)
            for process in tree:
                if process.is_running():
                    process.kill()


def another_program() -> Any:
    """A class of actors of another program on the same cluster."""

    class Somebody:
        def __init__(self) -> None:
            self.asked = 0

        def ask(self) -> int:
            self.asked += 1
            return self.asked

    return ray.remote(Somebody)


@pytest.fixture
def somebody(running: str) -> Iterator[str]:
    """The cluster with somebody else's actor on it, who was asked once."""
    with connected(running):
        actor = another_program().options(num_cpus=1, name="somebody", namespace="others", lifetime="detached").remote()
        assert ray.get(actor.ask.remote()) == 1
    yield running
    with connected(running):
        ray.kill(ray.get_actor("somebody", namespace="others"))


@contextmanager
def connected(address: str) -> Iterator[None]:
    ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def test_a_cluster_that_runs_is_left_as_it_was(tmp_path: Path, somebody: str) -> None:
    """Also after a cluster of the run's own in the same process, for which Ray turns its token on."""
    with cluster(recipe(tmp_path / "own", "ray").placement, cpus=1):
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_MODE" not in os.environ
    place = {"runtime": "ray", "address": somebody}
    config = recipe(tmp_path, "ray", steps=2, placement=place, train={"ranks": 1})
    api.train(config, view=NullView())
    assert len(logged(config)) >= 2 * 4 * 4
    with connected(somebody):
        assert ray.cluster_resources()["CPU"] == 4
        until(lambda: ray.available_resources().get("CPU", 0) == 3)  # its own: told with a delay
        assert ray.get(ray.get_actor("somebody", namespace="others").ask.remote()) == 2
        groups = ray.util.placement_group_table().values()
        assert groups
        assert {group["state"] for group in groups} == {"REMOVED"}


def test_a_cluster_that_this_process_cannot_work_with(
    tmp_path: Path, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no token, another Ray, another Sluice: said before anything is asked of it."""
    place = recipe(tmp_path, "ray", placement={"runtime": "ray", "address": running}).placement
    with monkeypatch.context() as other:
        other.setenv("RAY_AUTH_MODE", "token")
        token.reread()
        with pytest.raises(ConfigError, match="asks for no token"), cluster(place, cpus=1):
            pass
    token.reread()
    with monkeypatch.context() as other:
        other.setattr(ray, "__version__", "2.0.0")
        with (
            pytest.raises(ConfigError, match=r"another Ray or Python than this process: .*Ray: 2\.0\.0"),
            cluster(place, cpus=1),
        ):
            pass
    with monkeypatch.context() as other:
        other.setattr("sluice.orchestrate.ray.cluster.__version__", "99")
        with pytest.raises(ConfigError, match=r"has Sluice [\d.]+, and this is 99"), cluster(place, cpus=1):
            pass
    assert not ray.is_initialized()


def test_a_run_on_a_cluster_is_scaled(tmp_path: Path, running: str) -> None:
    """Further servers get room of their own, and the cluster has it back at the end."""
    config = gated(tmp_path, placement={"runtime": "ray", "address": running})
    served = scaled_while_it_trains(config)
    assert served[-1] == 2
    assert 3 in served
    with connected(running):
        until(lambda: ray.available_resources().get("CPU") == 4)  # told with a delay


class Watching(NullView):
    """Does something when a batch was trained."""

    def __init__(self, batch: int, then: Callable[[], None]) -> None:
        self._batch, self._then = batch, then

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self._batch:
            self._then()


@contextmanager
def another_node(address: str, cpus: int) -> Iterator[Callable[[], None]]:
    """One more node of a cluster, and what takes it away from one moment to the next."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", f"--num-cpus={cpus}",
               "--node-ip-address=127.0.0.1", "--block"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    ) as node:  # fmt: skip

        def lose() -> None:
            tree = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(tree, timeout=20)

        try:
            yield lose
        finally:
            if node.poll() is None:
                lose()


def test_a_node_that_is_lost_for_good(tmp_path: Path, running: str) -> None:
    """The server that was there is not coming back: the run goes on with the other one, and ends."""
    with another_node(running, 3) as lose:
        with connected(running):
            until(lambda: ray.cluster_resources().get("CPU") == 7)
        config = recipe(
            tmp_path, "ray", steps=5, placement={"runtime": "ray", "address": running}, train={"ranks": 1},
            rollout={"embedded": {"servers": 2, "threads": 3}}, data={"gate": {"max_lag": 1}},
        )  # fmt: skip
        api.train(config, view=Watching(2, lose))
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1]["engine/servers"] == 2
    assert rows[-1]["engine/servers"] == 1
    assert account(LogReader(config.folder / "log").read(kinds=ACCOUNTED)).complete
    with connected(running):
        until(lambda: ray.available_resources().get("CPU") == 4)  # told with a delay


def test_a_server_for_which_there_is_no_room_waits(tmp_path: Path, running: str) -> None:
    """It is told what is free; whoever takes the wish back takes the request for room back too."""
    told: list[str] = []
    place = recipe(tmp_path, "ray", placement={"runtime": "ray", "address": running}).placement

    async def wait_in_vain(hosts: RayHosts) -> None:
        launcher: Any = None  # nothing comes to be launched
        waiting = asyncio.create_task(hosts.start(launcher, "embedded-1"))
        async with asyncio.timeout(60):
            while not told:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        hosts.left("embedded-1")

    with cluster(place, cpus=1):
        room = Room([Part(4)], seconds=30)
        hosts = RayHosts(room, [0], told.append)
        hosts._free.clear()  # as if the first server were there
        asyncio.run(wait_in_vain(hosts))
        room.close()
        (line,) = told
        assert line.startswith("embedded-1: the cluster has no room for it: free are 0 CPU cores and 0 accelerators")
        until(lambda: {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"})


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_a_cluster_does_not_have(tmp_path: Path, running: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer cores than asked for, cores that somebody else holds, no cluster: said before anything is built."""
    place = {"runtime": "ray", "address": running, "ready_seconds": 3}
    with pytest.raises(ConfigError, match=r"asks for 9 CPU cores; the Ray cluster has \d\b"):
        api.train(recipe(tmp_path / "a", "ray", placement=place, train={"ranks": 7}), view=NullView())
    with monkeypatch.context() as job:
        job.setenv("RAY_ADDRESS", running)  # as in a job of the cluster
        with pytest.raises(ConfigError, match=r"asks for 9 CPU cores; the Ray cluster has \d\b"):
            api.train(recipe(tmp_path / "j", "ray", train={"ranks": 7}), view=NullView())
    with cluster(recipe(tmp_path / "b", "ray", placement=place).placement, cpus=1):
        room = Room([Part(2)], seconds=30)
        with pytest.raises(ConfigError, match="had no room within 1 s for 3 parts"):
            Room([Part(1)] * 3, seconds=1)
        room.close()
    nobody = {"runtime": "ray", "address": "127.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        api.train(recipe(tmp_path / "c", "ray", placement=nobody), view=NullView())
