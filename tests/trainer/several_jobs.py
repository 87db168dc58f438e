"""A worker that trains one job after the other in one process group: starting one costs ten seconds, training a tiny model none.

``python -m tests.trainer.several_jobs FOLDER`` under torchrun. Each case is a folder with recipe.json and job.json; its outcome on
each rank goes into ``outcome-<rank>.json``: the exit code, the message.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from finetune_api import contract
from finetune_trainer import __main__ as program
from finetune_trainer.errors import TrainingError
from finetune_trainer.progress import Reporter
from finetune_trainer.stop import StopRequest

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
