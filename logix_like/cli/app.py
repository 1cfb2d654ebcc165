"""The command itself: its help, its version, and how it ends when something is refused."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from logix_like import __version__
from logix_like.errors import LogixError

COMMANDS = ("demo", "info", "query", "report", "serve", "plan", "verify", "repair", "compact", "export")
"""In the order in which somebody meets them."""


class OneLineErrors(TyperGroup):
    """Ends with one line on stderr and exit code 1 where the library or the disk refuses."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Name the commands in the order of :data:`COMMANDS`."""
        return sorted(super().list_commands(ctx), key=COMMANDS.index)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output has gone: an ordinary end, handled above us
        except (LogixError, OSError) as error:
            typer.echo("error: " + " ".join(str(error).splitlines()), err=True)
            raise typer.Exit(1) from error


EXIT_CODES = "Exit codes: 0 done; 1 refused or damaged, said in one line on stderr; 2 wrong usage."


def example(line: str) -> str:
    """What stands below a command's help."""
    return f"Example: logix-like {line}\n\n{EXIT_CODES}"


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"logix_like {__version__}")
        raise typer.Exit


@app.callback(epilog=example("demo"))
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which training samples made the model do what it did."""
