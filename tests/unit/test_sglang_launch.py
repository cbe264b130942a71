"""Command lines and environments of SGLang servers, what their logs say, and where keys travel."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from sluice.config.rollout import RolloutConfig
from sluice.config.sglang import SGLangConfig
from sluice.errors import ConfigError, EngineError
from sluice.rollout.engines.sglang import make_fleet
from sluice.rollout.engines.sglang.affinity import Affinity
from sluice.rollout.engines.sglang.launch import Launcher, specs
from sluice_engine import cpu


def launcher(build: str = "cuda", **config: Any) -> Launcher:
    return Launcher(SGLangConfig.model_validate(config), Path("/models/m"), Path("/run/engines"), build, 4096)


def line(build: str = "cuda", number: int = 0, **config: Any) -> str:
    """The command line of one server, without interpreter and model."""
    made = launcher(build, **config)
    spec = specs(made.config)[number]
    words = made.command(spec, python=Path("py"), port=7, bootstrap_port=8)
    assert words[:5] == ["py", "-m", "sglang.launch_server", "--model-path", "/models/m"]
    return " ".join(words[5:])


def test_a_plain_server_on_a_gpu() -> None:
    assert line() == (
        "--host 127.0.0.1 --port 7 --incremental-streaming-output --device cuda --dtype auto --context-length 4096"
    )


def test_a_plain_server_on_a_cpu_has_what_a_cpu_needs() -> None:
    words = line("cpu")
    assert "--device cpu --dtype float32 --attention-backend torch_native" in words
    assert words.endswith("--context-length 4096")
    env = launcher("cpu").environment(specs(SGLangConfig())[0], {"PYTHONPATH": "mine"})
    assert env["PYTHONPATH"].split(":") == [str(cpu.SHIM), "mine"]
    assert env["SGLANG_USE_CPU_ENGINE"] == env["TORCHDYNAMO_DISABLE"] == "1"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in env


def test_every_typed_setting_is_a_flag() -> None:
    group = {
        "tp": 4, "dp": 2, "ep": 4, "pp": 2, "nodes": 2, "node_rank": 0, "dist_init_addr": "10.0.0.1:5000",
        "args": {"cuda-graph-bs": ["1", "2"], "enable_metrics": True, "disable-radix-cache": False, "dtype": "half"},
    }  # fmt: skip
    words = line(
        groups=[group],
        dtype="bfloat16",
        memory_fraction=0.7,
        deterministic=True,
        quantization="fp8",
        speculative={"algorithm": "EAGLE", "num-steps": 3},
        routed_experts=True,
    )
    for wanted in (
        "--tp-size 4", "--dp-size 2", "--ep-size 4", "--pp-size 2", "--nnodes 2", "--node-rank 0",
        "--dist-init-addr 10.0.0.1:5000", "--dtype bfloat16", "--mem-fraction-static 0.7",
        "--enable-deterministic-inference", "--quantization fp8", "--speculative-algorithm EAGLE",
        "--speculative-num-steps 3", "--enable-return-routed-experts",
    ):  # fmt: skip
        assert wanted in words, wanted
    assert words.endswith("--cuda-graph-bs 1 2 --enable-metrics --dtype half"), "what the recipe adds overrides"


def test_prefill_and_decode_servers_find_each_other() -> None:
    config = {"groups": [{"role": "prefill", "engines": 2}, {"role": "decode"}], "transfer_backend": "nixl"}
    assert [spec.name for spec in specs(SGLangConfig.model_validate(config))] == ["prefill-0", "prefill-1", "decode-0"]
    for number, role in ((1, "prefill"), (2, "decode")):
        assert f"--disaggregation-mode {role} --disaggregation-transfer-backend nixl" in line(number=number, **config)


def test_the_environment_of_a_server_is_the_recipes_last() -> None:
    config = {"groups": [{"engines": 2, "devices": ["0,1", "2,3"]}], "env": {"PYTHONPATH": "/site", "X": "1"}}
    made = launcher(**config)
    env = made.environment(specs(made.config)[1], {"PYTHONPATH": "mine", "HOME": "/h"})
    assert env == {
        "PYTHONPATH": "/site", "HOME": "/h", "X": "1", "CUDA_VISIBLE_DEVICES": "2,3",
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    }  # fmt: skip


@pytest.mark.parametrize(
    "config, says",
    [
        ({"groups": [{"role": "prefill"}, {"role": "decode"}], "routed_experts": True}, "needs regular engines"),
        ({"groups": [{"nodes": 2, "node_rank": 1, "dist_init_addr": "a:1"}]}, "node_rank = 1"),
        ({"api_key_env": "TOKEN"}, "want no token"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        specs(SGLangConfig.model_validate(config))
    assert caught.value.hint


def test_several_engines_without_a_router_are_refused(tmp_path: Path) -> None:
    config = {"engine": "sglang", "router": {"use": "never"}, "sglang": {"groups": [{"engines": 2}]}}
    with pytest.raises(ConfigError, match="2 engines need a router"):
        make_fleet(RolloutConfig.model_validate(config), model=tmp_path, folder=tmp_path, device="cpu")


def test_a_missing_environment_names_the_command_that_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path))
    with pytest.raises(EngineError, match="there is no SGLang at") as caught:
        launcher("cpu").python()
    assert "sluice engines install sglang --cpu" in caught.value.hint


def test_the_log_of_a_server_tells_its_phase_once_each() -> None:
    told: list[str] = []
    made = Launcher(SGLangConfig(), Path("m"), Path("f"), "cuda", None, told.append)
    take = made.reporter("regular-0")
    assert take is not None
    for text in (
        "[2026-11-24] server_args=ServerArgs(model_path='m')",
        "Load weight begin. avail mem=10 GB",
        "Capture cuda graph begin. This can take up to several minutes.",
        "Capture cuda graph end.",
        "INFO:     Uvicorn running on http://127.0.0.1:1 (Press CTRL+C to quit)",
    ):
        take(text)
    assert told == [f"regular-0: {phase}" for phase in ("importing", "loading weights", "capturing graphs", "ready")]


def test_an_argument_that_a_server_does_not_know_is_shown_as_its_own_error(tmp_path: Path) -> None:
    """The interpreter stands in for an environment in which SGLang refuses a flag at once."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    (tmp_path / "sglang" / "launch_server.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser('launch_server')\nparser.add_argument('--model-path')\n"
        "parser.parse_args()\n"
    )
    config = {
        "engine": "sglang",
        "sglang": {"python": sys.executable, "build": "cuda", "env": {"PYTHONPATH": str(tmp_path)}},
    }

    async def main() -> None:
        fleet = make_fleet(RolloutConfig.model_validate(config), model=tmp_path, folder=tmp_path, device="cpu")
        with pytest.raises(EngineError, match="unrecognized arguments: --host"):
            await fleet.start()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_key_leaves_a_server_above_the_ceiling_and_comes_back_to_no_old_one() -> None:
    affinity = Affinity(ceiling=1.5, slack=2)
    assert affinity.place("e", {"a": 0, "b": 0}) == "e/0"
    affinity.settled("e", "e/0", "a")
    # mean 4: above max(6, 6) only
    assert affinity.place("e", {"a": 6, "b": 2}) == "e/0"
    assert affinity.place("e", {"a": 7, "b": 1}) == "e/1"
    assert affinity.rekeyed == 1
    affinity.settled("e", "e/0", "a")  # a late answer to the old key
    assert affinity.home("e") is None
    affinity.settled("e", "e/1", "b")
    assert affinity.home("e") == "b"
    affinity.evict("b")
    assert affinity.home("e") is None
    affinity.forget("e")
    assert affinity.place("e", {}) == "e/0"
