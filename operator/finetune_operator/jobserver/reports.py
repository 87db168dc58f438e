"""The newest report of each agent, in memory: agents repeat themselves, so an operator that starts anew soon knows it all again."""

import dataclasses
from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType

from finetune_api.protocol import Exit, Report
from finetune_operator.plan.observation import Heard

LARGEST = 2**53
TEXT_LIMIT = 2048


def check_plausible(value: object, path: str = "$") -> None:
    """Refuse numbers and texts that status cannot hold: one pod's report must not keep its job from being planned or stored.

    Raises:
        ValueError: with the path of what is out of range.
    """
    if isinstance(value, Report) and not (0 < value.port < 65536 and len(value.address) <= 64):
        raise ValueError("$.port, $.address: out of range")
    if dataclasses.is_dataclass(value) and not isinstance(
        value, Exit
    ):  # the log of an exit may be long, and is cut in status
        for field in dataclasses.fields(value):
            check_plausible(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, Exit):
        for number in (value.generation, value.rank, value.exit_code or 0, value.signal or 0):
            if not -1 <= number < 2**31:
                raise ValueError(f"{path}: out of range")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_plausible(item, f"{path}[{index}]")
    elif isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < LARGEST:
        raise ValueError(f"{path}: out of range")
    elif isinstance(value, str) and len(value) > TEXT_LIMIT:
        raise ValueError(f"{path}: longer than {TEXT_LIMIT} characters")


class Reports:
    """What agents say, by pod uid."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._heard: dict[str, Heard] = {}

    @property
    def heard(self) -> Mapping[str, Heard]:
        """All newest reports."""
        return MappingProxyType(self._heard)

    def hear(self, report: Report) -> bool:
        """Take a report in, and tell whether it is news for a decision or for status."""
        known = self._heard.get(report.pod_uid)
        if known is None or _outcome(known.report) != _outcome(report):
            self._heard[report.pod_uid] = Heard(report=report, since=self._clock())
            return True
        self._heard[report.pod_uid] = Heard(report=report, since=known.since)
        return _telling(known.report) != _telling(report)

    def keep_only(self, pod_uids: set[str]) -> None:
        """Forget all pods but these."""
        for uid in self._heard.keys() - pod_uids:
            del self._heard[uid]


def _outcome(report: Report) -> object:
    return report.instance, report.generation, report.state, tuple(report.exits)


def _telling(report: Report) -> object:
    """What status shows; the step of a heartbeat is not, only its phase."""
    phase = report.heartbeat.phase if report.heartbeat else None
    return report.progress, report.evaluation, report.checkpoint, report.model, phase
