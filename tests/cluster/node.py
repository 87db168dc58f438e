"""A node: containerd, a kubelet and kube-proxy in a network namespace and a control group of its own.

containerd's root is not filled by importing images into each node (a minute and more for the trainer) but cloned from the
template of `images.py`: stored blobs are hard links, unpacked layers symbolic links to the template's (overlay never writes
to a lower layer), and only the databases are copied for real. Hard links to each of the trainer's 65,000 files would do too,
but cost 5 to 15 s to make and again to remove.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.network import Network
from tests.cluster.places import CLUSTER_NETWORK, HOST_ADDRESS, node_address, pod_network
from tests.cluster.process import ControlGroup, Process, Supervisor, run, wait_for

PAUSE_IMAGE = "localhost/pause:1"
LAYERS = Path("io.containerd.snapshotter.v1.overlayfs/snapshots")


@dataclass(frozen=True, slots=True)
class Node:
    index: int
    directory: Path
    sockets: Path
    group: ControlGroup
    network: Network
    supervisor: Supervisor
    programs: Mapping[str, Path]
    authority: Path
    kubeconfigs: Path

    @property
    def name(self) -> str:
        return f"node{self.index}"

    @property
    def socket(self) -> Path:
        return self.sockets / f"{self.name}.sock"

    @property
    def containerd_root(self) -> Path:
        return self.directory / "containerd"

    def start(self, template: Path) -> None:
        self.network.create_node(self.index)
        self.group.create()
        clone_images(template, self.containerd_root)
        self._start_containerd()
        self.start_kubelet()
        self._start_proxy()

    def ctr(self, *arguments: str) -> str:
        return run(["ctr", "--address", str(self.socket), "--namespace", "k8s.io", *arguments])

    def _start_containerd(self) -> None:
        self.mend_network_of_new_pods()
        file = self.directory / "containerd.toml"
        file.write_text(
            containerd_configuration(self.containerd_root, self.sockets / self.name, self.socket)
            + f"""
[plugins."io.containerd.grpc.v1.cri"]
  # The machine may lack CAP_SYS_RESOURCE; every sandbox would die on writing its oom_score_adj.
  restrict_oom_score_adj = true
  # Pods' network namespaces among our own files, so that none is left and none of a stranger is touched.
  netns_mounts_under_state_dir = true
  sandbox_image = "{PAUSE_IMAGE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{self.directory / "cni"}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""
        )
        self._start("containerd", "containerd", "--config", str(file))
        name = f"{self.name}-containerd"
        wait_for(f"{name} takes no requests", self._look_at_containerd(), 60, self.supervisor, name)

    def _look_at_containerd(self) -> Iterator[bool]:
        """Its socket is there before the part of it that serves kubelets, and a kubelet that finds the one without the other ends."""
        log = self.supervisor.log(f"{self.name}-containerd")
        while True:
            yield log.exists() and "Start streaming server" in log.read_text(errors="replace")

    def break_network_of_new_pods(self) -> None:
        """No pod that starts here gets an address any more; those that run keep theirs. The kubelet calls its node well."""
        self._configure_network(ipam=Path("/dev/null/ipam"))

    def mend_network_of_new_pods(self) -> None:
        self._configure_network(ipam=self.directory / "ipam")

    def _configure_network(self, ipam: Path) -> None:
        file = self.directory / "cni" / "10-pods.conflist"  # containerd looks at it again when it changes
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self._cni_configuration(ipam)))

    def _cni_configuration(self, ipam: Path) -> dict[str, object]:
        """`ptp` and not `bridge`: all traffic is routed, so that a pod reaches a Service whose backend is on its own node
        (bridged answers would bypass the address translation without the br_netfilter module)."""
        addresses = {"type": "host-local", "dataDir": str(ipam)}
        ranges = {"ranges": [[{"subnet": str(pod_network(self.index))}]], "routes": [{"dst": "0.0.0.0/0"}]}
        pods = {"type": "ptp", "ipMasq": False, "ipam": {**addresses, **ranges}}
        return {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [pods, {"type": "portmap", "capabilities": {"portMappings": True}}],
        }

    def start_kubelet(self) -> None:
        file = self.directory / "kubelet.yaml"
        file.write_text(yaml.safe_dump(self._kubelet_configuration()))
        self._start(
            "kubelet",
            str(self.programs["kubelet"]),
            f"--config={file}",
            f"--kubeconfig={self.kubeconfigs / self.name}",
            f"--root-dir={self.directory / 'kubelet'}",
            f"--cert-dir={self.directory / 'kubelet-certificates'}",
            f"--hostname-override={self.name}",
            f"--node-ip={node_address(self.index)}",
        )

    def _kubelet_configuration(self) -> dict[str, object]:
        nearly_full = {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        }
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.group.name}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "clusterDNS": [str(HOST_ADDRESS)],
            "clusterDomain": "cluster.local",
            "resolvConf": "",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.authority)},
            },
            "authorization": {"mode": "Webhook"},
            # The kubelet must never tidy away images that no registry could give back.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": nearly_full,
            # Its accounting of local storage wants a file system of its own for each node.
            "localStorageCapacityIsolation": False,
            "enforceNodeAllocatable": ["pods"],
            "nodeStatusUpdateFrequency": "3s",
            "nodeLeaseDurationSeconds": 10,
            "maxPods": 100,
            "podLogsDir": str(self.directory / "pod-logs"),
            "volumePluginDir": str(self.directory / "volume-plugins"),
            "registryPullQPS": 0,
            "eventRecordQPS": 0,
        }

    def _start_proxy(self) -> None:
        file = self.directory / "kube-proxy.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                    "kind": "KubeProxyConfiguration",
                    "mode": "iptables",
                    "hostnameOverride": self.name,
                    "clientConnection": {"kubeconfig": str(self.kubeconfigs / "kube-proxy")},
                    "clusterCIDR": str(CLUSTER_NETWORK),
                    # Limits of connection tracking belong to the machine's own namespace, which is not ours to set.
                    "conntrack": {"maxPerCore": 0, "min": 0},
                }
            )
        )
        self._start("kube-proxy", str(self.programs["kube-proxy"]), f"--config={file}")

    def kubelet(self) -> Process:
        return self.supervisor.find(f"{self.name}-kubelet")

    def _start(self, part: str, *argv: str) -> None:
        self.supervisor.start(f"{self.name}-{part}", argv, namespace=self.network.node(self.index))


def containerd_configuration(root: Path, state: Path, socket: Path) -> str:
    return f"""version = 2
root = "{root}"
state = "{state}"
[grpc]
  address = "{socket}"
"""


def clone_images(template: Path, root: Path) -> None:
    """Make a containerd root with the template's images. The template's layers must stay for as long as the clone lives."""

    def leave_out_layers(directory: str, names: list[str]) -> list[str]:
        return names if Path(directory) == template / LAYERS else []

    shutil.copytree(template, root, symlinks=True, ignore=leave_out_layers, copy_function=_copy_or_link)
    for layer in (template / LAYERS).iterdir():
        (root / LAYERS / layer.name).symlink_to(layer)


def _copy_or_link(source: str, target: str) -> None:
    if source.endswith(".db"):
        shutil.copy2(source, target)
    else:
        os.link(source, target)
