"""Task: ``python -m evomem.tasks SPEC`` prints samples for a person to look at."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from evomem.errors import EvomemError
from evomem.models import load
from evomem.tasks import Split, build
from evomem.tasks.encoding import TextEncoder
from evomem.terminal import plain_console


def show(
    spec: Annotated[str, typer.Argument(help='task, such as "multikey_1" or "passkey:length=1000"')],
    model: Annotated[str, typer.Option(help="model whose tokenizer counts")] = "smollm2-135m",
    n: Annotated[int, typer.Option(help="number of samples", min=1)] = 2,
    length: Annotated[int | None, typer.Option(help="tokens of a sample, at most")] = None,
    split: Annotated[Split, typer.Option(help="split")] = Split.TRAIN,
    seed: Annotated[int, typer.Option(help="seed of the split")] = 0,
) -> None:
    """Print samples of a task: context, question (cyan), answer (green)."""
    console = plain_console(highlight=False)
    try:
        tokenizer = load(model).tokenizer
        samples = build(spec, tokenizer, length).samples(split, n, seed)
        encoder = TextEncoder(tokenizer)
    except EvomemError as error:
        plain_console(stderr=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    for sample in samples:
        tokens = len(encoder.context(sample)) + sum(len(encoder.following(t)) for t in (sample.question, sample.answer))
        console.rule(f"{sample.id}: {tokens} tokens")
        parts = (sample.head or "", sample.context, sample.question, sample.answer)
        head, context, question, answer = map(escape, parts)
        console.print(f"[dim]{head}[/dim]{context}[cyan]{question}[/cyan][green]{answer}[/green]")
        console.print(
            f"references: {list(sample.references)}  new tokens: {sample.max_new_tokens}  {sample.meta}",
            style="dim",
            markup=False,
        )


if __name__ == "__main__":
    typer.run(show)
