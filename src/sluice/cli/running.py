"""Commands that run a model: train, sft, eval, generate, serve."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from sluice.cli.app import Json, Name, Overrides, Recipe, Seed, app, fail, load
from sluice.errors import ConfigError

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="Where the model goes. Default: beside the run."),
]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint and the log.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run folder of this name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe as TOML; no run.")] = False,
    colocate: Annotated[
        bool | None,
        typer.Option("--colocate/--no-colocate", help="Engines and trainer take turns on the same devices."),
    ] = None,
    train_gpus: Annotated[
        int | None, typer.Option("--train-gpus", min=1, metavar="N", help="Devices that train, one rank each.")
    ] = None,
    rollout_gpus: Annotated[
        int | None, typer.Option("--rollout-gpus", min=1, metavar="N", help="Devices of all engines together.")
    ] = None,
    trainer: Annotated[
        str | None,
        typer.Option("--trainer", metavar="BACKEND", help="Who trains: torch or megatron (train.backend)."),
    ] = None,
    seed: Seed = None,
    name: Name = None,
) -> None:
    """Train a model as the recipe says."""
    from sluice.config.sizes import sized

    if resume and overwrite:
        raise ConfigError("--resume continues the run folder, --overwrite replaces it", hint="give one of them")
    changes = list(overrides or ())
    if colocate is not None:
        changes.append(f"placement.colocate={str(colocate).lower()}")
    if trainer is not None:
        changes.append(f"train.backend={trainer}")
    ranks = [] if train_gpus is None else [f"train.ranks={train_gpus}"]  # a layout is checked against it
    config = sized(load(recipe, [*changes, *ranks], seed=seed, name=name), train=train_gpus, rollout=rollout_gpus)
    if dry_run:
        from sluice.config.dump import resolved_toml

        typer.echo(resolved_toml(config), nl=False)
        return
    from sluice.orchestrate import api

    try:
        api.train(config, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        sizes = {"train-gpus": train_gpus, "rollout-gpus": rollout_gpus}
        again = [recipe, *changes, *_flags(seed=seed, name=name, **sizes), "--resume"]
        fail(f"interrupted\n  → resume with: sluice train {shlex.join(again)}")
        raise typer.Exit(130) from None


@app.command()
def sft(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    seed: Seed = None,
    name: Name = None,
) -> None:
    """Fine-tune on the recipe's demonstrations (its warm_start) and print the model's folder."""
    config = load(recipe, overrides, seed=seed, name=name)
    from sluice.orchestrate import api

    typer.echo(api.sft(config, out))


@app.command()
def dpo(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    seed: Seed = None,
    name: Name = None,
) -> None:
    """Train on the recipe's pairs of better and worse answers (its preferences) and print the model's folder."""
    config = load(recipe, overrides, seed=seed, name=name)
    from sluice.orchestrate import api

    typer.echo(api.dpo(config, out))


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
    config = load(recipe, overrides, seed=seed, name=name)
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


def _flags(**values: object) -> list[str]:
    return [text for key, value in values.items() if value is not None for text in (f"--{key}", str(value))]
