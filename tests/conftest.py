"""What tests of several folders share."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path

import pytest

_STATUS: list[int] = []

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us with &; children inherit it


@pytest.fixture(scope="session")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model that calls a tool rightly; taught once."""
    from tests.tool_model import teach  # torch only where it is needed

    return teach(tmp_path_factory.mktemp("tool-model"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(exitstatus: int) -> None:
    _STATUS.append(int(exitstatus))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The session's result is the process's, once everything was told and everybody's exit functions have run.

    After a whole run with failures the interpreter was once aborted while it was taken down, when threads of native
    libraries were still there (Ray, gRPC, OpenMP); which one was not found. What is skipped is that taking down.
    """
    if not _STATUS:
        return  # nothing was run: a wrong flag, or --help
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    config.get_terminal_writer().flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_STATUS[-1])
