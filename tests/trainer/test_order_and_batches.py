"""Data order, micro-batches and their dealing are pure functions; nothing in them knows of the cluster."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.recipe import Training
from finetune_trainer.data.batches import BatchPlan, cut, deal, default_micro_batch_size, random_seed
from finetune_trainer.data.order import permute, sample_order

seeds = st.integers(0, 2**32 - 1)


@given(size=st.integers(1, 5000), seed=seeds, epoch=st.integers(0, 1000))
def test_every_sample_comes_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size=size, seed=seed, epoch=epoch)) == list(range(size))


@given(samples=st.integers(20, 500), seed=seeds, start=st.integers(0, 2000), count=st.integers(1, 600))
def test_any_piece_of_the_order_is_found_without_the_rest(samples: int, seed: int, start: int, count: int) -> None:
    whole = sample_order(np.arange(start + count), samples=samples, seed=seed)
    piece = sample_order(np.arange(start, start + count), samples=samples, seed=seed)
    assert list(piece) == list(whole[start:])


def test_order_is_frozen() -> None:
    """A resumed job must find the order it left: this may never change for a released version."""
    assert list(sample_order(np.arange(12), samples=10, seed=42)) == FROZEN


FROZEN = [8, 0, 7, 5, 9, 1, 2, 4, 6, 3, 8, 4]


def test_epochs_and_seeds_differ() -> None:
    first = permute(np.arange(1000), size=1000, seed=1, epoch=0)
    assert not np.array_equal(first, permute(np.arange(1000), size=1000, seed=1, epoch=1))
    assert not np.array_equal(first, permute(np.arange(1000), size=1000, seed=2, epoch=0))


def test_shuffling_is_thorough() -> None:
    """Neighbours in the file are no neighbours in the order, and no place keeps its sample."""
    size = 10_000
    images = np.stack([permute(np.arange(size), size=size, seed=seed, epoch=0) for seed in range(20)])
    assert np.mean(np.abs(np.diff(images, axis=1))) == pytest.approx(size / 3, rel=0.02)  # as for independent places
    assert np.mean(images == np.arange(size)) < 5 / size
    correlations = [np.corrcoef(image, np.arange(size))[0, 1] for image in images]
    assert np.max(np.abs(correlations)) < 0.05


@given(count=st.integers(1, 200), ranks=st.integers(1, 40))
def test_a_deal_gives_each_micro_batch_to_one_rank_and_as_many_turns_to_all(count: int, ranks: int) -> None:
    hands = [deal(count, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert sorted(index for hand in hands for index in hand if index is not None) == list(range(count))
    assert len({len(hand) for hand in hands}) == 1


@given(ranks=st.integers(1, 40), parts=st.integers(1, 30))
def test_rounds_are_the_turns_of_a_deal(ranks: int, parts: int) -> None:
    plan = BatchPlan(samples=100, global_batch_size=parts * 3, micro_batch_size=3, seed=1)
    assert plan.rounds(ranks) == len(deal(parts, ranks=ranks, rank=0))


def test_steps_follow_one_another_over_epochs_without_a_seam() -> None:
    plan = BatchPlan(samples=10, global_batch_size=4, micro_batch_size=2, seed=1)
    seen = [int(index) for step in range(5) for index in plan.chosen(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert plan.epoch(5) == 2


SKIPS = {
    "nothing": ([], [0, 1, 2, 3]),
    "a batch before": ([(0, 4)], [4, 5, 6, 7]),
    "part of the batch": ([(1, 3)], [0, 3, 4, 5]),
    "a batch behind": ([(4, 8)], [0, 1, 2, 3]),
    "two that touch, in the wrong order": ([(2, 4), (0, 2)], [4, 5, 6, 7]),
    "two that overlap": ([(0, 3), (1, 2)], [3, 4, 5, 6]),
    "one uncovered by another": ([(0, 4), (5, 6)], [4, 6, 7, 8]),
}


@pytest.mark.parametrize(("skipped", "numbers"), SKIPS.values(), ids=SKIPS.keys())
def test_the_row_closes_up_over_what_is_skipped(skipped: list[tuple[int, int]], numbers: list[int]) -> None:
    plan = BatchPlan(samples=100, global_batch_size=4, micro_batch_size=2, seed=1)
    assert list(plan.numbers(0, skipped)) == numbers


@given(
    ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)).map(lambda r: (r[0], r[0] + r[1])), max_size=6),
    steps=st.integers(1, 12),
)
def test_no_skipped_sample_is_used_and_no_other_is_left_out(ranges: list[tuple[int, int]], steps: int) -> None:
    plan = BatchPlan(samples=1000, global_batch_size=4, micro_batch_size=2, seed=1)
    used = [int(number) for step in range(steps) for number in plan.numbers(step, ranges)]
    skipped = {number for start, end in ranges for number in range(start, end)}
    assert used == [number for number in range(1000) if number not in skipped][: 4 * steps]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), size=st.integers(1, 9))
def test_a_cut_loses_no_sample_and_puts_like_lengths_together(lengths: list[int], size: int) -> None:
    samples = np.arange(100, 100 + len(lengths))
    parts = cut(samples, np.array(lengths), size)
    assert sorted(int(sample) for part in parts for sample in part) == list(samples)
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    in_order = [lengths[sample - 100] for part in parts for sample in part]
    assert in_order == sorted(lengths)


TOTALS = {
    "steps": ({"steps": 7}, 7),
    "whole epochs": ({"epochs": 2}, 5),
    "an epoch that ends inside a batch": ({"epochs": 1}, 3),
    "part of an epoch": ({"epochs": 0.01}, 1),
}


@pytest.mark.parametrize(("length", "steps"), TOTALS.values(), ids=TOTALS.keys())
def test_total_steps(length: dict[str, float], steps: int) -> None:
    plan = BatchPlan(samples=10, global_batch_size=4, micro_batch_size=2, seed=1)
    assert plan.total_steps(Training(global_batch_size=4, **length)) == steps


SIZES = {
    "a small model": (22_700_000, 64, 32),
    "BERT-base": (110_000_000, 64, 16),
    "seven billion": (7_000_000_000, 64, 4),
    "seventy billion": (70_000_000_000, 64, 1),
    "a batch smaller than the cap": (22_700_000, 12, 12),
    "a batch that the cap does not divide": (22_700_000, 36, 18),
    "a prime batch": (22_700_000, 37, 1),
}


@pytest.mark.parametrize(("parameters", "batch", "size"), SIZES.values(), ids=SIZES.keys())
def test_default_micro_batch(parameters: int, batch: int, size: int) -> None:
    assert default_micro_batch_size(parameters, batch) == size


def test_seeds_differ_by_every_part_and_are_frozen() -> None:
    assert len({random_seed("dropout", 42, step, index) for step in range(30) for index in range(30)}) == 900
    assert random_seed("dropout", 42, 0, 0) == FROZEN_SEED


FROZEN_SEED = 3998374099505963433
