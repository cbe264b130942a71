"""Starting SGLang servers: command line, environment, log, what its log says it is doing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from sluice.config.sglang import EngineGroup, Flag, SGLangConfig
from sluice.errors import ConfigError, EngineError
from sluice.rollout.engines.sglang.member import Running
from sluice.rollout.process import ManagedProcess, flags, reserve_port, start_on_port
from sluice_engine import cpu, environments

HOST = "127.0.0.1"
"""Servers that we start are for this machine: the router, or this process, is what others talk to."""
UNUSED_PORT = 30_000
"""Where ranks above 0 say that they are healthy; nobody asks them."""
PHASES = (
    ("server_args=", "importing"),
    ("Load weight begin", "loading weights"),
    ("Capture", "capturing graphs"),
    ("Uvicorn running", "ready"),
)
"""Words of the server's log, and what they mean; in this order."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One server to start: the `number`th of its group."""

    name: str
    group: EngineGroup
    devices: str = ""

    @property
    def role(self) -> str:
        return self.group.role


def specs(config: SGLangConfig) -> list[Spec]:
    """Every server of the recipe, named `ROLE-NUMBER`.

    Raises:
        ConfigError: a group is for another host of its server, or what it asks for cannot work.
    """
    if config.api_key_env:
        raise ConfigError(
            "rollout.sglang.api_key_env is for servers that are attached to by URL; those started here listen on "
            f"{HOST} and want no token",
            hint="clear rollout.sglang.api_key_env, or set rollout.sglang.urls",
        )
    found: list[Spec] = []
    counts: dict[str, int] = {}
    for group in config.groups:
        if config.routed_experts and group.role != "regular":
            raise ConfigError(
                "rollout.sglang.routed_experts needs regular engines: a decode engine does not learn from its "
                "prefill engine which experts the prompt was routed to",
                hint="use groups of the role regular, or routed_experts = false",
            )
        if group.node_rank > 0:
            raise ConfigError(
                f"a group has node_rank = {group.node_rank}: a run drives servers whose rank 0 is on its own host",
                hint="leave node_rank at 0 here; on the other hosts run the command that is shown at the start",
            )
        for number in range(group.engines):
            count = counts[group.role] = counts.get(group.role, -1) + 1
            found.append(Spec(f"{group.role}-{count}", group, group.devices[number] if group.devices else ""))
    return found


