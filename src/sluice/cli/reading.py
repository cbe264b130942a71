"""Commands that read: a run's log and checkpoints, a recipe, the schema of recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sluice.cli.app import Json, Overrides, Recipe, app, config_app, load
from sluice.errors import ConfigError


@app.command()
def episodes(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or its name under runs/.")],
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, help="Records of this step, and of the episodes it trained."),
    ] = None,
    group: Annotated[str | None, typer.Option("--group", help="Records of a group: g000017, or 17.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Records of one kind: episode, reward, fault ...")] = None,
    outcome: Annotated[
        str | None,
        typer.Option("--outcome", help="Episodes that ended like this: truncated, infra_failure ..."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most this many records.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Decode the tokens of each turn.")] = False,
) -> None:
    """Print a run's log as JSON lines, also while it is written."""
    from sluice.episodes import make_query, print_lines, render, run_folder, select

    query = make_query(step=step, group=group, kind=kind, outcome=outcome, limit=limit)
    folder = run_folder(run)
    print_lines(render(folder, select(folder, query), text=text))


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, or their names under runs/."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The page. Default: report.html in the run's folder, or here for several."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", metavar="N,N...", help="Steps whose episodes go in. Default: some, first and last."),
    ] = None,
    episodes: Annotated[
        int | None, typer.Option("--episodes", min=0, metavar="N", help="At most this many episodes. Default: 160.")
    ] = None,
) -> None:
    """Write a page about a run, or several: curves, time, what became of episodes, every token. Prints its path."""
    from sluice.obs.report.build import wish

    wanted = wish(steps, episodes)
    from sluice.orchestrate.reporting import write_report

    typer.echo(write_report(runs, out, wanted))


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder of a run, its name under runs/, or a model folder.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the model goes.")],
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="The checkpoint of this step. Default: the newest.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of the weights: bfloat16, float16 or float32. Default: the checkpoint's."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there.")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder that transformers, SGLang and vLLM load. Prints its path."""
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype {dtype} is none of bfloat16, float16 and float32")
    from sluice.orchestrate.exporting import export as write

    done = write(run, out, step=step, dtype=dtype, overwrite=overwrite)
    origin = "model folder" if done.step is None else f"checkpoint of step {done.step}"
    typer.echo(f"{origin}: {done.weights_bytes / 1e6:,.1f} MB of weights", err=True)
    typer.echo(done.folder)


@config_app.command()
def show(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe with every default filled in, as TOML."""
    from sluice.config.dump import resolved_json, resolved_toml

    config = load(recipe, overrides)
    typer.echo(resolved_json(config) if as_json else resolved_toml(config), nl=False)


@config_app.command(name="schema")
def print_schema() -> None:
    """Print the JSON schema of recipes: every key, what it means, its default."""
    from sluice.config.dump import schema

    typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))
