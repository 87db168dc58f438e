"""``finetune``: what needs no cluster."""

import sys
from collections.abc import Sequence

import typer

from finetune_cli.checkpoints import commands as checkpoints
from finetune_cli.errors import EXIT_CODES
from finetune_cli.program import run_program

app = typer.Typer(
    help=f"FineTuneJobs from the command line. {EXIT_CODES}",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(checkpoints.app, name="checkpoints")


@app.callback()
def finetune() -> None:
    """Hold the groups together: typer would make a single one the command itself."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    return run_program(app, "finetune", arguments)


def main() -> None:
    """Be the program."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
