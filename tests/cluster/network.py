"""The wires: a namespace for the control plane, one for each node, a bridge between them, one cable to the machine.

::

    machine (root namespace)          NAME-host: bridge, control plane, S3         NAME-node1, NAME-node2, …
      ftcluster 198.18.0.253 ───────── machine ┐
                                               br0 198.18.0.254 ── veth1 ───────── eth0 198.18.0.1, pods 198.18.101.0/24
                                               └────────────────── veth2 ───────── eth0 198.18.0.2, pods 198.18.102.0/24

The root namespace gets that one interface, with a route to the cluster's addresses over it, and loses both with it; its
firewall and forwarding stay as they are. Every namespace knows the routes to all nodes' pods beforehand. Only 198.18.0.0/15
is used (RFC 2544), which no real network has.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.console import ClusterError
from tests.cluster.places import (
    BENCHMARK_NETWORK,
    HOST_ADDRESS,
    MACHINE_ADDRESS,
    MAX_NODES,
    NODE_NETWORK,
    node_address,
    pod_network,
)
from tests.cluster.process import run

MACHINE_LINK = "ftcluster"
_NAMESPACES = Path("/run/netns")
_INOTIFY = {"max_user_instances": 8192, "max_user_watches": 1048576}


@dataclass(frozen=True, slots=True)
class Network:
    name: str

    @property
    def host(self) -> str:
        return f"{self.name}-host"

    def node(self, index: int) -> str:
        return f"{self.name}-node{index}"

    def create_host(self) -> None:
        _raise_inotify_limits()
        run(["ip", "netns", "add", self.host])
        run(["ip", "link", "add", MACHINE_LINK, "type", "veth", "peer", "name", "machine", "netns", self.host])
        run(
            ["ip", "-batch", "-"],
            input=f"address add {MACHINE_ADDRESS}/{NODE_NETWORK.prefixlen} dev {MACHINE_LINK}\n"
            f"link set {MACHINE_LINK} up\n"
            f"route add {BENCHMARK_NETWORK} via {HOST_ADDRESS} dev {MACHINE_LINK}\n",
        )
        self._configure(
            self.host,
            "link set lo up",
            "link add br0 type bridge",
            f"address add {HOST_ADDRESS}/{NODE_NETWORK.prefixlen} dev br0",
            "link set machine master br0",
            "link set machine up",
            "link set br0 up",
            f"route add default via {MACHINE_ADDRESS}",
            *(f"route add {pod_network(index)} via {node_address(index)}" for index in range(1, MAX_NODES + 1)),
        )

    def create_node(self, index: int) -> None:
        namespace = self.node(index)
        run(["ip", "netns", "add", namespace])
        self._in(
            self.host, "ip", "link", "add", f"veth{index}", "type", "veth", "peer", "name", "eth0", "netns", namespace
        )
        self._configure(self.host, f"link set veth{index} master br0", f"link set veth{index} up")
        others = [other for other in range(1, MAX_NODES + 1) if other != index]
        self._configure(
            namespace,
            "link set lo up",
            f"address add {node_address(index)}/{NODE_NETWORK.prefixlen} dev eth0",
            "link set eth0 up",
            f"route add default via {HOST_ADDRESS}",
            *(f"route add {pod_network(other)} via {node_address(other)}" for other in others),
        )

    def cut(self, index: int) -> None:
        self._in(self.host, "ip", "link", "set", f"veth{index}", "down")

    def heal(self, index: int) -> None:
        self._in(self.host, "ip", "link", "set", f"veth{index}", "up")

    def drop_forwarded(self, index: int, port: int) -> None:
        """Drop what comes through a node to a TCP port of a pod."""
        self._in(self.node(index), "iptables", "--wait", "--insert", "FORWARD", *_to(port))

    def forward_again(self, index: int, port: int) -> None:
        self._in(self.node(index), "iptables", "--wait", "--delete", "FORWARD", *_to(port))

    def drop(self, index: int, source: str, destination: str, *, heal: bool = False) -> None:
        """Lose all that a pod of a node sends to an address, or no longer. Behind kube-proxy: the address of no Service."""
        rule = ("FORWARD", "--source", source, "--destination", destination, "--jump", "DROP")
        self._in(self.node(index), "iptables", "--wait", "--delete" if heal else "--insert", *rule)

    def slow(self, index: int, rate: str) -> None:
        """Let no more than so many bits a second through a node's cable, in each direction."""
        bucket = ("tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
        for namespace, interface in self._ends(index):
            self._in(namespace, "tc", "qdisc", "replace", "dev", interface, "root", *bucket)

    def fast(self, index: int) -> None:
        for namespace, interface in self._ends(index):
            self._in(namespace, "tc", "qdisc", "delete", "dev", interface, "root")

    def _ends(self, index: int) -> tuple[tuple[str, str], ...]:
        return (self.host, f"veth{index}"), (self.node(index), "eth0")

    def remove(self) -> None:
        """Remove whatever of it exists; a namespace goes for good once the last process in it has gone."""
        with suppress(ClusterError):
            run(["ip", "link", "delete", MACHINE_LINK])
        for namespace in self.namespaces():
            run(["ip", "netns", "delete", namespace])
        for _ in range(100):
            if not (Path("/sys/class/net") / MACHINE_LINK).exists():
                return
            time.sleep(0.02)
        raise ClusterError(f"interface {MACHINE_LINK} cannot be removed")

    def namespaces(self) -> list[str]:
        return sorted(path.name for path in _NAMESPACES.glob(f"{self.name}-*")) if _NAMESPACES.exists() else []

    def _configure(self, namespace: str, *lines: str) -> None:
        self._in(namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        run(["nsenter", f"--net={_NAMESPACES / namespace}", "ip", "-batch", "-"], input="\n".join(lines) + "\n")

    def _in(self, namespace: str, *argv: str) -> str:
        return run(["nsenter", f"--net={_NAMESPACES / namespace}", *argv])


def _to(port: int) -> tuple[str, ...]:
    return ("--protocol", "tcp", "--destination-port", str(port), "--jump", "DROP")


def _raise_inotify_limits() -> None:
    """128 instances are fewer than two kubelets and their containers need; raised for good, never lowered."""
    for name, wanted in _INOTIFY.items():
        file = Path("/proc/sys/fs/inotify") / name
        if int(file.read_text()) < wanted:
            file.write_text(str(wanted))


def had_namespace_mount() -> bool:
    """Whether /run/netns is a mount point: the first `ip netns add` on a machine makes it one and never undoes it."""
    return any(line.split()[1] == str(_NAMESPACES) for line in Path("/proc/mounts").read_text().splitlines())


def remove_namespace_mount() -> None:
    while had_namespace_mount() and not any(_NAMESPACES.iterdir()):
        run(["umount", str(_NAMESPACES)])
    with suppress(OSError):
        _NAMESPACES.rmdir()
