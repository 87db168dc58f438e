"""What a rank does in the breakage tests: resume, train, save beside it, and say so; every number that it had is told as a hash."""

import ctypes
import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import botocore.auth
import deepspeed
import torch
import torch.distributed as dist

from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.head import Retention
from finetune_trainer.checkpoint.manifest import Position
from finetune_trainer.checkpoint.saving import ENDS_TRAINING
from finetune_trainer.errors import TrainingError
from finetune_trainer.object_store import S3ObjectStore
from tests.trainer.checkpoint.trainee import Case, new_engine, train

SAMPLES_PER_STEP = 6
Tell = Callable[..., None]


@dataclass(frozen=True)
class Drill:
    """One generation's task. Steps in ``saves`` and ``until`` count from the step that was resumed."""

    gang: int
    endpoint: str
    prefix: str
    generation: int
    folder: str
    pod: str
    """The staging folder: who gets that of an earlier generation starts in the same pod."""
    ranks: int = 2
    has_checkpoint: bool = False
    saves: list[int] = field(default_factory=list)
    """Begun when the step is done, without waiting for room."""
    until: int = 0
    retry_seconds: float = 300.0
    environment: dict[str, str] = field(default_factory=dict)
    twice: bool = False
    """Save the step that was resumed once more, before the first step."""
    clock_seconds: float = 0.0
    """How far the clock of rank 1's node, by which requests are signed, is ahead."""


def run(drill: Drill, rank: int, tell: Tell) -> None:
    """Be this rank, and end the process."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.environ.update(drill.environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(drill.ranks))
    code = 1
    try:
        with Path(drill.folder, f"gang-{drill.gang}-{rank}.log").open("a") as log:
            os.dup2(log.fileno(), 2)
        _set_clock(drill.clock_seconds * rank)
        _join(drill, rank)
        _Rank(drill, rank, lambda **event: tell(gang=drill.gang, rank=rank, **event)).train()
        code = 0
    except TrainingError as error:
        tell(gang=drill.gang, rank=rank, event="failed", error=type(error).__name__, message=str(error))
        code = error.exit_code
    except BaseException:  # noqa: BLE001  the unit of work is this process
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _set_clock(ahead_seconds: float) -> None:
    now = botocore.auth.get_current_datetime
    botocore.auth.get_current_datetime = lambda: now() + timedelta(seconds=ahead_seconds)


def _join(drill: Drill, rank: int) -> None:
    random.seed(rank)  # the jitter of pauses: a fork has copied it
    rendezvous = f"file://{drill.folder}/gang-{drill.gang}.rendezvous"
    minute = timedelta(minutes=1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=drill.ranks, timeout=minute)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


class _Rank:
    def __init__(self, drill: Drill, rank: int, tell: Tell) -> None:
        self.drill, self.rank, self.tell = drill, rank, tell
        self.engine = new_engine(Case("drill", stage=2, precision="BF16"))
        self.checkpoints = Checkpoints(
            engine=self.engine,
            store=S3ObjectStore(drill.endpoint, retry_seconds=drill.retry_seconds),
            prefix=drill.prefix,
            generation=drill.generation,
            has_checkpoint=drill.has_checkpoint,
            retention=Retention(keep=1),
            recipe_digest="recipe",
            staging=[Path(drill.pod)],
        )

    def train(self) -> None:
        position, resumed = self.checkpoints.resume()
        assert position == at(position.step), position
        self.tell(event="resumed", step=position.step, source=resumed.source.value, state=self.digest())
        if self.drill.twice:
            self.save(position.step)
        for step in range(position.step + 1, position.step + self.drill.until + 1):
            losses = train(self.engine, range(step - 1, step))
            self.tell(event="trained", step=step, losses=losses, state=self.digest())
            self.leave_together(self.collect(self.checkpoints.ended()))
            if step - position.step in self.drill.saves:
                self.save(step)
        self.leave(self.collect(self.checkpoints.wait()))
        self.tell(event="done")

    def save(self, step: int) -> None:
        """Begin to save; where a buffer is not free on every rank, wait for the saves under way first."""
        room = torch.tensor(float(self.checkpoints.has_room()))
        dist.all_reduce(room, dist.ReduceOp.MIN)
        if not room:
            self.leave(self.collect(self.checkpoints.wait()))
        self.checkpoints.begin_save(at(step))
        self.tell(event="began", step=step)

    def collect(self, outcomes) -> TrainingError | None:
        """Tell how saves ended; return the first error after which there is nothing to train for."""
        for outcome in outcomes:
            error = outcome.error
            self.tell(event="saved", step=outcome.step, error=error and type(error).__name__, message=str(error or ""))
        return next((outcome.error for outcome in outcomes if isinstance(outcome.error, ENDS_TRAINING)), None)

    def leave_together(self, error: TrainingError | None) -> None:
        """End where a rank has met such an error, all at one step and with nothing under way, as the trainer's ranks do."""
        over = torch.tensor(float(error is not None))
        dist.all_reduce(over, dist.ReduceOp.MAX)
        if over:
            rest = self.collect(self.checkpoints.wait())
            self.leave(error or rest)

    def leave(self, error: TrainingError | None) -> None:
        if error is not None:
            raise error

    def digest(self) -> str:
        """Hash what this rank owns of the master weights and moments, and the scalars."""
        digest = hashlib.sha256(json.dumps(state.scalars(self.engine), sort_keys=True).encode())
        for part in state.owned(self.engine):
            for view in part.views:
                digest.update(view.numpy().tobytes())
        return digest.hexdigest()


def at(step: int) -> Position:
    """Return the position behind a step."""
    return Position(step, SAMPLES_PER_STEP * step)
