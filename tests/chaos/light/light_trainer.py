"""A gang member without torch: steps together with its peers, commits to S3 behind a fence, and saves when asked to. Standard library only.

``python -m light_trainer HOST:PORT BUCKET JOB``. Below ``JOB/`` in the bucket lie

- ``started/GENERATION/RANK/POD-PID``: who has started as what, written before the first step;
- ``head``: generation and step of the newest commit, swapped by conditional writes alone, its generation only upwards;
- ``finish``: rank 0 looks for it, and its gang ends its work.

A step is a collective over TCP: rank 0 hears of all, and answers all. A peer that is gone ends the others, as in gloo.
"""

import datetime as dt
import hashlib
import hmac
import http.client
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback
import zlib
from pathlib import Path

STEP_SECONDS = 0.1
COMMIT_STEPS = 10
MEETING_SECONDS = 60.0
STORE_SECONDS = 2.0
STALE, SAVED, WRONG_WORLD = 73, 75, 71
FINISH, SAVE = 1, 2
ANSWER = struct.Struct("!BI")  # flags of all ranks, the step that is done

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
GENERATION = int(os.environ["FINETUNE_GENERATION"])


class Unavailable(Exception):
    """The store gave no answer that counts."""


class Store:
    """Just enough of S3."""

    def __init__(self, address: str, bucket: str) -> None:
        self._address, self._bucket = address, bucket
        self._key, self._secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]

    def ask(self, method: str, key: str, body: bytes = b"", **conditions: str) -> "tuple[int, str, bytes]":
        """Return status, ETag and body of an answer below 500."""
        path = f"/{self._bucket}/{key}"
        connection = http.client.HTTPConnection(self._address, timeout=STORE_SECONDS)
        headers = self._signed(method, path, body)
        headers.update({name.replace("_", "-"): value for name, value in conditions.items()})
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(str(error)) from error
        finally:
            connection.close()
        if answer.status >= 500:
            raise Unavailable(f"{method} {key}: {answer.status}")
        return answer.status, answer.headers.get("ETag", ""), said

    def _signed(self, method: str, path: str, body: bytes) -> "dict[str, str]":
        now = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
        digest, scope = hashlib.sha256(body).hexdigest(), f"{now[:8]}/us-east-1/s3/aws4_request"
        headers = {"host": self._address, "x-amz-content-sha256": digest, "x-amz-date": now}
        names = ";".join(headers)
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        request = hashlib.sha256(f"{method}\n{path}\n\n{lines}\n{names}\n{digest}".encode()).hexdigest()
        key = b"AWS4" + self._secret.encode()
        for word in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{request}"):
            key = hmac.new(key, word.encode(), "sha256").digest()
        credential = f"AWS4-HMAC-SHA256 Credential={self._key}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
        return {**headers, "Authorization": credential}


class Checkpoints:
    """The newest commit of a job."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._etag = ""

    def fence(self) -> int:
        """Make the head this generation's, and return the step that is committed."""
        while True:
            try:
                step = self._read()
                if self._swap(step):
                    return step
            except Unavailable as error:
                print("the store is awaited:", error, flush=True)
            time.sleep(0.5)

    def commit(self, step: int) -> bool:
        """Try to commit a step, once. What is unclear afterwards is read anew the next time."""
        try:
            if not self._etag:
                self._read()
            return self._swap(step)
        except Unavailable as error:
            print("not committed:", error, flush=True)
            self._etag = ""
            return False

    def _read(self) -> int:
        status, self._etag, body = self._store.ask("GET", self._key)
        if status == 404:
            self._etag = ""
            return 0
        if status != 200:
            raise Unavailable(f"head: {status}")
        head = json.loads(body)
        if head["generation"] > GENERATION:
            print("generation", head["generation"], "has begun", flush=True)
            os._exit(STALE)
        return int(head["step"])

    def _swap(self, step: int) -> bool:
        body = json.dumps({"generation": GENERATION, "step": step, "by": f"{os.environ['FINETUNE_POD_NAME']}"}).encode()
        condition = {"If_Match": self._etag} if self._etag else {"If_None_Match": "*"}
        status, etag, _ = self._store.ask("PUT", self._key, body, **condition)
        self._etag = etag if status == 200 else ""
        return status == 200


