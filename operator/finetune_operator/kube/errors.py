"""What a request to the Kubernetes API can end with.

KubeError
├── NotFound      404: data, not an error, for whoever deletes or reads
├── Conflict      409: exists already, or written by somebody else in between; look again
├── Gone          410: the resource version is too old; list again
├── Forbidden     401, 403: rights are missing; the message says which
├── Invalid       400, 422: the API server refuses the object; repeating it does not help
├── TooMany       429: wait ``retry_after`` seconds
├── Unavailable   5xx, no connection, no answer in time: unknown whether it was done
└── NotLeading    a write that was not sent, because another process may lead by now
"""


class KubeError(Exception):
    """A request failed. ``status`` is the HTTP status, 0 when there was no answer."""

    def __init__(self, message: str, *, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class NotFound(KubeError):
    """The object does not exist."""


class Conflict(KubeError):
    """The object exists already, or has been written by somebody else."""


class Gone(KubeError):
    """The resource version is too old."""


class Forbidden(KubeError):
    """The operator lacks a right."""


class Invalid(KubeError):
    """The API server refuses the object."""


class TooMany(KubeError):
    """The API server wants us to wait."""


class Unavailable(KubeError):
    """No answer, or a server error."""


class NotLeading(KubeError):
    """This process does not lead, so it did not send the write."""


_BY_STATUS: dict[int, type[KubeError]] = {
    400: Invalid,
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: TooMany,
}


def error_for(status: int, message: str, retry_after: float | None = None) -> KubeError:
    """Return the error that an HTTP status stands for."""
    kind = _BY_STATUS.get(status, Unavailable if status >= 500 else KubeError)
    return kind(message, status=status, retry_after=retry_after)
