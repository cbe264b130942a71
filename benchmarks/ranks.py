"""Several trainer ranks beside one: the gradient, tokens a second, memory of each rank.

    python -m benchmarks.ranks [--device cpu|cuda] [--ranks 1 2 4] [--layers 4] [--hidden 256] [--vocabulary 4096]
                               [--samples 64] [--budget 2048] [--steps 3] [--dtype float32] [--out FILE]

A random Qwen3 of the given size, and a batch whose sample lengths are lognormal (median 150 tokens). One rank is the
trainer without any; it too runs in a process of its own, so that memory can be compared. Each rank has one CPU thread,
or one accelerator; what there are too few of is not run, and the result says so. `--dtype` is that of the timed steps;
gradients are compared in float32. Prints one JSON object.

`load` is that of the machine at the start, in processes for each core: above 0 the figures of speed say little.
`difference` is the largest over all parameters of |g - g₁| / |g₁|, norms of whole tensors. `waiting` is the share of
rank time that would be idle if a pass took as long as it has tokens. `peak_bytes` holds, on a CPU, all that is
resident: the libraries (a process that only imports them has `libraries_bytes`), and the whole model at loading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from sluice import device
from sluice.config.model import DType, ScratchConfig, TokenizerConfig
from sluice.config.train import OptimizerConfig, TrainConfig
from sluice.models.build import make_scratch
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch, spread
from sluice.train.ranks.crew import ProcessCrew
from sluice.train.ranks.trainer import RankedTrainer
from sluice.types import STREAMS, LossInputs, LossOutput, Normaliser, TrainBatch, TrainSample, Version


def policy_loss(inputs: LossInputs) -> LossOutput:
    """-A · ratio."""
    advantage = inputs.streams["advantage"].to(inputs.logprobs.dtype)
    return LossOutput(-advantage * (inputs.logprobs - inputs.streams["behaviour"]).exp(), {})


def make_model(args: argparse.Namespace, folder: Path) -> Path:
    """A random Qwen3 in `folder`."""
    architecture = {
        "model_type": "qwen3", "hidden_size": args.hidden, "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers, "num_attention_heads": args.hidden // 32, "num_key_value_heads": 2,
        "head_dim": 32, "max_position_embeddings": args.budget, "tie_word_embeddings": True,
    }  # fmt: skip
    words = tuple(f"w{number}" for number in range(args.vocabulary))
    scratch = ScratchConfig(architecture=architecture, tokenizer=TokenizerConfig(words=words, chat_template=""))
    make_scratch(scratch, folder, seed=0)
    return folder


def samples(args: argparse.Namespace) -> list[TrainSample]:
    """Random ids, three quarters of each sample sampled and trained, a random advantage each."""
    rng = np.random.default_rng(0)
    made: list[TrainSample] = []
    for number in range(args.samples):
        length = int(np.clip(rng.lognormal(5.0, 0.7), 8, args.budget))
        streams = {name: np.full(length, fill, dtype=dtype) for name, (dtype, fill) in STREAMS.items()}
        for name in ("proximal", "reference", "value"):
            del streams[name]
        sampled = slice(length // 4, None)
        streams["weight"][sampled] = 1.0
        streams["temperature"][sampled] = 1.0
        streams["version"][sampled] = Version(0).code
        streams["behaviour"][sampled] = -np.log(args.vocabulary)
        streams["advantage"][sampled] = rng.normal()
        ids = rng.integers(5, args.vocabulary, length).astype(np.int32)
        made.append(TrainSample(f"e{number}", f"g{number // 8}", 0, ids, streams))
    return made


def settings(args: argparse.Namespace, dtype: DType) -> TrainConfig:
    return TrainConfig(
        optimizer=OptimizerConfig(lr=1e-5),
        micro_batch_tokens=args.budget,
        dtype=dtype,
        rank_seconds=300,
    )


def measure(trainer: Any, batch: TrainBatch, steps: int) -> float:
    """Tokens a second over `steps` optimizer steps, after one that is not counted."""
    trainer.step(batch, policy_loss)
    begin = time.perf_counter()
    for _ in range(steps):
        trainer.step(batch, policy_loss)
    return steps * batch.num_tokens / (time.perf_counter() - begin)


def alone(args: argparse.Namespace, model: Path, batch: TrainBatch, out: Path) -> None:
    """What a process of its own does for one rank; figures and gradient go to `out`."""
    torch.set_num_threads(1)
    libraries = device.peak_memory("cpu")
    on = device.resolve(args.device)
    exact = TorchTrainer(settings(args, "float32"), model, total_steps=100, seed=0, device=on)
    gradient = {name: value.cpu() for name, value in exact.gradients(batch, policy_loss).items()}
    if args.dtype != "float32":
        del exact
        exact = TorchTrainer(settings(args, args.dtype), model, total_steps=100, seed=0, device=on)
    speed = measure(exact, batch, args.steps)
    figures = {
        "tokens_per_second": speed,
        "peak_bytes": [device.peak_memory(on.partition(":")[0])],
        "libraries_bytes": libraries,
    }
    torch.save({"figures": figures, "gradient": gradient}, out)


def in_its_own_process(model: Path, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Figures and gradient of one rank."""
    command = [sys.executable, "-m", "benchmarks.ranks", *sys.argv[1:], "--alone", str(model), str(out)]
    if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
        sys.exit("the process of one rank failed; see above")
    found = torch.load(out)
    return found["figures"], found["gradient"]


