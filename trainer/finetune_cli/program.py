"""Runs a command line, and turns every end into one line on stderr and an exit code."""

from collections.abc import Sequence

import typer

from finetune_cli.errors import CannotTell, CommandError
from finetune_cli.output import fail
from finetune_trainer.errors import TrainingError

INTERRUPTED = 130


def run_program(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Errors that only some programs know pass through."""
    try:
        code = app(list(arguments), prog_name=name, standalone_mode=False)
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
