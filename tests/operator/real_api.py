"""A real API server on loopback: etcd and kube-apiserver, and nothing else of Kubernetes.

No controllers, so no garbage is collected and no service account is made; no scheduler and no kubelet (see kubelet.py). It can be killed
and started again, keeps its ports and data, and writes down who has written what (``writes``).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

from finetune_agent.processes import die_with_parent
from finetune_api.contract import PLURAL
from tests.cluster.binaries import ensure_binaries
from tests.cluster.certificates import Authority
from tests.cluster.kubeconfig import encoded, write_secret
from tests.cluster.places import PROJECT
from tests.operator.operator_process import free_port

Json = dict[str, Any]
ADMINISTRATOR = "admin"
OPERATOR = "system:serviceaccount:finetune-system:finetune-operator"
# In masters nobody waits for a turn, so only the administrator is in it.
GROUPS = {ADMINISTRATOR: "system:masters", OPERATOR: "system:serviceaccounts"}
WRITES = ("create", "update", "patch", "delete")
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "verbs": list(WRITES), "users": [OPERATOR]}, {"level": "None"}],
}
START_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Write:
    """One request of the operator that changes something, as the API server has audited it."""

    verb: str
    resource: str  # with its subresource
    namespace: str
    name: str
    status: int


class Refused(Exception):
    """The API server said no."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text[:500]}")
        self.status = status


