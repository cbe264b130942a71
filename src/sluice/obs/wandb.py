"""Metrics to Weights & Biases. Offline, they are written to the run folder's `wandb/`, for `wandb sync`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sluice.config.obs import WandbConfig
from sluice.errors import ConfigError, LogError
from sluice.obs.atomic import write_atomic


class WandbSink:
    """One W&B run for a run and all its resumes.

    W&B keeps what it was given: rows of steps that a resumed run makes again cannot be taken back. They are told
    apart by `resumes`, how often the run had been resumed when a row was written; `metrics.jsonl` holds the
    surviving rows only. `step` is the batch, the x-axis of every curve.

    Args:
        folder: of the run; `wandb.json` there keeps the W&B run's id.
        name: of the run.
        settings: the resolved configuration, shown beside the curves.
        resume: continue the W&B run of `folder`.

    Raises:
        ConfigError: wandb is not installed, or refuses to start.
        LogError: the file with the id is damaged.
    """

    def __init__(
        self, config: WandbConfig, folder: Path, *, name: str, settings: Mapping[str, Any], resume: bool
    ) -> None:
        try:
            wandb: Any = import_module("wandb")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "obs.wandb needs the package wandb, which is not installed", hint="pip install 'sluice-rl[wandb]'"
            ) from error
        kept = folder / "wandb.json"
        self._resumes, id = 0, secrets.token_hex(4)
        if resume and kept.exists():
            self._resumes, id = _read(kept)
            self._resumes += 1
        write_atomic(kept, json.dumps({"id": id, "resumes": self._resumes}).encode() + b"\n")
        values: dict[str, Any] = {"console": "off", "silent": True}
        if config.base_url is not None:
            values["base_url"] = config.base_url
        try:
            self._run: Any = wandb.init(
                project=config.project, entity=config.entity or None, name=name, id=id, dir=str(folder),
                mode=config.mode, resume="allow" if config.mode == "online" else None, config=dict(settings),
                settings=wandb.Settings(**values),
            )  # fmt: skip
        except (wandb.errors.Error, OSError, ValueError) as error:
            raise ConfigError(
                f"W&B could not be started: {error}",
                hint="`wandb login` sets the key; obs.wandb.mode = 'offline' needs none and is synchronised later",
            ) from error
        self.id = id
        self._run.define_metric("*", step_metric="step")
        self._closed = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one row; wandb's own process keeps it."""
        self._run.log({**metrics, "step": step, "resumes": self._resumes})

    def truncate_after(self, step: int) -> None:
        """Nothing: W&B takes no row back. See the class for how later rows are told apart."""

    def close(self) -> None:
        """Write out the rest and end the W&B run."""
        if not self._closed:
            self._closed = True
            self._run.finish()


def _read(kept: Path) -> tuple[int, str]:
    try:
        state = json.loads(kept.read_bytes())
        return int(state["resumes"]), str(state["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LogError(f"{kept} does not name a W&B run: {error}", hint="remove it to begin a new W&B run") from error
