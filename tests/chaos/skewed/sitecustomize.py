"""Sets the wall clock of every Python in a container off by up to half a minute, by the container's host name."""

import datetime as dt
import socket
import time
import zlib

SECONDS = zlib.crc32(socket.gethostname().encode()) % 61 - 30

real_time, real_datetime = time.time, dt.datetime


class AnyDatetime(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, real_datetime)


class SkewedDatetime(real_datetime, metaclass=AnyDatetime):
    @classmethod
    def now(cls, tz: "dt.tzinfo | None" = None) -> "dt.datetime":
        return real_datetime.now(tz) + dt.timedelta(seconds=SECONDS)


time.time = lambda: real_time() + SECONDS
dt.datetime = SkewedDatetime  # type: ignore[misc]
