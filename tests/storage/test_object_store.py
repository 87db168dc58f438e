"""What every object store does: the same cases for the one in memory and for a real S3 server."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.errors import BadConfig
from finetune_trainer.object_store import ObjectMissing, PreconditionFailed, split_uri


def test_an_object_is_read_as_it_was_written(store, prefix):
    etag = store.put(f"{prefix}/a", b"hello")
    assert store.get(f"{prefix}/a") == b"hello"
    assert store.read(f"{prefix}/a").body == b"hello"
    assert store.read(f"{prefix}/a").etag == etag == store.head(f"{prefix}/a").etag
    assert store.head(f"{prefix}/a").size == 5


def test_a_write_replaces_what_was_there(store, prefix):
    first = store.put(f"{prefix}/a", b"one")
    second = store.put(f"{prefix}/a", b"two")
    assert first != second
    assert store.get(f"{prefix}/a") == b"two"


def test_an_empty_object_is_an_object(store, prefix):
    store.put(f"{prefix}/a", b"")
    assert store.get(f"{prefix}/a") == b""
    assert store.head(f"{prefix}/a").size == 0


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        pytest.param(None, None, b"0123456789", id="the whole"),
        pytest.param(0, 3, b"012", id="the beginning"),
        pytest.param(4, 2, b"45", id="the middle"),
        pytest.param(7, None, b"789", id="the rest"),
        pytest.param(8, 100, b"89", id="a range that ends behind the object is cut"),
        pytest.param(10, 5, b"", id="a range behind the object is empty"),
        pytest.param(None, 4, b"0123", id="a length alone counts from the beginning"),
    ],
)
def test_ranges_are_slices(store, prefix, start, length, expected):
    store.put(f"{prefix}/a", b"0123456789")
    assert store.get(f"{prefix}/a", start, length) == expected


@pytest.mark.parametrize("ask", ["get", "read"])
def test_reading_what_is_not_there_says_so(store, prefix, ask):
    with pytest.raises(ObjectMissing, match=f"{prefix}/nothing does not exist"):
        getattr(store, ask)(f"{prefix}/nothing")


def test_the_head_of_what_is_not_there_is_none(store, prefix):
    assert store.head(f"{prefix}/nothing") is None


def test_listing_yields_everything_below_a_prefix_in_order(store, prefix):
    for name in ("b/2", "b/1", "a", "b/10", "bb", "c d+e"):
        store.put(f"{prefix}/{name}", name.encode())
    listed = list(store.list(f"{prefix}/"))
    assert [info.uri.removeprefix(f"{prefix}/") for info in listed] == ["a", "b/1", "b/10", "b/2", "bb", "c d+e"]
    assert [info.uri.removeprefix(f"{prefix}/") for info in store.list(f"{prefix}/b/")] == ["b/1", "b/10", "b/2"]
    assert listed[0].size == 1
    assert listed[0].etag == store.head(listed[0].uri).etag


def test_listing_nothing_yields_nothing(store, prefix):
    assert list(store.list(f"{prefix}/")) == []


def test_a_key_is_created_once(store, prefix):
    etag = store.put_if_absent(f"{prefix}/a", b"first")
    with pytest.raises(PreconditionFailed):
        store.put_if_absent(f"{prefix}/a", b"second")
    assert store.read(f"{prefix}/a").body == b"first"
    assert store.read(f"{prefix}/a").etag == etag


def test_a_swap_needs_the_etag_that_stands(store, prefix):
    old = store.put(f"{prefix}/a", b"one")
    new = store.put_if_match(f"{prefix}/a", b"two", old)
    with pytest.raises(PreconditionFailed):
        store.put_if_match(f"{prefix}/a", b"three", old)
    assert store.read(f"{prefix}/a").body == b"two"
    assert store.read(f"{prefix}/a").etag == new


def test_nothing_can_be_swapped_for_what_is_gone(store, prefix):
    etag = store.put(f"{prefix}/a", b"one")
    store.delete([f"{prefix}/a"])
    with pytest.raises(PreconditionFailed):
        store.put_if_match(f"{prefix}/a", b"two", etag)
    assert store.head(f"{prefix}/a") is None


def test_deleting_takes_many_and_does_not_mind_what_is_gone(store, prefix):
    for number in range(5):
        store.put(f"{prefix}/{number}", b"x")
    store.delete([f"{prefix}/{number}" for number in (0, 2, 4, 99)])
    assert [info.uri[-1] for info in store.list(f"{prefix}/")] == ["1", "3"]
    store.delete([])


@pytest.mark.parametrize("size", [0, 10, 40 * 2**20], ids=["an empty file", "a small file", "a file of several parts"])
def test_files_travel_whole(store, prefix, size, tmp_path: Path):
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    (tmp_path / "up").write_bytes(body)
    store.upload_file(tmp_path / "up", f"{prefix}/file")
    store.download_file(f"{prefix}/file", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == body
    assert store.head(f"{prefix}/file").size == size


def test_a_download_of_nothing_leaves_no_file(store, prefix, tmp_path: Path):
    with pytest.raises(ObjectMissing):
        store.download_file(f"{prefix}/nothing", tmp_path / "down")
    assert list(tmp_path.iterdir()) == []


def race(count: int, write: Callable[[int], object]) -> list[int]:
    """Let writers go at once and return those that were not refused."""
    barrier, winners = threading.Barrier(count), []

    def compete(number: int) -> None:
        barrier.wait()
        try:
            write(number)
        except PreconditionFailed:
            return
        winners.append(number)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners


@pytest.mark.parametrize("attempt", range(3))
def test_of_racing_creators_exactly_one_wins(store, prefix, attempt):
    winners = race(12, lambda number: store.put_if_absent(f"{prefix}/a", f"writer {number}".encode()))
    assert len(winners) == 1
    assert store.get(f"{prefix}/a") == f"writer {winners[0]}".encode()


@pytest.mark.parametrize("attempt", range(3))
def test_of_racing_swaps_exactly_one_wins(store, prefix, attempt):
    etag = store.put(f"{prefix}/a", b"before")
    winners = race(12, lambda number: store.put_if_match(f"{prefix}/a", f"writer {number}".encode(), etag))
    assert len(winners) == 1
    assert store.get(f"{prefix}/a") == f"writer {winners[0]}".encode()


@pytest.mark.parametrize("uri", ["", "/a/b", "s3:/a/b", "s3://", "s3:///key", "http://bucket/key"])
def test_what_is_no_uri_is_refused(store, uri):
    with pytest.raises(BadConfig, match="write s3://bucket/key"):
        store.get(uri)


def test_a_uri_is_a_bucket_and_a_key():
    assert split_uri("s3://bucket/a/b c") == ("bucket", "a/b c")
    assert split_uri("s3://bucket") == ("bucket", "")
