"""Where things lie, and the numbers of the network.

Slow things are cached under ``~/.cache/finetune-operator`` so that a clean clone starts warm. The run directory lies
there too, because nodes share blobs with the image template by hard links, which do not cross file systems. Sockets lie
under ``/run``, because a Unix socket's path may have 107 characters only.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
GO = Path(__file__).resolve().parent / "go"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"
RUN = CACHE / "run"
SOCKETS = Path("/run/finetune-cluster")

HOST_ADDRESS = IPv4Address("198.18.0.254")
MACHINE_ADDRESS = IPv4Address("198.18.0.253")
NODE_NETWORK = IPv4Network("198.18.0.0/24")
CLUSTER_NETWORK = IPv4Network("198.18.0.0/16")
SERVICE_NETWORK = IPv4Network("198.19.0.0/24")
BENCHMARK_NETWORK = IPv4Network("198.18.0.0/15")
API_PORT = 6443
S3_PORT = 8333

MAX_NODES = 16
"""Routes to this many nodes' pods are laid at once, so that a node that joins later needs no change of the others."""


def node_address(index: int) -> IPv4Address:
    return NODE_NETWORK[index]


def pod_network(index: int) -> IPv4Network:
    return IPv4Network(f"198.18.{100 + index}.0/24")
