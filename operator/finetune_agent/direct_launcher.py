"""Starts the recipe's trainer as torchrun would, without torchrun: fresh processes, each below a parent of ours (worker.py).

What torchrun does at its start is not needed where the operator mints membership, and costs: it imports torch once more
(3 s), has the launchers of all pods wait for one another in a store of its own, so that none may be another kind of
launcher, and waits for them at the end. Here rank 0's *worker* holds the store, as it does for workers that were forked
(warm_launcher.py): pods of one gang may start theirs either way.
"""

import os
import select
import subprocess
import sys
from typing import Dict, List, NamedTuple

from finetune_agent.environment import rank_environment
from finetune_agent.launcher import ColdLauncher, Launch, LauncherEnd, Running, check
from finetune_agent.worker import END_PIPE, WELL

TRAINER = ["-u", "-m", "finetune_trainer"]


class DirectLauncher(ColdLauncher):
    """A process of its own for each worker."""

    def start(self, launch: Launch) -> Running:
        """See Launcher."""
        check(launch.order)
        program = [sys.executable, "-I", "-S", self._agent_file, "worker"]
        pipes = EndPipes.of(launch)
        try:
            for environment, sink in zip(environments(launch), pipes.sinks):  # noqa: B905  Python 3.9
                subprocess.Popen(
                    [*program, sys.executable, *TRAINER],
                    env={**environment, END_PIPE: str(sink)},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=[sink],
                )
        finally:
            pipes.close_sinks()
        return RunningWorkers(pipes.sources)


def environments(launch: Launch) -> List[Dict[str, str]]:
    """Return the environment of each local worker."""
    ranks = range(launch.order.processes_per_node)
    return [rank_environment(launch.environment, launch.order, local_rank, launch.folder) for local_rank in ranks]


class EndPipes(NamedTuple):
    """A pipe for each local rank: the worker's parent holds one end, so the other tells when it is gone."""

    sources: Dict[int, int]  # → rank
    sinks: List[int]

    @classmethod
    def of(cls, launch: Launch) -> "EndPipes":
        """Open a pipe for each worker of a launch."""
        first, count = launch.order.rank * launch.order.processes_per_node, launch.order.processes_per_node
        pairs = [os.pipe() for _ in range(count)]
        return cls({source: first + local for local, (source, _) in enumerate(pairs)}, [sink for _, sink in pairs])

    def close_sinks(self) -> None:
        """Leave that end to the workers' parents."""
        for sink in self.sinks:
            os.close(sink)

    def close(self) -> None:
        """Give up."""
        self.close_sinks()
        for source in self.sources:
            os.close(source)


class RunningWorkers:
    """Workers below parents of ours, whose ends of ``pipes`` (→ rank) tell when they are gone."""

    def __init__(self, pipes: Dict[int, int]) -> None:
        self._pipes = pipes

    def wait(self) -> LauncherEnd:
        """See Running. It ends with the first parent that is gone without a word, for nobody would tell of its worker."""
        try:
            while self._pipes:
                for source in select.select(list(self._pipes), [], [])[0]:
                    rank = self._pipes.pop(source)
                    ended_well = os.read(source, 1) == WELL
                    os.close(source)
                    if not ended_well:
                        return LauncherEnd(message="the parent process of rank " + str(rank) + "'s worker was killed")
            return LauncherEnd(exit_code=0)
        finally:
            for source in self._pipes:
                os.close(source)
