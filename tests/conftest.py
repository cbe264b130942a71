"""What tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model that calls a tool rightly; taught once."""
    from tests.tool_model import teach  # torch only where it is needed

    return teach(tmp_path_factory.mktemp("tool-model"))
