"""Adding a low-rank adapter into the weight it adapts: FP32, in an order of operations that is the same everywhere.

``weight + scaling * (left @ right)`` has as many results as there are BLAS libraries, processors and thread counts, because each sums
the products in another order. Here they are summed one rank after the other by elementwise operations, which IEEE 754 leaves no
choice about. So a job's own result, wherever it was merged, and an export of its last checkpoint on somebody's laptop are equal bit
for bit. The price is bandwidth: blocks are kept within a cache, and the processors share them.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from finetune_trainer.rounding import Floats

BLOCK_NUMBERS = 2**18  # 1 MiB of FP32: block, sum and product together fit a second-level cache


def add_adapter(weight: Floats, left: Floats, right: Floats, scaling: float, *, threads: int | None = None) -> Floats:
    """Return the sum.

    Args:
        weight: what is adapted, (rows, columns).
        left: (rows, rank); of a linear layer, the adapter's B.
        right: (rank, columns); its A.
        scaling: what the product counts.
        threads: how many blocks are in work at once; by default one for each processor, up to 16.
    """
    rows, columns = weight.shape
    assert left.shape == (rows, right.shape[0]), (left.shape, right.shape)
    assert right.shape[1] == columns, (right.shape, weight.shape)
    total = np.empty((rows, columns), np.float32)
    step = max(1, BLOCK_NUMBERS // columns)

    def add(first: int) -> None:
        block = slice(first, first + step)
        total[block] = _added(weight[block], left[block], right, np.float32(scaling))

    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 16)) as pool:
        list(pool.map(add, range(0, rows, step)))
    return total


def _added(weight: Floats, left: Floats, right: Floats, scaling: np.float32) -> Floats:
    change = np.zeros(weight.shape, np.float32)
    product = np.empty(weight.shape, np.float32)
    for index in range(right.shape[0]):
        np.multiply(left[:, index : index + 1], right[index], out=product)
        np.add(change, product, out=change)
    np.multiply(change, scaling, out=change)
    return np.add(weight, change, out=change)
