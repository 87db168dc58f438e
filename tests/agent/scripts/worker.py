"""A worker without torch: does what the lines of ``<folder>/rank<rank>-g<generation>`` (else ``…rank<rank>``) say, one by one."""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
rank, generation = int(os.environ["RANK"]), int(os.environ["FINETUNE_GENERATION"])
agent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def beat(kind, value):
    message = {"kind": kind, "rank": rank, "generation": generation, kind: value}
    agent.sendto(json.dumps(message).encode(), os.environ["FINETUNE_PROGRESS_SOCKET"])


def raw(data):
    agent.sendto(data, os.environ["FINETUNE_PROGRESS_SOCKET"])


def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)


def flood():
    """Send datagrams for ever, from four processes."""
    for _ in range(2):
        os.fork()
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    step = 0
    while True:
        step += 1
        checkpoint = {"step": step, "uri": "s3://x", "sizeBytes": 1, "commitTime": "now"}
        message = {"kind": "checkpoint", "rank": rank, "generation": generation, "checkpoint": checkpoint}
        sender.sendto(json.dumps(message).encode(), os.environ["FINETUNE_PROGRESS_SOCKET"])


def on_term(code):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))


def show_stacks():
    file = Path(os.environ["FINETUNE_STACKS_FOLDER"]) / f"{rank}-{os.getpid()}"
    faulthandler.register(signal.SIGUSR1, file=file.open("a"))


def train(*, steps, start=0, seconds=0.02):
    """Beat once for each step."""
    for step in range(start, start + steps + 1):
        beat("heartbeat", {"phase": "Training", "step": step, "busySeconds": seconds * (rank + 1)})
        time.sleep(seconds)


def load_batch():
    """Hang."""
    ready()
    time.sleep(1000)


def ready():
    (folder / f"pid-{generation}-{rank}").write_text(str(os.getpid()))


def grandchild():
    """Leave an orphan in a session of its own that holds our output open."""
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (folder / "grandchild").write_text(str(child.pid))


if __name__ == "__main__":
    own = folder / f"rank{rank}-g{generation}"
    lines = own if own.exists() else folder / f"rank{rank}"
    for line in lines.read_text().splitlines():
        exec(line)
