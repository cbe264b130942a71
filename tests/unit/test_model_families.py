"""Every supported family: the trainer is transformers, the engine is the trainer, and weights go between them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import FAMILIES, MOE, ONE_AT_A_TIME, family
from safetensors.torch import load_file
from train_cases import make_samples, padded_logprobs, plain_model, ratio_loss

from sluice.config.rollout import EmbeddedConfig
from sluice.config.train import TrainConfig
from sluice.errors import EngineError
from sluice.models.build import load_model
from sluice.orchestrate.setup import embedded_engine
from sluice.rollout.engines.base import GenerateRequest, Generation
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import loss_scales, make_batch
from sluice.types import STREAMS, Normaliser, SamplingParams, TrainSample, Version
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore

torch.set_num_threads(1)
LENGTHS = (12, 30, 7, 2, 18)
PROXIMAL = frozenset({"proximal"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each family's model is, made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = family(tmp_path_factory.mktemp(name), name)
            return self[name]

    return Made()


def _trainer(folder: Path, **config: Any) -> TorchTrainer:
    given = {"micro_batch_tokens": 64, "logprob_chunk": 16, **config}
    return TorchTrainer(TrainConfig.model_validate(given), folder, total_steps=10, seed=0)


@pytest.mark.parametrize("name", [*FAMILIES, *ONE_AT_A_TIME])
def test_a_pack_is_what_its_samples_are_alone_and_what_transformers_computes(name: str, folders: Any) -> None:
    trainer = _trainer(folders[name])
    samples = make_samples(LENGTHS)
    packed = trainer.score(samples, PROXIMAL)
    with torch.no_grad():
        plain = padded_logprobs(plain_model(folders[name], torch.float32), samples)
    for sample, together, expected in zip(samples, packed, plain, strict=True):
        (alone,) = trainer.score([sample], PROXIMAL)
        np.testing.assert_allclose(together["proximal"], alone["proximal"], atol=2e-6, rtol=0)
        there = sample.trained
        np.testing.assert_allclose(together["proximal"][there], expected.numpy()[there], atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", [*FAMILIES, *ONE_AT_A_TIME])
def test_the_gradient_is_that_of_plain_transformers(name: str, folders: Any) -> None:
    samples = make_samples(LENGTHS)
    model = plain_model(folders[name], torch.float32).double()
    model.set_experts_implementation("eager")  # the grouped product has no float64
    loss = torch.zeros((), dtype=torch.float64)
    scales = loss_scales(samples, Normaliser.TOKEN)
    for sample, scale in zip(samples, scales, strict=True):
        (values,) = padded_logprobs(model, [sample])
        behaviour, advantage = (torch.from_numpy(sample[each]).double() for each in ("behaviour", "advantage"))
        loss = loss - (advantage * (values - behaviour).exp() * torch.from_numpy(scale)).sum()
    loss.backward()
    expected = {each: p.grad for each, p in model.named_parameters() if p.grad is not None}
    trainer = _trainer(folders[name])
    ours = trainer.gradients(make_batch(samples, budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    assert ours.keys() == expected.keys()
    for each, gradient in ours.items():
        error = float((gradient - expected[each]).norm() / expected[each].norm().clamp_min(1e-12))
        assert error <= 5e-5, f"{each}: {error}"


def _samples(contexts: list[np.ndarray], drawn: list[Generation], temperature: float) -> list[TrainSample]:
    """What the engine drew, as the trainer gets it."""
    samples: list[TrainSample] = []
    for number, (context, one) in enumerate(zip(contexts, drawn, strict=True)):
        ids = np.concatenate([context, one.ids])
        streams = {
            key: np.full(len(ids), STREAMS[key][1], STREAMS[key][0]) for key in ("behaviour", "weight", "version")
        }
        streams["temperature"] = np.full(len(ids), temperature, np.float32)
        streams["behaviour"][len(context) :] = one.logprobs
        streams["weight"][len(context) :] = 1.0
        streams["version"][len(context) :] = 0
        samples.append(TrainSample(f"e{number}", "g", 0, ids, streams))
    return samples


async def _generate(engine: EmbeddedEngine, contexts: list[np.ndarray], name: str = "") -> list[Generation]:
    """All at once; half way the engine is paused, its cache thrown away, and resumed."""
    sampling = SamplingParams(temperature=0.8, max_new_tokens=12)
    asked = [GenerateRequest(f"{name}{n}", each, sampling, 100 + n) for n, each in enumerate(contexts)]
    running = asyncio.gather(*map(engine.generate, asked))
    before = engine.statistics()["generated_tokens"]
    async with asyncio.timeout(60):
        while engine.statistics()["generated_tokens"] < before + 4 * len(contexts):  # noqa: ASYNC110 - turns of the loop
            await asyncio.sleep(0)
        await engine.pause()
        await engine.resume()
        return await running


def _mismatch(trainer: TorchTrainer, contexts: list[np.ndarray], drawn: list[Generation]) -> float:
    scored = trainer.score(_samples(contexts, drawn, 0.8), PROXIMAL)
    return max(
        float(np.abs(each["proximal"][len(context) :] - one.logprobs).max())
        for context, one, each in zip(contexts, drawn, scored, strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_engine_and_trainer_agree_also_after_new_weights(name: str, folders: Any, tmp_path: Path) -> None:
    folder = folders[name]
    trainer = _trainer(folder, optimizer={"lr": 0.02})
    config = EmbeddedConfig(kv_tokens=512, block_tokens=8, max_running=5)
    rng = np.random.default_rng(0)
    contexts = [rng.integers(5, 40, length).astype(np.int32) for length in (3, 21, 9)]
    contexts += [contexts[1], np.concatenate([contexts[1], contexts[0]])]  # prefixes that are shared
    store = WeightStore(tmp_path / "weights", folder, Lineage())

    async def main() -> None:
        engine = embedded_engine(config, folder, None, device="cpu", version=Version(0))  # pyright: ignore[reportArgumentType]
        first = await _generate(engine, contexts)
        assert engine.statistics()["cached_tokens"] >= 16
        assert _mismatch(trainer, contexts, first) <= 1e-5
        trainer.step(make_batch(make_samples(LENGTHS), budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
        assert _mismatch(trainer, contexts, first) > 1e-3
        await engine.apply(store.publish(trainer, 1))
        second = await _generate(engine, contexts, "again")
        assert _mismatch(trainer, contexts, second) <= 1e-5
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", [*FAMILIES, "glm_moe_dsa"])
def test_weights_have_the_names_and_bytes_of_the_checkpoint(name: str, folders: Any, tmp_path: Path) -> None:
    folder = folders[name]
    trainer = _trainer(folder, optimizer={"lr": 0.02})
    on_disk = load_file(folder / "model.safetensors")
    weights = dict(trainer.named_weights())
    assert weights.keys() == on_disk.keys()
    assert all(torch.equal(weights[each], tensor) for each, tensor in on_disk.items())
    if name in MOE:
        assert "model.layers.1.mlp.experts.3.gate_proj.weight" in weights
    trainer.step(make_batch(make_samples(LENGTHS), budget=64, normaliser=Normaliser.TOKEN), ratio_loss)
    trainer.save_model(tmp_path / "model")
    trainer.save_state(tmp_path / "state")
    weights = dict(trainer.named_weights())
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[each], tensor) for each, tensor in saved.items())
    fresh = _trainer(folder, optimizer={"lr": 0.02})
    fresh.load_state(tmp_path / "model", tmp_path / "state")
    batch = make_batch(make_samples(LENGTHS, seed=1), budget=64, normaliser=Normaliser.TOKEN)
    assert fresh.step(batch, ratio_loss).grad_norm == trainer.step(batch, ratio_loss).grad_norm
    again = dict(fresh.named_weights())
    assert all(torch.equal(again[each], tensor) for each, tensor in trainer.named_weights())


REASONS = {
    "mistral": "MistralForCausalLM: it has layers of sliding_attention over 8 tokens",
    "gemma3_text": "Gemma3ForCausalLM: it has layers of sliding_attention over 8 tokens",
    "gpt_oss": "GptOssForCausalLM: it has layers of sliding_attention over 8 tokens",
    "glm_moe_dsa": r"GlmMoeDsaForCausalLM: it has indexed_attention layers \(sparse attention",
    "qwen3_next": r"Qwen3NextForCausalLM: it has linear_attention layers",
}


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_the_embedded_engine_refuses_what_it_cannot_cache_before_it_loads_it(name: str, folders: Any) -> None:
    (folder := folders[name]).joinpath("model.safetensors").rename(folder / "away.safetensors")
    try:
        with pytest.raises(EngineError, match=REASONS[name]) as caught:
            embedded_engine(EmbeddedConfig(kv_tokens=256), folder, None, device="cpu")  # pyright: ignore[reportArgumentType]
        assert "rollout.engine = 'sglang'" in caught.value.hint
    finally:
        folder.joinpath("away.safetensors").rename(folder / "model.safetensors")


def test_a_window_that_no_sequence_outgrows_is_full_attention(folders: Any) -> None:
    config = EmbeddedConfig(kv_tokens=256, block_tokens=8, context_length=8)
    embedded_engine(config, folders["mistral"], None, device="cpu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(EngineError, match=r"GptOssForCausalLM.*wants s_aux"):  # sinks, which the start-up run finds
        embedded_engine(config, folders["gpt_oss"], None, device="cpu")  # pyright: ignore[reportArgumentType]


def test_bfloat16_leaves_rotary_frequencies_and_router_biases_in_float32(folders: Any) -> None:
    model = load_model(folders["glm4_moe"], dtype="bfloat16", attn_implementation="eager")
    engine = EmbeddedEngine(model, None, EmbeddedConfig(kv_tokens=256, dtype="bfloat16"))
    assert engine.version is None
    wide = {
        each for each, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.dtype == torch.float32
    }
    assert {each.rpartition(".")[2] for each in wide} >= {"inv_freq", "e_score_correction_bias"}
    assert model.dtype == torch.bfloat16
