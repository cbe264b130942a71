"""A call at a rank: made there, and answered with its result or its failure."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sluice.errors import RanksLost, SluiceError
from sluice.train.ranks.spec import RankSpec

WORKERS = {
    "torch": ("sluice.train.ranks.worker", "RankWorker"),
    "megatron": ("sluice.train.backends.megatron.worker", "MegatronWorker"),
}
"""Module and class of each backend's `Worker`. A rank imports its own alone."""

BROKEN = re.compile(r"gloo/transport/(?!.*time(d )?out)|^ncclRemoteError", re.IGNORECASE | re.DOTALL | re.MULTILINE)
"""What gloo and NCCL say of a connection between two ranks that ended, but not of one that fell silent until the
deadline."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception of a rank.

    Attributes:
        at: Unix time.
        text, hint: what it says.
        kind: its class.
        traceback: as it is printed.
    """

    at: float
    text: str
    hint: str
    kind: type[BaseException]
    traceback: str


def outcome(work: Callable[[], Any]) -> Any:
    """What `work` returns. A failure is an answer too, so that the first one can be told from what follows."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  (told to the controller, which raises it)
        hint = error.hint if isinstance(error, SluiceError) else ""
        text = str(error.args[0]) if isinstance(error, SluiceError) else f"{type(error).__name__}: {error}"
        kind = type(error)
        if isinstance(error, RuntimeError) and BROKEN.search(text):
            kind, text = RanksLost, f"lost touch with another one: {text}"
        return Failure(time.time(), text, hint, kind, traceback.format_exc())


class Dispatcher:
    """Makes the `Worker` of this process when the method is `begin`, and calls it afterwards."""

    def __init__(self) -> None:
        self._worker: Any = None

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method != "begin":
            return getattr(self._worker, method)(*arguments)
        spec: RankSpec = arguments[0]
        module, name = spec.worker or WORKERS[spec.config.backend]
        self._worker = getattr(import_module(module), name)(spec)
        return None
