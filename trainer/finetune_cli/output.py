"""How commands answer: one table for people, one JSON document for programs; errors on stderr.

rich leaves out colours and frames nothing where the output is no terminal, and is told not to wrap there either.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 10_000
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Output(StrEnum):
    """The form of an answer."""

    TABLE = "table"
    JSON = "json"


def say(text: str) -> None:
    """Print a line for people."""
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def show_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table without frames, as kubectl does."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console().print(table, markup=False)


def fail(message: str) -> None:
    """Print an error as one line on stderr."""
    Console(stderr=True, soft_wrap=True).print("error: " + " ".join(message.split()), markup=False, highlight=False)


def size(number: int) -> str:
    """Return a number of bytes for people."""
    value, unit = float(number), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{number} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDE)
