"""The parts of a run that the chaos benchmark has its way with: the run's own processes, and agents elsewhere."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from benchmarks.cut import connections, end_connection

from sluice.config.run import RunConfig
from sluice.rollout.process import die_with

WORDS = {"engine": "embedded.server", "router": "smg::router"} | dict.fromkeys(
    ("rank", "mesh", "calls"), "ranks.program"
)
"""What the command lines of the controller's children hold once they serve: the router renames itself then."""
AGENTS, THREADS = 3, 2
KEY = "SLUICE_OWNER_KEY"
PORTS = range(20_000, 30_000)
"""For the gateway, which must be found again where it was. They lie below those that outgoing connections get: an agent
that tries again at one of those while nobody listens there would now and then be connected to itself."""


class Parts:
    """The run's process, the parts below it, and the agents.

    Args:
        config: the recipe; its runner waits for agents elsewhere.
        seconds: deadline of the end of a process that was killed.
    """

    def __init__(self, config: RunConfig, *, seconds: float) -> None:
        self.config = config
        self.starts = 0
        """How often the run was started."""
        self._seconds = seconds
        self._output = config.runs_dir / "output.txt"
        self._env = {**os.environ, KEY: secrets.token_urlsafe()}
        self._agents: list[subprocess.Popen[bytes]] = []
        config.runs_dir.mkdir(parents=True, exist_ok=True)
        self._process = self._start()
        self.bring_agents()

    def _start(self) -> subprocess.Popen[bytes]:
        recipe = self.config.runs_dir / "recipe.json"
        recipe.write_text(self.config.model_dump_json())
        words = ["-c", "from sluice.cli import main; main()", "train", str(recipe), *(["--resume"] * bool(self.starts))]
        self.starts += 1
        with self._output.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *words], stdout=output, stderr=output, env=self._env, start_new_session=True
            )

    def resume(self, *, steps: int = 0) -> None:
        """Go on, with more steps if it is over."""
        self.config = self.config.model_copy(update={"steps": self.config.steps + steps})
        self._process = self._start()

    def bring_agents(self) -> None:
        """Start those that are missing; they do not outlive this process."""
        self._agents = [each for each in self._agents if each.poll() is None]
        url = f"http://{self.config.rollout.gateway.host}:{self.config.rollout.gateway.port}"
        words = ["-m", "benchmarks.chaos_agent", url, str(self.journal), "--threads", str(THREADS)]
        with self._output.open("ab") as output:
            while len(self._agents) < AGENTS:
                self._agents.append(
                    subprocess.Popen(
                        [sys.executable, *words], stdout=output, stderr=output, env=self._env,
                        preexec_fn=die_with(os.getpid(), signal.SIGKILL),
                    )
                )  # fmt: skip

    @property
    def journal(self) -> Path:
        """What the agents were told that it was finished."""
        return self.config.runs_dir / "finished.jsonl"

    @property
    def over(self) -> bool:
        """Whether the run has completed. SystemExit when it, or an agent by itself, ended otherwise."""
        code = self._process.poll()
        ended = [each.returncode for each in self._agents if each.poll() is not None]
        if code or ended:
            who = f"the run ended with {code}" if code else f"an agent ended with {ended[0]}"
            raise SystemExit(f"{who}:\n{self.output()}")
        return code == 0

    def find(self, part: str) -> list[psutil.Process]:
        """Processes of a part that are alive. The gateway is in the controller's, mesh and calls are in the ranks'."""
        if part == "agent":
            return [psutil.Process(each.pid) for each in self._agents if each.poll() is None]
        with suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self._process.pid)
            if part in ("controller", "gateway"):
                return [whole] if whole.status() != psutil.STATUS_ZOMBIE else []
            children = sorted(whole.children(recursive=True), key=lambda each: each.pid)
            return [each for each in children if WORDS[part] in _command(each)]
        return []

    def kill(self, part: str, victim: psutil.Process) -> None:
        """SIGKILL, and a new start of what the run does not start itself: the run, or an agent."""
        victim.kill()
        if part == "controller":
            self._process.wait(self._seconds)
            self.resume()
        elif part == "agent":
            next(each for each in self._agents if each.pid == victim.pid).wait(self._seconds)
            self.bring_agents()

    def cut(self, part: str, victim: psutil.Process, chance: random.Random) -> int:
        """End connections of a process, closed or reset, and say how many.

        All that clients have to the gateway at once; the one that a rank is called by, a socket pair whose number is
        its last argument but one, which can only be closed; else one or all of the process's TCP connections, the
        gateway's left out.
        """
        reset, one = (chance.random() < 0.5 for _ in range(2))
        if part == "calls":
            return int(end_connection(victim.pid, int(victim.cmdline()[-2])))
        every, clients = connections(victim.pid), connections(victim.pid, port=self.config.rollout.gateway.port)
        found = clients if part == "gateway" else [each for each in every if each not in clients]
        if one and found and part != "gateway":
            found = [chance.choice(found)]
        return sum(end_connection(victim.pid, each, reset=reset) for each in found)

    def output(self) -> str:
        """The end of what run and agents printed."""
        return self._output.read_text(errors="replace")[-6000:]

    def end(self) -> None:
        """Harmless when it is over."""
        for process in (*self._agents, self._process):
            process.kill()
            process.wait()


def _command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    return ""


def free_port() -> int:
    """One of `PORTS` that nobody listens on."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise SystemExit(f"no port of {PORTS} is free")
