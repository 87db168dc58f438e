"""Broken devices and fabrics, known by what CUDA, ROCm, NCCL and the drivers say of them.

Only texts that a program cannot bring about and that a peer's death does not cause: "illegal memory access" is most often a bug, and an NCCL
time-out or ``IBV_WC_RETRY_EXC_ERR`` most often the echo of a peer that is gone. Any other text fails as before, and the node is not blamed.
"""

import re

from finetune_api.protocol import Exit

_BROKEN = (
    r"uncorrectable (NVLink |ECC )?error",  # cudaErrorECCUncorrectable, cudaErrorNvlinkUncorrectable
    r"uncorrectable ECC",
    r"hipErrorECCNotCorrectable",
    r"CUDA(-capable)? device\(s\) is/are busy or unavailable",
    r"no (CUDA|ROCm)-capable device is detected",
    r"No (CUDA|HIP) GPUs are available",
    r"Unexpected error from cudaGetDeviceCount",
    r"NVIDIA driver on your system is too old",
    r"Found no NVIDIA driver on your system",
    r"(CUDA|hip) error: (hardware stack error|system not yet initialized|system has unsupported display driver)",
    r"GPU (is lost|has fallen off the bus)",
    r"NVRM: Xid",
    r"Driver/library version mismatch",
    r"NET/IB ?: .*[Gg]ot async (fatal )?event ?: (port error|local catastrophic error|device fatal)",
)
_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in _BROKEN), re.IGNORECASE)


def device_error(end: Exit) -> str | None:
    """Return the line in which a worker's end tells of a broken device, or None."""
    lines = [*end.message.splitlines(), *end.log_tail.splitlines()]
    return next((line.strip() for line in lines if _PATTERN.search(line)), None)
