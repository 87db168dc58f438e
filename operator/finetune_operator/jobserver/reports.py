"""The newest report of each agent, in memory: agents repeat themselves, so an operator that starts anew soon knows it all again.

What an agent has not said since ``listening_since`` it may have said to the leader before: its silence counts from then on, no sooner.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType

from finetune_api.protocol import Report
from finetune_operator.plan.observation import Heard


class Reports:
    """What agents say, by pod uid."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._heard: dict[str, Heard] = {}
        self.listening_since = clock()

    def start_listening(self) -> None:
        """This process leads from now on."""
        self.listening_since = self._clock()

    @property
    def heard(self) -> Mapping[str, Heard]:
        """All newest reports."""
        return MappingProxyType(self._heard)

    def hear(self, report: Report) -> bool:
        """Take a report in, and tell whether it is news for a decision or for status."""
        known, now = self._heard.get(report.pod_uid), self._clock()
        if known is None or _outcome(known.report) != _outcome(report):
            self._heard[report.pod_uid] = Heard(report=report, since=now, at=now)
            return True
        self._heard[report.pod_uid] = Heard(report=report, since=known.since, at=now)
        return _telling(known.report) != _telling(report)

    def keep_only(self, pod_uids: set[str]) -> None:
        """Forget all pods but these."""
        for uid in self._heard.keys() - pod_uids:
            del self._heard[uid]


def _outcome(report: Report) -> object:
    return report.instance, report.generation, report.state, tuple(report.exits), report.stalled


def _telling(report: Report) -> object:
    """What status shows; the step of a heartbeat is not, only its phase."""
    phase = report.heartbeat.phase if report.heartbeat else None
    return report.progress, report.evaluation, report.checkpoint, report.saves, report.resumed, report.model, phase
