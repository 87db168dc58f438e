"""Sets the wall clock of every Python in a container off by up to half a minute, by the container's host name.

``datetime.now`` is changed in the type itself: libraries have taken the type along by the time that another one could take its place.
"""

import ctypes
import datetime as dt
import gc
import socket
import time
import zlib

SECONDS = zlib.crc32(socket.gethostname().encode()) % 61 - 30

_time, _now = time.time, dt.datetime.now


def now(cls: type, tz: "dt.tzinfo | None" = None) -> dt.datetime:
    return _now(tz) + dt.timedelta(seconds=SECONDS)


time.time = lambda: _time() + SECONDS
gc.get_referents(dt.datetime.__dict__)[0]["now"] = classmethod(now)
ctypes.pythonapi.PyType_Modified(ctypes.py_object(dt.datetime))
