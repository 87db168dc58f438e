"""Encoded examples on disk, memory-mapped: two flat arrays and, for classification, a third.

``tokens`` holds all examples one after the other, ``offsets[i]:offsets[i+1]`` is example i, ``labels[i]`` its class. The folder's
name is a digest of everything the content depends on, so a restart, or another process of the node, maps what is already there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

TOKENS, OFFSETS, LABELS = "tokens.int32", "offsets.int64", "labels.int64"


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of token ids and, for classification, its class."""

    tokens: npt.NDArray[np.int32]
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples by number. Nothing is read before it is used."""

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Example(self.tokens[start:end], None if self.labels is None else int(self.labels[index]))

    def lengths(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each example."""
        lengths: npt.NDArray[np.int64] = self.offsets[indices + 1] - self.offsets[indices]
        return lengths


def open_encoded(folder: Path) -> Encoded:
    """Map the arrays of a folder."""
    labels = folder / LABELS
    return Encoded(
        tokens=np.memmap(folder / TOKENS, dtype=np.int32, mode="r"),
        offsets=np.memmap(folder / OFFSETS, dtype=np.int64, mode="r"),
        labels=np.memmap(labels, dtype=np.int64, mode="r") if labels.exists() else None,
    )


class EncodedWriter:
    """Appends examples to the arrays of a folder, in constant memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._tokens: BinaryIO = (folder / TOKENS).open("wb")
        self._offsets: BinaryIO = (folder / OFFSETS).open("wb")
        self._labels: BinaryIO | None = None
        self._folder = folder
        self._end = 0
        self.examples = 0
        self._offsets.write(np.int64(0).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._offsets, self._labels):
            if file is not None:
                file.close()

    def write(self, examples: Iterable[Example]) -> None:
        """Append examples: either all of a folder have labels, or none."""
        for example in examples:
            self._tokens.write(example.tokens.astype(np.int32).tobytes())
            self._end += len(example.tokens)
            self.examples += 1
            self._offsets.write(np.int64(self._end).tobytes())
            if example.label is not None:
                self._write_label(example.label)

    def _write_label(self, label: int) -> None:
        if self._labels is None:
            self._labels = (self._folder / LABELS).open("wb")
        self._labels.write(np.int64(label).tobytes())
