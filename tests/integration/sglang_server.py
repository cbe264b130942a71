"""A real SGLang server on the CPU for the length of a `with` block, and a tiny model for it to serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sluice.rollout.process import die_with
from sluice_engine import cpu

START_DEADLINE_S = 240.0
"""Start-up is imports: 25 s on an idle machine, 80 s on a busy one."""
STOP_DEADLINE_S = 20.0
PORT_ATTEMPTS = 5

CHARACTERS = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyz.,:?!"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready. `pid` is the process we started; its workers are in its process group."""

    url: str
    pid: int
    log_path: Path


def write_tiny_model(folder: Path, *, seed: int = 0) -> Qwen3ForCausalLM:
    """A random Qwen3 of 3 layers and 0.4 M parameters with a character tokenizer, written to `folder`.

    Returns the same model, float32, in eval mode. It declares no end of sequence: a turn ends where the request
    says so. Ids 0 and 1 are `<pad>` and `<eos>`.
    """
    names = ["<pad>", "<eos>", *CHARACTERS]
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():  # the default initialisation is so flat that all tokens are equally likely
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    return model


@contextmanager
def running_sglang(model_path: Path, *, extra_args: Sequence[str] = (), log_path: Path) -> Iterator[Server]:
    """Start a server, wait until it answers, and end exactly that server when the block is left.

    Args:
        model_path: folder with config, weights and tokenizer.
        extra_args: further SGLang flags.
        log_path: stdout and stderr of the server, overwritten.

    Raises:
        RuntimeError: it ended during start-up, or was not ready within `START_DEADLINE_S`; with the last
            40 lines of its log.
        FileNotFoundError: the engine's environment is not installed.
    """
    python = cpu.interpreter()
    for attempt in range(PORT_ATTEMPTS):
        port = _free_port()
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                cpu.command(python, model_path, port=port, extra_args=extra_args),
                env=cpu.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=die_with(os.getpid()),
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            problem = _wait_until_ready(process, url, model_path)
            if problem is None:
                yield Server(url, process.pid, log_path)
                return
            text = log_path.read_text(errors="replace")
            taken = "address already in use" in (problem + text).lower()
            if not taken or attempt == PORT_ATTEMPTS - 1:
                raise RuntimeError(f"{problem}. The end of {log_path}:\n" + "\n".join(text.splitlines()[-40:]))
        finally:
            _stop(process)


def _free_port() -> int:
    """A port nobody listens on now. Another process may take it before the server does: the caller retries."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, model_path: Path) -> str | None:
    """None once our server answers, otherwise what went wrong."""
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"the SGLang server ended with status {process.returncode} while starting"
        try:
            if httpx.get(f"{url}/health", timeout=5.0).status_code == httpx.codes.OK:
                served = httpx.get(f"{url}/model_info", timeout=5.0).json()["model_path"]
                return None if served == str(model_path) else f"{url} is another server, address already in use"
        except httpx.TransportError:
            pass  # not listening yet; the deadline bounds this
        time.sleep(0.25)
    return f"the SGLang server was not ready within {START_DEADLINE_S:.0f} s"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process; after the deadline, and for workers it left behind, SIGKILL to its group."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):  # killed below
            process.wait(STOP_DEADLINE_S)
    with suppress(ProcessLookupError):  # the group is gone already
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else is in this group
    process.wait(STOP_DEADLINE_S)
