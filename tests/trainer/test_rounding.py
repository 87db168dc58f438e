"""numpy and torch agree on every bit: what a job rounds and merges, anybody else rounds and merges to the same."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.adapters import BLOCK_NUMBERS, add_adapter
from finetune_trainer.rounding import FLOATS, converted, rounded

TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TRAINED = ("F32", "BF16", "F16")


@pytest.mark.parametrize("target", TRAINED)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_fp32_is_rounded_as_torch_does(target: str, numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    expected = torch.from_numpy(values).to(TORCH[target])
    assert rounded(values, target).tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_every_upper_half_of_fp32_is_rounded_as_torch_does(target: str) -> None:
    """All signs and exponents, with lower halves on both sides of each tie."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (upper[:, None] | lower).reshape(-1).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(TORCH[target])
    assert rounded(values, target).tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("target", TRAINED)
def test_not_a_number_stays_none(target: str) -> None:
    data = rounded(np.array([math.nan, 1.0], np.float32), target).tobytes()
    value = torch.frombuffer(bytearray(data), dtype=TORCH[target])
    assert value.isnan().tolist() == [True, False]


@pytest.mark.parametrize("target", TRAINED)
@pytest.mark.parametrize("source", FLOATS)
def test_any_format_is_converted_as_torch_does(source: str, target: str) -> None:
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(TORCH[source])
    data = values.view(torch.uint8).numpy().tobytes()
    assert bytes(converted(data, source, target)) == values.to(TORCH[target]).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(3, 5, 2), (1, 1, 1), (7, BLOCK_NUMBERS + 1, 1), (BLOCK_NUMBERS // 100, 301, 3)],
    ids=["small", "one number", "rows longer than a block", "many blocks"],
)
def test_an_adapter_is_added_right_whatever_the_blocks(rows: int, columns: int, rank: int) -> None:
    random = np.random.default_rng(1)
    weight, left, right = (
        random.standard_normal(shape, np.float32) for shape in ((rows, columns), (rows, rank), (rank, columns))
    )
    total = add_adapter(weight, left, right, 2.0)
    np.testing.assert_allclose(total, weight + 2.0 * (left.astype(np.float64) @ right), atol=1e-5)
    halves = [add_adapter(weight[rows], left[rows], right, 2.0) for rows in (slice(rows // 2), slice(rows // 2, None))]
    assert np.array_equal(total, np.concatenate(halves)), "blocks change no bit"
    assert np.array_equal(total, add_adapter(weight.T, right.T, left.T, 2.0).T), "nor does the way round"
