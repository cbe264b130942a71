"""Training with what samples begin with in common computed once, against every token computed, on the CPU.

    python -m benchmarks.shared_prompt [--rounds 11] [--out FILE]

Optimizer steps of the demo's model, both ways in turns in one process with one thread; CPU seconds, the median of the
rounds. Four loads: a step of the demo, its answers worked out by the demo's teacher, who often says the same twice;
the same with 18 random tokens for an answer, which have hardly more than the prompt in common; 8 samples of 64 random
tokens behind a prompt of 512; and 8 samples without anything in common, which shows what looking for it costs. All
samples have an advantage, so that no backward pass is left out. Prints one JSON object.
"""

from __future__ import annotations

import random
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.rig import command_line, machine, parser, report

from sluice.config.model import ScratchConfig
from sluice.config.train import TrainConfig
from sluice.models.build import load_tokenizer, make_scratch
from sluice.train import packed_model
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.train.prefixes import first_copies
from sluice.types import STREAMS, LossInputs, LossOutput, Normaliser, TrainBatch, TrainSample

DEMO = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "demo.py"))
GROUPS, MEMBERS, RANDOM_ANSWER = 32, 8, 18
PROMPT, ANSWER = 512, 64


def loss(inputs: LossInputs) -> LossOutput:
    """-A · log-prob."""
    return LossOutput(-inputs.streams["advantage"].to(inputs.logprobs.dtype) * inputs.logprobs, {})


def sample(number: int, group: int, prompt: list[int], answer: list[int], advantage: float) -> TrainSample:
    ids = np.array(prompt + answer, dtype=np.int32)
    trained = np.arange(len(ids)) >= len(prompt)
    streams = {name: np.full(len(ids), fill, dtype=dtype) for name, (dtype, fill) in STREAMS.items()}
    streams["weight"][trained] = 1.0
    streams["version"][trained] = 0
    streams["advantage"][trained] = advantage
    return TrainSample(f"e{number}", f"g{group}", 0, ids, streams)


def demo_samples(
    encode: Callable[[str], list[int]], rng: random.Random, vocabulary: int | None = None
) -> list[TrainSample]:
    """A step of the demo: 32 questions, 8 careless answers each, or 8 of random tokens of a vocabulary."""
    samples: list[TrainSample] = []
    for group in range(GROUPS):
        first, second = (str(rng.randrange(10, 100)) for _ in range(2))
        prompt = encode(f"<user>Calculate {first} + {second}.<assistant>")
        for _ in range(MEMBERS):
            answer = encode(DEMO["work_out"](first[::-1], second[::-1], forgets=rng.random() < DEMO["FORGETS"]))
            if vocabulary is not None:
                answer = [rng.randrange(vocabulary) for _ in range(RANDOM_ANSWER)]
            samples.append(sample(len(samples), group, prompt, answer, rng.choice([-1.0, 1.0])))
    return samples


def random_samples(vocabulary: int, rng: random.Random, *, shared: bool) -> list[TrainSample]:
    """Samples of one length with a prompt in common, or none."""

    def draw(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    prompt = draw(PROMPT)
    return [sample(n, 0, prompt if shared else draw(PROMPT), draw(ANSWER), 1.0 - n % 2 * 2) for n in range(MEMBERS)]


@contextmanager
def looking(look: bool) -> Iterator[None]:
    """Whether the trainer looks for what samples have in common."""
    packed_model.first_copies = first_copies if look else lambda samples: None
    try:
        yield
    finally:
        packed_model.first_copies = first_copies


def step_seconds(trainer: TorchTrainer, batch: TrainBatch, *, look: bool) -> float:
    with looking(look):
        begin = time.process_time()
        trainer.step(batch, loss)
        return time.process_time() - begin


def gradient_error(trainer: TorchTrainer, batch: TrainBatch) -> float:
    """Largest difference of a parameter's gradient both ways, as a share of its norm."""
    found = []
    for look in (True, False):
        with looking(look):
            found.append(trainer.gradients(batch, loss))
    return max(float((found[0][name] - whole).norm() / whole.norm()) for name, whole in found[1].items())


def compare(trainer: TorchTrainer, samples: list[TrainSample], rounds: int) -> dict[str, Any]:
    batch = make_batch(samples, budget=TrainConfig().micro_batch_tokens, normaliser=Normaliser.TOKEN)
    rows = 0
    for micro in batch.micro_batches:
        copies = first_copies([one.ids for one in micro.samples])
        rows += micro.num_tokens if copies is None else len(np.unique(copies))
    error = gradient_error(trainer, batch)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for look in (True, False):
            spent = step_seconds(trainer, batch, look=look)
            if number:  # the first round warms up
                seconds[look].append(spent)
    shared, every = (statistics.median(seconds[look]) for look in (True, False))
    return {
        "tokens": batch.num_tokens,
        "computed": rows,
        "micro_batches": len(batch.micro_batches),
        "every_token_cpu_seconds": round(every, 4),
        "shared_cpu_seconds": round(shared, 4),
        "ratio": round(every / shared, 3),
        "gradient_error": float(f"{error:.1e}"),
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=11)
    flags.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    scratch = DEMO["recipe"]()["model"]["scratch"]
    scratch["architecture"]["max_position_embeddings"] = PROMPT + ANSWER
    with tempfile.TemporaryDirectory() as folder:
        make_scratch(ScratchConfig(**scratch), Path(folder), seed=0)
        tokenizer = load_tokenizer(Path(folder))
        trainer = TorchTrainer(TrainConfig(), Path(folder), total_steps=1_000, seed=0)
        vocabulary = len(tokenizer)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        loads = {
            "demo_answers_of_the_teacher": demo_samples(encode, rng),
            "demo_answers_of_random_tokens": demo_samples(encode, rng, vocabulary),
            "prompt_512_samples_64": random_samples(vocabulary, rng, shared=True),
            "nothing_in_common": random_samples(vocabulary, rng, shared=False),
        }
        found = {name: compare(trainer, samples, arguments.rounds) for name, samples in loads.items()}
    result = {
        "command": command_line("shared_prompt"),
        **found,
        "rounds": arguments.rounds,
        "threads": 1,
        **machine(),
    }
    report(result, arguments.out)


if __name__ == "__main__":
    main()
