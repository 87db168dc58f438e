"""How commands answer: one table for people, one JSON document for programs; errors on stderr.

rich leaves out colours and frames nothing where the output is no terminal, and is told not to wrap there either. Messages come from programs
and files of others, so control characters in them are shown, never sent to the terminal.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

WIDE = 10_000
WRAPPED = 40  # columns of the terminal that text which may be broken gets at least
GAP = 2  # between two columns
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Output(StrEnum):
    """The form of an answer."""

    TABLE = "table"
    JSON = "json"


def say(text: str, style: str = "") -> None:
    """Print a line for people."""
    console().print(harmless(text), markup=False, highlight=False, soft_wrap=True, style=style or None)


def show_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, wraps: str = "") -> None:
    """Print a table without frames, as kubectl does. On a terminal the column ``wraps`` takes the room that is left.

    Where there is none, the terminal breaks the lines: rich would cut names and numbers, and half a number looks like one.
    """
    lines = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *lines, strict=True)]
    table, paper = Table(box=None, pad_edge=False, header_style="bold"), console()
    for column, width in zip(columns, widths, strict=True):
        least = min(width, WRAPPED) if column == wraps else width
        table.add_column(column, no_wrap=column != wraps, overflow="fold", min_width=least)
    for line in lines:
        table.add_row(*line)
    paper.width = max(paper.width, sum(column.min_width or 0 for column in table.columns) + GAP * (len(columns) - 1))
    paper.print(table, markup=False, highlight=False)


def fail(message: str) -> None:
    """Print an error as one line on stderr."""
    tell("error: " + " ".join(message.split()))


def tell(text: str) -> None:
    """Print a line on stderr: no part of the answer."""
    Console(stderr=True, soft_wrap=True).print(harmless(text), markup=False, highlight=False)


def harmless(text: str) -> str:
    """Return text whose control characters are visible."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def size(number: int) -> str:
    """Return a number of bytes for people."""
    value, unit = float(number), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{number} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


def console() -> Console:
    """Return what to print on: as wide as the terminal, or, where there is none, as wide as need be."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)
