"""The job file of one generation's workers: the mounted one, with what the generation's order wishes of checkpoints.

What is mounted stays as it was when the pods were made. All that is in it survives, also what this agent does not know; but of the
checkpoints only what it knows, for the order replaces the whole wish.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Mapping

from finetune_api.protocol import CheckpointWish, JobFile, from_wire, to_wire

NAME = "job.json"


def write_job_file(folder: Path, mounted: Mapping[str, Any], wish: CheckpointWish) -> Path:
    """Write the workers' job file into the folder of their generation, and return where it lies.

    Raises:
        OSError: it cannot be written (disk full); the error names the file.
    """
    known = from_wire(JobFile, mounted).checkpoint
    file = folder / NAME
    text = json.dumps({**mounted, "checkpoint": to_wire(replace(known, **asdict(wish)))})
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:  # that of a write names no file
        raise OSError(error.errno, error.strerror, str(file)) from error
    return file
