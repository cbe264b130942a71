"""Start a stock SGLang server on a CPU: where its interpreter is, its environment, its command line.

For tests and for trying things out without a GPU: float32, PyTorch's own attention, no compiled kernels,
about 100 tokens/s of a tiny model. SGLang itself is not changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sluice_engine import environments

SHIM = Path(__file__).parent / "cpu_shim"
FLAGS: dict[str, str | bool] = {
    "device": "cpu",
    "dtype": "float32",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-cuda-graph": True,
    # the KV pool: 16 sequences of 512 tokens
    "mem-fraction-static": "0.1",
    "max-total-tokens": "8192",
    "max-running-requests": "16",
    "skip-server-warmup": True,
}
"""What a server needs on a CPU, without dashes; `True` is a bare flag."""


def interpreter(environ: Mapping[str, str] = os.environ) -> Path:
    """The Python of the environment that `sluice engines install sglang --cpu` makes by default.

    Raises:
        FileNotFoundError: it is not installed.
    """
    python = environments.python_in(environments.folder("cpu", environ))
    if not python.exists():
        raise FileNotFoundError(f"there is no SGLang at {python}; run sluice engines install sglang --cpu")
    return python


def environment(base: Mapping[str, str] = os.environ, *, ranks: int = 1) -> dict[str, str]:
    """A copy of `base` with what a server of `ranks` processes needs on a CPU."""
    cores = os.cpu_count() or 1
    path = [str(SHIM), *filter(None, [base.get("PYTHONPATH")])]
    return {
        **base,
        "PYTHONPATH": os.pathsep.join(path),
        # without it the server ends at start-up: the rotary embedding asks for vllm's CUDA kernels
        "SGLANG_USE_CPU_ENGINE": "1",
        # SGLang compiles small functions at the first request otherwise (with tp > 1): no compiler, no server
        "TORCHDYNAMO_DISABLE": "1",
        # one server shares the machine with a trainer; three processes with a thread per core are slower
        "OMP_NUM_THREADS": "1",
        # without it several ranks want a NUMA node each
        **({"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank % cores) for rank in range(ranks))} if ranks > 1 else {}),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # /health generates a token otherwise: about a second, and 20 s and then 503 while paused
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    }


def command(
    python: Path, model_path: Path, *, port: int, context_length: int = 512, extra_args: Sequence[str] = ()
) -> list[str]:
    """The command line of one server on 127.0.0.1.

    Args:
        python: interpreter of the engine's environment.
        model_path: folder in Hugging Face layout; its tokenizer is needed.
        port: TCP port to listen on. SGLang cannot choose one itself.
        context_length: longest sequence, prompt and answer, in tokens.
        extra_args: further server flags; a repeated flag overrides the one given here.
    """
    words = [str(python), "-m", "sglang.launch_server", "--model-path", str(model_path)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--context-length", str(context_length)]
    for name, value in FLAGS.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*words, *extra_args]
