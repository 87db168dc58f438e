"""An API server in memory, behind the same protocol as the real one: resource versions, conflicts, uids, graceful deletion of pods.

It refuses what the CRD's rules refuse (a falling generation, a way out of Complete or Failed), and can die or lie at any write. What the
watches would show is kept in ``events`` until somebody takes it.
"""

import base64
import copy
import json
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.kube.api import ACCESS_REVIEWS, CONFIG_MAPS, JOBS, PODS, Resource
from finetune_operator.kube.errors import Conflict, Invalid, KubeError, NotFound, Unavailable
from finetune_operator.kube_object import KubeObject
from finetune_operator.plan.observation import timestamp
from tests.operator.documents import NOON

POD_GRACE_SECONDS = 60
Key = tuple[str, str, str]  # plural, namespace, name


class Crash(BaseException):
    """The operator process dies here."""


def apply_merge_patch(document: Any, patch: Any) -> Any:
    """Return a document with a patch applied, as RFC 7386 says it."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(document) if isinstance(document, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = apply_merge_patch(result.get(name), value)
    return result


class FakeKubeApi:
    """``KubeApi`` over a dictionary."""

    def __init__(self) -> None:
        self.objects: dict[Key, KubeObject] = {}
        self.events: deque[tuple[str, KubeObject]] = deque()  # (ADDED | MODIFIED | DELETED, object) of jobs and pods
        self.writes: list[str] = []
        self.pods_created: Counter[tuple[str, str, str]] = Counter()  # (job uid, rank, generation)
        self.member_sets: dict[tuple[str, int], Sequence[KubeObject]] = {}
        self.documents: dict[str, KubeObject | KubeError] = {}  # for ``read``
        self.crash_after: int | None = None  # so many more writes are done, and then the process dies
        self.fail_next: str | None = None  # the next write gets no answer: "lost" has done it, "refused" has not
        self.refuse_pods: dict[str, KubeError] = {}  # by rank
        self.clock: Callable[[], datetime] = lambda: NOON
        self.resource_version = 100
        self._uids = 0

    # KubeApi.

    async def get(self, resource: Resource, namespace: str, name: str) -> KubeObject:
        return copy.deepcopy(self._known(resource, namespace, name))

    async def list(
        self, resource: Resource, namespace: str | None = None, *, label_selector: str | None = None
    ) -> list[KubeObject]:
        return [
            copy.deepcopy(body)
            for key, body in self.objects.items()
            if key[0] == resource.plural and namespace in (None, key[1]) and _selects(label_selector, body)
        ]

    async def create(self, resource: Resource, namespace: str | None, body: KubeObject) -> KubeObject:
        if resource is ACCESS_REVIEWS:
            return body | {"status": {"allowed": True}}
        assert namespace is not None
        key = (resource.plural, namespace, body["metadata"]["name"])
        with_rank = body["metadata"].get("labels", {}).get("finetune.dev/rank")
        if resource is PODS and with_rank in self.refuse_pods:
            raise self.refuse_pods[with_rank]
        with self._write(f"create {resource.plural}/{key[2]}"):
            if key in self.objects:
                raise Conflict(f"{key} exists already", status=409)
            self._uids += 1
            stored = copy.deepcopy(body)
            stored["metadata"] |= {
                "uid": f"uid-{self._uids}",
                "namespace": namespace,
                "creationTimestamp": timestamp(NOON + timedelta(seconds=self._uids)),
            }
            if resource is PODS:
                labels = stored["metadata"]["labels"]
                self.pods_created[
                    labels["finetune.dev/job-uid"], labels["finetune.dev/rank"], labels["finetune.dev/generation"]
                ] += 1
                stored["status"] = {"phase": "Pending"}
            _encode(stored)
            return self.store(resource, stored, "ADDED")

    async def apply(self, resource: Resource, namespace: str, body: KubeObject) -> KubeObject:
        with self._write(f"apply {resource.plural}/{body['metadata']['name']}"):
            known = self.objects.get((resource.plural, namespace, body["metadata"]["name"]), {})
            metadata = {"uid": "applied"} | known.get("metadata", {}) | body["metadata"]
            return self.store(resource, copy.deepcopy(body) | {"metadata": metadata}, "MODIFIED")

    async def replace(self, resource: Resource, namespace: str, body: KubeObject) -> KubeObject:
        with self._write(f"replace {resource.plural}/{body['metadata']['name']}"):
            known = self._known(resource, namespace, body["metadata"]["name"])
            if body["metadata"].get("resourceVersion") != known["metadata"]["resourceVersion"]:
                raise Conflict("written meanwhile", status=409)
            stored = copy.deepcopy(body)
            _encode(stored)
            return self.store(resource, stored, "MODIFIED")

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, *, resource_version: str, status: Mapping[str, Any]
    ) -> KubeObject:
        assert json.loads(json.dumps(status)) == status
        with self._write(f"status {resource.plural}/{name}"):
            known = self._known(resource, namespace, name)
            if resource_version != known["metadata"]["resourceVersion"]:
                raise Conflict("written meanwhile", status=409)
            patched = copy.deepcopy(known) | {"status": apply_merge_patch(known.get("status"), status)}
            self._check_status(known, patched)
            return self.store(resource, patched, "MODIFIED")

    async def patch_labels(
        self, resource: Resource, namespace: str, name: str, *, uid: str, labels: Mapping[str, str | None]
    ) -> KubeObject:
        with self._write(f"labels {resource.plural}/{name}"):
            known = self._known(resource, namespace, name)
            if known["metadata"]["uid"] != uid:
                raise Conflict("another object of this name", status=409)
            return self.store(resource, apply_merge_patch(known, {"metadata": {"labels": labels}}))

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> None:
        with self._write(f"delete {resource.plural}/{name}"):
            body = self._known(resource, namespace, name)
            if body["metadata"]["uid"] != uid:
                raise Conflict("another object of this name", status=409)
            if resource is PODS:
                body = copy.deepcopy(body)
                body["metadata"]["deletionTimestamp"] = timestamp(self.clock() + timedelta(seconds=POD_GRACE_SECONDS))
                self.store(PODS, body, "MODIFIED")
            else:
                self.remove(resource, namespace, name)

    async def read(self, path: str) -> KubeObject:
        document = self.documents[path]
        if isinstance(document, KubeError):
            raise document
        return document

    # What others do.

    def store(self, resource: Resource, body: KubeObject, event: str = "MODIFIED") -> KubeObject:
        """Write an object as anybody might."""
        self.resource_version += 1
        body["metadata"]["resourceVersion"] = str(self.resource_version)
        self.objects[resource.plural, body["metadata"]["namespace"], body["metadata"]["name"]] = body
        if resource in (JOBS, PODS):
            self.events.append((event, copy.deepcopy(body)))
        return copy.deepcopy(body)

    def remove(self, resource: Resource, namespace: str, name: str) -> None:
        """An object is gone, and what it owns."""
        body = self.objects.pop((resource.plural, namespace, name))
        self.resource_version += 1
        body["metadata"]["resourceVersion"] = str(self.resource_version)
        if resource in (JOBS, PODS):
            self.events.append(("DELETED", copy.deepcopy(body)))
        for key, child in list(self.objects.items()):
            owners = [owner["uid"] for owner in child["metadata"].get("ownerReferences", ())]
            if body["metadata"]["uid"] in owners:
                self.remove(
                    {"pods": PODS, "configmaps": CONFIG_MAPS}.get(key[0], Resource("", key[0], "")), key[1], key[2]
                )

    def bodies(self, resource: Resource) -> Sequence[KubeObject]:
        """Return all objects of a kind."""
        return [body for key, body in self.objects.items() if key[0] == resource.plural]

    # How it fails.

    def _known(self, resource: Resource, namespace: str, name: str) -> KubeObject:
        key = (resource.plural, namespace, name)
        if key not in self.objects:
            raise NotFound(f"{key} not found", status=404)
        return self.objects[key]

    def _write(self, what: str) -> "_Write":
        return _Write(self, what)

    def _check_status(self, old: KubeObject, new: KubeObject) -> None:
        before, after = (body.get("status") or {} for body in (old, new))
        gang, new_gang = before.get("gang") or {}, after.get("gang") or {}
        if new_gang.get("generation", 0) < gang.get("generation", 0):
            raise Invalid("status.gang.generation cannot fall", status=422)
        final = {c["type"] for c in before.get("conditions", ()) if c["status"] == "True"} & {"Complete", "Failed"}
        holds = {c["type"] for c in after.get("conditions", ()) if c["status"] == "True"}
        if not final <= holds:
            raise Invalid("a job that is Complete or Failed stays so", status=422)
        if new_gang.get("members"):
            known = self.member_sets.setdefault((old["metadata"]["uid"], new_gang["generation"]), new_gang["members"])
            assert known == new_gang["members"], "one generation with two member sets"


def _selects(selector: str | None, body: KubeObject) -> bool:
    """Tell whether an object has the labels that a selector asks for: ``name`` or ``name=value``, separated by commas."""
    labels = body["metadata"].get("labels", {})
    terms = [term.partition("=") for term in (selector or "").split(",") if term]
    return all(name in labels and value in ("", labels[name]) for name, _, value in terms)


def _encode(secret: KubeObject) -> None:
    if "stringData" in secret:
        secret["data"] = {
            name: base64.b64encode(value.encode()).decode() for name, value in secret.pop("stringData").items()
        }


class _Write:
    """One write, which may be the last one that the operator sees done."""

    def __init__(self, api: FakeKubeApi, what: str) -> None:
        self._api, self._what = api, what

    def __enter__(self) -> None:
        if self._api.crash_after == 0:
            raise Crash
        if self._api.fail_next == "refused":
            self._api.fail_next = None
            raise Unavailable("no answer", status=0)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            return
        self._api.writes.append(self._what)
        if self._api.crash_after is not None:
            self._api.crash_after -= 1
        if self._api.fail_next == "lost":
            self._api.fail_next = None
            raise Unavailable("no answer", status=0)
