"""Peak memory and time of chunked log-probs, as they are and compiled, against naive ones, forward and backward.

    python -m benchmarks.logprob_memory [--device cpu|cuda] [--tokens 2000 …] [--vocabulary 150000] [--hidden 64]
                                        [--chunk 256] [--dtype float32] [--rounds 1] [--out FILE]

On a CPU each variant runs in a process of its own; its peak is `ru_maxrss` less that of a process that makes the inputs
and gradients only. On an accelerator it is what torch had allocated at most, less inputs and gradients. Seconds are CPU
seconds there and wall seconds here, the best of `rounds`, after one to warm up on an accelerator and
of what is compiled. A variant that does not fit says so. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.rig import command_line, machine, report

from sluice.train.logprob import token_scores

VARIANTS = ("inputs", "chunked", "compiled", "naive")


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process: seconds, peak bytes, and a checksum of the gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    tokens = args.tokens[0]
    hidden = torch.randn(tokens, args.hidden, **options).requires_grad_()
    weight = (torch.randn(args.vocabulary, args.hidden, **options) * 0.05).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (tokens,), device=args.device)
    temperature = torch.full((tokens,), 0.8, device=args.device)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    before = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    best = float("inf")
    for _ in range(args.rounds + (args.device == "cuda" or variant == "compiled")):
        hidden.grad.zero_()
        weight.grad.zero_()
        begin = clock(args.device)
        if variant in ("chunked", "compiled"):
            compiled = variant == "compiled"
            scores = token_scores(hidden, weight, None, targets, temperature, chunk=args.chunk, compiled=compiled)
            scores.logprob.sum().backward()
        elif variant == "naive":
            logp = ((hidden @ weight.T).float() / temperature[:, None]).log_softmax(-1)
            with torch.no_grad():
                entropy = -(logp.exp() * logp).sum(-1)
            assert torch.isfinite(entropy).all()
            logp.gather(1, targets[:, None]).sum().backward()
        best = min(best, clock(args.device) - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": best, "peak_bytes": peak, "gradient_norm": float(hidden.grad.float().norm())}


def clock(device: str) -> float:
    """Seconds: wall on an accelerator that has done what it was asked, CPU elsewhere."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def here(variant: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """A variant on the accelerator, whose peak is counted from here on."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        return measure(variant, argparse.Namespace(**{**vars(args), "tokens": [tokens]}))
    except torch.OutOfMemoryError as error:
        return {"does_not_fit": str(error).partition(". GPU ")[0]}


def alone(variant: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """A variant in a process of its own."""
    if args.device == "cuda":
        return here(variant, tokens, args)
    flags = [
        f"--{name}={getattr(args, name)}" for name in ("device", "vocabulary", "hidden", "chunk", "dtype", "rounds")
    ]
    command = [sys.executable, "-m", "benchmarks.logprob_memory", *flags, "--tokens", str(tokens), "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def compare(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Every variant at one number of tokens."""
    results = {variant: alone(variant, tokens, args) for variant in VARIANTS}
    floor = results.pop("inputs")["peak_bytes"]
    for figures in results.values():
        if "peak_bytes" in figures:
            figures["extra_mib"] = round((figures.pop("peak_bytes") - floor) / 2**20, 1)
            figures["seconds"] = round(figures["seconds"], 4)
    return {"tokens": tokens, "float32_logits_mib": round(tokens * args.vocabulary * 4 / 2**20, 1), **results}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2_000])
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    sizes = {name: getattr(args, name) for name in ("device", "vocabulary", "hidden", "chunk", "dtype", "rounds")}
    rows = [compare(tokens, args) for tokens in args.tokens]
    report({"command": command_line("logprob_memory"), **sizes, "rows": rows, **machine()}, args.out)


if __name__ == "__main__":
    main()
