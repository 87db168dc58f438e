"""Jobs on the cluster, as the tests speak of them: submit, wait for, look at, break."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.installation import operator_log

POLL_SECONDS = 0.3


def wait_until(what: str, holds: Callable[[], Any], seconds: float = 120) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not so after {seconds} s: {what}"
        time.sleep(POLL_SECONDS)


class Gone(Exception):
    """The job does not exist any more."""


@dataclass
class Job:
    """A job in a namespace of the cluster."""

    cluster: Cluster
    namespace: str
    name: str

    def status(self) -> dict[str, Any]:
        """Return its status as it stands."""
        said = self.cluster.kubectl(
            "get", "ftj", self.name, "--namespace", self.namespace, "--ignore-not-found", "-o", "json"
        )
        if not said.strip():
            raise Gone(self.name)
        status: dict[str, Any] = json.loads(said).get("status", {})
        return status

    def condition(self, kind: str) -> dict[str, Any]:
        """Return one condition; empty when it is not there yet."""
        return next((c for c in self.status().get("conditions", []) if c["type"] == kind), {})

    def wait(self, what: str, holds: Callable[[dict[str, Any]], Any], seconds: float = 180) -> dict[str, Any]:
        """Wait until the status is as wanted, and return it. A job that ends otherwise is not waited for."""
        until = time.monotonic() + seconds
        while True:
            status = self.status()
            if holds(status):
                return status
            if time.monotonic() > until or status.get("completionTime"):
                raise AssertionError(f"{self.name}: {what}: not so after all\n{self.story()}")
            time.sleep(POLL_SECONDS)

    def wait_for_phase(self, phase: str, seconds: float = 180) -> dict[str, Any]:
        """Wait until the job is in a phase."""
        return self.wait(f"phase {phase}", lambda status: status.get("phase") == phase, seconds)

    def pods(self) -> list[dict[str, Any]]:
        """Return its pods, by rank."""
        said = self.cluster.kubectl(
            "get", "pods", "--namespace", self.namespace, "-l", f"finetune.dev/job={self.name}", "-o", "json"
        )
        pods: list[dict[str, Any]] = json.loads(said)["items"]
        return sorted(pods, key=lambda pod: int(pod["metadata"]["labels"]["finetune.dev/rank"]))

    def wait_for_pods_to_go(self, seconds: float) -> None:
        """Wait until it has no pod any more, also when the job itself is gone."""
        until = time.monotonic() + seconds
        while self.pods():
            assert time.monotonic() < until, f"{self.name}: pods are left: {self.pods()}"
            time.sleep(POLL_SECONDS)

    def logs(self, pod: str) -> str:
        """Return what a pod's trainer has printed."""
        return self.cluster.kubectl("logs", "--namespace", self.namespace, pod, "--container", "trainer", check=False)

    def patch(self, spec: Mapping[str, Any]) -> None:
        """Change its spec."""
        body = json.dumps({"spec": spec})
        self.cluster.kubectl("patch", "ftj", self.name, "--namespace", self.namespace, "--type", "merge", "-p", body)

    def delete(self) -> None:
        """Delete it, and wait until it and its pods are gone."""
        self.cluster.kubectl("delete", "ftj", self.name, "--namespace", self.namespace, "--ignore-not-found", "--wait")
        self.cluster.kubectl(
            "wait", "--for=delete", "pod", "--namespace", self.namespace, "-l", f"finetune.dev/job={self.name}",
            "--timeout=90s", check=False,
        )  # fmt: skip

    def run_in(self, pod: str, *command: str) -> str:
        """Run a command in a pod's trainer container."""
        return self.cluster.kubectl(
            "exec", "--namespace", self.namespace, pod, "--container", "trainer", "--", *command
        )

    def story(self) -> str:
        """Return everything that helps to understand a failure."""
        describe = self.cluster.kubectl(
            "get", "ftj", self.name, "--namespace", self.namespace, "-o", "yaml", check=False
        )
        pods = self.cluster.kubectl("describe", "pods", "--namespace", self.namespace, check=False)[-6000:]
        logs = "\n".join(
            f"--- {p['metadata']['name']}\n{self.logs(p['metadata']['name'])[-4000:]}" for p in self.pods()
        )
        return f"{describe}\n{pods}\n{logs}\n--- operator\n{operator_log(self.cluster)[-4000:]}"


def restarts_used(status: Mapping[str, Any]) -> int:
    """Return how many restarts are used of all budgets together."""
    return sum(entry["used"] for entry in status.get("restarts", {}).get("byReason", ()))


def submit(cluster: Cluster, namespace: str, name: str, spec: Mapping[str, Any]) -> Job:
    """Create a job."""
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": dict(spec),
    }
    cluster.kubectl("create", "-f", "-", input=json.dumps(manifest))
    return Job(cluster, namespace, name)
