"""Plain JSON to and from an API server: the official client's kubeconfig, login and TLS, without its models.

Nothing is tried again here. A request either is answered or raises one of ``errors``, so that a command ends within seconds with a line
that says why; only waiting for a job outlasts a server that is away (``jobs``).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import urllib3
from kubernetes.client.api_client import ApiClient
from kubernetes.client.configuration import Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, list_kube_config_contexts, load_incluster_config, load_kube_config

from finetune_api import contract
from finetune_client.errors import ClientError, Exists, Fault, Forbidden, NoCluster, NotFound, NotInstalled, Refused

Json = dict[str, Any]
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 30.0
JOBS = f"/apis/{contract.GROUP}/{contract.VERSION}"
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def path(root: str, namespace: str | None, plural: str, name: str = "", subresource: str = "") -> str:
    """Return the path of a collection, an object or its subresource. Names are a user's, so they are quoted."""
    parts = [*(("namespaces", quote(namespace, safe="")) if namespace else ()), plural, quote(name, safe="")]
    return "/".join([root, *filter(None, [*parts, subresource])])


class Connection:
    """One API server, and the namespace that is meant when none is named."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client, self.namespace = client, namespace

    @classmethod
    def open(cls, *, kubeconfig: str | None = None, context: str | None = None) -> Self:
        """Log in as the kubeconfig says, else, in a pod, as its service account. Nothing is sent yet.

        Raises:
            NoCluster: there is no configuration, or no such context in it.
        """
        configuration = Configuration()
        configuration.retries = False
        try:
            load_kube_config(kubeconfig, context, client_configuration=configuration)
            namespace = _namespace_of(kubeconfig, context)
        except (ConfigException, TypeError, OSError) as error:  # TypeError: an empty kubeconfig
            if kubeconfig is not None or context is not None or not _OWN_NAMESPACE.exists():
                raise NoCluster(f"no cluster to talk to: {error}; see --kubeconfig, KUBECONFIG, --context") from error
            load_incluster_config(client_configuration=configuration)
            namespace = _OWN_NAMESPACE.read_text().strip()
        return cls(ApiClient(configuration), namespace)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Json:
        """Send one request and return the answer."""
        with self._answer(method, path, query, body, content_type) as response:
            raw = response.data
        try:
            answer: Json = json.loads(raw)
        except ValueError as error:
            host = self._client.configuration.host
            raise NoCluster(
                f"what answers at {host} is no API server: {raw[:100].decode('utf-8', 'replace')}"
            ) from error
        return answer

    def lines(self, path: str, *, query: Mapping[str, str], silent_seconds: float | None = None) -> Iterator[bytes]:
        """Yield the lines of an answer as they come, without their ends; None: however long that takes."""
        with self._answer("GET", path, query, seconds=silent_seconds) as response:
            for line in response:
                yield line.rstrip(b"\n")

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Json | None = None,
        content_type: str = "application/json",
        *,
        seconds: float | None = ANSWER_SECONDS,
    ) -> Iterator[urllib3.HTTPResponse]:
        try:
            request = self._client.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json, */*", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            response = self._client.call_api(*request, _request_timeout=(CONNECT_SECONDS, seconds)).response
            try:
                if response.status >= 300:
                    raise _error(response.status, response.data)
                yield response
            finally:
                response.release_conn() if response.isclosed() else response.close()
        except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
            host = self._client.configuration.host
            raise NoCluster(f"the API server at {host} does not answer: {_words(error)}") from error
        except ConfigException as error:  # a login program of the kubeconfig
            raise NoCluster(f"cannot log in: {error}") from error


def _namespace_of(kubeconfig: str | None, context: str | None) -> str:
    contexts, active = list_kube_config_contexts(kubeconfig)
    chosen = next((entry for entry in contexts if entry["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


def _words(error: Exception) -> str:
    said = getattr(error, "reason", None) or error  # urllib3 and the client wrap what happened
    return " ".join(str(said).split()) or type(error).__name__


def _error(status: int, raw: bytes) -> ClientError:
    """Return what an answer means that is no success."""
    try:
        answer = json.loads(raw)
        said, reason, details = answer["message"], answer.get("reason"), answer.get("details") or {}
    except (ValueError, KeyError, TypeError):  # a proxy's words, not the API server's
        said, reason, details = raw[:300].decode("utf-8", "replace").strip(), None, {}
    if status == 401:
        return Forbidden("the API server does not know who you are: log in again (401)")
    if status == 403:
        return Forbidden(said)
    if status == 404:
        missing = "the cluster has no FineTuneJobs: its administrator installs them with the chart finetune-crds"
        return NotFound(said) if details.get("name") else NotInstalled(missing)
    if status == 409:
        return Exists(said) if reason == "AlreadyExists" else Refused(said)
    if status in (400, 422):
        causes = details.get("causes") or ()
        return Refused(said, [Fault(cause.get("message", ""), cause.get("field", "")) for cause in causes])
    return NoCluster(f"the API server cannot answer now: {status} {said}")
