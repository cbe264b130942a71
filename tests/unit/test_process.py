"""Child programs: ready, ended, stopped, orphaned; ports. The programs are real ones."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from sluice.errors import EngineError
from sluice.rollout.process import ManagedProcess, flags, reserve_port, start_on_port

pytestmark = pytest.mark.timeout(60)
T = TypeVar("T")

LISTEN = """
import socket, sys
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", int(sys.argv[1])))
server.listen()
print("listening", flush=True)
while True:
    server.accept()[0].close()
"""
WAIT = "import signal\nprint('up', flush=True)\nsignal.pause()\n"
STUBBORN = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
os.write(1, b"child\\n" if child == 0 else f"parent {child}\\n".encode())
signal.pause()
"""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 50))


async def start(folder: Path, text: str, *words: str, says: str = "up", seconds: float = 30.0) -> ManagedProcess:
    log = folder / "program.log"

    async def ready() -> bool:
        return says in log.read_text()

    command = [sys.executable, "-c", text, *words]
    return await ManagedProcess.start("program", command, env=os.environ, log_path=log, ready=ready, seconds=seconds)


def gone(pid: int) -> bool:
    """Ended; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(30):
        while not gone(pid):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


def test_a_program_runs_until_it_is_stopped(tmp_path: Path) -> None:
    async def check() -> None:
        lines: list[str] = []
        log = tmp_path / "deep" / "er.log"

        async def ready() -> bool:
            return "up" in log.read_text()

        program = await ManagedProcess.start(
            "program", [sys.executable, "-c", WAIT], env=os.environ, log_path=log, ready=ready, seconds=30,
            progress=lines.append, cwd=tmp_path,
        )  # fmt: skip
        assert program.alive
        assert program.returncode is None
        assert os.getpgid(program.pid) == program.pid
        assert program.tail() == "up"
        ended = asyncio.create_task(program.wait())
        await program.stop()
        await program.stop()
        assert await ended == program.returncode == -signal.SIGTERM
        assert not program.alive

    run(check())


def test_the_whole_group_is_ended(tmp_path: Path) -> None:
    """A program and its child that both ignore SIGTERM."""

    async def check() -> None:
        program = await start(tmp_path, STUBBORN, says="child")
        async with asyncio.timeout(30):
            while "parent" not in program.tail():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)
        child = int(program.tail().split("parent ")[1].split()[0])
        await program.stop(grace=0.1)
        assert program.returncode == -signal.SIGKILL
        await until_gone(child)

    run(check())


@pytest.mark.parametrize(
    ("text", "code", "telling"),
    [
        ("raise ValueError('no such model')", 1, "ValueError: no such model"),
        ("import argparse\nargparse.ArgumentParser(prog='smg').parse_args(['--odd'])", 2,
         "smg: error: unrecognized arguments: --odd"),
        ("print('torch.OutOfMemoryError: CUDA out of memory')\nprint('Killed')\nraise SystemExit(9)", 9,
         "torch.OutOfMemoryError: CUDA out of memory"),
        ("print('bye')\nraise SystemExit(4)", 4, "bye"),
        ("raise SystemExit(5)", 5, "it printed nothing"),
    ],
)  # fmt: skip
def test_a_program_that_ends_while_it_starts_says_why(tmp_path: Path, text: str, code: int, telling: str) -> None:
    with pytest.raises(EngineError) as caught:
        run(start(tmp_path, text))
    assert f"program ended with exit code {code} while it started: {telling}\n" in str(caught.value)


def test_one_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    text = "import os\nprint('pid', os.getpid(), flush=True)\n" + WAIT.replace("'up'", "'still loading'")

    async def check() -> None:
        with pytest.raises(EngineError, match=r"not ready within 3 s(?s:.*)still loading"):
            await start(tmp_path, text, seconds=3)
        pid = int((tmp_path / "program.log").read_text().split()[1])
        assert gone(pid)

    run(check())


def test_a_start_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    text = "import os\nprint('pid', os.getpid(), flush=True)\n" + WAIT
    log = tmp_path / "program.log"

    async def check() -> None:
        task = asyncio.create_task(start(tmp_path, text, says="never"))
        async with asyncio.timeout(30):
            while not (log.exists() and "up" in log.read_text()):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gone(int(log.read_text().split()[1]))

    run(check())


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    async def ready() -> bool:
        return True

    async def check() -> None:
        await ManagedProcess.start(
            "the engine", [str(tmp_path / "nothing")], env={}, log_path=tmp_path / "log", ready=ready, seconds=5
        )

    with pytest.raises(EngineError, match="the engine could not be started"):
        run(check())


PARENT = """
import asyncio, os, sys
from pathlib import Path
from sluice.rollout.process import ManagedProcess
log = Path(sys.argv[1])
async def ready():
    return "up" in log.read_text()
async def main():
    program = await ManagedProcess.start(
        "program", [sys.executable, "-c", sys.argv[2]], env=os.environ, log_path=log, ready=ready, seconds=30)
    print(program.pid, flush=True)
    await program.wait()
asyncio.run(main())
"""


def test_a_killed_parent_leaves_no_child(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log"), WAIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        parent.kill()
        parent.wait(30)
    run(until_gone(child))


# ── ports ───────────────────────────────────────────────────────────────────────────────────────────────


def test_reserved_ports_are_free_and_differ() -> None:
    with reserve_port() as first, reserve_port() as second:
        assert first != second
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", first))


def test_another_port_is_tried_when_one_is_taken(tmp_path: Path) -> None:
    async def check() -> None:
        tried: list[int] = []
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()

            async def begin(port: int) -> ManagedProcess:
                tried.append(port)
                used = taken.getsockname()[1] if len(tried) == 1 else port  # somebody was faster
                return await start(tmp_path, LISTEN, str(used), says="listening")

            program = await start_on_port(begin)
            assert len(set(tried)) == 2
            await program.stop()

            tried.clear()
            with pytest.raises(EngineError, match=f"port {taken.getsockname()[1]} of 127.0.0.1 is taken"):
                await start_on_port(begin, port=taken.getsockname()[1])
            assert len(tried) == 1

    run(check())


def test_ports_are_tried_a_few_times_only(tmp_path: Path) -> None:
    async def check() -> None:
        tried: list[int] = []
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()

            async def begin(port: int) -> ManagedProcess:
                tried.append(port)
                return await start(tmp_path, LISTEN, str(taken.getsockname()[1]), says="listening")

            with pytest.raises(EngineError, match="Address already in use"):
                await start_on_port(begin)
            assert len(tried) == 5

    run(check())


def test_flags_of_a_recipe() -> None:
    values = {"mem-fraction-static": 0.8, "enable_x": True, "off": False, "--cors": ["a", "b"]}
    assert list(flags(values)) == ["--mem-fraction-static", "0.8", "--enable-x", "--cors", "a", "b"]
