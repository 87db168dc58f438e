"""Numbers in the formats that weights are stored in, by numpy alone: bytes to FP32, and FP32 rounded to bytes.

Rounding is to nearest, ties to even, as torch does it on any device, so that weights rounded here are bit for bit those that a job
rounded itself. numpy has no BF16: it is the upper half of an FP32.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per number of the safetensors formats that are handled here."""

FLOATS = ("F64", "F32", "BF16", "F16")
"""Those that can be converted into one another."""

_QUIET_NAN = np.uint16(0x7FC0)


def widen(data: bytes | memoryview, dtype: str) -> Floats:
    """Return little-endian numbers of a safetensors format as FP32: exact, but of F64."""
    match dtype:
        case "F32":
            return np.frombuffer(data, "<f4")
        case "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        case "F16":
            return np.frombuffer(data, "<f2").astype(np.float32)
        case "F64":
            return np.frombuffer(data, "<f8").astype(np.float32)
    raise ValueError(f"{dtype} is no floating-point format that can be converted")


def rounded(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """Return FP32 numbers in a safetensors format; ``.tobytes()`` of it, or its buffer, is what a file holds."""
    match dtype:
        case "F32":
            return values
        case "BF16":
            return _to_bf16(values)
        case "F16":
            with np.errstate(over="ignore", under="ignore"):
                return values.astype("<f2")
    raise ValueError(f"{dtype} is no format that weights are trained in")


def converted(data: bytes | memoryview, source: str, target: str) -> bytes | memoryview:
    """Return numbers of one format as the bytes of another; of the same, as they are."""
    return data if source == target else rounded(widen(data, source), target).data.cast("B")


def _to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    upper = bits >> 16
    upper &= 1
    upper += 0x7FFF  # half of the last place that stays, less one where it is even
    upper += bits
    upper >>= 16
    nearest = upper.astype("<u2")
    nearest[np.isnan(values)] = _QUIET_NAN
    return nearest
