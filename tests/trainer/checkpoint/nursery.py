"""The process that all ranks of the breakage tests are forked from: it has imported everything, so a gang starts in a fraction of a second.

    python -m tests.trainer.checkpoint.nursery

Each line on stdin is the ``Drill`` of a gang to start, as JSON. Lines on stdout tell what happens, one JSON object each: which processes a
gang got, what its ranks say (see drill), and how each of them ended. They come through one pipe, so their order is
that of the events. The nursery itself runs one thread and touches neither network nor process groups, or a fork would copy half of them.
"""

import json
import os
import select
import signal
import sys
from pathlib import Path

import deepspeed  # noqa: F401  what the ranks need, imported once
import torch._dynamo
import torch._inductor.compile_fx
import torch._inductor.utils  # noqa: F401

from finetune_trainer import object_store
from finetune_trainer.checkpoint import commit, fetch, manifest, shard
from finetune_trainer.object_store import protocol, s3_connection, s3_upload
from tests.trainer.checkpoint import trainee
from tests.trainer.checkpoint.drill import Drill, run

CHUNK_BYTES = 5 * 2**20
"""Instead of 8 MiB; no S3 server takes smaller parts."""
HIDDEN = 48_000
"""A hidden layer that makes each of two ranks' shards a little longer than that: so each is an upload in two parts, of a chunk each."""


def resize() -> None:
    """Make chunks small, the model large, and pauses short."""
    trainee.HIDDEN = HIDDEN
    for module in (object_store, protocol, s3_upload, manifest, shard, fetch):
        module.CHUNK_BYTES = CHUNK_BYTES
    s3_upload.LAST_PART_CHUNKS = 1
    for module, longest in ((commit, 0.2), (s3_connection, 0.5)):
        module.FIRST_PAUSE_SECONDS, module.LONGEST_PAUSE_SECONDS = 0.02, longest


def tell(**event: object) -> None:
    os.write(1, (json.dumps(event) + "\n").encode())  # short enough for a pipe to keep whole, whoever else writes


def start(drill: Drill) -> None:
    pids = []
    for rank in range(drill.ranks):
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            run(drill, rank, tell)
        pids.append(pid)
    tell(gang=drill.gang, event="started", pids=pids)


def bury() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        tell(event="ended", pid=pid, code=os.waitstatus_to_exitcode(status))


def main() -> None:
    resize()
    dead, alarm = os.pipe()
    for end in (dead, alarm):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(alarm)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    tell(event="ready", threads=sum(1 for _ in Path("/proc/self/task").iterdir()))
    while True:
        ready, _, _ = select.select([sys.stdin, dead], [], [])
        if dead in ready:
            os.read(dead, 4096)
        bury()
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            start(Drill(**json.loads(line)))


if __name__ == "__main__":
    main()
