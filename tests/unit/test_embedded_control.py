"""Pausing, aborting and weight updates of the embedded engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch
from embedded_rig import (
    V0,
    Publication,
    characters,
    make,
    prompts,
    publish,
    reference_logprobs,
    request,
    run_all,
    tiny,
    until_drawn,
)

from sluice.config.rollout import EmbeddedConfig
from sluice.errors import EngineError, Unroutable, WeightsError
from sluice.rollout.engines.base import Engine, Finish, Generation, PauseMode
from sluice.rollout.engines.embedded import EmbeddedEngine, engine_model
from sluice.types import Version, VersionSpan
from sluice.weights.base import Sink

V1 = Version(1)


def interrupted(
    engine: EmbeddedEngine, between: Callable[[], Awaitable[None]], *, count: int = 6, after: int = 60
) -> list[Generation | BaseException]:
    """Run `count` requests of 30 tokens; once `after` tokens were drawn in all, await `between`."""

    async def main() -> list[Generation | BaseException]:
        asked = [request(f"r{n}", ids, noise=n, max_new_tokens=30) for n, ids in enumerate(prompts(count))]
        calls = [asyncio.create_task(engine.generate(one)) for one in asked]
        await until_drawn(engine, after)
        await between()
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(main())


def finished(results: list[Generation | BaseException]) -> list[Generation]:
    assert all(isinstance(result, Generation) for result in results), results
    return [result for result in results if isinstance(result, Generation)]


def test_it_is_an_engine_and_a_sink():
    engine = make(context_length=100)
    as_engine: Engine = engine
    as_sink: Sink = engine

    async def main() -> None:
        capabilities = await as_engine.start()
        await as_engine.start()
        assert (capabilities.name, capabilities.context_length) == ("embedded-0", 100)
        assert capabilities.keyed_noise
        assert capabilities.pause_modes == frozenset(PauseMode)
        await as_engine.close()
        await as_engine.close()
        with pytest.raises(EngineError, match="was closed"):
            await as_engine.start()

    asyncio.run(main())
    assert as_sink.name == "embedded-0"


# ── pause, abort, cancel ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [PauseMode.RECOMPUTE, PauseMode.KEEP_KV])
def test_a_pause_draws_nothing_and_changes_nothing(mode: PauseMode):
    model = tiny()
    engine = make(model)

    async def between() -> None:
        await engine.pause(mode)
        before = engine.statistics()
        for _ in range(50):
            await asyncio.sleep(0)
        assert engine.statistics() == before
        assert bool(before["kv_blocks_used"]) is (mode is PauseMode.KEEP_KV)
        late = asyncio.create_task(engine.generate(request("late", [1, 2, 3], max_new_tokens=3)))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not late.done()
        await engine.resume()
        assert len((await late).ids) == 3

    results = finished(interrupted(engine, between))
    plain = [request(f"r{n}", ids, noise=n, max_new_tokens=30) for n, ids in enumerate(prompts(6))]
    for result, expected in zip(results, run_all(make(model), plain), strict=True):
        assert np.array_equal(result.ids, expected.ids)
        assert np.array_equal(result.logprobs, expected.logprobs)


def test_pause_abort_returns_what_there_is():
    engine = make(max_running=4)
    results = finished(interrupted(engine, lambda: engine.pause(PauseMode.ABORT), after=20))
    assert {result.finish for result in results} == {Finish.ABORT}
    assert [len(result.ids) for result in results] == [5] * 4 + [0] * 2
    assert results[0].spans == (VersionSpan(0, 5, V0),)
    assert results[5].spans == ()


def test_abort_ends_the_named_requests_only():
    engine = make()
    results = finished(interrupted(engine, lambda: engine.abort(["r1", "unknown"])))
    assert [result.finish is Finish.ABORT for result in results] == [False, True] + [False] * 4
    assert 0 < len(results[1].ids) < 30
    assert engine.statistics()["kv_blocks_used"] == 0


def test_a_cancelled_call_frees_its_sequence():
    engine = make()

    async def main() -> None:
        call = asyncio.create_task(engine.generate(request("r", [1, 2, 3], max_new_tokens=400)))
        await until_drawn(engine, 3)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert engine.statistics()["running"] == engine.statistics()["kv_blocks_used"] == 0
        again = await engine.generate(request("r", [1, 2, 3], max_new_tokens=4))
        assert len(again.ids) == 4

    asyncio.run(main())


def test_close_ends_waiting_calls():
    engine = make()
    results = interrupted(engine, engine.close)
    assert all(isinstance(result, EngineError) and "was closed" in str(result) for result in results)


# ── weight updates ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("paused", [True, False])
def test_after_an_update_later_tokens_belong_to_the_new_weights_alone(paused: bool):
    old, new = tiny(seed=0), tiny(seed=1)
    engine = make(old)

    async def between() -> None:
        if paused:
            await engine.pause()
        await engine.apply(publish(new, V1))
        if paused:
            await engine.resume()

    results = finished(interrupted(engine, between))
    assert engine.version == V1
    for ids, result in zip(prompts(6), results, strict=True):
        first, second = result.spans
        assert (first.version, second.version) == (V0, V1)
        assert (first.start, first.end, second.end) == (0, second.start, 30)
        assert 0 < first.end < 30
        for span, model in ((first, old), (second, new)):
            expected = reference_logprobs(model, ids, result.ids)[span.start : span.end]
            got = result.logprobs[span.start : span.end]
            assert np.abs(got - expected).max() <= 1e-6 * max(1, np.abs(expected).max())


def test_keep_kv_goes_on_with_old_keys_and_leaves_no_stale_prefix():
    old, new = tiny(seed=0), tiny(seed=1)
    engine = make(old)

    async def between() -> None:
        await engine.pause(PauseMode.KEEP_KV)
        held = engine.statistics()["kv_blocks_used"]
        await engine.apply(publish(new, V1))
        assert engine.statistics()["kv_blocks_used"] == held
        await engine.resume()

    results = finished(interrupted(engine, between))
    differs = False
    for ids, result in zip(prompts(6), results, strict=True):
        assert [span.version for span in result.spans] == [V0, V1]
        expected = reference_logprobs(new, ids, result.ids)
        differs |= bool(np.abs(result.logprobs - expected)[result.spans[1].start :].max() > 1e-3)
    assert differs
    for ids, result in zip(prompts(6), results, strict=True):
        context = np.concatenate([ids, result.ids])
        fresh = run_all(engine, [request("next", context, max_new_tokens=4)])[0]
        assert fresh.cached_tokens == 0
        assert np.allclose(fresh.logprobs, reference_logprobs(new, context, fresh.ids), rtol=1e-6, atol=1e-6)


def missing(published: Publication) -> None:
    published.manifest.tensors.pop("model.norm.weight")


def extra(published: Publication) -> None:
    published.manifest.tensors["lm_head.weight"] = published.manifest.tensors["model.norm.weight"]


def shape(published: Publication) -> None:
    info = published.manifest.tensors["model.norm.weight"]
    published.manifest.tensors["model.norm.weight"] = type(info)(info.dtype, (63,), info.digest)


def dtype(published: Publication) -> None:
    info = published.manifest.tensors["model.norm.weight"]
    published.manifest.tensors["model.norm.weight"] = type(info)("bfloat16", info.shape, info.digest)


def bits(published: Publication) -> None:
    published.content["model.norm.weight"][3] += 1


def unreadable(published: Publication) -> None:
    del published.content["model.norm.weight"]


@pytest.mark.parametrize("spoil", [missing, extra, shape, dtype, bits, unreadable])
def test_a_version_that_does_not_fit_touches_nothing_and_stops_serving(spoil: Callable[[Publication], None]):
    model = tiny(seed=0)
    engine = EmbeddedEngine(model, characters(), EmbeddedConfig(kv_tokens=1024), version=V0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad, good = publish(tiny(seed=1), V1), publish(tiny(seed=2), Version(2))
    spoil(bad)

    async def between() -> None:
        with pytest.raises(WeightsError, match=r"1\.0"):
            await engine.apply(bad)
        with pytest.raises(Unroutable, match="last weight update failed"):
            await engine.generate(request("later", [1]))
        assert engine.version is None

    results = interrupted(engine, between)
    assert all(isinstance(result, Unroutable) for result in results)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    asyncio.run(engine.apply(good))
    assert engine.version == Version(2)
    assert len(run_all(engine, [request("again", [1])])[0].ids) == 16


def test_a_copy_that_fails_half_way_stops_serving_until_a_whole_one():
    class Torn(Publication):
        reads = 0

        def tensors(self) -> Any:
            self.reads += 1
            for number, pair in enumerate(self.content.items()):
                if self.reads == 2 and number == 5:
                    raise OSError("disk gone")
                yield pair

    new = publish(tiny(seed=1), V1)
    engine = make()
    with pytest.raises(WeightsError, match="disk gone"):
        asyncio.run(engine.apply(Torn(new.manifest, new.content)))
    with pytest.raises(Unroutable):
        run_all(engine, [request("r", [1])])
    asyncio.run(engine.apply(new))
    result = run_all(engine, [request("r", [1])])[0]
    expected = reference_logprobs(tiny(seed=1), np.array([1]), result.ids)
    assert np.allclose(result.logprobs, expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_served_before_the_first_version():
    engine = EmbeddedEngine(tiny(), None, EmbeddedConfig(kv_tokens=1024))
    assert engine.version is None
    with pytest.raises(Unroutable, match="serves no version yet"):
        run_all(engine, [request("r", [1])])
    asyncio.run(engine.apply(publish(tiny(), V0)))
    assert len(run_all(engine, [request("r", [1])])[0].ids) == 16


def test_an_engine_model_is_a_copy_and_leaves_the_random_state(tmp_path: Any):
    model = tiny("llama")
    torch.manual_seed(5)
    copy = engine_model(model)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    model.save_pretrained(tmp_path)
    read = engine_model(tmp_path)
    for other in (copy, read):
        pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) and x.data_ptr() != y.data_ptr() for (a, x), (b, y) in pairs)
    with pytest.raises(EngineError, match="no model can be read"):
        engine_model(tmp_path / "nothing")
