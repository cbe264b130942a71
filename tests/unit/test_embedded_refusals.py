"""What the embedded engine refuses, and how it dies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from embedded_rig import make, publish, request, run_all, tiny
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig, Qwen3Config

from sluice.config.rollout import EmbeddedConfig
from sluice.errors import EngineError
from sluice.rollout.engines.base import Generation
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.rollout.engines.embedded.runner import Runner
from sluice.types import Version


@pytest.mark.parametrize(
    ("ids", "sampling", "words"),
    [
        (range(60), {}, "60 context tokens; the context length is 60"),
        (range(10), {"max_new_tokens": 50, "stop": ("",)}, "stop ="),
        ([], {}, "shape"),
        ([96], {}, "ids from 96 to 96; the vocabulary has 96"),
        ([-1], {}, "ids from -1"),
        ([1], {"temperature": -1.0}, "temperature = -1.0"),
        ([1], {"top_k": 0, "top_p": 0.0}, "top_p = 0.0, top_k = 0"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens = 0"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_at_once(ids: Any, sampling: dict[str, Any], words: str):
    engine = make(context_length=60)
    with pytest.raises(EngineError, match=words):
        run_all(engine, [request("r", ids, **sampling)])
    assert engine.statistics()["steps"] == 0


def test_a_request_larger_than_the_pool_is_refused_with_its_size():
    with pytest.raises(EngineError, match=r"may reach 300 tokens \(10 of context and up to 290 new\).* 256"):
        run_all(make(kv_tokens=256), [request("r", range(10), max_new_tokens=290)])


def test_a_name_in_use_is_refused():
    with pytest.raises(EngineError, match="already running"):
        run_all(make(), [request("r", [1]), request("r", [2])])


def test_models_of_other_attention_are_refused_by_name():
    small: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    window = Qwen3Config(**small, **heads, head_dim=16, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    for config, words in (
        (MambaConfig(**small), "MambaForCausalLM"),
        (MistralConfig(**small, **heads, sliding_window=64), "MistralForCausalLM.*sliding"),
        (window, "Qwen3ForCausalLM.*sliding_attention"),
    ):
        with pytest.raises(EngineError, match=words):
            EmbeddedEngine(AutoModelForCausalLM.from_config(config), None, EmbeddedConfig(kv_tokens=256))
    full = MistralConfig(**small, **heads, sliding_window=None)
    EmbeddedEngine(AutoModelForCausalLM.from_config(full), None, EmbeddedConfig(kv_tokens=256))


def test_a_failing_step_reaches_every_caller_and_later_ones(monkeypatch: pytest.MonkeyPatch):
    engine = make()
    forward, calls = Runner.forward, iter(range(100))

    def failing(self: Runner, *args: Any) -> Any:
        if next(calls) == 5:
            raise RuntimeError("out of memory")
        return forward(self, *args)

    monkeypatch.setattr(Runner, "forward", failing)

    async def main() -> list[Generation | BaseException]:
        asked = [request(f"r{n}", [n + 1], max_new_tokens=30) for n in range(4)]
        return await asyncio.gather(*map(engine.generate, asked), return_exceptions=True)

    for result in asyncio.run(main()):
        assert isinstance(result, EngineError)
        assert "RuntimeError: out of memory" in str(result)
        assert isinstance(result.__cause__, RuntimeError)
    for call in (engine.start, engine.pause, engine.resume, lambda: engine.generate(request("x", [1]))):
        with pytest.raises(EngineError, match="died in a step"):
            asyncio.run(call())
    asyncio.run(engine.close())


def test_broken_weights_kill_the_engine_with_a_reason():
    broken = tiny()
    with torch.no_grad():
        broken.get_parameter("model.norm.weight").fill_(float("nan"))
    engine = make()
    asyncio.run(engine.apply(publish(broken, Version(1))))
    with pytest.raises(EngineError, match="logits that are not finite"):
        run_all(engine, [request("r", [1])])
