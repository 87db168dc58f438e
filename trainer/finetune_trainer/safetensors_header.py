"""The header of a safetensors file: which tensor lies where. Pure; the numbers stay where they are.

The library wants a whole file on a disk. Here headers are read from objects by range, and written before there are any numbers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from finetune_trainer.rounding import ITEM_BYTES

LENGTH_BYTES = 8
"""Of the header's length, little-endian, in front of it."""
LONGEST_HEADER = 100_000_000
"""The library's own limit."""
ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file: its numbers are the bytes from ``begin`` up to ``end``, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class BadHeader(Exception):
    """Bytes that should be a safetensors header are none."""


def header_end(prefix: bytes) -> int:
    """Return where the header ends, from the first eight bytes of the file.

    Raises:
        BadHeader: no header is that long.
    """
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if len(prefix) < LENGTH_BYTES or length > LONGEST_HEADER:
        raise BadHeader(f"its header would be {length} bytes long")
    return LENGTH_BYTES + length


def parse_header(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file from its first ``header_end`` bytes.

    Raises:
        BadHeader: they are no header.
    """
    end = header_end(data)
    try:
        document = json.loads(data[LENGTH_BYTES:end])
        return {name: _tensor(entry, end) for name, entry in document.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadHeader(f"{type(error).__name__}: {error}") from error


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Tensor]]:
    """Return the header of a file of these tensors (name, format, shape) one after the other, and where each will lie."""
    document: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * ITEM_BYTES[dtype]
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return header, parse_header(header)


def _tensor(entry: dict[str, Any], data_begin: int) -> Tensor:
    first, last = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    return Tensor(str(entry["dtype"]), shape, data_begin + int(first), data_begin + int(last))