def further(config: SGLangConfig, number: int, devices: str) -> Spec:
    """A server beyond the recipe's, like them."""
    return Spec(f"regular-{number}", config.groups[0], devices)


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts the servers of a recipe.

    Attributes:
        config: what they have in common.
        model: folder they load at start; the weights of the run come later.
        folder: logs go to `folder/NAME.log`.
        build: `cpu`, `cuda` or `rocm`.
        context_length: longest sequence in tokens; None takes the model's own, or the server's default.
        progress: told what each server is doing while it starts.
        host: address that servers listen on.
        shares: servers give their memory up while the trainer computes.
    """

    config: SGLangConfig
    model: Path
    folder: Path
    build: str
    context_length: int | None = None
    progress: Callable[[str], None] | None = None
    host: str = HOST
    shares: bool = False

    def on(self, host: str) -> Launcher:
        """See `Launches`."""
        return replace(self, host=host, progress=None)

    def python(self) -> Path:
        """The interpreter of the engines' environment. EngineError when it is not there."""
        if self.config.python is not None:
            if not self.config.python.exists():
                raise EngineError(
                    f"rollout.sglang.python names {self.config.python}, which does not exist",
                    hint="name the interpreter of an environment that holds SGLang",
                )
            return self.config.python
        python = environments.python_in(environments.folder(self.build))
        if not python.exists():
            raise EngineError(
                f"there is no SGLang at {python}",
                hint=f"sluice engines install sglang --{self.build}, or set rollout.sglang.python",
            )
        return python

    def command(self, spec: Spec, *, python: Path, port: int, bootstrap_port: int | None) -> list[str]:
        """The command line of one server. `args` come last: a repeated flag overrides an earlier one."""
        words = [str(python), "-m", "sglang.launch_server", "--model-path", str(self.model)]
        return [*words, *flags(self._typed(spec.group, port, bootstrap_port)), *flags(spec.group.args)]

    def _typed(self, group: EngineGroup, port: int, bootstrap_port: int | None) -> dict[str, Flag]:
        config = self.config
        found: dict[str, Flag] = {"host": self.host, "port": port, "incremental-streaming-output": True}
        found |= cpu.FLAGS if self.build == "cpu" else {"device": "cuda"}  # ROCm answers to cuda as well
        if config.dtype != "auto" or self.build != "cpu":
            found["dtype"] = config.dtype
        optional: dict[str, Flag | None] = {
            "context-length": self.context_length,
            "mem-fraction-static": config.memory_fraction,
            "quantization": config.quantization or None,
            "enable-deterministic-inference": config.deterministic or None,
            "enable-return-routed-experts": config.routed_experts or None,
            "enable-memory-saver": True if self.shares and self.build != "cpu" else None,
        }
        sizes = {"tp-size": group.tp, "dp-size": group.dp, "ep-size": group.ep, "pp-size": group.pp}
        optional |= {name: size for name, size in sizes.items() if size > 1}
        if group.nodes > 1:
            optional |= {"nnodes": group.nodes, "node-rank": group.node_rank, "dist-init-addr": group.dist_init_addr}
        optional |= {f"speculative-{name}": value for name, value in config.speculative.items()}
        if group.role != "regular":
            optional |= {
                "disaggregation-mode": group.role,
                "disaggregation-transfer-backend": config.transfer_backend,
                "disaggregation-bootstrap-port": bootstrap_port,
            }
        return found | {name: value for name, value in optional.items() if value is not None}

    def environment(self, spec: Spec, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """`base`, what every server of ours needs, the recipe's own."""
        env = cpu.environment(base, ranks=spec.group.tp * spec.group.pp) if self.build == "cpu" else dict(base)
        # /health generates a token otherwise: about a second, and 20 s and then 503 while paused
        env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
        if spec.devices:
            env["CUDA_VISIBLE_DEVICES"] = spec.devices
        return env | self.config.env

    async def start(self, spec: Spec) -> Running:
        """Start a server and wait until it answers.

        Raises:
            EngineError: it ended, or did not answer within `start_seconds`; with the end of its log.
        """
        python = self.python()
        self._show_ranks(spec, python)
        if spec.role == "prefill":
            with reserve_port(self.host) as bootstrap_port:
                return await self._start(spec, python, bootstrap_port)
        return await self._start(spec, python, None)

    async def _start(self, spec: Spec, python: Path, bootstrap_port: int | None) -> Running:
        async def begin(port: int) -> tuple[ManagedProcess, str]:
            url = f"http://{self.host}:{port}"
            process = await ManagedProcess.start(
                spec.name,
                self.command(spec, python=python, port=port, bootstrap_port=bootstrap_port),
                env=self.environment(spec),
                log_path=self.folder / f"{spec.name}.log",
                ready=lambda: answers(url, self.model),
                seconds=self.config.start_seconds,
                progress=self.reporter(spec.name),
            )
            return process, url

        process, url = await start_on_port(begin, host=self.host)
        return Running(url, bootstrap_port, process)

    def _show_ranks(self, spec: Spec, python: Path) -> None:
        """What other hosts have to run for a server that spans them."""
        for rank in range(1, spec.group.nodes):
            there = replace(spec, group=spec.group.model_copy(update={"node_rank": rank}))
            words = shlex.join(self.command(there, python=python, port=UNUSED_PORT, bootstrap_port=None))
            if self.progress is not None:
                self.progress(f"{spec.name}: rank {rank} is to be started on its host: {words}")

    def reporter(self, name: str) -> Callable[[str], None] | None:
        """Takes the lines of a server's log and tells its phase, each once, in order."""
        progress = self.progress
        if progress is None:
            return None
        left = list(PHASES)

        def take(line: str) -> None:
            at = next((at for at, (words, _) in enumerate(left) if words in line), None)
            if at is not None:
                progress(f"{name}: {left[at][1]}")
                del left[: at + 1]

        return take


async def answers(url: str, model: Path) -> bool:
    """Whether the server at `url` is up, and is ours."""
    async with httpx.AsyncClient(base_url=url, timeout=5.0) as client:
        try:
            if not (await client.get("/health")).is_success:
                return False
            served = (await client.get("/model_info")).json().get("model_path")
        except (httpx.TransportError, ValueError):
            return False  # not listening yet; the deadline bounds this
    return served == str(model)
