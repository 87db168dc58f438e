"""Stands in for torch.distributed.run where what torch itself does is not at stake: starts in 50 ms instead of 4 s."""

import argparse
import os
import subprocess
import time

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

NAMES = (
    "nnodes",
    "node_rank",
    "nproc_per_node",
    "master_addr",
    "master_port",
    "local_addr",
    "rdzv_id",
    "max_restarts",
    "log_dir",
)


def parse_args(arguments):
    parser = argparse.ArgumentParser()
    for name in NAMES:
        parser.add_argument("--" + name)
    parser.add_argument("--no_python", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def run(options):
    if "FAKE_TORCH_FAILS" in os.environ:
        raise RuntimeError(os.environ["FAKE_TORCH_FAILS"])
    count = int(options.nproc_per_node)
    world = {
        "WORLD_SIZE": str(count * int(options.nnodes)),
        "MASTER_ADDR": options.master_addr,
        "MASTER_PORT": options.master_port,
    }
    workers = []
    for local in range(count):
        rank = str(int(options.node_rank) * count + local)
        error_file = options.log_dir + "/error" + str(local) + ".json"
        environment = {
            **os.environ,
            **world,
            "RANK": rank,
            "LOCAL_RANK": str(local),
            "TORCHELASTIC_ERROR_FILE": error_file,
        }
        workers.append(subprocess.Popen(options.command, env=environment, start_new_session=True))
    while any(worker.poll() is None for worker in workers):
        if any(worker.poll() for worker in workers):
            raise ChildFailedError({0: workers[0]})
        time.sleep(0.02)
