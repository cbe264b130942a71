"""Programs that mean harm: each meets its limit, and nothing of this machine is touched."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sluice.config.sandbox import SandboxConfig
from sluice.errors import SandboxError
from sluice.sandbox.sandbox import Ending, Ran, Sandbox

LIMITS: dict[str, Any] = {"seconds": 60.0, "cpu_seconds": 10, "memory_bytes": 256 * 1024**2, "isolation": "any"}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(SandboxConfig(**LIMITS))


def run(sandbox: Sandbox, program: str, stdin: str = "") -> Ran:
    async def main() -> Ran:
        async with asyncio.timeout(120):
            return await sandbox.run(textwrap.dedent(program), stdin=stdin)

    return asyncio.run(main())


def commands(*, below: bool) -> list[str]:
    """Command lines of this process's children, and of theirs with `below`."""
    found = []
    for child in psutil.Process().children(recursive=below):
        with contextlib.suppress(psutil.Error):  # it ended in between
            found.append(" ".join(child.cmdline()))
    return found


def orphans() -> list[list[str]]:
    """Programs of sandboxes that no process of tests is above."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            above = [" ".join(parent.cmdline()) for parent in process.parents()]
            if "/program/main.py" in " ".join(command) and not any("pytest" in line for line in above):
                found.append(command)
    return found


def limited(**limits: Any) -> Sandbox:
    return Sandbox(SandboxConfig(**{**LIMITS, **limits}))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process that a test has started is alive after it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not left
    assert not orphans()


def test_a_program_runs_with_the_packages_of_this_environment(sandbox: Sandbox) -> None:
    ran = run(
        sandbox, "import sys, numpy\nprint(numpy.arange(3), sys.stdin.read())\nprint('é', file=sys.stderr)", "in\0"
    )
    assert (ran.ending, ran.code, ran.stdout, ran.stderr) == (Ending.EXITED, 0, "[0 1 2] in\0\n", "é\n")
    assert run(sandbox, "raise SystemExit(3)").code == 3
    assert "ZeroDivisionError" in run(sandbox, "1 / 0").stderr
    assert run(sandbox, "import os; os.abort()").code == -6
    assert run(sandbox, "print(input())").stderr.endswith("EOFError: EOF when reading a line\n")


def test_its_folder_is_empty_and_private(sandbox: Sandbox) -> None:
    ran = run(sandbox, "import os; print(os.listdir()); open('a', 'w').write('x'); print(os.listdir())")
    assert ran.stdout == "[]\n['a']\n"
    assert run(sandbox, "import os; print(os.listdir())").stdout == "[]\n"


def test_a_fork_bomb(sandbox: Sandbox) -> None:
    ran = run(limited(seconds=3.0), "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert ran.ending in (Ending.TIMEOUT, Ending.LIMIT)
    if sandbox.confinement.processes == "own":
        ran = run(sandbox, "import os, signal\nfor _ in range(100): os.fork() or signal.pause()")
        assert (ran.ending, ran.limit) == (Ending.LIMIT, "processes")


def test_a_memory_hog(sandbox: Sandbox) -> None:
    ran = run(sandbox, "x = bytearray(2**30)")
    assert (ran.ending, ran.limit) == (Ending.LIMIT, "memory")


def test_an_endless_loop() -> None:
    ran = run(limited(cpu_seconds=1), "while True: pass")
    assert (ran.ending, ran.limit) == (Ending.LIMIT, "cpu")


@pytest.mark.parametrize(
    "program", ["import time; time.sleep(1000)", "import os; os.close(1); os.close(2); os.read(os.pipe()[0], 1)"]
)
def test_one_that_waits(program: str) -> None:
    assert run(limited(seconds=1.5), program).ending is Ending.TIMEOUT


@pytest.mark.parametrize("stream", [1, 2])
def test_an_output_flood(sandbox: Sandbox, stream: int) -> None:
    ran = run(sandbox, f"import os\nwhile True: os.write({stream}, b'x' * 65536)")
    assert (ran.ending, ran.limit, ran.code) == (Ending.LIMIT, "output", None)
    assert len((ran.stdout, ran.stderr)[stream - 1]) == 1024**2


def test_a_file_too_large(sandbox: Sandbox) -> None:
    ran = run(sandbox, "open('a', 'wb').write(bytes(20 * 2**20))")
    assert (ran.ending, ran.limit) == (Ending.LIMIT, "file")


def test_children_that_hide_are_ended_too(sandbox: Sandbox) -> None:
    program = """
        import os, time
        if not os.fork():
            os.setsid()
            if not os.fork():
                time.sleep(1000)
            os._exit(0)
        print("gone")
    """
    assert run(sandbox, program).stdout == "gone\n"  # and `nothing_is_left`


def test_the_environment_is_not_inherited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "sk-very-secret")
    ran = run(sandbox, "import os; print(sorted(os.environ))")
    assert "MY_SECRET" not in ran.stdout
    assert "PYTHONPATH" not in ran.stdout


def confined(sandbox: Sandbox) -> bool:
    """Whether this machine permits namespaces; what follows is about them, or about their absence being told."""
    return not sandbox.exposed


def test_reading_the_parent_s_environment(sandbox: Sandbox, tmp_path: Path) -> None:
    """In a process of its own: what the kernel shows is the environment that a process was started with."""
    script = tmp_path / "outer.py"
    script.write_text(
        "import asyncio, os\n"
        "from sluice.config.sandbox import SandboxConfig\n"
        "from sluice.sandbox.sandbox import Sandbox\n"
        f"program = '''{READS_ENVIRONMENTS}'''\n"
        "sandbox = Sandbox(SandboxConfig(isolation='any'))\n"
        "ran = asyncio.run(sandbox.run(program.replace('OUTER', str(os.getpid()))))\n"
        "print(ran.code, 'sk-very-secret' in ran.stdout, bool(sandbox.exposed))\n"
    )
    environment = {**os.environ, "MY_SECRET": "sk-very-secret"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    code, seen, exposed = done.stdout.split()
    assert code == "0"
    assert seen == "False" or exposed == "True", "it sees the secret, or it is told that it may"


READS_ENVIRONMENTS = """
import os
for pid in ["OUTER", os.getppid(), *filter(str.isdigit, os.listdir("/proc"))]:
    try:
        print(open(f"/proc/{pid}/environ", errors="replace").read())
    except OSError as error:
        print(error)
