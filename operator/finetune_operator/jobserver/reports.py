"""The newest report of each agent, in memory: agents repeat themselves, so an operator that starts anew soon knows it all again.

Every message counts as hearing an agent, a question as much as a report. A connection that is open does not: one to a node that is cut off
stays so for a long time.

Nor does what was said before something that is known: a connection that was given up may still deliver, seconds after the next one has.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType

from finetune_api.protocol import Report
from finetune_operator.plan.observation import Heard, Hearing
from finetune_operator.plan.silence import LATE_SECONDS

FORMER_INSTANCES = 8  # of an agent, whose last words may still be on their way
LAST_WORDS = 2  # that an agent may have under way when it dies: one on a connection that was given up, one on the next


class Reports:
    """What agents say, by pod uid."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._heard: dict[str, Heard] = {}
        self._former: dict[str, dict[str, int]] = {}  # pod uid → instance → how many of its last words have come
        self.start_listening()

    def start_listening(self) -> None:
        """Give every agent its time to be heard: this process begins to serve them, or leads from now on."""
        self._hearing = Hearing(since=self._clock(), at=self._clock())

    @property
    def hearing(self) -> Hearing:
        """Since when agents are heard without a gap."""
        return self._hearing

    @property
    def heard(self) -> Mapping[str, Heard]:
        """All newest reports."""
        return MappingProxyType(self._heard)

    def hear(self, report: Report) -> bool:
        """Take a report in, and tell whether it is news for a decision or for status."""
        known, now = self._heard.get(report.pod_uid), self._clock()
        if known is not None and self._is_outdated(report, known.report):
            return False
        self._listen(now)
        known = self._heard.get(report.pod_uid)
        steady_since = now if known is None or _was_late(known, now) else known.steady_since
        if known is None or _outcome(known.report) != _outcome(report):
            self._heard[report.pod_uid] = Heard(report=report, since=now, at=now, steady_since=steady_since)
            return True
        heard = replace(known, report=report, at=now, steady_since=steady_since)
        self._heard[report.pod_uid] = _with_step(heard, known)
        return _telling(known.report) != _telling(report) or _was_late(known, now)

    def _is_outdated(self, report: Report, known: Report) -> bool:
        """Tell whether a report was made before the one that is known. Agents of an older version do not count theirs.

        To a process that began to listen a moment ago, last words may come after those of the next instance: who goes on talking lives.
        """
        if report.instance == known.instance:
            return 0 < report.number < known.number
        former = self._former.setdefault(report.pod_uid, {})
        if former.get(report.instance, LAST_WORDS) < LAST_WORDS:
            former[report.instance] += 1
            return True
        former.pop(report.instance, None)
        former[known.instance] = 0
        if len(former) > FORMER_INSTANCES:
            del former[next(iter(former))]
        return False

    def hear_question(self, pod_uid: str) -> bool:
        """Take in that an agent has asked for its order, and tell whether that is news."""
        now = self._clock()
        self._listen(now)
        known = self._heard.get(pod_uid)
        if known is None:
            return False
        late = _was_late(known, now)
        self._heard[pod_uid] = replace(known, at=now, steady_since=now if late else known.steady_since)
        return late

    def _listen(self, now: datetime) -> None:
        gap = (now - self._hearing.at).total_seconds()
        if gap < 0:  # the clock was set back: what was heard in its future would be believed until it gets there
            self._heard = {uid: _heard_by(now, heard) for uid, heard in self._heard.items()}
        self._hearing = Hearing(since=self._hearing.since if 0 <= gap <= LATE_SECONDS else now, at=now)

    def keep_only(self, pod_uids: set[str]) -> None:
        """Forget all pods but these."""
        for uid in self._heard.keys() - pod_uids:
            del self._heard[uid]
            self._former.pop(uid, None)


def _heard_by(now: datetime, heard: Heard) -> Heard:
    """Return the same as heard no later than now."""
    step_at = None if heard.step_at is None else min(heard.step_at, now)
    steady_since = min(heard.steady_since, now)
    return replace(
        heard, since=min(heard.since, now), at=min(heard.at, now), steady_since=steady_since, step_at=step_at
    )


def _with_step(new: Heard, known: Heard) -> Heard:
    beat, before = new.report.heartbeat, known.report.heartbeat
    if beat is None or before is None or beat.step <= before.step:
        return new
    seconds = (new.at - known.step_at).total_seconds() if known.step_at else 0.0
    return replace(new, step_at=new.at, step_seconds=seconds)


def _was_late(known: Heard, now: datetime) -> bool:
    """Tell whether decisions were made without an agent that is back."""
    return (now - known.at).total_seconds() > LATE_SECONDS


def _outcome(report: Report) -> object:
    return report.instance, report.generation, report.state, tuple(report.exits), report.stalled


def _telling(report: Report) -> object:
    """What status shows; the step of a heartbeat is not, only its phase."""
    phase = report.heartbeat.phase if report.heartbeat else None
    return report.progress, report.evaluation, report.checkpoint, report.saves, report.resumed, report.model, phase
