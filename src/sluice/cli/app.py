"""The command itself, and what the commands share: options, loading a recipe, telling an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

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


def load(recipe: str, overrides: list[str] | None, *, seed: int | None = None, name: str | None = None) -> RunConfig:
    """The run of a recipe, with overrides and flags."""
    from sluice.config.load import load_recipe

    given = {"seed": seed, "name": name}
    flags: dict[str, tuple[str, object]] = {
        key: (f"--{key}", value) for key, value in given.items() if value is not None
    }
    return load_recipe(recipe, overrides or (), flags=flags)


def fail(text: str) -> None:
    """One red block on stderr, unwrapped."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text(text, style="red"))
