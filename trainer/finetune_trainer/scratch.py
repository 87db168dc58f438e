"""The part of a pod's scratch folder where things are made that are not whole yet.

Scratch outlives the workers, so that what one generation has fetched serves the next, and any of them may be killed in the middle of a
download. What it leaves behind has a name that nobody knows. So all of that lies in one folder, which each generation empties first.
"""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = "unfinished"


def discard_unfinished(scratch: Path) -> None:
    """Remove what former generations did not finish. Call before anybody on this node begins something."""
    shutil.rmtree(scratch / UNFINISHED, ignore_errors=True)


def unfinished(scratch: Path) -> Path:
    """Return where to make a file or a folder, of which there is nothing yet; renamed, it gets its place in scratch at once."""
    folder = scratch / UNFINISHED
    folder.mkdir(parents=True, exist_ok=True)
    return folder / uuid.uuid4().hex


@contextmanager
def unfinished_folder(scratch: Path) -> Iterator[Path]:
    """A folder to make something in that has its place elsewhere; gone afterwards."""
    folder = unfinished(scratch)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
