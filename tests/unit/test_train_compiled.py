"""Functions compiled over tokens; what is compiled for how many is in test_megatron_parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sluice.errors import TrainError
from sluice.train.compiled import over_tokens


def test_a_compiler_that_does_not_work_is_said_with_the_way_out() -> None:
    def broken(graph: torch.fx.GraphModule, example: Any) -> Any:
        raise RuntimeError("no C compiler was found")

    twice = over_tokens(lambda states: states * 2, broken)
    with pytest.raises(TrainError, match=r"does not work here: .*no C compiler was found") as error:
        twice(torch.ones(3, 2))
    assert "train.compile=false" in (error.value.hint or "")
