"""The cluster is what it says: real nodes, a network, DNS, S3, faults that heal, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, ClusterError, ownership
from tests.cluster.cluster import take_down
from tests.cluster.places import PROJECT, RUN, SOCKETS
from tests.cluster.process import ControlGroup

_SERVE = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)"
# A pod is ready before each node's kube-proxy has heard of it: a Service answers soon, not at once.
_FETCH = """
import sys, time, urllib.error, urllib.request
for left in reversed(range(30)):
    try:
        print(urllib.request.urlopen(sys.argv[1], timeout=5).status)
        break
    except urllib.error.URLError:
        if not left: raise
        time.sleep(1)
"""
_RESOLVE = "import socket; print(socket.gethostbyname('kubernetes.default'))"


def pod(cluster: Cluster, name: str, namespace: str, node: str) -> dict[str, Any]:
    """A web server on port 8000, as restricted as a pod can be."""
    container = {
        "name": "web",
        "image": cluster.operator_image,
        "command": ["python", "-c", _SERVE],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"web": name}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        },
    }


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace with two pods, `one` on node1 and `two` on node2, and a Service in front of `one`."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    spec = {"selector": {"web": "one"}, "ports": [{"port": 80, "targetPort": 8000}]}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "one", "namespace": name}, "spec": spec}
    try:
        cluster.kubectl("wait", "-n", name, "--for=create", "serviceaccount/default", "--timeout=60s")
        cluster.apply([pod(cluster, "one", name, "node1"), pod(cluster, "two", name, "node2"), service])
        cluster.kubectl("wait", "-n", name, "--for=condition=Ready", "pod/one", "pod/two", "--timeout=90s")
        yield name
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")


def run_in(cluster: Cluster, namespace: str, name: str, code: str, *arguments: str) -> str:
    return cluster.kubectl("exec", "-n", namespace, name, "--", "python", "-c", code, *arguments).strip()


@pytest.mark.skipif(ownership.current() is not None, reason="another cluster is up, and there can be one only")
def test_nothing_is_left_after_down() -> None:
    """In a process of its own, and before the session's cluster exists: see the order in conftest."""
    before = Footprint.now()
    code = "from tests.cluster import Cluster; Cluster.start(nodes=1, load_images=False)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=300)
    assert Footprint.now().beyond(before) == {}


@pytest.mark.skipif(ownership.current() is not None, reason="another cluster is up, and there can be one only")
def test_what_a_killed_process_leaves_is_cleared_by_the_next() -> None:
    before = Footprint.now()
    code = "import os; from tests.cluster import Cluster; Cluster.start(nodes=1, load_images=False); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False, timeout=300)
    assert Footprint.now().beyond(before) != {}
    take_down()
    assert Footprint.now().beyond(before) == {}


def test_a_cache_that_the_store_would_not_see_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    assert tmp_path.is_relative_to("/tmp")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.cluster", "build"],
        cwd=PROJECT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "is in /tmp, of which the S3 server sees nothing: set HOME or XDG_CACHE_HOME" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def readiness(cluster: Cluster) -> dict[str, str]:
    """Return what the API server says of each node: True, False, or Unknown when it hears nothing."""
    nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    ready = {node["metadata"]["name"]: node["status"]["conditions"] for node in nodes}
    return {name: next(c["status"] for c in conditions if c["type"] == "Ready") for name, conditions in ready.items()}


def test_nodes_are_ready(cluster: Cluster) -> None:
    for node in cluster.nodes():
        cluster.wait_for_ready(node.name)
    assert readiness(cluster) == {"node1": "True", "node2": "True"}


@pytest.mark.parametrize(("source", "target"), [("one", "two"), ("two", "one")])
def test_pods_on_two_nodes_reach_one_another(cluster: Cluster, namespace: str, source: str, target: str) -> None:
    address = cluster.get("pod", target, namespace)["status"]["podIP"]
    assert run_in(cluster, namespace, source, _FETCH, f"http://{address}:8000/") == "200"


@pytest.mark.parametrize("source", ["one", "two"], ids=["from the backend's own node", "from another node"])
def test_a_service_reaches_its_pod_by_name(cluster: Cluster, namespace: str, source: str) -> None:
    assert run_in(cluster, namespace, source, _FETCH, f"http://one.{namespace}.svc.cluster.local/") == "200"


def test_dns_resolves_the_api_server(cluster: Cluster, namespace: str) -> None:
    assert run_in(cluster, namespace, "two", _RESOLVE) == "198.19.0.1"


def test_logs_of_a_pod_can_be_read(cluster: Cluster, namespace: str) -> None:
    assert "Serving HTTP" in cluster.kubectl("logs", "-n", namespace, "two")


