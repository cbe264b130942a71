"""`report.html` of runs: reads their folders, spells their tokens, writes the page as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sluice.checkpoint.store import CheckpointStore
from sluice.errors import ConfigError, LogError
from sluice.models.build import load_tokenizer
from sluice.obs.atomic import write_atomic
from sluice.obs.report.build import Wish, build
from sluice.obs.report.compact import Spell, Spelled
from sluice.obs.report.folder import RunFolder, read_run
from sluice.rollout.chat.pieces import Pieces

REPORT = "report.html"


def write_report(runs: Sequence[str | Path], out: Path | None = None, wanted: Wish | None = None) -> Path:
    """Write the page about one run, or several overlaid.

    Args:
        runs: run folders, or their names under `runs/`.
        out: the file; None writes `report.html` into the folder of a single run, into this one for several.
        wanted: which episodes go in.

    Returns:
        The file.

    Raises:
        LogError: a folder is no run's, or the page cannot be written.
    """
    read = [read_run(_folder(run)) for run in runs]
    page = build(read, _spell, wanted)
    target = out or (read[0].path / REPORT if len(read) == 1 else Path(REPORT))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, page.encode())
    except OSError as error:
        raise LogError(f"the report could not be written: {error}", hint="name another file: --out FILE") from error
    return target


def report_run(folder: Path, tell: Callable[[str], None]) -> None:
    """The page of a run that has just ended, beside its other files. Whatever is wrong with it, the run is not."""
    try:
        tell(f"report   {write_report([folder])}")
    except Exception as error:  # noqa: BLE001 - a defect of the page must not become one of the run; it is told
        tell(f"{REPORT} was not written, the run is not affected: {type(error).__name__}: {error}")


def _folder(run: str | Path) -> Path:
    candidates = (Path(run), Path("runs") / run)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise LogError(
        f"there is no run in {' or '.join(dict.fromkeys(map(str, candidates)))}", hint="give the folder of a run"
    )


def _spell(run: RunFolder) -> Spell | None:
    """From the tokenizer that the run used; without one the page shows ids, and says so."""
    problem = "no model folder is left"
    for folder in _models(run):
        try:
            pieces = Pieces(load_tokenizer(folder))
        except ConfigError as error:
            problem = str(error).partition("\n")[0]
            continue
        return lambda id: Spelled(pieces.of(id), pieces.special(id))
    run.notices.append(f"Tokens are shown as ids: {problem}.")
    return None


def _models(run: RunFolder) -> list[Path]:
    """Folders that hold the run's tokenizer, those that are certain first."""
    model = run.config.get("model")
    named = model.get("path") if isinstance(model, dict) else None
    candidates = [Path(named)] if isinstance(named, str) else []
    candidates += [run.path / "model-init", run.path / "model-sft"]
    candidates += [each.model for each in reversed(CheckpointStore(run.path / "checkpoints", keep=1).all())]
    return [folder for folder in candidates if folder.is_dir()]
