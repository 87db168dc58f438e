"""An eye of its own on all jobs and pods of a namespace: a list and a watch, over plain HTTP, that outlive the API server.

Every version that the API server sends is compared with the one before it. After a restart it may not remember the version that was seen last;
then a list closes the gap, which is counted.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlencode, urlsplit

import yaml

from finetune_api.contract import GROUP, JOB_LABEL, PLURAL, VERSION
from tests.chaos.promises import broken_by_pods, broken_by_version
from tests.cluster.cluster import Cluster

_SILENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.3


@dataclass
class Watched:
    """One job, from its first version on."""

    body: Mapping[str, Any] = field(default_factory=dict)
    pods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By uid; another object for each change, so that whoever reads needs no lock."""
    gangs: dict[int, dict[int, str]] = field(default_factory=dict)
    """Generation → node rank → name of the pod."""
    broken: list[str] = field(default_factory=list)
    versions: int = 0

    @property
    def status(self) -> Mapping[str, Any]:
        return self.body.get("status") or {}

    def members(self) -> list[Mapping[str, Any]]:
        """The pods of the gang that are there, by rank."""
        members = (self.status.get("gang") or {}).get("members", [])
        return [self.pods[member["uid"]] for member in members if member["uid"] in self.pods]


class Watch:
    """All jobs of a namespace and their pods."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._server = _Server(cluster)
        self._lock = threading.Lock()
        self._jobs: dict[str, Watched] = {}
        self._ended = threading.Event()
        self.gaps = 0
        paths = {
            f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}": self._see_job,
            f"/api/v1/namespaces/{namespace}/pods": self._see_pod,
        }
        self._threads = [threading.Thread(target=self._follow, args=entry, daemon=True) for entry in paths.items()]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def job(self, name: str) -> Watched:
        with self._lock:
            return self._jobs.setdefault(name, Watched())

    def _follow(self, path: str, see: Callable[[Mapping[str, Any], bool], None]) -> None:
        version = ""
        while not self._ended.is_set():
            with suppress(OSError, http.client.HTTPException, ValueError):
                if not version:
                    version = self._list(path, see)
                for event in self._server.watch(path, version):
                    if event["type"] == "ERROR":
                        version = ""
                        break
                    version = event["object"]["metadata"]["resourceVersion"]
                    see(event["object"], event["type"] == "DELETED")
            self._ended.wait(_PAUSE_SECONDS)

    def _list(self, path: str, see: Callable[[Mapping[str, Any], bool], None]) -> str:
        found = self._server.get(path)
        self.gaps += 1
        for body in found["items"]:
            see(body, False)
        if see == self._see_pod:
            self._forget_pods_but({body["metadata"]["uid"] for body in found["items"]})
        return str(found["metadata"]["resourceVersion"])

    def _forget_pods_but(self, uids: set[str]) -> None:
        with self._lock:
            for job in self._jobs.values():
                job.pods = {uid: pod for uid, pod in job.pods.items() if uid in uids}

    def _see_job(self, body: Mapping[str, Any], deleted: bool) -> None:
        job = self.job(body["metadata"]["name"])
        with self._lock:
            job.broken += broken_by_version(job.body, body) if not deleted else ()
            job.body, job.versions = body, job.versions + 1
            gang = job.status.get("gang") or {}
            if gang.get("members"):
                job.gangs[gang["generation"]] = {member["rank"]: member["pod"] for member in gang["members"]}

    def _see_pod(self, body: Mapping[str, Any], deleted: bool) -> None:
        job = self.job(body["metadata"]["labels"].get(JOB_LABEL, ""))
        with self._lock:
            others = {uid: pod for uid, pod in job.pods.items() if uid != body["metadata"]["uid"]}
            job.pods = others if deleted else {**others, body["metadata"]["uid"]: body}
            job.broken += broken_by_pods(job.pods.values())


class _Server:
    """The API server, for its administrator."""

    def __init__(self, cluster: Cluster) -> None:
        document = yaml.safe_load(cluster.kubeconfig.read_text())
        server = document["clusters"][0]["cluster"]
        self._address = urlsplit(server["server"]).netloc
        authority = base64.b64decode(server["certificate-authority-data"]).decode()
        self._context = ssl.create_default_context(cadata=authority)
        self._headers = {"Authorization": f"Bearer {document['users'][0]['user']['token']}", "Connection": "close"}

    def get(self, path: str) -> dict[str, Any]:
        with self._answer(path) as answer:
            body: dict[str, Any] = json.loads(answer.read())
        return body

    def watch(self, path: str, version: str) -> Iterator[dict[str, Any]]:
        query = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true"}
        with self._answer(f"{path}?{urlencode(query)}") as answer:
            if answer.status == 410:
                yield {"type": "ERROR"}
                return
            for line in answer:
                event = json.loads(line)
                if event["type"] != "BOOKMARK":
                    yield event

    def _answer(self, path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPSConnection(self._address, timeout=_SILENCE_SECONDS, context=self._context)
        connection.request("GET", path, headers=self._headers)
        answer = connection.getresponse()
        if answer.status not in (200, 410):
            connection.close()
            raise http.client.HTTPException(f"{path}: {answer.status}")
        return answer


def wait_for(what: str, holds: Callable[[], bool], seconds: float) -> None:
    """Wait until something that is watched is so."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"not after {seconds:.0f} s: {what}")
        time.sleep(0.1)
