"""How long workers may be silent, and who of those that are too silent is the likeliest to hold up the others.

All ranks take the same steps together: when one hangs, all fall silent within a step, and who is silent says nothing of who is the cause.
So a pod is stalled only when *all* its workers are, a gang only when all its pods are (the operator sees that), and the cause is told
apart by what their threads stand in (see stacks).

The limit in training is learned from the newest steps: several times the median, for steps are not all alike, and never below the
job's ``hang_seconds``, which covers what makes a fast step slow for once. Other phases have no rhythm that could be learned in time, so
their limits are what none of them takes between two heartbeats on any cluster. So is training's before there are steps to learn from: the
first one compiles. Before its first heartbeat a worker has no limit unless it is our trainer, which beats before it imports anything.
"""

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Collection, Deque, List, Mapping, Optional, Tuple

from finetune_api.protocol import Doing, Heartbeat, Pace, Phase, Stalled

FIRST_BEAT_SECONDS = 1800.0  # for an interpreter to start, from whatever the image lies on
LIMITS = {
    Phase.INITIALIZING: 7200.0,  # a model of hundreds of gigabytes comes in one piece
    Phase.TRAINING: 1800.0,
    Phase.EVALUATING: 1800.0,
    Phase.CHECKPOINTING: 1800.0,
    Phase.FINISHING: 7200.0,
}
MEDIAN_STEPS = 5  # so many median steps of silence are a hang
LONGEST_STEPS = 2  # unless a step has taken half of that lately
STEPS_TO_LEARN = 3
STEPS_KEPT = 32
STEPS_FOR_PACE = 16


@dataclass(frozen=True)
class Pulse:
    """A worker's newest heartbeat, and when it came by the monotonic clock."""

    heartbeat: Heartbeat
    at: float


@dataclass(frozen=True)
class Finding:
    """What a silent worker was found to be doing."""

    doing: Doing
    place: str = ""


class Watch:
    """Watches the workers of one generation in this pod."""

    def __init__(self, ranks: Collection[int], *, hang_seconds: int, must_beat: bool, now: float) -> None:
        self._rhythms = {rank: Rhythm() for rank in ranks}
        self._hang_seconds = hang_seconds
        self._must_beat = must_beat
        self._since = now

    def hear(self, pulses: Mapping[int, Pulse]) -> None:
        """Take the newest heartbeat of each worker."""
        for rank, pulse in pulses.items():
            if rank in self._rhythms:
                self._rhythms[rank].hear(pulse)

    def are_silent(self, ranks: Collection[int], now: float) -> bool:
        """Tell whether all of these workers are silent for too long. Those of a script that never spoke do not count."""
        watched = self._watched(ranks)
        return bool(self._hang_seconds and watched) and all(self._is_silent(rank, now) for rank in watched)

    def suspect(self, findings: Mapping[int, Finding], now: float) -> Optional[Stalled]:
        """Return which of the workers that were looked at is the likeliest to hold up the others."""
        suspects = [self._describe(rank, findings[rank], now) for rank in self._watched(findings)]
        return min(suspects, key=lambda suspect: suspect.innocence, default=None)

    def paces(self) -> List[Pace]:
        """Return how fast each worker is, of which enough is known."""
        paces = {rank: rhythm.pace() for rank, rhythm in sorted(self._rhythms.items())}
        return [Pace(rank, *pace) for rank, pace in paces.items() if pace is not None]

    def _watched(self, ranks: Collection[int]) -> List[int]:
        return [rank for rank in ranks if self._must_beat or self._rhythms[rank].newest is not None]

    def _is_silent(self, rank: int, now: float) -> bool:
        rhythm = self._rhythms[rank]
        return now - self._heard(rank) > rhythm.limit(self._hang_seconds)

    def _describe(self, rank: int, finding: Finding, now: float) -> Stalled:
        pulse = self._rhythms[rank].newest
        beat = pulse.heartbeat if pulse else Heartbeat(Phase.INITIALIZING)
        silent = round(now - self._heard(rank), 1)
        return Stalled(rank, beat.phase, beat.step, silent, finding.doing, finding.place)

    def _heard(self, rank: int) -> float:
        pulse = self._rhythms[rank].newest
        return pulse.at if pulse else self._since


class Rhythm:
    """What is known of one worker's steps."""

    def __init__(self) -> None:
        self.newest: Optional[Pulse] = None
        self._step_began: Optional[Pulse] = None
        self._steps: Deque[float] = deque(maxlen=STEPS_KEPT)
        self._busy: Deque[float] = deque(maxlen=STEPS_KEPT)

    def hear(self, pulse: Pulse) -> None:
        """Take a heartbeat, which may be one that is known, and may come after some that were lost."""
        beat, began = pulse.heartbeat, self._step_began
        if pulse == self.newest:
            return
        self.newest = pulse
        if beat.phase is not Phase.TRAINING:
            self._step_began = None
        elif began is None or beat.step != began.heartbeat.step:
            self._step_began = pulse
        if beat.phase is Phase.TRAINING and began is not None and beat.step > began.heartbeat.step:
            self._steps.append((pulse.at - began.at) / (beat.step - began.heartbeat.step))
            if beat.busy_seconds is not None:
                self._busy.append(beat.busy_seconds)

    def limit(self, hang_seconds: int) -> float:
        """Return for how many seconds this worker may be silent now."""
        if self.newest is None:
            return FIRST_BEAT_SECONDS
        phase = self.newest.heartbeat.phase
        if phase is not Phase.TRAINING or len(self._steps) < STEPS_TO_LEARN:
            return max(LIMITS[phase], hang_seconds)
        return max(hang_seconds, MEDIAN_STEPS * median(self._steps), LONGEST_STEPS * max(self._steps))

    def pace(self) -> Optional[Tuple[float, float]]:
        """Return the medians of the newest steps, if there are enough of them."""
        if len(self._busy) < STEPS_FOR_PACE:
            return None
        return rounded(median(self._steps)), rounded(median(self._busy))


def rounded(seconds: float) -> float:
    """Return three significant digits: the rest is noise."""
    return float(f"{seconds:.3g}")
