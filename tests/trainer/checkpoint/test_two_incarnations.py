"""An incarnation that everybody thought dead comes back beside its successor: it ends, and nothing that counts has changed.

The old one's processes are stopped right before a request of theirs; its successor starts in other pods, trains and commits; then the
old ones go on. The request is lost, as if it had not been sent yet, or was held up by the network and arrives now. Two ranks
each, a real S3 server, and a proxy of its own for each incarnation.
"""

import signal
import threading
from contextlib import contextmanager

import pytest

from finetune_api.contract import ExitCode
from finetune_trainer.checkpoint.commit import HeadWriter
from finetune_trainer.checkpoint.head import Kept, Retention
from finetune_trainer.errors import Stale
from finetune_trainer.object_store import S3ObjectStore
from tests.storage.faulty_proxy import Fault, faulty_proxy
from tests.trainer.checkpoint.gangs import written_more_than_once
from tests.trainer.checkpoint.site import COMMIT

PATIENCE_SECONDS = 120
ALL, FIRST = (0, 1), (0,)

STOPPED_BEFORE = {
    "the fence, never sent": (COMMIT, 1, ALL, Fault.REQUEST_LOST),
    "the fence, arriving late": (COMMIT, 1, FIRST, None),
    "a part of a shard, arriving late": ("PUT partNumber=2", 1, ALL, None),
    "the manifest, never sent": ("PUT manifest.json", 1, FIRST, Fault.REQUEST_LOST),
    "the manifest, arriving late": ("PUT manifest.json", 1, ALL, None),
    "the commit, never sent": (COMMIT, 2, ALL, Fault.REQUEST_LOST),
    "the commit, arriving late": (COMMIT, 2, FIRST, None),
    "deleting what its commit dropped, never sent": ("POST ?delete", 1, FIRST, Fault.REQUEST_LOST),
    "deleting what its commit dropped, arriving late": ("POST ?delete", 1, ALL, None),
    "deleting what others left, arriving late": ("POST ?delete", 2, ALL, None),
}


class Stopped:
    """Stops ranks of a gang when its ``number``-th such request has arrived, and holds the request until it is let go."""

    def __init__(self, proxy, pattern, number, ranks, fate):
        self.pattern, self.left, self.ranks, self.fate = pattern, number, ranks, fate
        self.arrived, self.released = threading.Event(), threading.Event()
        proxy.before = self.before
        self.gang = None

    def before(self, request):
        if not request.matches(self.pattern):
            return None
        self.left -= 1
        if self.left != 0:
            return None
        self.gang.send(signal.SIGSTOP, self.ranks)
        self.arrived.set()
        assert self.released.wait(PATIENCE_SECONDS)
        return self.fate

    def go_on(self):
        self.gang.send(signal.SIGCONT, self.ranks)
        self.released.set()


@contextmanager
def stopped_gang(site, prefix, pattern, number, ranks, fate):
    """Generation 2, stopped there."""
    with faulty_proxy(site.server.endpoint) as proxy:
        stopped = Stopped(proxy, pattern, number, ranks, fate)
        stopped.gang = site.start(proxy, prefix, 2, site.new_pod(), saves=[1, 2], until=3)
        try:
            assert stopped.arrived.wait(PATIENCE_SECONDS), stopped.gang.story()
            yield stopped
        finally:
            stopped.released.set()
            stopped.gang.kill_all()


@pytest.mark.parametrize(("pattern", "number", "ranks", "fate"), STOPPED_BEFORE.values(), ids=STOPPED_BEFORE.keys())
def test_one_that_was_replaced_ends_and_changes_nothing(site, remains, pattern, number, ranks, fate):
    prefix = site.new_prefix(like=remains)
    with stopped_gang(site, prefix, pattern, number, ranks, fate) as stopped:
        with faulty_proxy(site.server.endpoint) as proxy:
            successor = site.start(proxy, prefix, 3, site.new_pod(), saves=[1, 2], until=3)
            assert successor.wait() == [0, 0], successor.story()
            assert all(said["error"] is None for said in successor.told("saved"))
        head, steps = prefix.get("HEAD"), prefix.check()
        stopped.go_on()
        assert stopped.gang.wait() == [ExitCode.STALE, ExitCode.STALE], stopped.gang.story()
    site.check(successor)
    site.check(stopped.gang)
    assert prefix.get("HEAD") == head
    assert prefix.check() == steps


