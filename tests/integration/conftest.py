"""What several modules of integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.integration.megatron_rig import Rig


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Ranks of the Megatron backend, started when a module first asks for them; they end with it, as even idle ones
    take memory and time."""
    rig = Rig(tmp_path_factory.mktemp("megatron"))
    yield rig
    rig.end()
