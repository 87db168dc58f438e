"""A real API server as these tests see it: plain JSON over one kept connection, and refusals as (field path, message)."""

from __future__ import annotations

import base64
import http.client
import json
import re
import ssl
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import yaml

Json = dict[str, Any]
JOBS = "/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
IDLE_SECONDS = 30.0  # the API server closes a connection that is idle for 90 s
UNKNOWN_FIELD = re.compile(r'unknown field "([^"]+)"')


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that the API server found wrong."""

    path: str
    message: str


class Refused(Exception):
    """The API server said no."""

    def __init__(self, status: Json) -> None:
        super().__init__(f"{status.get('code')} {status.get('message')}")
        self.status = status

    @property
    def refusals(self) -> list[Refusal]:
        unknown = [Refusal(path, "unknown field") for path in UNKNOWN_FIELD.findall(self.status["message"])]
        causes = self.status.get("details", {}).get("causes", [])
        return unknown + [Refusal(cause.get("field", ""), cause["message"]) for cause in causes]


class ApiServer:
    """The administrator's connection, or anybody's in whose name he speaks. Strict about unknown fields, as kubectl is."""

    def __init__(self, kubeconfig: Path, namespace: str, *, user: str | None = None) -> None:
        document = yaml.safe_load(kubeconfig.read_text())
        server = urlsplit(document["clusters"][0]["cluster"]["server"])
        assert server.hostname is not None
        self.kubeconfig, self.namespace = kubeconfig, namespace
        self._headers = {"Authorization": f"Bearer {document['users'][0]['user']['token']}"}
        if user is not None:
            self._headers["Impersonate-User"] = user
        with tempfile.NamedTemporaryFile() as authority:
            authority.write(base64.b64decode(document["clusters"][0]["cluster"]["certificate-authority-data"]))
            authority.flush()
            context = ssl.create_default_context(cafile=authority.name)
        self._connection = http.client.HTTPSConnection(server.hostname, server.port, context=context, timeout=30)
        self._asked = time.monotonic()

    def create(self, job: Json, *, dry_run: bool = False) -> Json:
        return self._write("POST", self._jobs(), job, dry_run=dry_run)

    def apply(self, job: Json, *, manager: str = "tests") -> Json:
        return self._write("PATCH", self._jobs(job), job, "application/apply-patch+yaml", fieldManager=manager)

    def merge(self, job: Json, patch: Json, *, subresource: str = "", dry_run: bool = False) -> Json:
        kind = "application/merge-patch+json"
        return self._write("PATCH", self._jobs(job, subresource), patch, kind, dry_run=dry_run)

    def delete(self, job: Json) -> None:
        self.request("DELETE", self._jobs(job))

    def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Json:
        headers = self._headers | {"Content-Type": content_type}
        if time.monotonic() - self._asked > IDLE_SECONDS:
            self._connection.close()  # the next request opens it anew
        self._asked = time.monotonic()
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = self._connection.getresponse()
        answer: Json = json.loads(response.read())
        if response.status >= 400:
            raise Refused(answer)
        return answer

    def close(self) -> None:
        self._connection.close()

    def _write(
        self,
        method: str,
        path: str,
        body: Json,
        content_type: str = "application/json",
        *,
        dry_run: bool = False,
        **query: str,
    ) -> Json:
        query |= {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return self.request(method, f"{path}?{urlencode(query)}", body, content_type)

    def _jobs(self, job: Mapping[str, Any] | None = None, subresource: str = "") -> str:
        path = JOBS.format(namespace=self.namespace)
        if job is not None:
            path += f"/{job['metadata']['name']}"
        return f"{path}/{subresource}" if subresource else path