def test_one_that_was_replaced_aborts_no_upload_of_its_successor(site, remains):
    """It stops between its fence and the end of its search for abandoned uploads; when it goes on, those it finds are in use."""
    prefix = site.new_prefix(like=remains)
    prefix.begin_upload("checkpoints/step-3/g1-0123456789abcdef-2/rank-00000.safetensors")
    with (
        stopped_gang(site, prefix, "GET ?uploads", 1, ALL, None) as stopped,
        faulty_proxy(site.server.endpoint) as proxy,
    ):
        all_sent, may_complete = threading.Event(), threading.Event()

        def hold(request):
            if request.matches("POST ?uploadId="):
                all_sent.set()
                assert may_complete.wait(PATIENCE_SECONDS)

        proxy.before = hold
        successor = site.start(proxy, prefix, 3, site.new_pod(), saves=[1], until=1)
        try:
            assert all_sent.wait(PATIENCE_SECONDS), successor.story()
            stopped.go_on()
            assert stopped.gang.wait() == [ExitCode.STALE, ExitCode.STALE], stopped.gang.story()
        finally:
            may_complete.set()
        assert successor.wait() == [0, 0], successor.story()
    assert successor.committed == [3]
    assert all("/g2-" in key for key in prefix.uploads()), "what it was at when it ended is for the next generation"


def test_what_the_writer_did_itself_is_never_taken_for_somebody_elses(site, remains):
    """Answers that are lost and requests that are carried out twice, at each kind of conditional write."""
    prefix = site.new_prefix(like=remains)
    sequence = prefix.head()["sequence"]
    with faulty_proxy(site.server.endpoint) as proxy:
        proxy.faults += [
            (COMMIT, Fault.ANSWER_LOST),
            ("PUT manifest.json", Fault.ANSWER_LOST),
            (COMMIT, Fault.REPEATED),
            ("PUT manifest.json", Fault.REPEATED),
            (COMMIT, Fault.ANSWER_LOST),
        ]
        gang = site.start(proxy, prefix, 2, site.new_pod(), saves=[1, 2], until=2)
        assert gang.wait() == [0, 0], gang.story()
        assert proxy.faults == []
        assert written_more_than_once(proxy) == {}
    site.check(gang)
    assert gang.committed == [3, 4]
    assert prefix.check() == [4]
    assert prefix.head()["sequence"] == sequence + 3, "the fence and two commits, none of them twice"


def writer(site, prefix, generation, monkeypatch):
    for name, value in site.server.environment.items():
        monkeypatch.setenv(name, value)
    return HeadWriter(
        store=S3ObjectStore(site.server.endpoint), prefix=prefix.uri, generation=generation, retention=Retention(3)
    )


def entry(step):
    return Kept(step, f"checkpoints/step-{step}/g2-0-{step}/manifest.json", "0" * 64, 1, "2026-01-01T00:00:00Z")


def test_the_same_bytes_written_again_are_the_same_head(site, monkeypatch):
    """The server's ETag is the MD5 of the bytes, so a condition on it speaks of content, not of time (the ABA problem).

    That is enough: no two swaps write the same bytes, since each raises the sequence and has a nonce of its own, so the
    same ETag is the same swap. Only somebody who puts a copy back can bring an old one up again; and who decides from that decides right.
    """
    prefix = site.new_prefix()
    old = writer(site, prefix, 2, monkeypatch)
    old.fence()
    body = prefix.get("HEAD")
    prefix.put("HEAD", b"something else")
    prefix.put("HEAD", body)
    assert [kept.step for kept in old.commit(entry(1)).kept] == [1]


def test_a_head_put_back_from_a_backup_belongs_to_the_highest_generation_again(site, monkeypatch):
    prefix = site.new_prefix()
    old, new = writer(site, prefix, 2, monkeypatch), writer(site, prefix, 3, monkeypatch)
    old.fence()
    backup = prefix.get("HEAD")
    new.fence()
    with pytest.raises(Stale):
        old.commit(entry(1))
    prefix.put("HEAD", backup)
    assert new.commit(entry(2)).generation == 3
    with pytest.raises(Stale):
        old.commit(entry(3))
    assert [kept["step"] for kept in prefix.head()["kept"]] == [2]
