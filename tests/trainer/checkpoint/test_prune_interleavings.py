"""A prune beside running incarnations: every interleaving, with answers lost and writes that arrive late.

The world and its other inhabitants are those of test_head_interleavings, which check after each move that HEAD lists nothing that was
deleted. New is somebody who swaps HEAD without being an incarnation.
"""

from dataclasses import dataclass, replace

import pytest

from finetune_trainer.checkpoint import pruning
from finetune_trainer.checkpoint.head import Drop, Grade, Head, Retention, Write
from finetune_trainer.checkpoint.pruning import NoneWouldStay, take_off
from tests.trainer.checkpoint.test_head_interleavings import (
    START,
    World,
    arrive,
    etag_of,
    kept,
    manifests,
    search,
    writer,
)


@dataclass(frozen=True)
class Pruner:
    """Looks once, decides what goes, and swaps until none of it is listed; then deletes it, and what is dead."""

    keep: int
    losses: int
    doomed: tuple = ()
    looked: bool = False
    pending: Write | None = None
    ended: str = ""
    committed: bool = False

    def steps(self, world: World):
        if self.ended or world.head is None:
            return
        if not self.looked:
            yield world, replace(self, looked=True, doomed=world.head.kept[self.keep :])
        elif self.pending is None:
            yield self.read(world)
        else:
            yield from self.write(world)

    def read(self, world: World):
        try:
            shorter = take_off(world.head, self.doomed)
        except NoneWouldStay:
            return world, replace(self, ended="refused")
        if shorter is None:
            return self.delete(world)
        return world, replace(self, pending=Write(shorter, etag_of(world.head)))

    def write(self, world: World):
        after, asked = arrive(world, self.pending), replace(self, pending=None)
        if after.head == self.pending.head:
            yield asked.delete(after)
        else:
            yield after, asked
        if self.losses:
            unanswered = replace(asked, losses=self.losses - 1)
            yield after, unanswered
            yield replace(world, in_flight=world.in_flight | {self.pending}), unanswered

    def delete(self, world: World):
        head = world.head
        listed = manifests(head.kept)
        lower = manifests(kept(g, step) for g in range(1, head.generation) for step in (30, 40))
        passed = manifests([kept(head.generation, 30)] if kept(head.generation, 40).manifest in listed else [])
        gone = manifests(self.doomed) | ((lower | passed) - listed)
        assert not gone & listed, "what HEAD lists was deleted"
        return replace(world, deleted=world.deleted | gone), replace(self, ended="pruned")


@pytest.mark.parametrize("losses", [(0, 1), (1, 0), (1, 1)], ids=["the prune's answer", "the job's", "one of each"])
def test_a_running_job_never_minds_a_prune(losses):
    found = search(World(START, (writer(1, keep=3, losses=losses[0]), Pruner(1, losses[1]))))
    assert len(found.states) > 100
    for end in found.ends:
        assert end.writers[0].ended in {"", "gave up"}, "a prune made a job stale"
        assert end.writers[1].ended == "pruned"
        assert end.head.kept
        assert end.head.generation == 1 or not end.writers[0].committed
    assert {end.head.kept for end in found.ends if end.writers[0].committed} >= {
        (kept(1, 40), kept(1, 30), START.kept[0]),
        (kept(1, 40),),
    }, "pruned before the first commit and after the last"


def test_a_prune_between_two_generations_changes_nothing_between_them():
    writers = (writer(1, keep=2, losses=0), writer(2, keep=2, losses=0), Pruner(1, 1))
    found = search(World(START, writers))
    for end in found.ends:
        assert end.writers[1].ended != "stale", "the highest generation is never stale"
        assert end.head.generation == 2 or not end.writers[1].committed
    assert any(end.head.kept[:1] == (kept(2, 40),) for end in found.ends)


def test_a_job_that_grades_its_checkpoints_meanwhile_loses_none_that_is_listed():
    between = (Grade(10, 0.9, Retention(2, "highest")),)
    found = search(World(START, (writer(1, keep=2, losses=1, between=between), Pruner(1, 1))))
    assert {end.writers[1].ended for end in found.ends} == {"pruned"}
    assert any(kept.metric for state in found.states for kept in state.head.kept)


def test_two_prunes_at_once_are_as_safe():
    found = search(World(START, (writer(1, keep=3, losses=0), Pruner(1, 1), Pruner(1, 1))))
    assert {pruner.ended for end in found.ends for pruner in end.writers[1:]} == {"pruned"}


def test_a_prune_that_would_leave_nothing_beside_a_job_that_drops_the_rest_is_refused():
    start = World(START, (writer(1, keep=2, losses=0, extra=(Drop(START.kept[:1]),)), Pruner(1, 0)))
    found = search(start)
    assert {end.writers[1].ended for end in found.ends} == {"pruned", "refused"}
    assert all(end.head.kept for end in found.ends)


def test_with_a_nonce_of_its_own_the_search_finds_a_stale_job(monkeypatch):
    """The search has teeth: this is the obvious way to prune."""
    obvious = pruning.take_off
    monkeypatch.setattr(
        "tests.trainer.checkpoint.test_prune_interleavings.take_off",
        lambda head, doomed: None if (new := obvious(head, doomed)) is None else replace(new, nonce="prune"),
    )
    found = search(World(START, (writer(1, keep=3, losses=0), Pruner(1, 0))))
    assert "stale" in {end.writers[0].ended for end in found.ends}


def test_without_a_rising_sequence_the_search_finds_what_was_deleted_listed_again(monkeypatch):
    obvious = pruning.take_off
    monkeypatch.setattr("tests.trainer.checkpoint.test_head_interleavings.etag_of", lambda head: head.nonce)
    monkeypatch.setattr("tests.trainer.checkpoint.test_prune_interleavings.etag_of", lambda head: head.nonce)
    monkeypatch.setattr(
        "tests.trainer.checkpoint.test_prune_interleavings.take_off",
        lambda head, doomed: None if (new := obvious(head, doomed)) is None else replace(new, sequence=head.sequence),
    )
    with pytest.raises(AssertionError, match=r"deleted|sequence"):
        search(World(START, (writer(1, keep=3, losses=0), Pruner(1, 0))))


def test_what_is_taken_off_is_all_that_changes():
    assert take_off(START, START.kept[1:]) == Head(8, 0, "start", START.kept[:1])
    assert take_off(START, [kept(1, 30)]) is None
    with pytest.raises(NoneWouldStay):
        take_off(START, START.kept)
