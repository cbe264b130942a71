"""`sluice export`: a checkpoint of a run becomes a Hugging Face folder that needs no Sluice."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from sluice import __version__
from sluice.checkpoint.store import Checkpoint, CheckpointStore
from sluice.errors import CheckpointError, ConfigError
from sluice.models.build import load_tokenizer
from sluice.models.convert import SHARD_BYTES, ExportDType, convert_model, set_turn_ends
from sluice.rollout.chat.renderer import ChatRenderer

_KEPT = ("checkpoints", "log", "model-init", "model-sft", "model-dpo")
"""What a run resumes from, in its folder."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. `step` is None where the source is a model folder rather than a run."""

    folder: Path
    step: int | None
    weights_bytes: int


def export(
    run: str | Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: ExportDType | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write a checkpoint's model to `out`: config, weights, tokenizer with its chat template, a model card.

    The folder appears under its name when it is complete, and not before.

    Args:
        run: folder of a run, its name under `runs/`, or a model folder (of `sluice sft`, for example).
        step: which checkpoint; None takes the newest.
        dtype: of the weights; None keeps that of the checkpoint.
        overwrite: replace a model folder at `out`.
        shard_bytes: weights beyond this go to a further file.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: there is no such run, `out` exists, or the weights do not fit `dtype`.
    """
    folder = _source(run)
    checkpoint = None if _is_model(folder) else _chosen(folder, step)
    if checkpoint is None and step is not None:
        raise ConfigError(f"{folder} is a model folder and has no steps", hint="leave --step out")
    source = checkpoint.model if checkpoint else folder
    _check_target(out, folder, overwrite=overwrite)
    torn = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(torn, ignore_errors=True)
        torn.mkdir(parents=True)
        size = convert_model(source, torn, dtype=dtype, shard_bytes=shard_bytes)
        tokenizer = load_tokenizer(torn)
        own: Any = tokenizer.eos_token_id
        set_turn_ends(torn, ChatRenderer(tokenizer).eos if tokenizer.chat_template else (int(own),))
        (torn / "README.md").write_text(_card(folder, checkpoint, out.name, dtype), encoding="utf-8")
        _put(torn, out)
    except OSError as error:
        raise CheckpointError(
            f"{out} was not written: {error}", hint="free space there, or choose another folder: --out FOLDER"
        ) from error
    finally:
        shutil.rmtree(torn, ignore_errors=True)
    return Exported(out, checkpoint.step if checkpoint else None, size)


def _source(run: str | Path) -> Path:
    candidates = dict.fromkeys((Path(run), Path("runs") / run))
    for folder in candidates:
        if _is_model(folder) or (folder / "config.json").is_file() or (folder / "checkpoints").is_dir():
            return folder
    raise ConfigError(
        f"there is no run in {' or '.join(map(str, candidates))}", hint="give the folder of a run, or of a model"
    )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _chosen(folder: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a run, its files compared with what was written."""
    found = CheckpointStore(folder / "checkpoints", keep=1).all()
    if not found:
        raise CheckpointError(
            f"{folder} has no checkpoint: the run ended, or was ended, before it wrote its first",
            hint="go on with it: sluice train RECIPE --resume",
        )
    listed = ", ".join(str(each.step) for each in found)
    chosen = found[-1] if step is None else next((each for each in found if each.step == step), None)
    if chosen is None:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}; there are: {listed}",
            hint="checkpoint.every sets how often one is written, checkpoint.keep how many stay",
        )
    try:
        chosen.verify()
    except CheckpointError as error:
        others = ", ".join(str(each.step) for each in found if each is not chosen)
        reason = str(error).partition("\n")[0]
        hint = f"export another: --step N ({others})" if others else "no other checkpoint is left in this run"
        raise CheckpointError(f"the checkpoint of step {chosen.step} is damaged: {reason}", hint=hint) from error
    return chosen


def _check_target(out: Path, run: Path, *, overwrite: bool) -> None:
    here, there = out.resolve(), run.resolve()
    if here == there or here in there.parents:
        raise ConfigError(f"--out {out} would replace {run} itself", hint="choose another folder")
    if any((run / kept).resolve() in (here, *here.parents) for kept in _KEPT):
        raise ConfigError(f"--out {out} is where {run} keeps its own model", hint="choose another folder")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ConfigError(f"{out} exists already", hint="choose another --out, or replace it with --overwrite")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not _is_model(out)):
        raise ConfigError(
            f"{out} is not a model folder, so --overwrite leaves it alone",
            hint="choose another --out, or remove it yourself",
        )


def _put(torn: Path, out: Path) -> None:
    """Give the complete folder its name. A folder of that name is put aside first and removed afterwards."""
    aside = out.with_name(f".{out.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    torn.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _card(folder: Path, checkpoint: Checkpoint | None, name: str, dtype: ExportDType | None) -> str:
    """The model card: where the weights come from, and with what they were written."""
    recipe: dict[str, Any] = {}
    if checkpoint is not None and (folder / "config.json").is_file():
        try:
            recipe = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{folder / 'config.json'} is no JSON: {error}", hint="restore the file; the model card is made from it"
            ) from error
    rows: list[tuple[str, str]] = []
    if checkpoint is None:
        rows.append(("source", f"the model folder `{folder.resolve().name}`"))
    else:
        rows += _origin(recipe, folder, checkpoint)
    rows.append(("weights", dtype or f"as in the {'checkpoint' if checkpoint else 'source'}"))
    versions = {"sluice": __version__} | {each: installed(each) for each in ("torch", "transformers", "safetensors")}
    rows.append(("written with", ", ".join(f"{key} {value}" for key, value in versions.items())))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- sluice\n"
        f"- reinforcement-learning\n---\n\n# {name}\n\n| | |\n|---|---|\n{table}\n\n"
        "The chat template that the model was trained with is in the tokenizer; `generation_config.json` names the "
        "tokens that end a turn.\n" + _template_note(recipe)
    )


def _origin(recipe: dict[str, Any], folder: Path, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    model, state = recipe.get("model") or {}, checkpoint.state()
    scratch = (model.get("scratch") or {}).get("architecture") or {}
    base = f"`{model['path']}`" if model.get("path") else f"a {scratch.get('model_type', 'model')} of random weights"
    phases = [phase for phase, key in (("SFT", "warm_start"), ("DPO", "preferences")) if recipe.get(key)]
    return [
        ("run", f"`{recipe.get('name', folder.resolve().name)}`"),
        ("step", f"{checkpoint.step} of {recipe.get('steps', '?')}, weights version {state.get('version', '?')}"),
        ("base model", base + (f", then {' and '.join(phases)}" if phases else "")),
        ("algorithm", str((recipe.get("algorithm") or {}).get("type", "?"))),
        ("seed", str(recipe.get("seed", "?"))),
    ]


def _template_note(recipe: dict[str, Any]) -> str:
    """Arguments that the template was called with in training: they are no part of any file."""
    settings = (recipe.get("model") or {}).get("chat_template_kwargs")
    if not settings:
        return ""
    return f"\nIn training the template was called with `{json.dumps(settings)}`; give servers the same.\n"
