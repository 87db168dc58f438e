"""How saving goes, as status tells it, and how often to save. Pure: outcomes in, words and numbers out."""

import math
from dataclasses import replace

from finetune_api.contract import MESSAGE_LIMIT, ExitCode
from finetune_api.protocol import Saves
from finetune_trainer.checkpoint.saving import Outcome

HOURS_BETWEEN_FAILURES_PER_RANK = 50_000.0
"""What one accelerator with its share of the node, the network and the power achieves: 419 unexpected interruptions in 54 days on 16,384
GPUs (Llama 3, table 5) are one in 50,700 hours each."""

SHORTEST_SECONDS = 10.0
LONGEST_SECONDS = 3600.0
"""Failures of software know nothing of the number of ranks: an hour is the most that one should cost."""

REASONS = {
    ExitCode.STORAGE_UNAVAILABLE: "StorageUnavailable",
    ExitCode.NO_PERMISSION: "NoPermission",
    ExitCode.CHECKPOINTS_LOST: "CheckpointsLost",
}


def begun(told: Saves, *, step: int, now: str) -> Saves:
    """Return what to tell after a save began."""
    return replace(told, saving_step=step, saving_since=now, put_off=0)


def put_off(told: Saves) -> Saves:
    """Return what to tell after a save was due while there was no room."""
    return replace(told, put_off=told.put_off + 1)


def ended(told: Saves, outcome: Outcome, now: str) -> Saves:
    """Return what to tell after a save ended. Of two under way the newer is told."""
    if told.saving_step == outcome.step:
        told = replace(told, saving_step=None, saving_since=None)
    if outcome.copy_seconds is not None:
        total = (told.total_stall_seconds or 0.0) + outcome.stall_seconds
        told = replace(told, stall_seconds=outcome.stall_seconds, total_stall_seconds=total)
    if outcome.error is None:
        return replace(told, failing_since=None, reason="", message="", commit_seconds=outcome.seconds)
    return replace(
        told,
        failing_since=told.failing_since or now,
        reason=REASONS.get(outcome.error.exit_code, "SaveFailed"),
        message=f"step {outcome.step}: {outcome.error}"[:MESSAGE_LIMIT],
    )


def best_interval_seconds(*, copy_seconds: float, commit_seconds: float, ranks: int) -> float:
    """Return the seconds between saves that lose least training time.

    Young's first-order optimum, the root of twice the cost of a save times the mean time between failures (CACM 17(9), 1974; Daly's
    correction, FGCS 22(3), 2006, is below a percent while the cost is small beside it). What a save costs is taken to be its whole copy:
    also where training does not wait for it, both use the same memory. A save that takes ``commit_seconds`` beside
    training cannot be had more often than that.
    """
    between_failures = HOURS_BETWEEN_FAILURES_PER_RANK * 3600 / ranks
    best = math.sqrt(2 * copy_seconds * between_failures)
    return max(SHORTEST_SECONDS, commit_seconds, min(LONGEST_SECONDS, best))
