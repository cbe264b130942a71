"""Trainer ranks on the nodes of a cluster: see `train.ranks.crew` for what a crew is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import get_node_ip_address

from sluice.errors import TrainError
from sluice.orchestrate.ray.cluster import Room
from sluice.train.ranks.calls import Dispatcher, Failure, outcome
from sluice.train.ranks.crew import Crew
from sluice.train.ranks.work import open_store

BESIDE = "beside"
_OPTIONS: Any = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {BESIDE: 1}}


class RankShell(Dispatcher):
    """A rank as an actor."""

    def open_store(self) -> str:
        """Address of a store in this process, which replaces the last one."""
        host = get_node_ip_address()
        self._store = open_store(host)
        return f"tcp://{host}:{self._store.port}"

    def answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return outcome(lambda: self.call(method, arguments))

    @ray.method(concurrency_group=BESIDE)
    def answer_beside(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """In a thread of its own, whatever `answer` is doing."""
        return outcome(lambda: self.call(method, arguments))


RankActor: Any = ray.remote(**_OPTIONS)(RankShell)


class RayCrew(Crew):
    """See `train.ranks.crew.Crew`.

    Args:
        size: how many ranks.
        room: where they go, as its first parts.
    """

    def __init__(self, size: int, room: Room) -> None:
        super().__init__()
        self._actors = [RankActor.options(**room.place(rank)).remote() for rank in range(size)]

    @property
    def size(self) -> int:
        return len(self._actors)

    def meeting(self, folder: Path) -> str:
        return ray.get(self._actors[0].open_store.remote())

    def _send(self, method: str, arguments: Mapping[int, tuple[Any, ...]], *, beside: bool = False) -> dict[Any, int]:
        calls: dict[Any, int] = {}
        for rank, each in arguments.items():
            actor = self._actors[rank]
            answer = actor.answer_beside if beside else actor.answer
            calls[answer.remote(method, each)] = rank
        return calls

    def _receive(self, calls: Mapping[Any, int], seconds: float) -> dict[Any, Any]:
        ready, _ = ray.wait(list(calls), timeout=seconds)
        return {call: _answer(call) for call in ready}

    def _forget(self, call: Any) -> None:
        """Harmless: every call has an answer of its own."""

    def _end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayActorError as error:
        return Failure(time.time(), f"was lost: {str(error).splitlines()[0]}", "", ProcessLookupError, "")
    except RayTaskError as error:
        return Failure(time.time(), str(error).strip().splitlines()[-1], "", TrainError, str(error))
