"""What must be true of every version of a job and of its pods, and of the starts of its workers. Pure; each promise broken is a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.operator import kstatus

Body = Mapping[str, Any]
Members = Mapping[int, str]
"""Node rank → name of the pod."""
GAVE_WAY = "GaveWay"
Start = tuple[int, int, str]
"""Generation, global rank, name of the pod."""


def broken_by_version(before: Body | None, after: Body) -> Iterator[str]:
    """Compare a job with the version before it. Versions may be missing between the two: all of this holds over any distance."""
    new = after.get("status") or {}
    old = (before.get("status") if before else None) or {}
    if not new:
        if old:
            yield "status is gone"
        return
    try:
        kstatus.check(dict(after))
    except AssertionError as error:
        yield f"kstatus: {error} ({_conditions(new)}, phase {new.get('phase')})"
    yield from _broken_gang(old.get("gang") or {}, new.get("gang") or {})
    yield from _broken_counts(old, new)
    yield from _broken_end(old, new)
    limit = after["spec"].get("recovery", {}).get("maxRestarts", 8)
    for entry in (new.get("restarts") or {}).get("byReason", ()):
        if entry["used"] > limit:
            yield f"{entry['used']} restarts used of {limit} for {entry['reason']}"


def _broken_gang(old: Body, new: Body) -> Iterator[str]:
    if old.get("generation", 0) > new.get("generation", 0):
        yield f"generation fell from {old['generation']} to {new.get('generation')}"
    members = new.get("members", [])
    ranks, uids = [member["rank"] for member in members], [member["uid"] for member in members]
    if members and (sorted(ranks) != list(range(new["nodes"])) or len(set(uids)) != len(uids)):
        yield f"generation {new['generation']} is no gang of {new['nodes']}: {members}"
    is_same = old.get("generation") == new.get("generation")
    for name in ("members", "masterAddress", "masterPort"):
        if is_same and old.get("members") and old.get(name) != new.get(name):
            yield f"{name} of generation {new['generation']} changed: {old.get(name)}, {new.get(name)}"


def _broken_counts(old: Body, new: Body) -> Iterator[str]:
    committed = (old.get("checkpoint") or {}).get("step", 0)
    told = (new.get("checkpoint") or {}).get("step", 0)
    if told < committed:
        yield f"the committed step fell from {committed} to {told}"
    resumed, known = new.get("resumed") or {}, old.get("resumed") or {}
    if resumed.get("generation") != known.get("generation") and resumed.get("step", committed) < committed:
        yield f"generation {resumed['generation']} resumed at step {resumed['step']}, and {committed} was committed"
    if (old.get("restarts") or {}).get("total", 0) > (new.get("restarts") or {}).get("total", 0):
        yield "restarts fell"
    ended = [attempt["generation"] for attempt in new.get("attempts", ())]
    if ended != sorted(set(ended)) or (ended and ended[-1] >= new["gang"]["generation"] and not _is_final(new)):
        yield f"attempts {ended} of a job in generation {new['gang']['generation']}"


def _broken_end(old: Body, new: Body) -> Iterator[str]:
    if _is_final(old) and old != new:
        yield "a finished job changed"


def _is_final(status: Body) -> bool:
    return bool({"Complete", "Failed"} & {kind for kind, holds in _conditions(status).items() if holds == "True"})


def _conditions(status: Body) -> dict[str, str]:
    return {condition["type"]: condition["status"] for condition in status.get("conditions", ())}


def broken_by_pods(pods: Iterable[Body]) -> Iterator[str]:
    """Look at all pods of a job at one time: no two that live are made for the same rank of the same generation."""
    labels = [pod["metadata"]["labels"] for pod in pods if lives(pod)]
    places = Counter((entry["finetune.dev/generation"], entry["finetune.dev/rank"]) for entry in labels)
    for (generation, rank), count in places.items():
        if count > 1:
            yield f"{count} pods live for rank {rank} of generation {generation}"


def lives(pod: Body) -> bool:
    """Tell whether a pod is neither over nor asked to go."""
    is_over = pod["status"].get("phase") in ("Succeeded", "Failed")
    return not is_over and "deletionTimestamp" not in pod["metadata"]


def broken_by_starts(starts: Iterable[Start], gangs: Mapping[int, Members], processes: int) -> Iterator[str]:
    """Compare what workers have written down at their starts with the gangs that status committed."""
    seen: dict[tuple[int, int], str] = {}
    for generation, rank, pod in sorted(starts):
        if (generation, rank) in seen:
            yield f"rank {rank} of generation {generation} started twice: in {seen[generation, rank]} and in {pod}"
        seen[generation, rank] = pod
        member = gangs.get(generation, {}).get(rank // processes)
        if member is not None and member != pod:
            yield f"rank {rank} of generation {generation} ran in {pod}; its member is {member}"
        if generation > max(gangs, default=0):
            yield f"generation {generation} ran and was never committed"


def broken_by_outcome(body: Body, touches: int) -> Iterator[str]:
    """Look at a job that has ended: whatever befell it ends well, and each time that it was touched costs one generation at most.

    A gang that could not be placed as a whole beside all others and gave its places back was touched by nobody, and lost nothing.
    """
    status = body["status"]
    if status["phase"] != "Succeeded":
        yield f"ended {status['phase']}: {next(c['message'] for c in status['conditions'] if c['type'] == 'Ready')}"
    attempts = status.get("attempts", ())
    generations = status["gang"]["generation"] - 1 - sum(attempt["reason"] == GAVE_WAY for attempt in attempts)
    if generations > touches:
        said = ", ".join(f"{a['generation']} {a['reason']}" for a in attempts)
        yield f"touched {touches} times and restarted {generations} times ({said})"
