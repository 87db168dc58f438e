"""``python -m finetune_trainer``: one worker, started by torchrun or by the agent's warm launcher.

Every end is told three ways: the exit code (contract), a beat to the agent, and the error file that torchrun reads. A known reason is one
line on stderr; anything else is a bug or the machine's doing and shows its traceback.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping

from finetune_api.contract import ExitCode
from finetune_trainer.errors import TrainingError
from finetune_trainer.progress import Reporter, one_line
from finetune_trainer.stacks import show_stacks_when_asked
from finetune_trainer.stop import StopRequest


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Run one worker to its end and return its exit code."""
    stop = StopRequest(environment)
    stop.listen()
    show_stacks_when_asked(environment)
    reporter = Reporter(environment)
    reporter.alive()
    try:
        _work(environment, reporter, stop)
    except TrainingError as error:
        print(f"{error.exit_code.name}: {one_line(str(error))}", file=sys.stderr, flush=True)  # noqa: T201
        return _end(reporter, error, error.exit_code, str(error))
    except Exception as error:  # noqa: BLE001  the unit of work is this process
        traceback.print_exc()
        return _end(reporter, error, ExitCode.ERROR, traceback.format_exception_only(error)[-1])
    return ExitCode.OK


def _work(environment: Mapping[str, str], reporter: Reporter, stop: StopRequest) -> None:
    quieten()
    from finetune_trainer.job import read_job
    from finetune_trainer.ranks import join_ranks, leave_ranks  # the imports take seconds: the first beat must not wait
    from finetune_trainer.train import train

    job = read_job(environment)
    ranks = join_ranks(environment)
    train(job, ranks, reporter, stop)
    leave_ranks()


def _end(reporter: Reporter, error: Exception, code: int, message: str) -> int:
    """Tell why this worker ends, to the agent and in torchrun's error file."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    reporter.failure(code, message)
    get_error_handler().record_exception(error)
    return code


def quieten() -> None:
    """Leave the log to what our users can act on."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # peers that failed may still hold a collective open, and its destructor would wait for them
