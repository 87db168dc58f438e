"""Makes faults happen on the real cluster, each with its end: nothing stays broken behind a seed.

Faults of the whole cluster that would together be something else than what a seed says (two cuts in a row are one long cut) take turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from finetune_api.contract import JOB_SERVER_PORT, TRAINER_CONTAINER
from tests.chaos import processes
from tests.chaos.promises import lives
from tests.chaos.scenario import CUT_SECONDS, ChaosJob, Fault, Kind
from tests.chaos.watch import Watch
from tests.cluster.cluster import Cluster
from tests.cluster.console import ClusterError
from tests.cluster.installation import SYSTEM_NAMESPACE, leader
from tests.cluster.places import S3_PORT

T = TypeVar("T")
SLOW_RATE = "1mbit"
REST_SECONDS = 5.0  # until kubelets have renewed what they could not meanwhile
DETECTION_SECONDS = 45.0  # an agent that is killed tells so by the next one, or is missed after 30 s
_PATIENCE_SECONDS = 60.0


class Missed(Exception):
    """There was nobody whom the fault could have befallen."""


class World:
    """The cluster, as what befalls it."""

    def __init__(self, cluster: Cluster, namespace: str, watch: Watch) -> None:
        self._cluster, self._namespace, self._watch = cluster, namespace, watch
        self._turns = {name: threading.Lock() for name in ("nodes", "operator", "store")}
        self._under_way: set[str] = set()
        self._calm_since = 0.0
        self._deeds: Mapping[Kind, Callable[[Fault, dict[str, ChaosJob]], list[str]]] = {
            Kind.WORKER_KILLED: self._kill_worker,
            Kind.AGENT_KILLED: self._kill_agent,
            Kind.CONTAINER_KILLED: self._kill_container,
            Kind.POD_DELETED: self._delete_pod,
            Kind.POD_FORCED_AWAY: self._delete_pod,
            Kind.OPERATOR_KILLED: self._kill_operator,
            Kind.OPERATOR_CUT: self._cut_operator,
            Kind.OPERATOR_DEAF: self._deafen_operator,
            Kind.APISERVER_AWAY: self._stop_apiserver,
            Kind.KUBELET_AWAY: self._stop_kubelet,
            Kind.NODE_CUT_BRIEFLY: self._cut_node,
            Kind.NODE_CUT: self._cut_node,
            Kind.STORE_AWAY: self._hide_store,
            Kind.STORE_FROZEN: self._freeze_store,
            Kind.NETWORK_SLOW: self._slow_network,
        }

    def befall(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        """Make it happen, and end it. Returns the jobs that it touched, once for each restart that this may cost.

        Raises:
            Missed: nothing happened.
        """
        return self._deeds[fault.kind](fault, jobs)

    def is_calm(self) -> bool:
        """Tell whether nothing has happened to the cluster for so long that whatever befalls a job must have been noticed."""
        return not self._under_way and time.monotonic() - self._calm_since > DETECTION_SECONDS

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        with self._turns[name]:
            self._under_way.add(name)
            try:
                yield
            finally:
                self._under_way.discard(name)
                self._calm_since = time.monotonic()

    # What befalls a job.

    def _victim(self, fault: Fault) -> tuple[str, str]:
        """Return name and uid of a member's pod, or of any that is there while a gang is made."""
        job = self._watch.job(fault.job)
        pods = job.members() or list(filter(lives, job.pods.values()))
        if not pods:
            raise Missed("the job has no pod just now")
        pod = pods[fault.place % len(pods)]["metadata"]
        return pod["name"], pod["uid"]

    def _kill_worker(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        _, uid = self._victim(fault)
        return self._kill(processes.WORKER, uid, fault)

    def _kill_agent(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        _, uid = self._victim(fault)
        return self._kill(processes.AGENT, uid, fault)

    def _kill(self, name: str, uid: str, fault: Fault) -> list[str]:
        if not processes.kill(name, uid, fault.place):
            raise Missed(f"there is no {name.strip()} just now")
        return [fault.job]

    def _kill_container(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        name, _ = self._victim(fault)
        try:
            self._cluster.kill_container(self._namespace, name, TRAINER_CONTAINER)
        except ClusterError as error:
            raise Missed(str(error)) from error
        return [fault.job]

    def _delete_pod(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        name, _ = self._victim(fault)
        how = ("--force", "--grace-period=0") if fault.kind == Kind.POD_FORCED_AWAY else ()
        patiently(
            lambda: self._cluster.kubectl(
                "delete", "pod", "-n", self._namespace, name, "--wait=false", "--ignore-not-found", *how
            )
        )
        return [fault.job]

    # What befalls the operator.

    def _kill_operator(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("operator"):
            pod = patiently(lambda: leader(self._cluster))
            try:
                self._cluster.kill_container(SYSTEM_NAMESPACE, pod, "operator")
            except ClusterError as error:
                raise Missed(str(error)) from error
            self._renew(pod)
        return []

    def _cut_operator(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("operator"):
            pod = patiently(lambda: leader(self._cluster))
            try:
                with self._cluster.without_apiserver(SYSTEM_NAMESPACE, pod):
                    time.sleep(fault.seconds)
            except ClusterError as error:
                raise Missed(str(error)) from error
            self._renew(pod)
        return []

    def _renew(self, pod: str) -> None:
        """A container that has ended too often is started again ever later: after a day's faults in minutes, there would be no operator."""
        patiently(
            lambda: self._cluster.kubectl(
                "delete", "pod", "-n", SYSTEM_NAMESPACE, pod, "--wait=false", "--ignore-not-found"
            )
        )

    def _deafen_operator(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("operator"):
            self._cluster.drop_forwarded(JOB_SERVER_PORT)
            try:
                time.sleep(fault.seconds)
            finally:
                self._cluster.forward_again(JOB_SERVER_PORT)
        return []

    # What befalls the cluster.

    def _stop_apiserver(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("nodes"):
            self._cluster.stop_apiserver()
            try:
                time.sleep(fault.seconds)
            finally:
                self._cluster.start_apiserver()
            time.sleep(REST_SECONDS)
        return []

    def _stop_kubelet(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("nodes"):
            node = self._node(fault)
            self._cluster.kill_kubelet(node)
            try:
                time.sleep(fault.seconds)
            finally:
                self._cluster.start_kubelet(node)
            self._rest(node)
        return []

    def _cut_node(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("nodes"):
            node = self._node(fault)
            touched = [name for name in jobs for _ in self._pods_on(node, name)] if fault.seconds >= CUT_SECONDS else []
            self._cluster.cut_node(node)
            try:
                time.sleep(fault.seconds)
            finally:
                self._cluster.heal_node(node)
            self._rest(node)
        return touched

    def _pods_on(self, node: str, job: str) -> list[str]:
        pods = self._watch.job(job).pods.values()
        return [pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName") == node]

    def _slow_network(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("nodes"):
            node = self._node(fault)
            self._cluster.slow_node(node, SLOW_RATE)
            try:
                time.sleep(fault.seconds)
            finally:
                self._cluster.fast_node(node)
        return []

    def _node(self, fault: Fault) -> str:
        names = [node.name for node in self._cluster.nodes()]
        return names[fault.place % len(names)]

    def _rest(self, node: str) -> None:
        time.sleep(REST_SECONDS)
        patiently(lambda: self._cluster.wait_for_ready(node))

    def _hide_store(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("store"):
            self._cluster.drop_forwarded(S3_PORT)
            try:
                time.sleep(fault.seconds)
            finally:
                self._cluster.forward_again(S3_PORT)
        return []

    def _freeze_store(self, fault: Fault, jobs: dict[str, ChaosJob]) -> list[str]:
        with self._turn("store"), self._cluster.without_store():
            time.sleep(fault.seconds)
        return []


def patiently(do: Callable[[], T]) -> T:
    """Try again while the API server is away."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return do()
        except ClusterError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
