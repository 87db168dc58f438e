"""What talking to a cluster can end with.

ClientError
├── NoCluster       no configuration, or no answer: nothing is known
├── Forbidden       401, 403: not logged in, or without the right
├── NotInstalled    the cluster knows no FineTuneJobs
├── NotFound        there is no such job; the message has names that are like it
├── Exists          there is one of that name already
├── Refused         the manifest, or the change, is refused; ``faults`` say what is wrong in it, and where
├── EndedOtherwise  the job has ended, and not as it was waited for
└── TimedOut        it is not as it was waited for yet
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong in a manifest: the field's path, and the line that it stands in where that is known."""

    message: str
    path: str = ""
    line: int | None = None


class ClientError(Exception):
    """A reason to stop. The message is one line: what, where, what to do."""


class NoCluster(ClientError):
    """No configuration, or no answer."""


class Forbidden(ClientError):
    """Not logged in, or without the right."""


class NotInstalled(ClientError):
    """The cluster knows no FineTuneJobs."""


class NotFound(ClientError):
    """There is no such object."""


class Exists(ClientError):
    """There is one of that name already."""


class Refused(ClientError):
    """What was sent is refused."""

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class EndedOtherwise(ClientError):
    """The job has ended, and not as it was waited for."""


class TimedOut(ClientError):
    """It is not as it was waited for yet."""
