"""Runs the image's own torchrun in this process and writes down, as JSON, why it ended badly.

torchrun's exit code is 1 whatever happened, so the reasons are taken from the exception: a missing torch, a taken port,
workers that failed behind the back of their parents (worker.py), anything else by its text.
"""

import json
import sys
from pathlib import Path
from typing import Any, Dict, List

from finetune_agent import processes
from finetune_api.contract import ExitCode

PORT_TAKEN = ("EADDRINUSE", "address already in use")


def main(arguments: List[str]) -> int:
    """Run torchrun with ``arguments[1:]``; why it failed goes to the file ``arguments[0]``."""
    processes.die_with_parent()
    record_file, torchrun_arguments = arguments[0], arguments[1:]
    try:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run
    except ImportError as error:
        return write(record_file, ExitCode.BAD_CONFIG, "python3 in this image has no torch: " + str(error))
    try:
        run(parse_args(torchrun_arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        failures = [describe(rank, failure) for rank, failure in error.failures.items()]
        return write(record_file, ExitCode.ERROR, "torchrun: workers failed", failures)
    except Exception as error:  # noqa: BLE001  whatever it is, it is this program's one result
        return write(record_file, classify(error), "torchrun: " + type(error).__name__ + ": " + str(error))
    return 0


def classify(error: Exception) -> ExitCode:
    """Return the exit code for a torchrun that could not do its work."""
    return ExitCode.PORT_IN_USE if any(text in str(error) for text in PORT_TAKEN) else ExitCode.ERROR


def describe(rank: int, failure: Any) -> Dict[str, Any]:
    """Return what torch knows of a failed worker."""
    code = int(failure.exitcode)
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", "")
    return {
        "rank": rank,
        "localRank": failure.local_rank,
        "pid": failure.pid,
        "exitCode": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "message": str(message),
    }


def write(path: str, code: ExitCode, message: str, failures: Any = ()) -> int:
    """Leave the reasons for the agent."""
    sys.stderr.write("finetune-agent: " + message + "\n")
    Path(path).write_text(json.dumps({"message": message, "failures": list(failures)}), encoding="utf-8")
    return int(code)
