"""Numbers and texts that status cannot hold are refused at the door: one pod's report must not keep its job from being planned or stored."""

import dataclasses

from finetune_api.protocol import Exit, Report

LARGEST = 2**53  # what JSON's readers agree on
TEXT_LIMIT = 2048


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
            _check(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]")
    else:
        _check_scalar(value, path)


def _check_exit(end: Exit, path: str) -> None:
    """Only numbers: the texts of an exit may be long, and are cut in status."""
    for number in (end.generation, end.rank, end.exit_code or 0, end.signal or 0):
        if not -1 <= number < 2**31:
            raise ValueError(f"{path}: out of range")


def _check_scalar(value: object, path: str) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < LARGEST:
        raise ValueError(f"{path}: out of range")
    if isinstance(value, str) and len(value) > TEXT_LIMIT:
        raise ValueError(f"{path}: longer than {TEXT_LIMIT} characters")
