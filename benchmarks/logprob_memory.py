"""Peak memory and time of chunked log-probs against naive ones, forward and backward, on the CPU.

    python benchmarks/logprob_memory.py [--tokens 2000] [--vocabulary 150000] [--hidden 64] [--chunk 256]

Each variant runs in a process of its own; its peak is `ru_maxrss`, less that of a process that makes the
inputs and gradients only. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from sluice.train.logprob import token_scores

VARIANTS = ("inputs", "chunked", "naive")


def measure(variant: str, args: argparse.Namespace) -> dict[str, float]:
    """One variant in this process: CPU seconds, peak bytes, and a checksum of the gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, requires_grad=True)
    weight = (torch.randn(args.vocabulary, args.hidden) * 0.05).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (args.tokens,))
    temperature = torch.full((args.tokens,), 0.8)
    begin = time.process_time()
    if variant == "chunked":
        token_scores(hidden, weight, None, targets, temperature, chunk=args.chunk).logprob.sum().backward()
    elif variant == "naive":
        logp = ((hidden @ weight.T) / temperature[:, None]).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        assert torch.isfinite(entropy).all()
        logp.gather(1, targets[:, None]).sum().backward()
    else:
        hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
    seconds = time.process_time() - begin
    assert hidden.grad is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu_seconds": seconds, "peak_bytes": peak, "gradient_norm": float(hidden.grad.norm())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    results: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        results[variant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    floor = results.pop("inputs")["peak_bytes"]
    for figures in results.values():
        figures["extra_mib"] = round((figures.pop("peak_bytes") - floor) / 2**20, 1)
        figures["cpu_seconds"] = round(figures["cpu_seconds"], 2)
    logits = args.tokens * args.vocabulary * 4 / 2**20
    sizes = {name: getattr(args, name) for name in ("tokens", "vocabulary", "hidden", "chunk")}
    print(json.dumps({**sizes, "logits_mib": round(logits, 1), **results}, indent=1))


if __name__ == "__main__":
    main()
