"""Trainer ranks on the nodes of a cluster: see `train.ranks.crew` for what a crew is."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import get_node_ip_address

from sluice.errors import SluiceError, TrainError
from sluice.orchestrate.ray.cluster import Room
from sluice.rollout.process import reserve_port
from sluice.train.ranks.crew import GRACE_SECONDS, Failure, first_failure


class RankShell:
    """Holds one `RankWorker`; a failure is an answer, so that the first one can be told from what follows."""

    def __init__(self) -> None:
        self._worker: Any = None

    def port(self) -> tuple[str, int]:
        """Address of this node and a port of it that is free."""
        host = get_node_ip_address()
        with reserve_port(host) as port:
            return host, port

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            if method == "begin":
                from sluice.train.ranks.worker import RankWorker

                self._worker = RankWorker(*arguments)
                return None
            return getattr(self._worker, method)(*arguments)
        except Exception as error:  # noqa: BLE001  (told to the run, which raises it)
            hint = error.hint if isinstance(error, SluiceError) else ""
            text = str(error.args[0]) if isinstance(error, SluiceError) else f"{type(error).__name__}: {error}"
            return Failure(time.time(), text, hint, type(error), traceback.format_exc())


RankActor: Any = ray.remote(max_restarts=0, max_task_retries=0)(RankShell)


class RayCrew:
    """See `train.ranks.crew.Crew`.

    Args:
        size: how many ranks.
        room: where they go, as its first parts.
    """

    def __init__(self, size: int, room: Room) -> None:
        self._actors = [RankActor.options(**room.place(rank)).remote() for rank in range(size)]
        self._ended = ""

    @property
    def size(self) -> int:
        return len(self._actors)

    def meeting(self, folder: Path) -> str:
        host, port = ray.get(self._actors[0].port.remote())
        return f"tcp://{host}:{port}"

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], *, seconds: float) -> list[Any]:
        """See `Crew.call`."""
        if self._ended:
            raise TrainError(f"the ranks were ended: {self._ended}", hint="start the run again with --resume")
        calls = {actor.call.remote(method, each): rank
                 for rank, (actor, each) in enumerate(zip(self._actors, arguments, strict=True))}  # fmt: skip
        answers: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        deadline = time.monotonic() + seconds
        while calls:
            done, _ = ray.wait(list(calls), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            rank = calls.pop(done[0])
            answer = _answer(done[0])
            if isinstance(answer, Failure):
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failures[rank] = answer
            else:
                answers[rank] = answer
        if len(answers) == self.size:
            return [answers[rank] for rank in range(self.size)]
        missing = sorted(set(calls.values()))
        self._ended = f"rank {min(failures, default=missing[0] if missing else 0)} failed"
        self.close()
        raise first_failure(failures, method, missing, seconds)

    def close(self) -> None:
        """End all ranks. Harmless when repeated."""
        self._ended = self._ended or "the trainer was closed"
        for actor in self._actors:
            ray.kill(actor)


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayActorError as error:
        return Failure(time.time(), f"was lost: {str(error).splitlines()[0]}", "", ProcessLookupError, "")
    except RayTaskError as error:
        return Failure(time.time(), str(error).strip().splitlines()[-1], "", TrainError, str(error))
