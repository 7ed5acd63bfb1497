"""CLI: only the commands' shape is here and in the files beside it, so that ``--help`` is there at once."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import evomem
from evomem.cli.compare import compare, evaluate, transfer
from evomem.cli.runs import export, import_namm, list_, models, track
from evomem.cli.search import TRAIN, allocate, evolve, trace

app = typer.Typer(
    name="evomem",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warnings about forks would fill the terminal
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evomem {evomem.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Evolve memory managers for frozen language models, compare them with the field, and take them away as plug-ins.

    [bold]First steps[/bold]

      evomem evolve demo                    search, compare, and save a plug-in in runs/demo

      evomem compare runs/demo --budgets 32,64,128

      evomem list managers
    """


# In the order in which ``--help`` shows them.
app.command()(evolve)
app.command("train", help=TRAIN)(evolve)
app.command()(trace)
app.command()(allocate)
app.command()(compare)
app.command()(transfer)
app.command()(evaluate)
app.command()(track)
app.command()(export)
app.command("import-namm")(import_namm)
app.command("list")(list_)
app.command()(models)
