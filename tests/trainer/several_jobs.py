"""A worker that trains one job after the other in one process group: starting one costs ten seconds, training a tiny model none.

``python -m tests.trainer.several_jobs FOLDER`` under torchrun. Each case is a folder with recipe.json and job.json; its outcome on
each rank goes into ``outcome-<rank>.json``: the exit code, the message.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3

from finetune_api import contract
from finetune_trainer import __main__ as program
from finetune_trainer.errors import TrainingError
from finetune_trainer.object_store import split_uri
from finetune_trainer.progress import Reporter
from finetune_trainer.stop import StopRequest

BEFORE = "TEST_BEFORE"
"""Environment of a case: what somebody does before it, as JSON."""
STOP_AT_LOOK = "TEST_STOP_AT_LOOK"
"""Environment of a case: rank 0, and no other, hears SIGTERM when it looks for the so-manieth time."""


class StopAtLook(StopRequest):
    """The loop looks once before the first step and once per step."""

    def __init__(self, look: int) -> None:
        self._looks_left = look

    @property
    def requested(self) -> bool:
        self._looks_left -= 1
        return self._looks_left == 0


class Somebody:
    """Who changes, before a case, what lies in the store, or gives the job another pod."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        storage = json.loads(Path(environment[contract.JOB_FILE_VARIABLE]).read_text())["storage"]
        self._s3 = boto3.resource("s3", endpoint_url=storage["endpoint"])
        self._staging = Path(environment["FINETUNE_STAGING_FOLDER"])

    def puts(self, source: str, uri: str) -> None:
        """Write a file, or all files of a folder, under a URI."""
        path, (bucket, key) = Path(source), split_uri(uri)
        for file, name in (
            [(path, key)] if path.is_file() else [(each, f"{key}/{each.name}") for each in path.iterdir()]
        ):
            self._s3.Object(bucket, name).put(Body=file.read_bytes())

    def empties(self, uri: str) -> None:
        bucket, key = split_uri(uri)
        for found in self._s3.Bucket(bucket).objects.filter(Prefix=key):
            found.delete()

    def makes_bucket(self, bucket: str) -> None:
        self._s3.create_bucket(Bucket=bucket)

    def deletes_bucket(self, bucket: str) -> None:
        self.empties(f"s3://{bucket}")
        self._s3.Bucket(bucket).delete()

    def replaces_pod(self) -> None:
        shutil.rmtree(self._staging)


def run_all(folder: Path) -> None:
    program.quieten()
    from deepspeed.accelerator import get_accelerator

    from finetune_trainer.ranks import join_ranks, leave_ranks

    ranks = join_ranks(os.environ)
    # DeepSpeed refuses FP16 on CPUs without instructions for it; PyTorch computes it on any, slowly.
    get_accelerator().is_fp16_supported = lambda: True
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        outcome = run_one(case, ranks)
        (case / f"outcome-{ranks.rank}.json").write_text(json.dumps(outcome))
    leave_ranks()


def run_one(case: Path, ranks: Any) -> dict[str, object]:
    from finetune_trainer.job import read_job
    from finetune_trainer.train import train

    environment = os.environ | json.loads((case / "environment.json").read_text())
    if ranks.rank == 0:
        for deed, *arguments in json.loads(environment.get(BEFORE, "[]")):
            getattr(Somebody(environment), deed)(*arguments)
    stop = StopAtLook(int(environment.get(STOP_AT_LOOK, "0")) if ranks.rank == 0 else 0)
    try:
        reporter = Reporter(environment)
        reporter._open().setblocking(True)  # these tests count beats, which a busy machine may drop
        train(read_job(environment), ranks, reporter, stop)
    except TrainingError as error:
        return {"code": int(error.exit_code), "message": str(error)}
    except Exception:  # noqa: BLE001  a bug; the next cases may still tell something
        return {"code": int(contract.ExitCode.ERROR), "message": traceback.format_exc()}
    return {"code": int(contract.ExitCode.OK), "message": ""}


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
