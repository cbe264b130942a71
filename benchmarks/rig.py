"""What the benchmarks share: an engine that serves a recipe's first weights, the names of things, where results go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sluice import device
from sluice.config.run import RunConfig
from sluice.models.build import load_tokenizer
from sluice.orchestrate.serve import FolderSource
from sluice.orchestrate.setup import initial_model
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.sglang.fleet import SGLangFleet
from sluice.rollout.engines.sglang.make import make_fleet
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore, activate


@dataclass(frozen=True, slots=True)
class Served:
    """A fleet that serves the weights of `folder` as version 0."""

    config: RunConfig
    fleet: SGLangFleet
    chat: ChatRenderer
    vocabulary: int
    context_length: int
    engine_version: str

    def url(self, number: int = 0) -> str:
        """Where one of its servers listens."""
        return str(list(self.fleet.members())[number].control.wire.url)


@asynccontextmanager
async def served(config: RunConfig) -> AsyncIterator[Served]:
    """Start the recipe's engines, give them the recipe's model, and end them afterwards.

    Logs, weights and a model from scratch go to the run folder.
    """
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = initial_model(config, folder)
    tokenizer = load_tokenizer(model)
    on = device.resolve(config.device)
    fleet = make_fleet(config.rollout, model=model, folder=folder, device=on, progress=say)
    try:
        capabilities = await fleet.start()
        published = WeightStore(folder / "weights", model, Lineage()).publish(FolderSource(model), 0)
        await activate(published, [fleet])
        chat = ChatRenderer(tokenizer, config.rollout.chat, config.model.chat_template_kwargs)
        context_length = config.rollout.context_length or capabilities.context_length
        yield Served(config, fleet, chat, len(tokenizer), context_length, capabilities.engine_version)
    finally:
        await fleet.close()


def say(line: str) -> None:
    """Progress, beside the JSON on stdout."""
    print(line, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    found: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    found["load_average"] = round(os.getloadavg()[0], 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["versions"] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "httpx", "fastapi", "uvicorn", "smg"):
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command_line(module: str) -> str:
    """The command that made a result, without folders and interpreters of this machine."""
    words = list(sys.argv[1:])
    for flag in ("--out", "--runs", "--python"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    return " ".join(["python", "-m", f"benchmarks.{module}", *words])


def report(result: dict[str, Any], file: Path | None) -> None:
    """Print a result, and write it to a file."""
    text = json.dumps(result, indent=1)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    print(text)


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> dict[str, float]:
    """Median, 95th percentile and largest of some measurements."""
    ordered = sorted(values)
    at = lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * scale, digits)  # noqa: E731
    return {"p50": at(0.5), "p95": at(0.95), "max": at(1.0)}


def parser(text: str | None) -> argparse.ArgumentParser:
    """With the first line of a module's docstring."""
    return argparse.ArgumentParser(description=(text or "").splitlines()[0])