def test_a_user_has_no_rights_until_given_some(cluster: Cluster) -> None:
    config = cluster.user_kubeconfig("alice", ["team-a"])
    said = cluster.kubectl("--kubeconfig", str(config), "auth", "whoami", "-o", "jsonpath={.status.userInfo}")
    assert '"username":"alice"' in said
    assert "team-a" in said
    with pytest.raises(ClusterError, match="forbidden"):
        cluster.kubectl("--kubeconfig", str(config), "get", "pods")


def test_s3_lets_one_of_two_conditional_writers_win(cluster: Cluster) -> None:
    client = cluster.s3.client()
    bucket = f"test-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="HEAD", Body=b"first", IfNoneMatch="*")
    with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="HEAD", Body=b"second", IfNoneMatch="*")
    assert client.get_object(Bucket=bucket, Key="HEAD")["Body"].read() == b"first"


def test_s3_is_reached_from_a_pod(cluster: Cluster, namespace: str) -> None:
    code = "import socket, sys; socket.create_connection(('198.18.0.254', 8333), 5); print('connected')"
    assert run_in(cluster, namespace, "one", code) == "connected"


def test_a_killed_container_starts_again(cluster: Cluster, namespace: str) -> None:
    before = cluster.get("pod", "one", namespace)["status"]["containerStatuses"][0]["containerID"]
    cluster.kill_container(namespace, "one", "web")
    changed = "--for=jsonpath={.status.containerStatuses[0].restartCount}=1"
    cluster.kubectl("wait", "-n", namespace, changed, "pod/one", "--timeout=60s")
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/one", "--timeout=60s")
    after = cluster.get("pod", "one", namespace)["status"]["containerStatuses"][0]
    assert after["containerID"] != before
    assert after["lastState"]["terminated"]["exitCode"] == 137


@pytest.mark.long
def test_a_node_that_is_cut_off_is_not_ready_until_healed(cluster: Cluster) -> None:
    cluster.cut_node("node2")
    try:
        cluster.wait_for_ready("node2", ready=False)
        assert readiness(cluster) == {"node1": "True", "node2": "Unknown"}
    finally:
        cluster.heal_node("node2")
        cluster.wait_for_ready("node2")
    assert readiness(cluster) == {"node1": "True", "node2": "True"}


def test_a_killed_kubelet_can_be_started_again(cluster: Cluster) -> None:
    cluster.kill_kubelet("node1")
    try:
        assert not cluster.node("node1").kubelet().alive
    finally:
        cluster.start_kubelet("node1")
        cluster.wait_for_ready("node1")


def test_the_api_server_stops_and_comes_back_with_its_objects(cluster: Cluster) -> None:
    before = cluster.get("namespace", "default")["metadata"]["uid"]
    cluster.stop_apiserver()
    try:
        with pytest.raises(ClusterError, match="refused"):
            cluster.kubectl("get", "nodes")
    finally:
        cluster.start_apiserver()
    assert cluster.get("namespace", "default")["metadata"]["uid"] == before
    for node in cluster.nodes():
        cluster.wait_for_ready(node.name)


def test_a_second_cluster_is_refused_with_the_name_of_the_holder(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=f"there is cluster '{cluster.name}'"):
        Cluster.start(nodes=1, name="another", load_images=False)
    assert not ControlGroup("finetune-cluster-another").members()


class Footprint(dict[str, set[str]]):
    """What a cluster could leave on a machine. Only what is marked as ours: other work goes on beside the test."""

    @classmethod
    def now(cls) -> Footprint:
        marks = ("finetune-cluster", "finetune-images", "finetune-operator/run", "ftcluster", "ft-dev")
        groups = [
            str(path)
            for root in Path("/sys/fs/cgroup").iterdir()
            if root.is_dir()
            for path in root.glob("finetune-cluster-*")
        ]
        found = {
            "processes": [_command_line(path) for path in Path("/proc").glob("[0-9]*")],
            "mounts": Path("/proc/mounts").read_text().splitlines(),
            "namespaces": [path.name for path in Path("/run/netns").glob("*")],
            "links": [path.name for path in Path("/sys/class/net").iterdir()],
            "control groups": groups,
            "folders": [str(path) for path in (RUN, SOCKETS) if path.exists()],
            "sockets": [str(path) for path in Path("/tmp").glob("seaweedfs-*-18*.sock")],
        }
        return cls(
            {
                kind: {thing for thing in things if any(mark in thing for mark in marks)}
                for kind, things in found.items()
            }
        )

    def beyond(self, before: Footprint) -> dict[str, set[str]]:
        return {kind: things - before[kind] for kind, things in self.items() if things - before[kind]}


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
