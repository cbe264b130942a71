"""What a trainer of the Megatron backend holds, against numbers that were counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from megatron_models import config_of
from tests.tiny import tiny
from transformers import AutoModelForCausalLM

from sluice.algos import make_algorithm
from sluice.config.train import TrainConfig
from sluice.errors import ConfigError
from sluice.models.build import read_config
from sluice.orchestrate.holdings import (
    GENERATES,
    TRAINS,
    Holdings,
    count_parameters,
    megatron_holdings,
    stage_parameters,
)
from sluice.orchestrate.ledger import Ledger, ledger
from sluice.train.backends.megatron.families import architecture

MATRICES = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 2 * 48 * 32 + 32 * 48
"""Of a layer: queries, keys and values, their way back, gate and up, down."""
NORMS = 32 + 32 + 8 + 8
VOCABULARY = 24
TABLE = VOCABULARY * 32
BOTH = frozenset({GENERATES, TRAINS})


def holdings(folder: Path, device: str = "cuda:0", frozen: int = 0, *, critic: bool = False, **train: Any) -> Holdings:
    config = TrainConfig.model_validate({"backend": "megatron", **train})
    return megatron_holdings(config, folder, frozen, device, BOTH, critic=critic)


def sizes(found: Holdings) -> list[int]:
    return [entry.size for entry in found.entries]


def made(folder: Path, *, tied: bool) -> Path:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = config_of("qwen3", vocab_size=VOCABULARY, intermediate_size=48, tie_word_embeddings=tied, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return made(tmp_path / "tied", tied=True)


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return made(tmp_path / "untied", tied=False)


def test_parameters_of_every_stage(tied: Path, untied: Path) -> None:
    whole = architecture(read_config(tied))
    layer = MATRICES + NORMS
    assert stage_parameters(whole, tp=1, pp=1, vpp=1) == [4 * layer + TABLE + 32] == [count_parameters(tied)]
    # the last stage has the head, which is the embedding again; only matrices are divided by tp
    layer = MATRICES // 2 + NORMS
    ends = [2 * layer + TABLE // 2, 2 * layer + TABLE // 2 + 32]
    assert stage_parameters(whole, tp=2, pp=2, vpp=1) == ends
    assert stage_parameters(whole, tp=2, pp=2, vpp=2) == ends
    apart = architecture(read_config(untied))
    assert stage_parameters(apart, tp=1, pp=1, vpp=1) == [4 * (MATRICES + NORMS) + 2 * TABLE + 32]
    assert stage_parameters(apart, tp=2, pp=2, vpp=1) == ends


def test_bytes_of_a_rank(untied: Path) -> None:
    held = 4 * (MATRICES + NORMS) + 2 * TABLE + 32
    assert sizes(holdings(untied)) == [4 * held, 8 * held, 4 * held]
    assert sizes(holdings(untied, dtype="bfloat16")) == [2 * held, 12 * held, 4 * held]
    few = {"dtype": "bfloat16", "ranks": 4}
    rounded = sizes(holdings(untied, **few, megatron={"gradients": "bfloat16"}))
    assert rounded == [2 * held, 12 * (held // 4), 2 * held + 4 * (held // 4)], "an update widens what it updates"
    whole = holdings(untied, **few, megatron={"distributed_optimizer": False})
    assert sizes(whole) == [2 * held, 12 * held, 4 * held]
    assert whole.host == 0


def test_the_fullest_stage_counts(untied: Path) -> None:
    """tp 2 x pp 2 x 2 replicas: the last stage, with the head and the last norm."""
    last = 2 * (MATRICES // 2 + NORMS) + TABLE // 2 + 32
    found = holdings(untied, dtype="bfloat16", ranks=8, megatron={"tp": 2, "pp": 2})
    assert sizes(found) == [2 * last, 12 * (last // 2), 4 * last]
    assert [entry.waits for entry in found.entries] == [2 * last, 12 * (last // 2), 0]
    context = holdings(untied, dtype="bfloat16", ranks=8, megatron={"tp": 2, "pp": 2, "cp": 2})
    assert sizes(context) == sizes(found), "ranks that share tokens share the optimizer's state too"


def test_what_lies_on_the_host(untied: Path) -> None:
    """A quarter of the moments of all ranks, with parameters and gradients to update; of both replicas, two frozen
    policies and the trained one."""
    held = 4 * (MATRICES + NORMS) + 2 * TABLE + 32
    found = holdings(
        untied, frozen=2, dtype="bfloat16", ranks=2, megatron={"offload_optimizer": 0.25},
    )  # fmt: skip
    assert sizes(found) == [2 * held, (4 + 8 * 3 // 4) * (held // 2), 4 * held]
    assert found.host == 2 * 3 * held * 2 + 16 * held // 4


def test_a_cpu_holds_what_all_ranks_do(untied: Path) -> None:
    stages = 4 * (MATRICES // 2 + NORMS) + TABLE + 32  # of one tensor-parallel rank
    found = holdings(untied, "cpu", frozen=1, ranks=8, megatron={"tp": 2, "pp": 2, "offload_optimizer": 0.5})
    everywhere = stages * 2 * 2
    assert sizes(found) == [4 * everywhere, 8 * everywhere // 2, 4 * everywhere, 2 * 4 * everywhere]
    assert found.host == 0


def test_a_model_that_cannot_be_divided_so_is_refused_before_the_run(tmp_path: Path, untied: Path) -> None:
    for changes, message in (
        ({"ranks": 3, "megatron": {"tp": 3}}, "tp = 3 does not divide the model's num_attention_heads = 4"),
        ({"ranks": 3, "megatron": {"pp": 3}}, "pp = 3 does not divide the model's num_hidden_layers = 4"),
    ):
        config = tiny(tmp_path, train={"backend": "megatron", **changes})
        with pytest.raises(ConfigError, match=message):
            ledger(config, make_algorithm(config.algorithm, max_new_tokens=8), untied, "cpu")


def test_what_does_not_fit_names_the_keys(untied: Path) -> None:
    found = holdings(untied, frozen=1, dtype="bfloat16")
    counted = Ledger("cuda:0", 2**17, found.entries, True, 0, found.host, found.knobs)
    assert "  in host memory, all ranks together: 0.1 MiB" in counted.lines()
    with pytest.raises(ConfigError, match=r"cuda:0 has 0.1 MiB; while it .* the run needs") as refused:
        counted.refuse_if_too_much()
    for key in ("tp", "pp", "distributed_optimizer", "offload_optimizer", "recompute"):
        assert f"train.megatron.{key}" in refused.value.hint or f"or {key}" in refused.value.hint
    Ledger("cuda:0", 2**30, found.entries, True, 0, found.host, found.knobs).refuse_if_too_much()


def test_a_critic_is_divided_as_the_policy_is(untied: Path) -> None:
    """Two replicas of two stages, bfloat16: 2 bytes of weights and 4 of gradients, and 12 shared by the replicas."""
    layout = {"ranks": 4, "dtype": "bfloat16", "megatron": {"pp": 2}}
    plain, found = holdings(untied, **layout), holdings(untied, critic=True, **layout)
    stage = 2 * (MATRICES + NORMS) + TABLE + 32  # the last one, with the final norm and the head
    assert sizes(found) == [*sizes(plain), stage * 2 + stage * 12 // 2 + stage * 4]
    assert found.entries[-1].waits == stage * 2 + stage * 12 // 2
