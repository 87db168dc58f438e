"""Gangs of real ranks as the breakage tests see them: start, kill, stop, and what they said; and a prefix as it lies in the store."""

import dataclasses
import hashlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.storage.faulty_proxy import Proxy
from tests.storage.seaweedfs import S3Server
from tests.trainer.checkpoint.drill import Drill

REPOSITORY = Path(__file__).parents[3]
PATIENCE_SECONDS = 120
Event = dict[str, Any]


@dataclass
class Gang:
    """The ranks of one generation."""

    drill: Drill
    changed: threading.Condition
    pids: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    def told(self, event: str, rank: int = 0) -> list[Event]:
        """What one rank said of a kind, in order."""
        with self.changed:
            return [said for said in self.events if (said["event"], said["rank"]) == (event, rank)]

    def is_over(self) -> bool:
        return bool(self.pids) and len(self.codes) == len(self.pids)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> list[int]:
        """Wait until all ranks have ended and return their exit codes."""
        with self.changed:
            assert self.changed.wait_for(self.is_over, seconds), self.story()
            return [self.codes[pid] for pid in self.pids]

    def end(self, seconds: float) -> None:
        """Wait until a rank has ended, give its peers time to fail by themselves, and kill what is left, as the agent does."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.codes, PATIENCE_SECONDS), self.story()
            self.changed.wait_for(self.is_over, seconds)
        self.kill_all()

    def kill_all(self) -> None:
        """Kill what is alive, and return when it is dead. A rank may still fail by itself, of a peer that died just before."""
        self.kill(*range(len(self.pids)))
        self.wait()

    def kill(self, *ranks: int) -> None:
        """Kill ranks at once, and return when they are dead."""
        with ExitStack() as opened:
            processes = []
            for pid in (self.pids[rank] for rank in ranks):
                with suppress(ProcessLookupError, FileNotFoundError):  # the latter while the kernel takes it apart
                    processes.append(os.pidfd_open(pid))
                    opened.callback(os.close, processes[-1])
            for process in processes:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            for process in processes:
                assert select.select([process], [], [], PATIENCE_SECONDS)[0], "a rank does not die"

    def send(self, number: signal.Signals, ranks: tuple[int, ...]) -> None:
        """Stop or continue ranks."""
        for rank in ranks:
            os.kill(self.pids[rank], number)

    @property
    def committed(self) -> list[int]:
        """The steps whose saves were reported as committed, by any rank, in order."""
        said = (event for rank in range(self.drill.ranks) for event in self.told("saved", rank))
        return sorted({event["step"] for event in said if event["error"] is None})

    def story(self) -> str:
        """Everything there is to say about the gang."""
        logs = [
            f"--- rank {rank}, code {self.codes.get(pid)}\n{path.read_text()[-3000:] if path.exists() else ''}"
            for rank, pid in enumerate(self.pids)
            for path in [Path(self.drill.folder, f"gang-{self.drill.gang}-{rank}.log")]
        ]
        return "\n".join([repr(self.drill), *map(str, self.events), *logs])


class Nursery:
    """Starts gangs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._changed = threading.Condition()
        self._gangs: dict[int, Gang] = {}
        self._numbers = itertools.count(1)
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        assert self._ready.wait(PATIENCE_SECONDS), "the nursery does not start"

    def start(self, **drill: object) -> Gang:
        """Start a gang and return when its processes exist."""
        number = next(self._numbers)
        gang = Gang(Drill(gang=number, **drill), self._changed)
        self._gangs[number] = gang
        print(json.dumps(dataclasses.asdict(gang.drill)), file=self._process.stdin, flush=True)
        with self._changed:
            assert self._changed.wait_for(lambda: gang.pids, PATIENCE_SECONDS), "the nursery is gone"
        return gang

    def end(self) -> None:
        """Kill every gang and the nursery."""
        for gang in self._gangs.values():
            gang.kill_all()
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()

    def _listen(self) -> None:
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # DeepSpeed prints to stdout
            with self._changed:
                self._note(event)
                self._changed.notify_all()

    def _note(self, event: Event) -> None:
        match event["event"]:
            case "ready":
                assert event["threads"] == 1, "a process with threads must not fork"
                self._ready.set()
            case "started":
                self._gangs[event["gang"]].pids = event["pids"]
            case "ended":
                for gang in self._gangs.values():
                    if event["pid"] in gang.pids and event["pid"] not in gang.codes:
                        gang.codes[event["pid"]] = event["code"]
            case _:
                self._gangs[event["gang"]].events.append(event)


@contextmanager
def running_nursery() -> Iterator[Nursery]:
    """Run a nursery until the block is left."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(REPOSITORY / root) for root in ("crds", "trainer", ".")),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.checkpoint.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        nursery = Nursery(process)
        try:
            yield nursery
        finally:
            nursery.end()


@dataclass(frozen=True)
class Prefix:
    """What lies below one job's prefix, read without any of the trainer's code."""

    server: S3Server
    bucket: str
    path: str
    client: Any = field(repr=False)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.path}"

    def objects(self) -> list[str]:
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.path}/")
        return [item["Key"].removeprefix(f"{self.path}/") for item in listed.get("Contents", ())]

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=f"{self.path}/{key}")["Body"].read()

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.path}/{key}", Body=body)

    def delete(self, keys: Iterable[str]) -> None:
        for key in list(keys):
            self.client.delete_object(Bucket=self.bucket, Key=f"{self.path}/{key}")

    def begin_upload(self, key: str) -> None:
        self.client.create_multipart_upload(Bucket=self.bucket, Key=f"{self.path}/{key}")

    def uploads(self) -> list[str]:
        listed = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=f"{self.path}/")
        return [upload["Key"] for upload in listed.get("Uploads", ())]

    def head(self) -> Event:
        return json.loads(self.get("HEAD"))

    def listed_folders(self) -> set[str]:
        return {kept["manifest"].rpartition("/")[0] for kept in self.head()["kept"]}

    def folders(self) -> set[str]:
        """The folders below checkpoints/ in which anything lies."""
        return {key.rpartition("/")[0] for key in self.objects() if key.startswith("checkpoints/")}

    def check(self) -> list[int]:
        """Assert that everything that HEAD lists is there to the byte; return the steps, newest first."""
        for kept in self.head()["kept"]:
            body = self.get(kept["manifest"])
            assert hashlib.sha256(body).hexdigest() == kept["sha256"], kept
            manifest = json.loads(body)
            for shard in manifest["shards"]:
                bytes_ = self.get(f"{kept['manifest'].rpartition('/')[0]}/{shard['name']}")
                size = manifest["chunkBytes"]
                chunks = [bytes_[start : start + size] for start in range(0, len(bytes_), size)]
                assert [hashlib.sha256(chunk).hexdigest() for chunk in chunks] == shard["sha256"], shard["name"]
        return [kept["step"] for kept in self.head()["kept"]]


def written_more_than_once(proxy: Proxy) -> dict[str, int]:
    """Return which objects were written by several requests that the server carried out; HEAD is meant to be."""
    writes = Counter(
        request.path.partition("?")[0]
        for request in proxy.requests
        if ((request.matches("PUT") and "partNumber=" not in request.path) or request.matches("POST ?uploadId="))
        and proxy.statuses.get(request.number) == 200
        and "/checkpoints/" in request.path
    )
    return {path: count for path, count in writes.items() if count > 1}
