"""Turns a fetched data file into encoded examples on the node, once, and maps them on every rank."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune_api.recipe import Columns
from finetune_trainer.data.encoded import EncodedWriter, Example
from finetune_trainer.data.records import Record, Wanted, read_records
from finetune_trainer.errors import BadData
from finetune_trainer.scratch import unfinished
from finetune_trainer.sources import Pinned, replace_folder
from finetune_trainer.tasks import Task

FORMAT = 2
"""Part of the folder's name: raise it when the arrays change."""

ALIVE_EVERY = 2000
"""Tell that we are alive after so many records."""


def encode_data(
    *,
    data: Pinned,
    model: Pinned,
    folder: Path,
    columns: Columns,
    task: Task,
    tokenizer: Any,
    scratch: Path,
    alive: Callable[[], None],
) -> Path:
    """Return the folder of the encoded examples of ``data``, whose file lies in ``folder``, making it when it is not there yet.

    Raises:
        BadData: something is wrong with the file, or it holds no example.
    """
    wanted = Wanted(text=columns.text, label=columns.label if task.needs_labels else None)
    name = _digest([FORMAT, data.digest, model.digest, task.identity, wanted.names])
    finished = scratch / "encoded" / name
    if not finished.is_dir():
        arriving = unfinished(scratch)
        try:
            records = read_records(folder / data.files[0].name, data.uri, wanted)
            _write(task.encode(_telling(records, alive), tokenizer), arriving, data.uri)
            finished.parent.mkdir(exist_ok=True)
            replace_folder(arriving, finished)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
    return finished


def _write(examples: Iterable[Example], folder: Path, source: str) -> None:
    with EncodedWriter(folder) as writer:
        writer.write(examples)
    if writer.examples == 0:
        raise BadData(f"{source}: holds too little text for one example")


def _telling(records: Iterator[Record], alive: Callable[[], None]) -> Iterator[Record]:
    for number, record in enumerate(records):
        if number % ALIVE_EVERY == 0:
            alive()
        yield record


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
