"""Sums of Kubernetes quantities."""

from decimal import Decimal

_FACTORS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{prefix: Decimal(1000) ** power for power, prefix in enumerate(("k", "M", "G", "T", "P"), start=1)},
    **{prefix: Decimal(1024) ** power for power, prefix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), start=1)},
}


def quantity_value(quantity: str) -> Decimal:
    """Return the number that a quantity stands for: bytes, cores. Raises ``ValueError`` when it is none."""
    digits = quantity.rstrip("mkKMGTPi")
    suffix = quantity[len(digits) :]
    if suffix not in _FACTORS or not digits:
        raise ValueError(f"not a quantity: {quantity!r}")
    return Decimal(digits) * _FACTORS[suffix]


def total_bytes(*quantities: str) -> str:
    """Return the sum of quantities of memory, in bytes, as a quantity."""
    return str(int(sum(quantity_value(quantity) for quantity in quantities)))