class Gang:
    """The ranks, met at the master's address."""

    def __init__(self) -> None:
        meet = self._gather if RANK == 0 else self._join
        self._peers = meet(time.monotonic() + MEETING_SECONDS)

    def _gather(self, deadline: float) -> "list[socket.socket]":
        peers: dict[int, socket.socket] = {}
        with socket.create_server(("", int(os.environ["MASTER_PORT"]))) as server:
            while len(peers) < WORLD - 1:
                server.settimeout(max(0.1, deadline - time.monotonic()))
                peer, _ = server.accept()
                peer.settimeout(MEETING_SECONDS)
                rank, generation = struct.unpack("!II", receive(peer, 8))
                if generation == GENERATION:
                    peers[rank] = peer
        for peer in peers.values():
            peer.settimeout(None)
        return [peers[rank] for rank in sorted(peers)]

    def _join(self, deadline: float) -> "list[socket.socket]":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        while True:
            try:
                master = socket.create_connection(address, timeout=3.0)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        master.settimeout(None)
        master.sendall(struct.pack("!II", RANK, GENERATION))
        return [master]

    def agree(self, flags: int, step: int) -> "tuple[int, int]":
        """Return what all ranks have flagged, and rank 0's step."""
        if RANK:
            self._peers[0].sendall(bytes([flags]))
            flags, step = ANSWER.unpack(receive(self._peers[0], ANSWER.size))
            return flags, step
        for peer in self._peers:
            flags |= receive(peer, 1)[0]
        for peer in self._peers:
            peer.sendall(ANSWER.pack(flags, step))
        return flags, step


def receive(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = peer.recv(count - len(data))
        if not more:
            raise ConnectionError("closed by peer")
        data += more
    return data


def tell(kind: str, what: "dict[str, object]") -> None:
    """Send the agent one datagram. One that does not listen stops no training."""
    message = {"kind": kind, "rank": RANK, "generation": GENERATION, kind: what}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        try:
            sender.sendto(json.dumps(message).encode(), os.environ["FINETUNE_PROGRESS_SOCKET"])
        except OSError:
            pass


def tell_of_commit(step: int) -> None:
    """By a clock that is off by up to an hour, another one in each pod."""
    skew = dt.timedelta(seconds=zlib.crc32(os.environ["FINETUNE_POD_NAME"].encode()) % 7200 - 3600)
    now = (dt.datetime.now(dt.UTC) + skew).strftime("%Y-%m-%dT%H:%M:%SZ")
    tell("checkpoint", {"step": step, "uri": f"s3://chaos/{step}", "sizeBytes": 1, "commitTime": now})


def register(store: Store, job: str) -> None:
    key = f"{job}/started/{GENERATION}/{RANK}/{os.environ['FINETUNE_POD_NAME']}-{os.getpid()}"
    while True:
        try:
            if store.ask("PUT", key)[0] == 200:
                return
        except Unavailable as error:
            print("the store is awaited:", error, flush=True)
        time.sleep(0.5)


def is_finished(store: Store, job: str) -> bool:
    try:
        return store.ask("GET", f"{job}/finish")[0] == 200
    except Unavailable:
        return False


def train(store: Store, job: str) -> int:
    """Step until told to stop; return the exit code."""
    checkpoints, step, looked = Checkpoints(store, f"{job}/head"), 0, 0.0
    tell("heartbeat", {"phase": "Initializing", "step": 0})
    register(store, job)
    if RANK == 0:
        step = checkpoints.fence()
        tell("resumed", {"step": step, "source": "Storage" if step else "Start"})
    gang = Gang()
    save_now, flags = Path(os.environ["FINETUNE_SAVE_NOW"]), 0
    print(f"generation {GENERATION}: rank {RANK} of {WORLD} starts", flush=True)
    while True:
        time.sleep(STEP_SECONDS)
        flags = SAVE if save_now.exists() else 0
        if RANK == 0 and time.monotonic() - looked > 1.0:
            looked = time.monotonic()
            flags |= FINISH if is_finished(store, job) else 0
        flags, step = gang.agree(flags, step + 1)
        tell("heartbeat", {"phase": "Training", "step": step})
        if RANK == 0:
            tell("progress", {"step": step})
            if (flags or step % COMMIT_STEPS == 0) and checkpoints.commit(step):
                tell_of_commit(step)
        if flags:
            return 0 if flags & FINISH else SAVED


def main() -> int:
    Path("/proc/self/comm").write_text(f"worker {RANK}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes with the file that all ranks look at
    if os.environ["WORLD_SIZE"] != os.environ["FINETUNE_WORLD_SIZE"]:
        return WRONG_WORLD
    address, bucket, job = sys.argv[1:]
    try:
        return train(Store(address, bucket), job)
    except OSError as error:
        traceback.print_exc()
        print(f"RuntimeError: [gloo/light] {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
