"""A store in memory that fails where a test wants it to."""

from collections.abc import Callable

from finetune_trainer.object_store import Ambiguous, MemoryObjectStore, PreconditionFailed


class Crash(BaseException):
    """The process dies here."""


class FaultyStore(MemoryObjectStore):
    """Calls ``before`` and ``after`` with the method's name and the URI around each change.

    What they raise happens instead of the change, or after it; ``writes`` counts the changes that happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[str, str], None] = lambda method, uri: None
        self.after: Callable[[str, str], None] = lambda method, uri: None
        self.writes = 0

    def put(self, uri, body):
        return self._change("put", uri, lambda: MemoryObjectStore.put(self, uri, body))

    def upload(self, body, uri, **options):
        self._change("upload", uri, lambda: MemoryObjectStore.put(self, uri, bytes(body)))

    def put_if_absent(self, uri, body):
        return self._change("put_if_absent", uri, lambda: MemoryObjectStore.put_if_absent(self, uri, body))

    def put_if_match(self, uri, body, etag):
        return self._change("put_if_match", uri, lambda: MemoryObjectStore.put_if_match(self, uri, body, etag))

    def delete(self, uris):
        for uri in list(uris):
            self._change("delete", uri, lambda: MemoryObjectStore.delete(self, [uri]))  # noqa: B023  called at once

    def _change(self, method, uri, change):
        self.before(method, uri)
        result = change()
        self.writes += 1
        self.after(method, uri)
        return result

    def crash_after(self, writes: int) -> None:
        """Die right after so many more changes."""
        last = self.writes + writes

        def die(method, uri):
            if self.writes >= last:
                raise Crash

        self.after = die
        if writes == 0:
            self.before = die

    def heal(self) -> None:
        """Work from now on."""
        self.before = self.after = lambda method, uri: None


class IgnoresConditions(MemoryObjectStore):
    """What rclone's S3 server does: takes the headers, and writes whatever they say."""

    def __init__(self, *, absent: bool = True, match: bool = True) -> None:
        super().__init__()
        self._ignored = {"absent": absent, "match": match}

    def put_if_absent(self, uri, body):
        return self.put(uri, body) if self._ignored["absent"] else super().put_if_absent(uri, body)

    def put_if_match(self, uri, body, etag):
        return self.put(uri, body) if self._ignored["match"] else super().put_if_match(uri, body, etag)


class Once:
    """Raises an error for the first change whose URI ends so."""

    def __init__(self, suffix: str, error: Exception) -> None:
        self.suffix, self.error, self.raised = suffix, error, False

    def __call__(self, method: str, uri: str) -> None:
        if uri.endswith(self.suffix) and method != "delete" and not self.raised:
            self.raised = True
            raise self.error


__all__ = ["Ambiguous", "Crash", "FaultyStore", "IgnoresConditions", "Once", "PreconditionFailed"]
