"""How much memory the connections of agents take: two for each pod, open for as long as it runs.

asyncio keeps a buffer of 256 KiB for each TLS connection, for what has been received and is not decrypted yet, and has no setting for it:
half a GiB for a thousand pods. A report has less than 1 KiB, and whatever does not fit comes in the next pieces. The size is that of every
connection of the process, those to the API server too: a list of 500 pods then comes in some hundred pieces more.

A handshake needs more than the connection that it makes, and what it leaves lies between connections, where glibc keeps it: a third of all
that an operator with 700 agents took. It gives such pages back when asked to.
"""

import ctypes
from asyncio import sslproto

BUFFER_BYTES = 4 * 1024
LIBC = ctypes.CDLL(None)


def cut_buffers() -> None:
    """Give the TLS connections that are made from now on small buffers."""
    sslproto.SSLProtocol.max_size = BUFFER_BYTES  # an attribute of the class, read by each new one


def give_memory_back() -> None:
    """Give the kernel back what is free; other C libraries than glibc do so by themselves, or not at all."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
