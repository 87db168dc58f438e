"""Where models and data lie, and how they get onto a node.

A source is first *pinned*: rank 0 asks the store which files it is made of and which versions (ETags) they have, and all ranks take its
word. Then the first rank of each node fetches exactly those into scratch, under a name made of URI and version, so that a restart on the
same node finds them there and a changed source is never mixed with an old one. A file appears under its final name only whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune_trainer.errors import BadConfig, BadData, NoPermission, TrainingError
from finetune_trainer.object_store import ObjectInfo, ObjectStore
from finetune_trainer.scratch import unfinished


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file of a source: ``name`` relative to the source, ``version`` an ETag, or size and time for a mounted file."""

    name: str
    uri: str
    version: str
    size: int

    @property
    def lasting_version(self) -> str:
        """The version as far as it is the same on every node and at every start, for as long as nobody changes the file.

        A commit of the Hub also changes other files; what an image holds has the times at which that was built.
        """
        if self.uri.startswith("hf://"):
            return self.version.rpartition(":")[2]
        return str(self.size) if self.uri.startswith("file://") else self.version


@dataclass(frozen=True, slots=True)
class Pinned:
    """A source and the versions of its files. ``folder`` is set when the files already lie on every node."""

    uri: str
    files: tuple[PinnedFile, ...]
    folder: Path | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the URI and every file's name and version."""
        content = [self.uri, *([file.name, file.version] for file in self.files)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def version(self) -> str:
        """The version of a source of one file; a digest over the versions of several."""
        return self.files[0].version if len(self.files) == 1 else f"sha256:{self.digest}"


def mounted_path(uri: str, claims: Path) -> Path | None:
    """Return where a ``pvc://`` or ``file://`` URI lies in this pod, or None for other schemes."""
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return Path(rest)
    if scheme == "pvc":
        return claims / rest
    return None


def pin_data(uri: str, store: ObjectStore, claims: Path) -> Pinned:
    """Pin one data file.

    Raises:
        BadData: there is no such file.
        NoPermission: it may not be read.
    """
    path = mounted_path(uri, claims)
    name = PurePosixPath(uri).name
    if path is not None:
        return Pinned(uri, (_pin_mounted(path, name, uri, BadData),), folder=path.parent)
    info = store.head(uri)
    if info is None:
        raise BadData(f"{uri}: there is no such object")
    return Pinned(uri, (PinnedFile(name, uri, info.etag.strip('"'), info.size),))


def pin_folder(uri: str, store: ObjectStore, claims: Path, *, wanted: Callable[[str], bool]) -> Pinned:
    """Pin the files directly in a folder whose names are ``wanted``; an absent folder has none."""
    path = mounted_path(uri, claims)
    if path is not None:
        names = sorted(entry.name for entry in _list_folder(path, uri) if entry.is_file() and wanted(entry.name))
        files = tuple(_pin_mounted(path / name, name, f"{uri}/{name}", BadConfig) for name in names)
        return Pinned(uri, files, folder=path)
    listed = ((info.uri.removeprefix(uri + "/"), info) for info in store.list(uri + "/"))
    return Pinned(uri, tuple(_pin_listed(name, info) for name, info in listed if "/" not in name and wanted(name)))


def fetch(pinned: Pinned, store: ObjectStore, scratch: Path) -> Path:
    """Return the folder that holds the pinned files on this node, downloading those that are missing.

    Raises:
        BadData: a file has changed since it was pinned.
    """
    if pinned.folder is not None:
        return pinned.folder
    folder = scratch / "sources" / pinned.digest[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for file in pinned.files:
        if not (folder / file.name).exists():
            _fetch_file(file, store, folder, unfinished(scratch))
    return folder


def _fetch_file(file: PinnedFile, store: ObjectStore, folder: Path, arriving: Path) -> None:
    try:
        store.download_file(file.uri, arriving)
        info = store.head(file.uri)
        if info is None or info.etag.strip('"') != file.version or arriving.stat().st_size != file.size:
            raise BadData(f"{file.uri}: changed while it was read; start the job again when nobody writes to it")
        arriving.replace(folder / file.name)
    finally:
        arriving.unlink(missing_ok=True)


def replace_folder(arriving: Path, folder: Path) -> None:
    """Give a finished folder its final name; when another process was faster, its work stands and ours is dropped."""
    try:
        arriving.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(arriving)


def _pin_mounted(path: Path, name: str, uri: str, missing: type[TrainingError]) -> PinnedFile:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
    except PermissionError:
        raise NoPermission(f"{uri}: may not be read as user {os.getuid()} in the pod ({path})") from None
    except OSError as error:
        raise missing(f"{uri}: cannot be read ({path}: {error.strerror})") from None
    return PinnedFile(name, uri, f"{status.st_size}-{status.st_mtime_ns}", status.st_size)


def _pin_listed(name: str, info: ObjectInfo) -> PinnedFile:
    return PinnedFile(name, info.uri, info.etag.strip('"'), info.size)


def _list_folder(path: Path, uri: str) -> list[Path]:
    try:
        return list(path.iterdir())
    except PermissionError:
        raise NoPermission(f"{uri}: may not be read as user {os.getuid()} in the pod ({path})") from None
    except OSError as error:
        raise BadConfig(f"{uri}: cannot be read ({path}: {error.strerror})") from None
