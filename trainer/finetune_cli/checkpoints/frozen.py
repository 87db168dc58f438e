"""Frozen numbers, read by range: from the model's source in S3, from a copy of it in a folder, from the plan's constants.

The source must be the one that the job trained from. In S3 its ETags say so, before and after it was read. A copy in a folder is
held against the names, sizes and shapes only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from finetune_cli.errors import CannotTell, Damaged
from finetune_trainer.export_plan import SourceFile, Weight
from finetune_trainer.object_store import ObjectStore
from finetune_trainer.rounding import ITEM_BYTES, converted
from finetune_trainer.safetensors_header import LENGTH_BYTES, BadHeader, Tensor, header_end, parse_header


class Bytes(Protocol):
    """A file somewhere."""

    @property
    def name(self) -> str:
        """What to call it in a message."""

    def read(self, start: int, length: int) -> bytes:
        """Return so many bytes from there on."""


@dataclass(frozen=True, slots=True)
class LocalBytes:
    """A file on this machine."""

    path: Path

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self.path)

    def read(self, start: int, length: int) -> bytes:
        """Return so many bytes from there on."""
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """An object."""

    store: ObjectStore
    name: str

    def read(self, start: int, length: int) -> bytes:
        """Return so many bytes from there on."""
        return self.store.get(self.name, start, length)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, of which single tensors are read in pieces."""

    file: Bytes

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """What its header says."""
        try:
            return parse_header(self.file.read(0, header_end(self.file.read(0, LENGTH_BYTES))))
        except BadHeader as error:
            raise Damaged(f"{self.file.name} is no safetensors file: {error}") from None

    def numbers(self, tensor_name: str, weight: Weight, first: int, count: int) -> bytes | memoryview:
        """Return ``count`` numbers of a tensor from ``first``, in the weight's format.

        Raises:
            Damaged: there is no tensor of this name and the weight's shape.
        """
        tensor = self.tensors.get(tensor_name)
        if tensor is None or tensor.shape != weight.shape:
            found = "no such tensor" if tensor is None else f"shape {list(tensor.shape)}"
            raise Damaged(
                f"{self.file.name}: {tensor_name} should have shape {list(weight.shape)}, there is {found}: "
                "it is another model than the job trained from"
            )
        item = ITEM_BYTES[tensor.dtype]
        return converted(self.file.read(tensor.begin + first * item, count * item), tensor.dtype, weight.dtype)


def stored_source(store: ObjectStore, uri: str, files: Mapping[str, SourceFile]) -> dict[str, TensorFile]:
    """Return the files of a source in S3.

    Raises:
        Damaged: one of them is not the one that the job trained from.
    """
    require_unchanged(store, uri, files)
    return {name: TensorFile(StoredBytes(store, f"{uri}/{name}")) for name in files}


def require_unchanged(store: ObjectStore, uri: str, files: Mapping[str, SourceFile]) -> None:
    """Return if the files of a source in S3 still are those that the job trained from."""
    for name, file in files.items():
        info = store.head(f"{uri}/{name}")
        if info is None or info.etag.strip('"') != file.version:
            found = "is gone" if info is None else f"has ETag {info.etag}"
            raise Damaged(
                f"{uri}/{name} {found}, the job trained from {file.version!r}: restore it, or give a copy of the model as "
                "it was with --model FOLDER"
            )


def local_source(folder: Path, uri: str, files: Mapping[str, SourceFile]) -> dict[str, TensorFile]:
    """Return the files of a copy of a source.

    Raises:
        CannotTell: a file is not there.
        Damaged: it has another size than the one that the job trained from.
    """
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            raise CannotTell(
                f"{path} is missing: --model needs a copy of {uri}, whose frozen weights the result contains"
            )
        if path.stat().st_size != file.size_bytes:
            raise Damaged(
                f"{path} has {path.stat().st_size} bytes, the job trained from {file.size_bytes} (version {file.version}): "
                f"give a copy of {uri} as it was"
            )
    return {name: TensorFile(LocalBytes(folder / name)) for name in files}