def several(
    args: argparse.Namespace, count: int, model: Path, batch: TrainBatch, work: Path, first: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Figures of `count` ranks."""
    places = device.several(device.resolve(args.device), count)

    def begin(name: str, dtype: DType) -> RankedTrainer:
        crew = ProcessCrew(count, work / name, [{"OMP_NUM_THREADS": "1"}] * count)
        return RankedTrainer(
            crew, settings(args, dtype), model, total_steps=100, seed=0, devices=places, scratch=work / "scratch",
            threads=1,
        )  # fmt: skip

    with closing(begin("exact", "float32")) as trainer:
        found = trainer.gradients(batch, policy_loss)
    assert found.keys() == first.keys()
    difference = max(float((found[name] - g).norm() / g.norm()) for name, g in first.items())
    with closing(begin("timed", args.dtype)) as trainer:
        speed = measure(trainer, batch, args.steps)
        peak = trainer.peak_memory()
    lengths = [len(sample) for sample in batch.samples]
    shares = spread(lengths, count, args.budget)
    tokens = np.array([[sum(lengths[index] for index in members) for members in share] for share in shares])
    return {
        "difference": difference,
        "tokens_per_second": speed,
        "peak_bytes": peak,
        "tokens": tokens.sum(axis=1).tolist(),
        "passes": len(shares[0]),
        "waiting": float(1 - tokens.sum() / (tokens.max(axis=0).sum() * count)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    for name, size in (("layers", 4), ("hidden", 256), ("vocabulary", 4096), ("samples", 64), ("budget", 2048)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch = make_batch(samples(args), budget=args.budget, normaliser=Normaliser.TOKEN)
    if args.alone:
        alone(args, args.alone[0], batch, args.alone[1])
        return
    result: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "alone")},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.cuda.device_count()} accelerators",
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
        "batch_tokens": batch.num_tokens,
    }
    available = torch.cuda.device_count() if args.device == "cuda" else max(args.ranks)
    measured: dict[str, Any] = {str(count): f"needs {count} GPUs, not run" for count in args.ranks if count > available}
    counts = [count for count in sorted({1, *args.ranks}) if count <= available]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(args, work / "model")
        result["parameters"] = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
        first: dict[str, torch.Tensor] = {}
        for count in counts:
            if count == 1:
                figures, first = in_its_own_process(model, work / "one.pt")
            else:
                figures = several(args, count, model, batch, work / f"ranks-{count}", first)
            measured[str(count)] = figures
    text = json.dumps({**result, "ranks": measured}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    from benchmarks import ranks

    ranks.main()  # by this name, so that the ranks can import the loss