"""


def test_killing_the_parent(sandbox: Sandbox) -> None:
    if not confined(sandbox):
        assert "processes" in sandbox.exposed
        return
    program = f"""
        import os, signal
        for pid in ({os.getpid()}, os.getppid(), 1):
            try:
                os.kill(pid, signal.SIGKILL)
                print("sent")
            except OSError as error:
                print(error)
    """
    ran = run(sandbox, program)
    assert ran.code == 0
    assert ran.stdout.startswith("[Errno 3] No such process\n")
    assert run(sandbox, "import os; os.kill(-1, 9); print('alive')").ending is Ending.EXITED


def test_no_network_and_no_files(sandbox: Sandbox, tmp_path: Path) -> None:
    if not confined(sandbox):
        assert sandbox.exposed == "processes, network, files"
        return
    program = f"""
        import os, socket
        try:
            socket.create_connection(("127.0.0.1", 1), 5)
        except OSError as error:
            print(error.errno)
        print(socket.if_nameindex(), os.path.exists({str(tmp_path)!r}), os.path.exists("/home"))
        try:
            open("/usr/lib/mine", "w")
        except OSError as error:
            print(error.strerror)
    """
    lines = run(sandbox, program).stdout.splitlines()
    assert lines == ["101", "[(1, 'lo')] False False", "Read-only file system"]  # 101: network is unreachable


def test_many_at_once_are_few_at_once() -> None:
    sandbox = limited(concurrent=2)

    async def main() -> list[Ran]:
        async with asyncio.timeout(120):
            runs = [asyncio.create_task(sandbox.run(f"print({n})")) for n in range(8)]
            most = 0
            while not all(each.done() for each in runs):
                most = max(most, sum("launcher.py" in command for command in commands(below=False)))
                await asyncio.wait(runs, timeout=0.01)
            assert most <= 2
            return [each.result() for each in runs]

    assert [ran.stdout for ran in asyncio.run(main())] == [f"{n}\n" for n in range(8)]


def test_a_caller_that_is_cancelled_leaves_nothing(sandbox: Sandbox) -> None:
    async def main() -> None:
        task = asyncio.create_task(sandbox.run("import time; time.sleep(1000)"))
        while not any("main.py" in command for command in commands(below=True)):
            await asyncio.wait({task}, timeout=0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="cannot be run"):
        limited(python=tmp_path / "python")
