"""What a save takes, exactly, and how it goes on while training does."""

import errno
import shutil
import threading
import time

import pytest
import torch

from finetune_api.protocol import ResumeSource
from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint.shard import copy_in
from finetune_trainer.checkpoint.staging import Slot
from finetune_trainer.errors import StorageUnavailable
from tests.trainer.checkpoint.faulty_store import FaultyStore, Once
from tests.trainer.checkpoint.incarnations import checkpoints, head, mark, marks, position, save


def test_masters_that_are_ahead_of_their_counters_are_not_saved(engine, two_saved):
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    engine.global_steps -= 1  # as after an exception in the middle of a step
    try:
        with pytest.raises(AssertionError, match="masters are 1 steps ahead"):
            saver.save(position(30))
    finally:
        engine.global_steps += 1


def test_the_view_of_the_state_is_exact(engine, two_saved):
    """Not one value for all, as above, but as training leaves it: what is restored is what was saved, to the bit."""
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    for part in state.held(engine):
        for view in part.views:
            view.copy_(torch.rand_like(view))
    saved = [view.clone() for part in state.held(engine) for view in part.views]
    saver.save(position(30))
    mark(engine, -1)
    checkpoints(engine, two_saved, 3).resume()
    restored = [view for part in state.held(engine) for view in part.views]
    assert all(torch.equal(one, other) for one, other in zip(saved, restored, strict=True))


def test_a_save_goes_on_beside_training_and_is_told_when_it_ends(engine, store):
    saver = checkpoints(engine, store, 1)
    saver.resume()
    mark(engine, 10)
    released = threading.Event()
    store.before = lambda method, uri: released.wait(60) if uri.endswith("manifest.json") else None
    saver.begin_save(position(10))
    saver.wait_for_copy()
    mark(engine, 11)
    assert (saver.ended(), saver.has_room(), head(store).kept) == ([], True, ())
    saver.begin_save(position(11))
    assert not saver.has_room(), "two buffers, both on their way"
    saver.wait_for_copy()
    mark(engine, -1)
    released.set()
    assert [(outcome.step, outcome.checkpoint.step) for outcome in saver.wait()] == [(10, 10), (11, 11)]
    assert saver.has_room()
    assert [kept.step for kept in head(store).kept] == [11, 10]
    assert checkpoints(engine, store, 2).resume()[0] == position(11)
    assert marks(engine) == {11.0}


def test_the_passes_of_the_next_step_are_computed_beside_the_copy_and_its_update_waits(engine, store, monkeypatch):
    saver = checkpoints(engine, store, 1)
    saver.resume()
    saved = [view.clone() for part in state.held(engine) for view in part.views]
    passes_done, order = threading.Event(), []

    def copy_slowly(*arguments):
        assert passes_done.wait(60)
        time.sleep(0.5)
        copy_in(*arguments)
        order.append("copied")

    monkeypatch.setattr("finetune_trainer.checkpoint.shard.copy_in", copy_slowly)
    saver.begin_save(position(10))
    engine.backward(engine(torch.zeros((3, 7), dtype=torch.long), torch.zeros(3, dtype=torch.long)))
    passes_done.set()
    engine.step()
    order.append("updated")
    [outcome] = saver.wait()
    assert order == ["copied", "updated"]
    assert not any(torch.equal(one, other) for one, other in zip(saved, views(engine), strict=True))
    assert outcome.copy_seconds >= outcome.stall_seconds > 0.04
    checkpoints(engine, store, 2).resume()
    assert all(torch.equal(one, other) for one, other in zip(saved, views(engine), strict=True))


def test_an_update_that_waits_long_for_a_copy_says_that_it_lives(engine, store, monkeypatch):
    """Else it would be taken for a hang."""
    told = threading.Event()
    saver = checkpoints(engine, store, 1, alive=told.set)
    saver.resume()

    def copy_until_told(*arguments):
        assert told.wait(60)
        copy_in(*arguments)

    monkeypatch.setattr("finetune_trainer.checkpoint.shard.copy_in", copy_until_told)
    monkeypatch.setattr("finetune_trainer.checkpoint.saving.BEAT_SECONDS", 0.01)
    saver.begin_save(position(10))
    engine.backward(engine(torch.zeros((3, 7), dtype=torch.long), torch.zeros(3, dtype=torch.long)))
    assert not told.is_set()
    engine.step()
    assert saver.wait()[0].error is None


def views(engine):
    return [view for part in state.held(engine) for view in part.views]


def test_what_is_saved_while_an_older_save_is_on_its_way_can_be_taken_up_from_memory(engine, store, tmp_path):
    saver = checkpoints(engine, store, 1, pod=tmp_path)
    saver.resume()
    released = threading.Event()
    store.before = lambda method, uri: released.wait(60) if uri.endswith(".safetensors") else None
    for step in (10, 11):
        mark(engine, step)
        saver.begin_save(position(step))
        saver.wait_for_copy()
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("*.seal"))) < 2:
        assert time.monotonic() < until, "only what is being uploaded is sealed"
        time.sleep(0.01)
    assert saver.ended() == []
    memory = tmp_path / "as the process dies here"
    memory.mkdir()
    for left in tmp_path.glob("rank-*"):
        shutil.copy(left, memory)
    released.set()
    saver.wait()
    mark(engine, -1)
    found, resumed = checkpoints(engine, FaultyStore(), 2, pod=memory).resume()
    assert (found, resumed.source, marks(engine)) == (position(11), ResumeSource.MEMORY, {11.0})


def test_a_save_that_fails_beside_training_is_told_and_the_one_behind_it_commits(engine, two_saved):
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    two_saved.before = Once("rank-00000.safetensors", StorageUnavailable("away"))
    saver.begin_save(position(30))
    saver.begin_save(position(31))
    failed, committed = saver.wait()
    assert (failed.step, str(failed.error), failed.checkpoint) == (30, "away", None)
    assert (committed.step, committed.error) == (31, None)
    assert [kept.step for kept in head(two_saved).kept] == [31, 20]


def test_a_disk_that_is_full_costs_the_copy_in_memory_and_not_the_commit(engine, store, tmp_path, monkeypatch, caplog):
    saver = checkpoints(engine, store, 1, pod=tmp_path)
    saver.resume()

    def full(self, seal):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Slot, "seal", full)
    save(engine, saver, 10)
    monkeypatch.undo()
    assert "Step 10 is not kept in memory" in caplog.text
    assert [kept.step for kept in head(store).kept] == [10]
    assert checkpoints(engine, store, 2, pod=tmp_path).resume()[1].source == ResumeSource.STORAGE
