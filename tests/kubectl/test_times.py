"""Ages are as exact as people want them."""

from datetime import UTC, datetime

import pytest

from finetune_cli.jobs.times import age, duration, until

NOON = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0.9, "0s"), (119, "119s"), (120, "2m"), (200, "3m20s"), (599, "9m59s"), (3599, "59m"), (10799, "179m"),
     (10800, "3h"), (19800, "5h30m"), (30000, "8h"), (172799, "47h"), (172800, "2d"), (352800, "4d2h"), (1036800, "12d")],
)  # fmt: skip
def test_a_length_of_time(seconds: float, text: str):
    assert duration(seconds) == text


def test_how_long_ago_and_how_long_until():
    assert age("2026-01-01T11:58:20Z", NOON) == "100s"
    assert age(None, NOON) == ""
    assert until("2026-01-01T12:14:00Z", NOON) == "14m"
    assert until("2026-01-01T11:59:00Z", NOON) == "now"
    assert until(None, NOON) == ""
