"""What an agent must remember past its own death, in one file of the pod's emptyDir.

The file is replaced whole (write, fsync, rename, fsync of the folder), so a reader sees the old or the new record and
never a torn one. It is written before the deed that it records: a generation that is on disk may have been started, one
that is not has not been. An unreadable journal therefore ends the agent: to guess could start a generation twice.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from finetune_api.protocol import AgentState, Checkpoint, Evaluation, Exit, Model, Resumed, from_wire, to_wire


@dataclass(frozen=True)
class Record:
    """``started`` is the newest generation started, ``obeyed`` the newest that any order named; the rest is for reports.

    ``exits`` and ``resumed`` are of the newest generation started, what is committed or evaluated is of any.
    """

    started: int = 0
    obeyed: int = 0
    state: AgentState = AgentState.IDLE
    exits: List[Exit] = field(default_factory=list)
    resumed: Optional[Resumed] = None
    evaluation: Optional[Evaluation] = None
    checkpoint: Optional[Checkpoint] = None
    model: Optional[Model] = None


class Journal:
    """The file that keeps the newest :class:`Record`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "journal.json"

    def read(self) -> Record:
        """Return the newest record, an empty one before the first.

        Raises:
            ValueError: the file is not one of ours.
        """
        try:
            text = self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return Record()
        try:
            return from_wire(Record, json.loads(text))
        except ValueError as error:
            raise ValueError(str(self._file) + " cannot be read: " + str(error)) from error

    def write(self, record: Record) -> None:
        """Put ``record`` on disk; it is there when this returns.

        Raises:
            OSError: it is not (disk full, read-only).
        """
        new = self._file.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(to_wire(record), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._file)
        folder = os.open(str(self._folder), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