class RealApi:
    """The processes, and what is needed to talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs = ensure_binaries()
        self._tokens = {user: secrets.token_hex(16) for user in GROUPS}
        self._port, self._etcd_port, self._peer_port = (free_port() for _ in range(3))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    @property
    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._authority.certificate))

    @property
    def _authority(self) -> Authority:
        return Authority(self.folder / "pki")

    def client(self, user: str = ADMINISTRATOR) -> Client:
        """Return a connection in somebody's name, to be used as a context."""
        return Client(self.url, self._tokens[user], self.context)

    def kubeconfig(self, user: str = OPERATOR, url: str | None = None) -> Path:
        """Write how ``user`` reaches the API server, or what stands in front of it at ``url``."""
        cluster = {"server": url or self.url, "certificate-authority-data": encoded(self._authority.certificate)}
        document = {
            "clusters": [{"name": "c", "cluster": cluster}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {"token": self._tokens[user]}}],
            "current-context": "c",
        }
        path = self.folder / "kubeconfig.yaml"
        write_secret(path, yaml.safe_dump(document))
        return path

    async def start(self) -> None:
        """Start it all, with the CRD and the operator's rights."""
        authority = self._authority
        authority.create()
        authority.service_account_keys()
        authority.issue("api", "kube-apiserver", addresses=["IP:127.0.0.1"])
        lines = [f'{self._tokens[user]},{user},{user},"{group}"' for user, group in GROUPS.items()]
        write_secret(self.folder / "tokens.csv", "\n".join(lines) + "\n")
        (self.folder / "audit.yaml").write_text(json.dumps(AUDIT_POLICY))
        self._run(
            "etcd",
            *("--data-dir", self.folder / "etcd", "--unsafe-no-fsync", "--log-level", "warn"),
            *(f"--{kind}-client-urls=http://127.0.0.1:{self._etcd_port}" for kind in ("listen", "advertise")),
            f"--listen-peer-urls=http://127.0.0.1:{self._peer_port}",
        )
        await self.start_api_server()
        async with self.client() as client:
            await self._install(client)

    async def start_api_server(self) -> None:
        """Start kube-apiserver, and wait until it is ready."""
        pki = self._authority.directory
        self._run(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            "--advertise-address=198.18.0.254",  # of a Service that nobody uses: without one it asks for a default route
            "--endpoint-reconciler-type=none",
            f"--tls-cert-file={pki / 'api.crt'}",
            f"--tls-private-key-file={pki / 'api.key'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--profiling=false",
            f"--service-account-key-file={pki / 'service-accounts.pub'}",
            f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=198.19.0.0/24",
            f"--audit-policy-file={self.folder / 'audit.yaml'}",
            f"--audit-log-path={self.folder / 'audit.log'}",
        )
        async with asyncio.timeout(START_SECONDS), self.client() as client:
            while not await client.is_ready():
                assert self._processes["kube-apiserver"].poll() is None, self.log("kube-apiserver")
                await asyncio.sleep(0.1)

    def kill_api_server(self) -> None:
        """Kill kube-apiserver; etcd stays."""
        self._end("kube-apiserver")

    def stop(self) -> None:
        """End it all."""
        for name in list(self._processes):
            self._end(name)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def writes(self) -> list[Write]:
        """Return what the operator has written, tries that failed too."""
        return [_write(json.loads(line)) for line in (self.folder / "audit.log").read_text().splitlines()]

    async def _install(self, client: Client) -> None:
        crd = yaml.safe_load((PROJECT / f"crds/{PLURAL}.finetune.dev.yaml").read_text())
        crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        await client.post(crds, crd)
        rights = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
        subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": OPERATOR}
        await client.post(rights, {"metadata": {"name": "operator"}, "roleRef": role, "subjects": [subject]})
        await client.make_namespace("finetune-system")
        while "Established" not in await client.conditions(f"{crds}/{crd['metadata']['name']}"):
            await asyncio.sleep(0.1)

    def _run(self, name: str, *arguments: object) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [self._programs[name], *(str(argument) for argument in arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509  it allocates nothing
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()


@asynccontextmanager
async def running_api(folder: Path) -> AsyncIterator[RealApi]:
    """Run a real API server whose data lies in ``folder``."""
    api = RealApi(folder)
    try:
        await api.start()
        yield api
    finally:
        api.stop()


class Client:
    """Plain JSON over a few kept connections."""

    def __init__(self, url: str, token: str, context: ssl.SSLContext) -> None:
        self._url, self._headers, self._context = url, {"Authorization": f"Bearer {token}"}, context

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=64, ssl=self._context)
        self._session = aiohttp.ClientSession(
            self._url, headers=self._headers, connector=connector, timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, method: str, path: str, body: Json | None = None, kind: str = "application/json") -> Json:
        """Return the answer.

        Raises:
            Refused: it is an error.
            aiohttp.ClientError: there is none.
        """
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, path, data=data, headers={"Content-Type": kind}) as response:
            text = await response.text()
            if response.status >= 400:
                raise Refused(response.status, text)
            answer: Json = json.loads(text)
            return answer

    async def get(self, path: str) -> Json:
        return await self.ask("GET", path)

    async def post(self, path: str, body: Json) -> Json:
        return await self.ask("POST", path, body)

    async def merge(self, path: str, patch: Json) -> Json:
        return await self.ask("PATCH", path, patch, "application/merge-patch+json")

    async def delete(self, path: str, *, grace_seconds: int | None = None) -> None:
        await self.ask("DELETE", path, {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds})

    async def watch(self, path: str, since: str, selector: str = "") -> AsyncIterator[Json]:
        """Yield what happens after a version, until the stream ends."""
        query = {"watch": "1", "resourceVersion": since, "labelSelector": selector}
        async with self._session.get(path, params=query) as response:
            response.raise_for_status()
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield json.loads(line)

    async def make_namespace(self, name: str) -> None:
        """Make a namespace, and its service account, which a controller would make."""
        await self.post("/api/v1/namespaces", {"metadata": {"name": name}})
        await self.post(f"/api/v1/namespaces/{name}/serviceaccounts", {"metadata": {"name": "default"}})

    async def conditions(self, path: str) -> set[str]:
        """Return the conditions that are true of an object."""
        conditions = (await self.get(path)).get("status", {}).get("conditions") or ()  # null in a CRD that is new
        return {condition["type"] for condition in conditions if condition["status"] == "True"}

    async def is_ready(self) -> bool:
        try:
            async with self._session.get("/readyz") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


def _write(event: Json) -> Write:
    reference = event.get("objectRef", {})
    resource = "/".join(part for part in (reference.get("resource"), reference.get("subresource")) if part)
    return Write(
        verb=event["verb"],
        resource=resource,
        namespace=reference.get("namespace", ""),
        name=reference.get("name", ""),
        status=event["responseStatus"]["code"],
    )
