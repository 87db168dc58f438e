"""Finds a port for a generation's rendezvous.

From 20000 to 29999: below the ports from which Linux makes outgoing connections (32768 up by default), so that none
takes it between this look and the rendezvous, and below Kubernetes' NodePorts (30000-32767), which matters to pods on
the host's network. By chance, because pods of one host look at the same time and would all find the first one free.
"""

import random
import socket
from typing import Optional

PORTS = range(20000, 30000)
TRIES = 100


def propose_port(random_source: Optional[random.Random] = None) -> int:
    """Return a port that nobody listens on.

    Raises:
        OSError: a hundred in a row were taken.
    """
    source = random_source or random.SystemRandom()
    for _ in range(TRIES):
        port = source.choice(PORTS)
        if is_free(port):
            return port
    raise OSError("no port of " + str(PORTS.start) + "-" + str(PORTS.stop - 1) + " is free")


def is_free(port: int) -> bool:
    """Tell whether a server could listen on ``port``, on every address, as torch's TCPStore will."""
    return _can_bind(socket.AF_INET, "0.0.0.0", port) and _can_bind(socket.AF_INET6, "::", port)  # noqa: S104  the store does


def _can_bind(family: int, address: str, port: int) -> bool:
    try:
        probe = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return True  # a kernel without this family
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return family == socket.AF_INET6 and not _is_in_use(error)
        return True


def _is_in_use(error: OSError) -> bool:
    import errno

    return error.errno == errno.EADDRINUSE
