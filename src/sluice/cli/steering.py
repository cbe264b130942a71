"""Commands that change a run while it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from sluice.cli.app import Json, app


@app.command()
def scale(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or its name under runs/.")],
    engines: Annotated[int | None, typer.Option("--engines", metavar="N", help="Have so many servers.")] = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, metavar="SECONDS", help="How long to wait until they are there.")
    ] = 120.0,
    as_json: Json = False,
) -> None:
    """Have more or fewer rollout servers in a run that is under way. Without --engines: show how many there are."""
    from sluice.episodes import run_folder
    from sluice.orchestrate import control

    folder = run_folder(run)
    found = control.standing(folder) if engines is None else control.scale(folder, engines, seconds=wait)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(found)
    if engines is not None and not found.settled:
        typer.echo(f"the run goes on with it; see `sluice scale {run}`", err=True)
