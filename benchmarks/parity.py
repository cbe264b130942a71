"""How far trainer and embedded engine are apart, and where the first difference arises.

    python benchmarks/parity.py [MODEL_FOLDER] [--tokens 48] [--threads 1]

Samples answers with the embedded engine, then runs the same tokens through the packed trainer and compares the
output of every module, in order of execution, row by row. Prints one JSON object; `first_difference` is null when
all log-probs are bit-equal. Without a folder a random two-layer Qwen3 is made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sluice.config.model import ScratchConfig
from sluice.config.rollout import EmbeddedConfig
from sluice.models.build import load_model, make_scratch
from sluice.rollout.engines.base import GenerateRequest
from sluice.rollout.engines.embedded import EmbeddedEngine
from sluice.train.attention import PACKED_ATTENTION
from sluice.train.packed_model import PackedModel, make_pack
from sluice.types import (
    Author,
    Episode,
    Message,
    MicroBatch,
    Outcome,
    Prompt,
    SamplingParams,
    Segment,
    Turn,
    Version,
    expand,
    observed,
)

SCRATCH: dict[str, Any] = {
    "architecture": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "tokenizer": {"words": [f"w{i}" for i in range(250)], "chat_template": "{{ messages[0].content }}"},
}  # fmt: skip


def record(model: PreTrainedModel) -> tuple[dict[str, list[Tensor]], list[str]]:
    """Hook every module; outputs `[rows, width]` by name, and the names in order of first execution."""
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    order: list[str] = []

    def hook(name: str):
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.ndim >= 3:
                if name not in outputs:
                    order.append(name)
                outputs[name].append(first.detach()[0].float().reshape(first.shape[1], -1).clone())

        return keep

    for name, module in model.named_modules():
        if (name and not any(module.children())) or name.endswith("self_attn"):
            module.register_forward_hook(hook(name))
    return outputs, order


async def sample(engine: EmbeddedEngine, ids: np.ndarray, tokens: int) -> Any:
    await engine.start()
    try:
        return await engine.generate(GenerateRequest("r", ids, SamplingParams(max_new_tokens=tokens), 7))
    finally:
        await engine.close()


def compare(folder: Path, tokens: int) -> dict[str, Any]:
    engine_side = load_model(folder, dtype="float32", attn_implementation="sdpa")
    vocabulary = int(engine_side.config.vocab_size)
    engine = EmbeddedEngine(engine_side, None, EmbeddedConfig(kv_tokens=4096), version=Version(0))
    theirs, _ = record(engine_side)
    ids = np.arange(5, 17, dtype=np.int32) % vocabulary
    generation = asyncio.run(sample(engine, ids, tokens))

    trainer_side = load_model(folder, dtype="float32", attn_implementation=PACKED_ATTENTION)
    ours, order = record(trainer_side)
    turn = Turn(
        Author.SAMPLED, generation.ids, logprobs=generation.logprobs, spans=generation.spans,
        sampling=SamplingParams(max_new_tokens=tokens),
    )  # fmt: skip
    prompt = Prompt("p", "parity", (Message("user", ""),))
    episode = Episode("e", "g", prompt, (Segment((observed(ids), turn)),), Outcome.COMPLETED)
    (one,) = expand(episode)
    micro = MicroBatch((one,), np.zeros(len(one)))
    with torch.no_grad():
        scores = PackedModel(trainer_side, chunk=2048).scores(make_pack(micro, one.trained, torch.device("cpu")))
    difference = np.abs(scores.logprob.numpy().astype(np.float64) - generation.logprobs.astype(np.float64))

    rows = len(one) - 1  # the engine never computes the last token it drew
    first = None
    for name in order:
        if name not in theirs:
            continue
        # the engine pads each pass to whole tiles: the first pass holds the prompt, each later one a token
        passes = [theirs[name][0][: len(ids)], *(each[:1] for each in theirs[name][1:])]
        engine_rows = torch.cat(passes)[:rows]
        trainer_rows = ours[name][0][:rows]
        if engine_rows.shape != trainer_rows.shape:
            continue
        delta = (engine_rows - trainer_rows).abs().amax(dim=1)
        if float(delta.max()) > 0:
            where = int(torch.nonzero(delta)[0])
            phase = "prompt" if where < len(ids) else "sampled"
            first = {"module": name, "row": where, "phase": phase, "max_abs": float(delta.max())}
            break
    return {
        "bit_equal": bool((difference == 0).all()),
        "mean_abs": float(difference.mean()),
        "max_abs": float(difference.max()),
        "tokens": len(difference),
        "first_difference": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="Hugging Face folder; default: a random tiny Qwen3")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to sample")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or Path(scratch) / "model"
        if arguments.model is None:
            make_scratch(ScratchConfig.model_validate(SCRATCH), folder, seed=0)
        result = compare(folder, arguments.tokens)
    result |= {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
