"""A gang member that all-reduces for ever: until the file ``finish`` is there, or SIGTERM says to save (all agree, then 75).

The file ``hang-GENERATION-RANK`` makes it hang while it loads its batch.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

folder = Path(sys.argv[1])
rank, generation = int(os.environ["RANK"]), int(os.environ["FINETUNE_GENERATION"])
told_to_stop = []
signal.signal(signal.SIGTERM, lambda *_: told_to_stop.append(1))
agent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
agent.setblocking(False)


def beat(kind, value):
    try:
        message = {"kind": kind, "rank": rank, "generation": generation, kind: value}
        agent.sendto(json.dumps(message).encode(), os.environ["FINETUNE_PROGRESS_SOCKET"])
    except BlockingIOError:
        pass


def end(code):
    """As the trainer ends: with a peer gone first, the process group's own threads may abort an orderly exit."""
    sys.stderr.flush()
    os._exit(code)


def load_batch():
    if (folder / f"hang-{generation}-{rank}").exists():
        time.sleep(1e6)


stacks = Path(os.environ["FINETUNE_STACKS_FOLDER"]) / f"{rank}-{os.getpid()}"
faulthandler.register(signal.SIGUSR1, file=stacks.open("a"))
dist.init_process_group("gloo")
assert dist.get_world_size() == int(os.environ["FINETUNE_WORLD_SIZE"])
(folder / f"pid-{generation}-{rank}").write_text(str(os.getpid()))
print("ready", flush=True)
step = 0
while True:
    load_batch()
    flags = torch.tensor([float(bool(told_to_stop)), float((folder / "finish").exists()), 1.0])
    try:
        dist.all_reduce(flags)
    except RuntimeError:
        traceback.print_exc()
        end(1)
    step += 1
    beat("heartbeat", {"phase": "Training", "step": step})
    if rank == 0:
        beat("progress", {"step": step, "loss": 1.0 / step})
    if flags[0]:
        end(75)
    if flags[1]:
        end(0)
    time.sleep(0.02)
