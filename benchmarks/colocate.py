"""Engine and trainer taking turns on one device: seconds of each switch, memory between them, what a round costs.

    python -m benchmarks.colocate [KEY=VALUE ...] [--recipe recipes/smollm2.py] [--rounds 6] [--prompts 16]
                                  [--samples 8] [--answer 256] [--trainer torch] [--out FILE] [--runs FOLDER]
    python -m benchmarks.colocate --cpu-smoke        # a tiny random model and the embedded engine's server
    python -m benchmarks.colocate --shape qwen3-4b ...      # random weights in the shape of a model; see SHAPES

A round is: generate, switch to training, one optimizer step on what was generated, switch back with the new weights.
The parts are those of a run with `--colocate` (`sluice.orchestrate.pool.Shared`), which is what makes every switch.
Medians leave out the first round. `exact` says whether a switch that trains nothing leaves weights, masters and moments
as they were, bit for bit. Figures of memory are those of the whole device, all processes together. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.ranks import policy_loss
from benchmarks.rig import command_line, machine, parser, report, say
from benchmarks.shapes import SHAPES, write_model
from tests.tiny import merge, tiny

from sluice import device
from sluice.algos import make_algorithm
from sluice.config.load import load_recipe
from sluice.config.run import RunConfig
from sluice.models.build import load_tokenizer
from sluice.models.chat_template import TEMPLATE_FILE
from sluice.obs.timing import PhaseTimer
from sluice.orchestrate.assignment import assign
from sluice.orchestrate.beside import Beside
from sluice.orchestrate.ledger import ledger
from sluice.orchestrate.placement import place
from sluice.orchestrate.pool import Shared
from sluice.orchestrate.setup import initial_model, load_data, make_engine
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Engine, GenerateRequest, Generation
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import STREAMS, Normaliser, TrainBatch, TrainSample
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore, digest


def shaped(name: str, tokenizer: Path, folder: Path) -> Path:
    """A model of random bfloat16 weights with the tokenizer of another, in `folder`."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        if (file.suffix in {".json", ".txt"} and file.name != "config.json") or file.name == TEMPLATE_FILE:
            shutil.copy2(file, folder / file.name)
    write_model(name, folder)
    return folder


def configuration(arguments: argparse.Namespace) -> RunConfig:
    """The recipe with the command line's overrides, colocated."""
    changes: dict[str, Any] = {"runs_dir": str(arguments.runs), "placement": {"colocate": True}}
    if arguments.trainer:
        changes["train"] = {"backend": arguments.trainer}
    if arguments.cpu_smoke:
        changes |= {"rollout": {"embedded": {"servers": 1}}}
        return tiny(arguments.runs / "questions", **changes)
    config = load_recipe(arguments.recipe, arguments.set)
    if arguments.shape:
        assert config.model.path is not None  # the recipes of this folder name one
        changes["model"] = {"path": str(shaped(arguments.shape, config.model.path, arguments.runs / arguments.shape))}
    return RunConfig.model_validate(merge(config.model_dump(mode="json", exclude_unset=True), changes))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    config = configuration(arguments)
    folder, on = config.folder, device.resolve(config.device)
    folder.mkdir(parents=True, exist_ok=True)
    model = initial_model(config, folder)
    counted = ledger(config, make_algorithm(config.algorithm, max_new_tokens=arguments.answer), model, on)
    counted.refuse_if_too_much()
    tokenizer = load_tokenizer(model)
    timer, rows = PhaseTimer(), list[dict[str, float]]()
    async with AsyncExitStack() as stack:
        placement = stack.enter_context(place(config, folder, on, say))
        engine, sink = make_engine(
            assign(config, on), model, tokenizer, device=on, folder=folder, tell=say, hosts=placement.hosts, shares=True
        )
        stack.push_async_callback(engine.close)
        begin = time.perf_counter()
        capabilities = await engine.start()
        started = time.perf_counter() - begin
        pool = Shared(engine, sink, timer, on)
        await pool.vacate()
        first = {name: round(value, 4) for name, value in pool.figures().items()}
        begin = time.perf_counter()
        trainer = stack.enter_context(
            placement.trainers.open("policy", config.train, model, total_steps=100, seed=config.seed)
        )
        loaded = time.perf_counter() - begin
        beside = Beside(apart=True, threads=config.threads)
        stack.callback(beside.close)
        await pool.occupied(trainer, None, beside)
        store = WeightStore(folder / "weights", model, Lineage())
        chat = ChatRenderer(tokenizer, config.rollout.chat, config.model.chat_template_kwargs)
        prompts = load_data(config.data, seed=config.seed).train[: arguments.prompts]
        contexts = [chat.prompt_ids(prompt) for prompt in prompts for _ in range(arguments.samples)]
        sampling = replace(
            config.rollout.sampling.params(eos=chat.eos), max_new_tokens=arguments.answer, stop_token_ids=()
        )
        exact = None
        for number in range(arguments.rounds):
            begin = time.perf_counter()
            await pool.rest()
            published = await beside(store.publish, trainer, number)
            publishing = time.perf_counter() - begin
            await pool.serve(published)
            served = time.perf_counter() - begin
            figures = pool.figures()
            begin = time.perf_counter()
            answers = await asyncio.gather(
                *(ask(engine, f"{number}-{at}", ids, sampling) for at, ids in enumerate(contexts))
            )
            generating = time.perf_counter() - begin
            begin = time.perf_counter()
            await pool.train()
            back = time.perf_counter() - begin
            batch = batch_of(contexts, answers, config)
            begin = time.perf_counter()
            await beside(trainer.step, batch, policy_loss)
            training = time.perf_counter() - begin
            if number == 0 and arguments.exact and isinstance(trainer, TorchTrainer):
                exact = await unchanged(trainer, beside)
            drawn = sum(len(answer.ids) for answer in answers)
            rows.append({
                **figures, **pool.figures(), "publish_seconds": publishing, "to_serving_seconds": served,
                "to_training_seconds": back, "generate_seconds": generating, "train_seconds": training,
                "tokens_per_second": drawn / generating, "trained_tokens_per_second": batch.num_tokens / training,
            })  # fmt: skip
            say(f"round {number}: to training {back:.2f} s, to serving {served:.2f} s")
    names = sorted(set().union(*rows))
    return {
        "model": arguments.shape or str(config.model.path or "a tiny random one").rpartition("/")[2],
        "engine": capabilities.engine_version,
        "ranks": config.train.ranks,
        "dtype": config.train.dtype,
        "ledger": counted.lines(),
        "exact": exact,
        "engine_start_seconds": round(started, 1),
        "trainer_load_seconds": round(loaded, 1),
        "first_release": first,
        "median": {name: round(float(np.median([row[name] for row in rows[1:]])), 4) for name in names},
        "rounds": [{name: round(value, 4) for name, value in row.items()} for row in rows],
    }


