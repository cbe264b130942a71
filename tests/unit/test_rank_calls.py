"""What a rank answers a call with when it fails: which failures are worth another try."""

from __future__ import annotations

from typing import NoReturn

import pytest

from sluice.errors import RanksLost, TrainError
from sluice.train.ranks.calls import Failure, outcome
from sluice.train.ranks.crew import first_failure

PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553]"
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268"
"""The forms are those of torch 2.6 to 2.11; NVIDIA/nccl issues 2076 and 1928 show them whole."""


def failure(error: Exception) -> Failure:
    def work() -> NoReturn:
        raise error

    found = outcome(work)
    assert isinstance(found, Failure)
    return found


@pytest.mark.parametrize(
    "said",
    [
        f"{PAIR} Connection closed by peer [127.0.0.1]:18313. This is typically caused by a remote worker crashing.",
        f"{PAIR} Read error [127.0.0.1]:22943: Connection reset by peer. This is typically caused by a hang.",
        f"{PAIR} writev [127.0.0.1]:20914: Broken pipe",
        f"{NCCL}, remote process exited or there was a network error, NCCL version 2.28.8\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
        "Last error:\nsocketProgressOpt: Call to recv from 10.0.0.2<33759> failed : Connection reset by peer",
    ],
)
def test_a_connection_between_ranks_that_ends_is_worth_another_try(said: str) -> None:
    found = failure(RuntimeError(said))
    assert found.kind is RanksLost
    assert found.text == f"lost touch with another one: RuntimeError: {said}"
    error = first_failure({1: found}, "step", [], 60)
    assert isinstance(error, RanksLost)
    assert error.args[0].startswith("rank 1 of the trainer: lost touch with another one")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{PAIR} Timed out waiting 3000ms for recv operation to complete"),
        RuntimeError(f"{PAIR} Application timeout caused pair closure"),
        RuntimeError(f"{NCCL}, internal error, NCCL version 2.28.8\nncclInternalError: Internal check failed."),
        RuntimeError("the loss is not finite"),
        ValueError(f"{PAIR} Connection closed by peer"),
        TrainError("a sample does not fit"),
    ],
)
def test_anything_else_ends_the_run(error: Exception) -> None:
    assert failure(error).kind is type(error)
