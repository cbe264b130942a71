"""Servers of the embedded engine: started and supervised as SGLang's are, by the same fleet."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sluice.config.rollout import RolloutConfig
from sluice.rollout.engines.sglang.elastic import Growth
from sluice.rollout.engines.sglang.fleet import SGLangFleet
from sluice.rollout.engines.sglang.hosting import Here, Hosts
from sluice.rollout.engines.sglang.launch import HOST, answers
from sluice.rollout.engines.sglang.make import leader, spreader
from sluice.rollout.engines.sglang.member import Member, Running
from sluice.rollout.process import ManagedProcess, start_on_port
from sluice_engine import environments


@dataclass(frozen=True, slots=True)
class EmbeddedLauncher:
    """Starts servers of one recipe.

    Attributes:
        config: of rollout.
        model: folder they load at start; the weights of the run come later.
        folder: logs go to `folder/NAME.log`.
        device: of weights and cache.
        host: address that servers listen on.
    """

    config: RolloutConfig
    model: Path
    folder: Path
    device: str
    host: str = HOST

    def on(self, host: str) -> EmbeddedLauncher:
        """See `Launches`."""
        return replace(self, host=host)

    def command(self, port: int) -> list[str]:
        """The command line of one server."""
        embedded = self.config.embedded
        words = [sys.executable, "-m", "sluice.rollout.engines.embedded.server"]
        words += ["--model", str(self.model), "--host", self.host, "--port", str(port), "--device", self.device]
        return [*words, "--threads", str(embedded.threads), "--config", embedded.model_dump_json()]

    def environment(self) -> dict[str, str]:
        """That of the run, with as many threads as the recipe says and the modules that the run found."""
        threads = str(self.config.embedded.threads)
        paths = os.pathsep.join(path for path in sys.path if path)
        return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": paths}

    async def start(self, name: str) -> Running:
        """Start a server and wait until it answers.

        Raises:
            EngineError: it ended, or did not answer within `rollout.sglang.start_seconds`; with the end of its log.
        """

        async def begin(port: int) -> tuple[ManagedProcess, str]:
            url = f"http://{self.host}:{port}"
            process = await ManagedProcess.start(
                name, self.command(port), env=self.environment(), log_path=self.folder / f"{name}.log",
                ready=lambda: answers(url, self.model), seconds=self.config.sglang.start_seconds,
            )  # fmt: skip
            return process, url

        process, url = await start_on_port(begin, host=self.host)
        return Running(url, None, process)


def make_fleet(
    config: RolloutConfig,
    *,
    model: Path,
    folder: Path,
    device: str,
    progress: Callable[[str], None] | None = None,
    hosts: Hosts | None = None,
    shares: bool = False,
    spare: Sequence[str] | None = None,
) -> SGLangFleet:
    """The engine of `rollout.embedded.servers` >= 1; see the function of the same name for SGLang.

    Deadlines, restarts and the transport of the weights are those of `rollout.sglang`.

    Raises:
        ConfigError: there are several servers and no router is allowed.
    """
    logs = folder.absolute() / "engines"
    launcher = EmbeddedLauncher(config, model.absolute(), logs, device)
    where = hosts or Here()

    def make(number: int, _devices: str) -> Member:
        name = f"embedded-{number}"
        start = partial(where.start, launcher, name)
        return Member(name, "regular", "embedded", config.sglang, start, owned=True, model=launcher.model)

    members = [make(number, "") for number in range(config.embedded.servers)]
    lead = leader(config, members, python_with_router, logs, "")
    free = None if spare is None else list(spare)
    return SGLangFleet(
        members, config.sglang, config.router, spreader=spreader(config, members, python_with_router, logs, ""),
        progress=progress, growth=None if shares else Growth(make, lead, where, len(members), free),
    )  # fmt: skip


def python_with_router() -> Path:
    """This interpreter when it has `smg`, else that of SGLang's environment on a CPU."""
    if importlib.util.find_spec("smg") is not None:
        return Path(sys.executable)
    return environments.python_in(environments.folder("cpu"))