async def ask(engine: Engine, rid: str, ids: Any, sampling: Any) -> Generation:
    return await engine.generate(GenerateRequest(rid, np.asarray(ids, np.int32), sampling, hash(rid) & (2**63 - 1)))


def batch_of(contexts: Sequence[Any], answers: Sequence[Generation], config: RunConfig) -> TrainBatch:
    """What was generated, with an advantage of +1 and -1 in turns."""
    made: list[TrainSample] = []
    for number, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        ids = np.concatenate([np.asarray(context, np.int32), answer.ids])
        streams = {name: np.full(len(ids), fill, dtype=dtype) for name, (dtype, fill) in STREAMS.items()}
        for name in ("proximal", "reference", "value"):
            del streams[name]
        new = slice(len(context), None)
        streams["weight"][new] = 1.0
        streams["temperature"][new] = 1.0
        streams["version"][new] = answer.spans[-1].version.code
        streams["behaviour"][new] = answer.logprobs
        streams["advantage"][new] = 1.0 - 2.0 * (number % 2)
        made.append(TrainSample(f"e{number}", f"g{number // 8}", 0, ids, streams))
    return make_batch(made, budget=config.train.micro_batch_tokens, normaliser=Normaliser.TOKEN)


async def unchanged(trainer: TorchTrainer, beside: Beside) -> bool:
    """Whether everything is bit for bit the same after it was away."""

    def state() -> dict[str, str]:
        found = {name: digest(tensor) for name, tensor in trainer.named_weights()}
        return found | {name: digest(tensor) for name, tensor in trainer.optimizer.state().items()}

    before = await beside(state)
    await beside(trainer.offload)
    away = await beside(state)
    await beside(trainer.onload)
    return before == away == await beside(state)


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("set", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    arguments_of.add_argument("--recipe", default="recipes/smollm2.py")
    arguments_of.add_argument("--shape", choices=tuple(SHAPES), help="random weights in this shape instead")
    arguments_of.add_argument("--trainer", choices=("torch", "megatron"), help="default: the recipe's")
    arguments_of.add_argument("--rounds", type=int, default=6)
    arguments_of.add_argument("--prompts", type=int, default=16)
    arguments_of.add_argument("--samples", type=int, default=8)
    arguments_of.add_argument("--answer", type=int, default=256, help="tokens of every answer, unless it ends earlier")
    arguments_of.add_argument("--runs", type=Path, help="folder for models, logs, weights; default: a temporary one")
    arguments_of.add_argument("--no-exact", dest="exact", action="store_false", help="leave out that comparison")
    arguments_of.add_argument("--cpu-smoke", action="store_true")
    arguments_of.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = arguments_of.parse_args()
    if arguments.cpu_smoke:
        arguments.answer = min(arguments.answer, 6)
    with tempfile.TemporaryDirectory() as name:
        arguments.runs = arguments.runs or Path(name)
        result = asyncio.run(measure(arguments))
    report({"command": command_line("colocate"), **result, **machine()}, arguments.out)


if __name__ == "__main__":
    main()
