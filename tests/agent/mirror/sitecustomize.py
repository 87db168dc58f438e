"""Writes every datagram that any process of a pod sends, and when, to the file BEAT_MIRROR: what agents pass on is a part of it."""

import json
import os
import socket
import time

_FILE = os.environ.get("BEAT_MIRROR", os.devnull)


class _Mirrored(socket.socket):
    def sendto(self, data, *where):
        line = {"at": time.monotonic(), "pid": os.getpid(), "said": json.loads(data)}
        descriptor = os.open(_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        os.close(descriptor)
        return super().sendto(data, *where)


socket.socket = _Mirrored
