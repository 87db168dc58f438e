"""Numbers and texts that status cannot hold are refused at the door: one pod's report must not keep its job from being planned or stored."""

import dataclasses
import re
from datetime import datetime

from finetune_api.protocol import Exit, Report

LARGEST = 2**53  # what JSON's readers agree on
TEXT_LIMIT = 2048
TIMES = ("commit_time", "saving_since", "failing_since")
DURATIONS = (
    *("stall_seconds", "total_stall_seconds", "commit_seconds", "recommended_interval_seconds"),
    *("silent_seconds", "step_seconds", "busy_seconds"),
)
RFC_3339 = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})")


def check_plausible(report: Report) -> None:
    """Refuse a report that status cannot hold.

    Raises:
        ValueError: with the path of what is out of range.
    """
    if not 0 < report.port < 65536:
        raise ValueError("$.port: out of range")
    if len(report.address) > 64:
        raise ValueError("$.address: longer than 64 characters")
    _check(report, "$")


def _check(value: object, path: str) -> None:
    if isinstance(value, Exit):
        _check_exit(value, path)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_field(field.name, getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]")
    else:
        _check_scalar(value, path)


def _check_field(name: str, value: object, path: str) -> None:
    if name in TIMES and value is not None:
        _check_time(str(value), path)
    elif name in DURATIONS and isinstance(value, float) and not 0 <= value < LARGEST:
        raise ValueError(f"{path}: out of range")
    else:
        _check(value, path)


def _check_time(text: str, path: str) -> None:
    """The API server refuses a whole status for one time that is none. A year at either end of what there is has no UTC."""
    try:
        is_time = RFC_3339.fullmatch(text) is not None and 1970 <= datetime.fromisoformat(text).year < 9999
    except ValueError:  # the 30th of February
        is_time = False
    if not is_time:
        raise ValueError(f"{path}: must be a time such as 2026-01-01T00:00:00Z")


def _check_exit(end: Exit, path: str) -> None:
    """Only numbers: the texts of an exit may be long, and are cut in status."""
    for number in (end.generation, end.rank, end.exit_code or 0, end.signal or 0):
        if not -1 <= number < 2**31:
            raise ValueError(f"{path}: out of range")
    if end.memory is not None:
        _check(end.memory, f"{path}.memory")


def _check_scalar(value: object, path: str) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < LARGEST:
        raise ValueError(f"{path}: out of range")
    if isinstance(value, str) and len(value) > TEXT_LIMIT:
        raise ValueError(f"{path}: longer than {TEXT_LIMIT} characters")
