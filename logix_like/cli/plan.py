"""A command that calculates: ``plan``."""

from __future__ import annotations

from typing import Annotated

import typer
from torch import nn

from logix_like.cli.app import app, example
from logix_like.cli.loading import call_function
from logix_like.cli.options import AsJson, answer
from logix_like.config import load_config


@app.command(epilog=example("plan --model mymodel:build --samples 1000000 --epochs 3"))
def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A function in one of your modules that returns the model; on the meta device it costs nothing.",
        ),
    ],
    samples: Annotated[int, typer.Option(min=1, help="Training samples.")],
    epochs: Annotated[int, typer.Option(min=1, help="How often each is visited.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 8,
    config: Annotated[str | None, typer.Option(help="A YAML file or a preset's name.", show_default="default")] = None,
    json: AsJson = False,
) -> None:
    """Tell what logging a model will take: bytes on disk, memory, time."""
    from logix_like.planning import plan as make_plan

    made = call_function(model)
    made = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(made, nn.Module):
        raise typer.BadParameter(f"{model} returned a {type(made).__name__}; it must return the model")
    found = make_plan(made, load_config(config), samples=samples, epochs=epochs, batch=batch)
    answer(found, found.to_json(), as_json=json)
