"""What is shown while somebody waits for a job: on a terminal a bar with the time that is left, elsewhere a line whenever something turns.

It goes to stderr, so that the answer stands alone on stdout.
"""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_api.status import ConditionType
from finetune_cli.jobs.times import until
from finetune_cli.output import harmless, tell
from finetune_client import Job

BAR_WIDTH = 40


def show_progress(changes: Iterator[Job]) -> Job:
    """Follow a job to the end of its changes, and return it as it was last."""
    return _on_terminal(changes) if sys.stderr.isatty() else _line_by_line(changes)


def _on_terminal(changes: Iterator[Job]) -> Job:
    shown = [next(changes)]
    # Drawn anew every second: the time that is left runs down between two changes.
    with Live(get_renderable=lambda: _picture(shown[0]), console=Console(stderr=True), refresh_per_second=1) as live:
        for job in changes:
            shown[0] = job
            live.refresh()
    return shown[0]


def _line_by_line(changes: Iterator[Job]) -> Job:
    told: tuple[object, ...] = ()
    for job in changes:
        turn = _turn(job)
        if turn != told:
            tell(_line(job))
        told = turn
    return job


def _turn(job: Job) -> tuple[object, ...]:
    """Return what is worth a line when it changes: progress counts in tenths."""
    ready, progress = job.condition(ConditionType.READY), job.status.progress
    tenths = progress.percent // 10 if progress and progress.percent is not None else None
    return job.status.phase, ready.reason if ready else None, tenths


def _line(job: Job) -> str:
    return f"{job.name}: {', '.join(filter(None, [job.status.phase or 'Pending', _steps(job), _message(job)]))}"


def _steps(job: Job) -> str:
    progress = job.status.progress
    if progress is None:
        return ""
    of = f" of {progress.total_steps}" if progress.total_steps else ""
    left = until(progress.estimated_completion_time, datetime.now(UTC)) if not job.is_final else ""
    return f"{progress.step}{of} steps" + (f", {left} left" if left not in ("", "now") else "")


def _message(job: Job) -> str:
    ready = job.condition(ConditionType.READY)
    return f"{ready.reason}: {ready.message}" if ready else "the operator has not looked at it yet"


def _picture(job: Job) -> Group:
    progress = job.status.progress
    row = Table.grid(padding=(0, 1))
    if progress is not None and progress.percent is not None:
        bar = ProgressBar(total=100, completed=progress.percent, width=BAR_WIDTH)
        row.add_row(Text(job.name, style="bold"), job.status.phase or "", bar, f"{progress.percent}%", _steps(job))
    else:
        row.add_row(Text(job.name, style="bold"), job.status.phase or "", _steps(job))
    return Group(row, Text(harmless(_message(job)), style="dim"))
