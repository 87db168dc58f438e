"""``kubectl-finetune``, which kubectl runs for ``kubectl finetune``, and ``kubectl_complete-finetune``, which it asks for completions."""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence

from finetune_cli.jobs.commands import app
from finetune_cli.output import fail
from finetune_cli.program import run_program
from finetune_client import ClientError, EndedOtherwise, Exists, Refused, TimedOut

NAME = "kubectl-finetune"
NO_FILES, FILES = ":4", ":0"  # what kubectl's shells do beside the completions that are printed


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        return run_program(app, NAME, arguments)
    except ClientError as error:
        fail(str(error))
        return _exit_code(error)


def _exit_code(error: ClientError) -> int:
    if isinstance(error, TimedOut):
        return 3
    return 1 if isinstance(error, (Refused, Exists, EndedOtherwise)) else 2


def main() -> None:
    """Be the program."""
    sys.exit(run(sys.argv[1:]))


def complete() -> None:
    """Print what the last word may become, as kubectl wants it: one a line, and what to do with files."""
    words = [NAME, *sys.argv[1:]]
    os.environ |= {
        "_KUBECTL_FINETUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": shlex.join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        app(prog_name=NAME)
    found = said.getvalue().strip()
    sys.stdout.write(f"{found}\n{NO_FILES}\n" if found else f"{FILES}\n")


if __name__ == "__main__":
    main()
