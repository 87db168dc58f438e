"""``finetune``: builds the command line, runs it, and turns every end into one line on stderr and an exit code."""

import sys
from collections.abc import Sequence

import typer

from finetune_cli.checkpoints import commands as checkpoints
from finetune_cli.errors import EXIT_CODES, CannotTell, CommandError
from finetune_cli.output import fail
from finetune_trainer.errors import TrainingError

INTERRUPTED = 130

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
    try:
        code = app(list(arguments), prog_name="finetune", standalone_mode=False)
    except CommandError as error:
        fail(str(error))
        return error.exit_code
    except typer.BadParameter as error:
        fail(error.format_message())
    except (typer.TyperException, TrainingError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'this machine'}: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    else:
        return int(code or 0)
    return CannotTell.exit_code


def main() -> None:
    """Be the program."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
