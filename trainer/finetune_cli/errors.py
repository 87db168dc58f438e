"""What ends a command, one class for each exit code.

    CommandError
    ├── Damaged      1  what is there is not as it should be
    └── CannotTell   2  wrong usage, or the store did not say: nothing is known of what is there

Everything that the trainer's packages raise about a store (forbidden, unreachable, no such bucket) is the second kind. Zero means that
the answer is good, not only that there was one.
"""

from typing import ClassVar


class CommandError(Exception):
    """A reason to stop. The message is one line for the user: what, where, what to do."""

    exit_code: ClassVar[int]


class Damaged(CommandError):
    """What is there is not as it should be."""

    exit_code = 1


class CannotTell(CommandError):
    """Wrong usage, or no answer: nothing is known of what is there."""

    exit_code = 2


EXIT_CODES = "Exit codes: 0 all is well; 1 something is damaged, or was refused for safety; 2 wrong usage, or the store cannot tell."
