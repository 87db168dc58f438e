"""How much memory the connections of agents take: two for each pod, open for as long as it runs.

asyncio keeps a buffer of 256 KiB for each TLS connection, for what has been received and is not decrypted yet, and has no setting for it:
half a GiB for a thousand pods. A report has less than 1 KiB, and whatever does not fit comes in the next pieces. The size is that of every
connection of the process, those to the API server too: a list of 500 pods then comes in some hundred pieces more.
"""

from asyncio import sslproto

BUFFER_BYTES = 4 * 1024


def cut_buffers() -> None:
    """Give the TLS connections that are made from now on small buffers."""
    sslproto.SSLProtocol.max_size = BUFFER_BYTES  # an attribute of the class, read by each new one
