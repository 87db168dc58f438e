"""The ranks of this generation, and how they come to one mind.

A rank that fails alone leaves its peers inside a collective until a timeout. So whatever can go wrong for a known reason on one rank
(reading data, downloading a model) runs inside :meth:`Ranks.together`, :meth:`Ranks.once_per_node` or :meth:`Ranks.once`: the
outcomes are exchanged, and the first known error is raised on every rank, with the same message and hence the same exit code.
An unknown error needs no such care: its process dies, and gloo peers of a dead process fail within 50 ms.

These exchanges use a gloo group of their own, with a timeout of a day, because one node may download while the others wait, and the
training group may be NCCL, whose collectives must not be interleaved with waiting on a file.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist

from finetune_api import contract
from finetune_trainer.errors import PortInUse, TrainingError, WrongWorld

T = TypeVar("T")

PATIENCE = timedelta(days=1)
STORE_SECONDS = 300.0  # as long as torch itself would try
STORE_PAUSE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What one rank's part of the work came to: a value, or a known error."""

    value: T | None = None
    error: TrainingError | None = None


@dataclass(frozen=True, slots=True)
class Ranks:
    """This worker's place among all, and the group in which they agree."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    agreement: Any

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank and return this rank's value; raise on all what any raised."""
        outcome = _attempt(work)
        self._settle(Outcome(error=outcome.error), self.rank)  # the value may be a model: it stays where it is
        return cast("T", outcome.value)

    def once_per_node(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the first rank of each node and return its value on all ranks of that node."""
        outcome = _attempt(work) if self.local_rank == 0 else Outcome()
        return self._settle(outcome, self.rank - self.local_rank)

    def once(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its value on all."""
        outcome = _attempt(work) if self.rank == 0 else Outcome()
        return self._settle(outcome, 0)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of each value over all ranks, in double precision, the same bits on every rank."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.agreement)
        return [float(value) for value in tensor]

    def read(self, number: torch.Tensor) -> float:
        """Return the number in a tensor of one element: on a GPU, when all that was launched before is done, collectives too.

        It is here because the agent takes a main thread that stands in this file for one that waits for its peers.
        """
        return float(number)

    def _settle(self, outcome: Outcome[T], source: int) -> T:
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.agreement)
        for each in outcomes:
            if each.error is not None:
                raise each.error
        return cast("T", outcomes[source].value)


def join_ranks(environment: Mapping[str, str]) -> Ranks:
    """Join the process group that torchrun's environment describes.

    Raises:
        PortInUse: rank 0, which holds the store, cannot.
        WrongWorld: the group has another size than the job; a worker that trained in it would train something else.
    """
    rank, size, local_rank = (int(environment.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    expected = environment.get(contract.EXPECTED_WORLD_SIZE, "")
    if expected != str(size):
        raise WrongWorld(
            f"WORLD_SIZE is {size}, but the job says {contract.EXPECTED_WORLD_SIZE}={expected or '(unset)'}"
        )
    device = _pick_device(local_rank)
    if rank != 0:
        _await_store(environment)
    try:
        dist.init_process_group(backend="nccl" if device.type == "cuda" else "gloo")
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise PortInUse(f"port {environment['MASTER_PORT']} is in use on rank 0's node") from error
    _forbid_building_operators()
    with redirect_stdout(None):  # "built successfully", of what was prebuilt, in front of what people look for
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    agreement = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(rank=rank, size=size, local_rank=local_rank, device=device, agreement=agreement)


def _await_store(environment: Mapping[str, str]) -> None:
    """Wait until rank 0 listens: a store that is tried too early is tried again after half a second at the soonest (torch 2.13)."""
    place = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    deadline = time.monotonic() + STORE_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(place, timeout=1).close()
        except OSError:
            time.sleep(STORE_PAUSE_SECONDS)
        else:
            return


def leave_ranks() -> None:
    """Leave the process group; the end of every run that did not fail."""
    dist.destroy_process_group()


def _attempt(work: Callable[[], T]) -> Outcome[T]:
    try:
        return Outcome(value=work())
    except TrainingError as error:
        return Outcome(error=error)


def _pick_device(local_rank: int) -> torch.device:
    chosen = os.environ.get("DS_ACCELERATOR")
    if chosen == "cuda":  # GPUs were asked for
        torch.cuda.init()  # type: ignore[no-untyped-call]  # raises with what is wrong with the driver or the device, where is_available only says no
    if chosen == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks the same question in its own way
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _forbid_building_operators() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives: 35 s at the first start, and a lock file when it is killed.

    Nothing else reads this table. DeepSpeed fills it when it is first looked at, by running a compiler (0.1 s).
    """
    from deepspeed.git_version_info import installed_ops

    name = "deepspeed_shm_comm"
    deepspeed.ops.__compatible_ops__ = {name: installed_ops.get(name, False)}
