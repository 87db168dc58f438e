"""How much of a job's time went into training that counts, and where the rest went.

The time from the job's first start on, without what it was suspended, is accounted for piece by piece, each when it is known what it was:

    when a generation begins to train    all since the last piece was startup (the first time) or recovery: the silence before an end and
                                         noticing it, new pods, initializing. The steps that have to be done again are moved from
                                         productive to recomputation, at what a step took of late
    when progress is told                all since the last piece was productive, less what training stood still for saves
    when the job ends                    what is left was productive if it succeeded (the result was handed over)

Status holds the sums and up to when they reach, and nothing else is remembered: whichever operator process comes next goes on from there.
Only recipes tell when they begin to train, so only they have it.
"""

from finetune_api.protocol import Report
from finetune_api.status import Gang, Goodput, JobStatus, LostSeconds
from finetune_operator.plan.observation import Observation, instant, timestamp


def account(observed: Observation, status: JobStatus, gang: Gang, said: Report) -> JobStatus:
    """Return ``status``, into which node 0's report is folded, with the time since the last piece accounted for."""
    before, resumed = observed.status, status.resumed
    if observed.job.spec.recipe is None or resumed is None or resumed.generation != gang.generation:
        return status
    known = status.goodput or Goodput(until=status.start_time)
    if before.resumed is None or before.resumed.generation != gang.generation:
        spent = _begun(observed, known, gang, is_first=before.resumed is None)
        return status.model_copy(update={"goodput": _done_again(spent, before, status)})
    if status.progress == before.progress:
        return status
    return status.model_copy(update={"goodput": _trained(observed, known, before, status, said)})


def pause(status: JobStatus) -> JobStatus:
    """Return ``status`` of a job at rest, whose time does not count until it starts again."""
    if status.goodput is None:
        return status
    return status.model_copy(update={"goodput": status.goodput.model_copy(update={"until": None})})


def settle(observed: Observation, status: JobStatus, *, succeeded: bool) -> JobStatus:
    """Return ``status`` of a job that ends, with all of its time accounted for."""
    if status.goodput is None:
        return status
    seconds = _seconds_since(observed, status.goodput.until)
    productive, recovery = (seconds, 0.0) if succeeded else (0.0, seconds)
    return status.model_copy(
        update={"goodput": _with(observed, status.goodput, productive=productive, recovery=recovery)}
    )


def _begun(observed: Observation, known: Goodput, gang: Gang, *, is_first: bool) -> Goodput:
    """The generation trains from now on, and has not stood still for a save yet."""
    seconds = _seconds_since(observed, known.until or gang.start_time)
    known = known.model_copy(update={"stalled_seconds": 0.0})
    return _with(observed, known, startup=seconds) if is_first else _with(observed, known, recovery=seconds)


def _done_again(known: Goodput, before: JobStatus, status: JobStatus) -> Goodput:
    """Take what the ended generations have lost, which is known just now, from what counts."""
    counted = {attempt.generation for attempt in before.attempts if attempt.lost_steps is not None}
    lost = sum(attempt.lost_steps or 0 for attempt in status.attempts if attempt.generation not in counted)
    seconds = min(known.productive_seconds, lost * (known.step_seconds or 0.0))
    return _moved(known, productive=-seconds, recomputation=seconds)


def _trained(observed: Observation, known: Goodput, before: JobStatus, status: JobStatus, said: Report) -> Goodput:
    seconds = _seconds_since(observed, known.until)
    stalled = said.saves.total_stall_seconds if said.saves is not None else None
    stall = min(seconds, max(0.0, (stalled or 0.0) - known.stalled_seconds))
    steps = _step(status) - _step(before)
    known = known.model_copy(
        update={
            "stalled_seconds": known.stalled_seconds + stall,
            "step_seconds": float(f"{(seconds - stall) / steps:.4g}") if steps > 0 else known.step_seconds,
        }
    )
    return _with(observed, known, productive=seconds - stall, checkpoint=stall)


def _step(status: JobStatus) -> int:
    return status.progress.step if status.progress is not None else 0


def _with(observed: Observation, known: Goodput, **seconds: float) -> Goodput:
    """Add seconds to the sums, which now reach up to this instant."""
    return _moved(known, **seconds).model_copy(update={"until": timestamp(observed.now)})


def _moved(known: Goodput, *, productive: float = 0.0, **lost: float) -> Goodput:
    sums = known.lost_seconds.model_dump()
    losses = LostSeconds(**{kind: round(total + lost.get(kind, 0.0), 3) for kind, total in sums.items()})
    counted = round(known.productive_seconds + productive, 3)
    whole = counted + sum(losses.model_dump().values())
    percent = round(100 * counted / whole, 1) if whole > 0 else 0.0
    return known.model_copy(update={"productive_seconds": counted, "lost_seconds": losses, "percent": percent})


def _seconds_since(observed: Observation, since: str | None) -> float:
    """Return the seconds since an instant, both as status writes them: so no fraction of one is counted twice."""
    now = instant(timestamp(observed.now))
    return max(0.0, (now - instant(since)).total_seconds()) if since is not None else 0.0
