"""The run folder: what a person can read with `ls` and `jq`, and what a resumed run may change.

runs/NAME/
    config.json         the resolved configuration
    metrics.jsonl       one row a batch
    summary.json        written at the end
    report.html         written at the end, and by `sluice report`
    agents/             logs of agent programs, an episode each (runner `command`)
    engines/            logs of servers and the router that were started here
    control/            how many servers there are, and a wish for another number (`sluice scale`)
    ranks/              logs of trainer ranks (`train.ranks`)
    evaluation/         engines/ and agents/ of the evaluation's own servers (`evaluation.servers`)
    log/                the durable episode log (`sluice episodes runs/NAME`)
    turns/              turns of episodes that are under way (runners of several turns)
    checkpoints/        atomic, newest last
    tensorboard/        event files
    wandb/              W&B's files, and wandb.json with the run's id (`obs.wandb`)
    prometheus.json     the address of the metrics while the run lasts (`obs.prometheus`)
    model-init/         the model before anything was trained, when made from scratch or given a chat template
    model-sft/          after the warm start, when there is one
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import xxhash

from sluice.config.dump import flatten
from sluice.config.run import RunConfig
from sluice.errors import ConfigError
from sluice.log import Kind, LogReader
from sluice.log.lock import FolderLock

MAY_CHANGE = (
    "steps", "runs_dir", "device", "threads", "offline", "allow_hosts", "checkpoint", "obs", "limits", "log",
    "evaluation.every", "evaluation.show", "evaluation.beside", "evaluation.servers", "rollout.engine",
    "rollout.sglang", "rollout.router", "rollout.embedded",
    "rollout.gateway.host", "rollout.gateway.port", "rollout.gateway.owner_key_env", "rollout.gateway.idle_seconds",
    "rollout.gateway.max_sessions", "rollout.gateway.body_bytes", "rollout.gateway.retry_after_seconds",
    "rollout.runner.parallel", "rollout.runner.keep", "train.micro_batch_tokens",
    "train.logprob_chunk", "train.compile", "train.activation_checkpointing", "placement", "data.gate",
    *(f"{phase}train.{key}" for phase in ("", "warm_start.", "preferences.")
      for key in ("backend", "megatron", "ranks", "rank_seconds")),
)  # fmt: skip
"""What a resumed run may change: speed, length, place, or the lag from here on; not what was learned up to here."""


def open_folder(config: RunConfig, *, resume: bool, overwrite: bool) -> Path:
    """Create the run folder, or check that an existing one may be continued.

    Raises:
        ConfigError: the folder holds a run and neither flag is given, or there is nothing to resume, or the
            configuration changed in a way that would make it another run.
        LogError: a run is writing there at this moment.
    """
    folder = config.folder
    saved = folder / "config.json"
    _refuse_if_running(folder)
    if folder.exists() and not resume:
        if not overwrite and not _came_to_nothing(folder):
            raise ConfigError(
                f"{folder} already holds a run",
                hint="--resume continues it, --overwrite replaces it, name=NAME starts another beside it",
            )
        if not saved.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} is not a run folder: it has no config.json, so --overwrite leaves it alone",
                hint="choose another name, or remove it yourself",
            )
        shutil.rmtree(folder)
    if resume and not saved.exists():
        raise ConfigError(f"there is no run to resume in {folder}", hint="start it without --resume")
    if resume:
        _check_unchanged(config, saved)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torn = folder / ".config.json.tmp"
        torn.write_text(config.model_dump_json(indent=2) + "\n")
        torn.replace(saved)
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written: {error}",
            hint="set runs_dir to a writable place with free space",
        ) from error
    return folder


def _refuse_if_running(folder: Path) -> None:
    """LogError when a run is writing there: its folder is neither replaced nor continued beside it."""
    if (folder / "log").is_dir():
        FolderLock(folder / "log").release()


def _came_to_nothing(folder: Path) -> bool:
    """Whether a run ended before it did any work: of a typo in a path, for instance. Its folder is worth nothing."""
    done = ("checkpoints", "model-sft", "model-dpo", "weights")
    if not (folder / "config.json").exists() or any((folder / name).exists() for name in done):
        return False
    return not (folder / "log").is_dir() or not any(LogReader(folder / "log").read(kinds=(Kind.EPISODE, Kind.VERSION)))


def _check_unchanged(config: RunConfig, saved: Path) -> None:
    before = flatten(json.loads(saved.read_text()))
    after = flatten(json.loads(config.model_dump_json()))
    changed = sorted(
        key
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    )
    if changed:
        rows = [f"{key}: {before.get(key)!r} → {after.get(key)!r}" for key in changed[:8]]
        raise ConfigError(
            f"{saved.parent} was started with another configuration:\n    " + "\n    ".join(rows),
            hint="resume with the original values, or start a new run under another name",
        )


def digest(config: RunConfig) -> str:
    """xxh3-128 of the resolved configuration, hex: names it in the log."""
    return xxhash.xxh3_128_hexdigest(config.model_dump_json().encode())
