"""Programs of the user's: ended with their children, logged without the key, their end put into words."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sluice.rollout.runners.program import LOG_BYTES, Ended, run_program

KEY = "sk-sluice-0123456789abcdef"


def run(tmp_path: Path, code: str, *, seconds: float = 30.0) -> Ended:
    env = {"PATH": os.environ["PATH"], "KEY": KEY, "PYTHONUNBUFFERED": "1"}
    job = run_program(
        [sys.executable, "-c", code], folder=tmp_path, env=env, log=tmp_path / "log.txt", seconds=seconds, secret=KEY
    )
    return asyncio.run(job)


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody reaped counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + 30
    while not gone(pid):
        assert time.monotonic() < until, f"{pid} still runs"
        time.sleep(0.01)


def wait_for(file: Path) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until, f"{file} did not come"
        time.sleep(0.01)


def test_output_and_exit_code(tmp_path: Path) -> None:
    ended = run(tmp_path, "import sys; print('one'); print('two\\n'); print('oops', file=sys.stderr); sys.exit(3)")
    assert ended == Ended(3, "oops", "two")
    assert ended.fault == "ended with exit code 3: oops"
    assert sorted((tmp_path / "log.txt").read_text().split()) == ["one", "oops", "two"]


def test_no_fault_when_it_ends_well(tmp_path: Path) -> None:
    ended = run(tmp_path, "print('0.5', end='')")
    assert ended.fault == ""
    assert ended.output == "0.5"


def test_killed_by_a_signal(tmp_path: Path) -> None:
    assert run(tmp_path, "import os; os.kill(os.getpid(), 9)").fault == "was killed by SIGKILL"


@pytest.mark.parametrize("cut", [1, 5, len(KEY) - 1])
def test_the_key_is_in_no_log_however_it_is_written(tmp_path: Path, cut: int) -> None:
    first = f"import os, sys; k = os.environ['KEY']; sys.stdout.write('a ' + k[:{cut}]); sys.stdout.flush()"
    run(tmp_path, f"{first}; sys.stdout.write(k[{cut}:] + ' b ' + k + 'c')")
    assert (tmp_path / "log.txt").read_text() == "a [session key] b [session key]c"


def test_a_deadline_ends_it_and_its_children(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", {child!r}]).pid)
time.sleep(60)
"""
    ended = run(tmp_path, code, seconds=1.5)
    assert ended.code is None
    wait_until_gone(int((tmp_path / "log.txt").read_text()))


def test_a_child_that_outlives_it_is_ended(tmp_path: Path) -> None:
    code = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
"""
    ended = run(tmp_path, code)
    assert ended.code == 0
    wait_until_gone(int(ended.output))


def test_cancelling_ends_it(tmp_path: Path) -> None:
    code = "import os, time; open('pid.tmp', 'w').write(str(os.getpid())); os.rename('pid.tmp', 'pid'); time.sleep(60)"
    env = {"PATH": os.environ["PATH"]}

    async def cancelled() -> None:
        job = asyncio.ensure_future(
            run_program([sys.executable, "-c", code], folder=tmp_path, env=env, log=tmp_path / "log", seconds=60)
        )
        await asyncio.to_thread(wait_for, tmp_path / "pid")
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(cancelled())
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_it_dies_with_us(tmp_path: Path) -> None:
    inner = "import os, time; open('pid.tmp', 'w').write(str(os.getpid())); os.rename('pid.tmp', 'pid'); time.sleep(60)"
    outer = f"""
import asyncio, os, sys
from pathlib import Path
from sluice.rollout.runners.program import run_program
asyncio.run(run_program([sys.executable, "-c", {inner!r}], folder=Path({str(tmp_path)!r}), env=dict(os.environ),
                        log=Path({str(tmp_path / "log")!r}), seconds=60))
"""
    process = subprocess.Popen([sys.executable, "-c", outer])
    wait_for(tmp_path / "pid")
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_flood_of_output_is_cut(tmp_path: Path) -> None:
    run(tmp_path, f"for _ in range({LOG_BYTES // 1000 + 2000}): print('x' * 999)")
    assert LOG_BYTES < (tmp_path / "log.txt").stat().st_size < LOG_BYTES + 100


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        asyncio.run(run_program(["/no/such"], folder=tmp_path, env={}, log=tmp_path / "log", seconds=1))
