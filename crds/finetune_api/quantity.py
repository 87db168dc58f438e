"""The numbers that Kubernetes quantities stand for."""

import re
from decimal import Decimal

_FACTORS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{prefix: Decimal(1000) ** power for power, prefix in enumerate(("k", "M", "G", "T", "P"), start=1)},
    **{prefix: Decimal(1024) ** power for power, prefix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), start=1)},
}


def quantity_value(quantity: str) -> Decimal:
    """Return the number that a quantity stands for: bytes, cores. Raises ``ValueError`` when it is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", quantity, re.ASCII)
    if match is None or match[2] not in _FACTORS:
        raise ValueError(f"not a quantity: {quantity!r}")
    return Decimal(match[1]) * _FACTORS[match[2]]


def total_bytes(*quantities: str) -> str:
    """Return the sum of quantities of memory, in bytes, as a quantity."""
    return str(int(sum(quantity_value(quantity) for quantity in quantities)))
