"""What ``Checkpoints`` does about crashes, damage, rivals and stores that misbehave: one real engine, one rank, a store in memory."""

import errno
import logging
import pickle
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune_api.protocol import Resumed, ResumeSource
from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.commit import ATTEMPTS
from finetune_trainer.checkpoint.head import Head, Retention, encode
from finetune_trainer.checkpoint.lost_bucket import gone_is_lost
from finetune_trainer.checkpoint.manifest import Position
from finetune_trainer.checkpoint.shard import copy_in
from finetune_trainer.checkpoint.staging import Slot
from finetune_trainer.errors import BadConfig, BadData, CheckpointsLost, NoPermission, Stale, StorageUnavailable
from finetune_trainer.object_store import Ambiguous, MemoryObjectStore, NoBucket, PreconditionFailed
from tests.trainer.checkpoint.faulty_store import Crash, FaultyStore, IgnoresConditions, Once
from tests.trainer.checkpoint.incarnations import HEAD, PREFIX, checkpoints, head, mark, marks, objects, position, save
from tests.trainer.checkpoint.trainee import Case, new_engine, weights_digest


@pytest.fixture
def two_saved(engine, store):
    """Steps 10 and 20, saved by generation 1."""
    first = checkpoints(engine, store, 1)
    assert first.resume() == (Position(0, 0), Resumed(0, ResumeSource.START))
    save(engine, first, 10)
    save(engine, first, 20)
    mark(engine, -1)
    return store


def test_an_empty_prefix_is_a_fresh_start(engine, store):
    before = weights_digest(engine)
    assert checkpoints(engine, store, 1).resume() == (Position(0, 0), Resumed(0, ResumeSource.START))
    assert weights_digest(engine) == before
    assert (head(store).sequence, head(store).generation, head(store).kept) == (1, 1, ())


def test_a_commit_is_reported_as_it_stands_in_the_store(engine, store):
    saver = checkpoints(engine, store, 1)
    saver.resume()
    report = save(engine, saver, 10)
    kept = head(store).kept[0]
    assert report.uri == f"{PREFIX}/{kept.folder}".rstrip("/")
    assert report.uri.startswith(f"{PREFIX}/checkpoints/step-10/g1-")
    assert report.size_bytes == sum(info.size for info in store.list(report.uri + "/"))
    assert (report.step, report.commit_time) == (kept.step, kept.commit_time)


def test_the_newest_commit_is_resumed_with_its_position(engine, two_saved):
    assert checkpoints(engine, two_saved, 2).resume()[0] == position(20)
    assert marks(engine) == {20.0}


def test_resuming_twice_is_the_same(engine, two_saved):
    for generation in (2, 3):
        assert checkpoints(engine, two_saved, generation).resume()[0] == position(20)
    assert head(two_saved).generation == 3
    assert len(head(two_saved).kept) == 2


def test_only_so_many_are_kept_and_the_rest_is_deleted(engine, two_saved):
    saver = checkpoints(engine, two_saved, 2, keep=2)
    saver.resume()
    save(engine, saver, 30)
    assert [kept.step for kept in head(two_saved).kept] == [30, 20]
    assert objects(two_saved, "/step-10/") == []
    assert len(objects(two_saved, "/step-20/")) == 2


def test_one_step_may_be_saved_twice(engine, two_saved):
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    save(engine, saver, 20)
    assert [kept.step for kept in head(two_saved).kept] == [20, 20]
    assert checkpoints(engine, two_saved, 3).resume()[0] == position(20)


@pytest.mark.parametrize("generation", [1, 2], ids=["the same generation", "a lower generation"])
def test_an_incarnation_that_comes_too_late_is_stale(engine, two_saved, generation):
    checkpoints(engine, two_saved, 2).resume()
    before = dict(two_saved.objects)
    with pytest.raises(Stale, match=r"HEAD belongs to generation 2"):
        checkpoints(engine, two_saved, generation).resume()
    assert two_saved.objects == before


def test_a_fenced_incarnation_cannot_commit_and_deletes_nothing(engine, store):
    old = checkpoints(engine, store, 1, keep=1)
    old.resume()
    save(engine, old, 10)
    new = checkpoints(engine, store, 2)
    assert new.resume()[0] == position(10)
    with pytest.raises(Stale):
        save(engine, old, 20)
    assert [kept.step for kept in head(store).kept] == [10]
    assert checkpoints(engine, store, 3).resume()[0] == position(10)


def flip(body):
    return body[:-5] + bytes([body[-5] ^ 1]) + body[-4:]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip, id="a flipped bit"),
        pytest.param(lambda body: body[:-1], id="a missing byte"),
        pytest.param(lambda body: body[: len(body) // 2], id="half of it missing"),
        pytest.param(lambda body: b"", id="empty"),
        pytest.param(lambda body: None, id="deleted"),
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_damage_falls_back_to_the_checkpoint_before_and_says_so(engine, two_saved, name, damage, caplog):
    (uri,) = [uri for uri in objects(two_saved, "/step-20/") if uri.endswith(name)]
    body = damage(two_saved.objects.pop(uri))
    if body is not None:
        two_saved.objects[uri] = body
    with caplog.at_level(logging.WARNING):
        saver = checkpoints(engine, two_saved, 2)
        assert saver.resume()[0] == position(10)
    assert saver.newest is not None
    assert (saver.newest.step, saver.newest.size_bytes) == (10, head(two_saved).kept[0].size_bytes)
    assert marks(engine) == {10.0}
    assert f"Checkpoint of step 20 cannot be loaded: {uri}" in caplog.text
    assert "Fell back to the checkpoint of step 10" in caplog.text
    assert [kept.step for kept in head(two_saved).kept] == [10], "a fallback rewrites HEAD"


@pytest.mark.parametrize(
    ("suspect_from", "back_to", "kept"), [(35, 20, [20, 10]), (20, 20, [20, 10]), (19, 10, [10]), (3, 10, [10])]
)
def test_a_rollback_goes_behind_what_is_suspected_as_far_as_there_are_checkpoints(
    engine, two_saved, suspect_from, back_to, kept
):
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    assert saver.last_good(suspect_from) == back_to
    saver.roll_back(suspect_from, (280, 288))
    assert [entry.step for entry in head(two_saved).kept] == kept
    after = checkpoints(engine, two_saved, 3)
    assert after.resume()[0].step == back_to
    save(engine, after, 30)
    assert [entry.step for entry in head(two_saved).kept] == [30, back_to]
    assert {uri.split("/")[-3] for uri in objects(two_saved, "/checkpoints/")} == {"step-30", f"step-{back_to}"}


def test_a_rollback_keeps_a_checkpoint_whose_commit_was_never_confirmed(engine, store):
    saver = checkpoints(engine, store, 1)
    saver.resume()
    store.after = Once("HEAD", StorageUnavailable("away"))
    with pytest.raises(StorageUnavailable):
        save(engine, saver, 10)
    store.heal()
    saver.roll_back(0, (0, 8))
    assert [entry.step for entry in head(store).kept] == [10]


def test_without_a_checkpoint_a_rollback_goes_to_the_start(engine, store):
    saver = checkpoints(engine, store, 1)
    saver.resume()
    assert saver.last_good(7) == 0


def test_what_was_fallen_back_from_goes_after_the_next_commit(engine, two_saved):
    (uri,) = [uri for uri in objects(two_saved, "/step-20/") if uri.endswith("manifest.json")]
    two_saved.objects[uri] = b"torn"
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    assert len(objects(two_saved, "/step-20/")) == 2
    save(engine, saver, 11)
    assert objects(two_saved, "/step-20/") == []
    assert checkpoints(engine, two_saved, 3).resume()[0] == position(11)


@pytest.mark.parametrize("name", ["manifest.json", ".safetensors", "/checkpoints/"])
def test_checkpoints_that_were_deleted_under_their_head_are_lost_until_they_are_back(engine, two_saved, name):
    deleted = {uri: two_saved.objects.pop(uri) for uri in objects(two_saved, name)}
    with pytest.raises(
        CheckpointsLost, match=r"none of the 2 .* \(step 20: .* is missing; step 10: .* somebody deleted"
    ):
        checkpoints(engine, two_saved, 2).resume()
    assert len(head(two_saved).kept) == 2, "what might come back stays listed"
    two_saved.objects.update(deleted)
    assert checkpoints(engine, two_saved, 3).resume()[0] == position(20)


def test_nothing_loadable_is_an_error_and_never_a_fresh_start(engine, two_saved):
    """One is missing, but the other is damaged, and that is nobody's to put back."""
    missing, damaged = objects(two_saved, ".safetensors")
    del two_saved.objects[missing]
    two_saved.objects[damaged] = flip(two_saved.objects[damaged])
    with pytest.raises(BadData, match=r"none of the 2 checkpoints .* can be loaded \(step 20: .* has other bytes"):
        checkpoints(engine, two_saved, 2).resume()
    assert len(head(two_saved).kept) == 2, "what might come back stays listed"


def test_another_job_s_checkpoints_that_are_gone_are_not_ours_to_wait_for(engine, two_saved):
    for uri in objects(two_saved, ".safetensors"):
        del two_saved.objects[uri]
    mine = checkpoints(engine, two_saved, 1, prefix="s3://bucket/team/mine", resume_from=PREFIX)
    with pytest.raises(BadData, match=r"none of the 2 checkpoints below s3://bucket/team/job can be loaded"):
        mine.resume()


@pytest.mark.parametrize(
    ("prefix", "has_checkpoint", "error"),
    [
        pytest.param("s3://gone/job", True, CheckpointsLost, id="where the job has committed"),
        pytest.param("s3://gone/job", False, NoBucket, id="where it never has: the URI is wrong"),
        pytest.param("s3://mine/job", True, NoBucket, id="another one's, which data lies in"),
    ],
)
def test_a_bucket_that_is_gone_is_lost(prefix, has_checkpoint, error):
    gone = pickle.loads(pickle.dumps(NoBucket("bucket 'gone' does not exist", "gone")))  # as from another rank
    with pytest.raises(error, match="'gone'"), gone_is_lost(prefix, has_checkpoint=has_checkpoint):
        raise gone


def test_a_head_that_was_deleted_is_not_made_anew(engine, two_saved):
    body = two_saved.objects.pop(HEAD)
    with pytest.raises(CheckpointsLost, match=r"HEAD: it is gone, although there is s3://.*/step-10/"):
        checkpoints(engine, two_saved, 2).resume()
    assert HEAD not in two_saved.objects
    two_saved.objects[HEAD] = body
    assert checkpoints(engine, two_saved, 3).resume()[0] == position(20)


def without_anything(objects):
    return {}


def without_a_list(objects):
    return {HEAD: encode(Head(9, 1, "somebody's"))}


@pytest.mark.parametrize("source", [None, "s3://bucket/team/other@10"], ids=["from the start", "from another job"])
@pytest.mark.parametrize(
    ("left", "says"),
    [
        (without_anything, "everything is gone"),
        (without_a_list, "lists no checkpoint, but this job has committed some"),
    ],
)
def test_a_job_that_has_committed_never_starts_again(engine, two_saved, left, says, source):
    others = {uri.replace("/job/", "/other/"): body for uri, body in two_saved.objects.items()}
    deleted, two_saved.objects = two_saved.objects, {**left(two_saved.objects), **others}
    with pytest.raises(CheckpointsLost, match=says):
        checkpoints(engine, two_saved, 2, has_checkpoint=True, resume_from=source).resume()
    two_saved.objects.update(deleted)
    assert checkpoints(engine, two_saved, 3, has_checkpoint=True).resume()[0] == position(20)


def test_what_the_pods_hold_is_taken_up_even_if_nothing_is_listed_any_more(engine, store, tmp_path):
    saver = checkpoints(engine, store, 1, pod=tmp_path)
    saver.resume()
    save(engine, saver, 10)
    store.objects = {HEAD: encode(Head(9, 1, "somebody's"))}
    again = checkpoints(engine, store, 2, pod=tmp_path, has_checkpoint=True)
    assert again.resume()[1].source == ResumeSource.MEMORY
    assert [outcome.error for outcome in again.wait()] == [None]
    assert [kept.step for kept in head(store).kept] == [10]


def test_while_head_is_gone_saves_fail_and_nothing_more_is_uploaded_until_it_is_back(engine, two_saved):
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    deleted = two_saved.objects.pop(HEAD)
    for step in (30, 40, 50):
        with pytest.raises(CheckpointsLost, match="HEAD: it is gone"):
            save(engine, saver, step)
    assert HEAD not in two_saved.objects
    assert objects(two_saved, "/step-30/"), "it is found out when it is committed"
    assert objects(two_saved, "/step-40/") == objects(two_saved, "/step-50/") == []
    two_saved.objects[HEAD] = deleted
    save(engine, saver, 60)
    assert [kept.step for kept in head(two_saved).kept] == [60, 20]
    assert objects(two_saved, "/step-30/") == []


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"version": 99}', b"\xff\x00"])
def test_a_head_that_cannot_be_read_is_an_error(engine, two_saved, body):
    two_saved.objects[HEAD] = body
    with pytest.raises(BadData, match="HEAD is not a HEAD that can be read"):
        checkpoints(engine, two_saved, 2).resume()


def test_a_read_that_broke_on_its_way_is_repeated_and_not_damage(engine, two_saved, monkeypatch):
    def get(uri, start=None, length=None):
        body = MemoryObjectStore.get(two_saved, uri, start, length)
        broken = uri.endswith(".safetensors") and not seen
        seen.append(uri)
        return flip(body) if broken else body

    seen = []
    monkeypatch.setattr(two_saved, "get", get)
    assert checkpoints(engine, two_saved, 2).resume()[0] == position(20)


@pytest.mark.parametrize("error", [NoPermission, StorageUnavailable])
@pytest.mark.parametrize("what", ["HEAD", "manifest.json", ".safetensors"])
def test_what_cannot_be_told_is_no_fallback_and_no_fresh_start(engine, two_saved, monkeypatch, what, error):
    def refuse(uri, *arguments):
        if uri.endswith(what):
            raise error(f"{uri}: cannot tell")
        return method(two_saved, uri, *arguments)

    name = "read" if what == "HEAD" else "get"
    method = getattr(MemoryObjectStore, name)
    monkeypatch.setattr(two_saved, name, refuse)
    with pytest.raises(error, match="cannot tell"):
        checkpoints(engine, two_saved, 2).resume()
    assert [kept.step for kept in head(two_saved).kept] == [20, 10]


def test_another_recipe_is_refused(engine, two_saved):
    with pytest.raises(BadConfig, match=r"belongs to another recipe \(recipe-1, this one is recipe-2\)"):
        checkpoints(engine, two_saved, 2, digest="recipe-2").resume()


def test_another_model_is_refused(engine, two_saved, alone):
    other = new_engine(Case("lora", stage=2, precision="BF16", lora=True))
    with pytest.raises(BadConfig, match="has other trainable parameters"):
        checkpoints(other, two_saved, 2).resume()


@pytest.mark.parametrize(
    ("lying", "named"),
    [
        (IgnoresConditions(), r"ignores If-None-Match: \*"),
        (IgnoresConditions(match=False), r"ignores If-None-Match: \*"),
        (IgnoresConditions(absent=False), "ignores If-Match"),
    ],
    ids=["both", "only If-None-Match", "only If-Match"],
)
def test_a_store_that_ignores_conditions_is_refused_by_name(engine, lying, named):
    with pytest.raises(BadConfig, match=f"memory {named}"):
        checkpoints(engine, lying, 1).resume()
    assert HEAD not in lying.objects


def test_the_store_is_probed_once_per_prefix(engine, two_saved):
    probed = objects(two_saved, "/probes/")
    assert len(probed) == 1
    writes = two_saved.writes
    checkpoints(engine, two_saved, 2).resume()
    assert two_saved.writes == writes + 1, "the fence alone"


@pytest.mark.parametrize("error", [Ambiguous("lost"), PreconditionFailed("echo")], ids=["lost", "refused"])
@pytest.mark.parametrize("suffix", ["HEAD", "manifest.json"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unclear_answer_is_settled_by_reading(engine, two_saved, suffix, error, when):
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    fault = Once(suffix, error)
    setattr(two_saved, when, fault)
    save(engine, saver, 30)
    assert fault.raised
    assert [kept.step for kept in head(two_saved).kept] == [30, 20]
    assert head(two_saved).sequence == 5, "no swap happened twice"
    assert checkpoints(engine, two_saved, 3).resume()[0] == position(30)


def test_a_save_that_fails_loses_nothing_and_the_next_one_commits(engine, two_saved):
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()

    def never(method, uri):
        if uri == HEAD:
            raise Ambiguous(uri)

    two_saved.before = never
    with pytest.raises(StorageUnavailable, match=f"could not be swapped in {ATTEMPTS} attempts"):
        save(engine, saver, 30)
    two_saved.heal()
    assert [kept.step for kept in head(two_saved).kept] == [20, 10]
    save(engine, saver, 40)
    assert [kept.step for kept in head(two_saved).kept] == [40, 20]


@pytest.mark.parametrize("error", [NoPermission("no"), StorageUnavailable("no")])
def test_a_delete_that_fails_never_stops_training(engine, two_saved, error, caplog):
    saver = checkpoints(engine, two_saved, 2, keep=1)
    saver.resume()

    def refuse(method, uri):
        if method == "delete":
            raise error

    two_saved.before = refuse
    save(engine, saver, 30)
    assert "its objects stay" in caplog.text
    two_saved.heal()
    assert checkpoints(engine, two_saved, 3).resume()[0] == position(30)


def test_orphans_of_lower_generations_go_with_the_first_commit_and_not_before(engine, two_saved):
    ours, theirs = (f"{PREFIX}/checkpoints/step-25/g{generation}-dead/rank-00000.safetensors" for generation in (2, 1))
    foreign = f"{PREFIX}/checkpoints/notes.txt"
    saver = checkpoints(engine, two_saved, 2)
    saver.resume()
    for uri in (ours, theirs, foreign):
        two_saved.objects[uri] = b"remains"
    assert theirs in two_saved.objects
    save(engine, saver, 30)
    assert theirs not in two_saved.objects
    assert {ours, foreign} <= set(two_saved.objects)


def test_a_rank_that_dies_at_any_write_leaves_a_checkpoint_that_loads(engine):
    """Crash-point enumeration: die after the k-th change of the store, for every k of a resume, two saves and their deletions."""
    crashed = 0
    for writes in range(100):
        store = FaultyStore()
        first = checkpoints(engine, store, 1, keep=1)
        first.resume()
        save(engine, first, 10)
        store.crash_after(writes)
        committed = [10]
        try:
            second = checkpoints(engine, store, 2, keep=1)
            second.resume()
            committed += [save(engine, second, 20).step]
            committed += [save(engine, second, 30).step]
        except Crash:
            crashed += 1
        store.heal()
        mark(engine, -1)
        resumed = checkpoints(engine, store, 3, keep=1)
        found, _ = resumed.resume()
        assert found in {position(step) for step in (10, 20, 30)}
        assert found.step >= committed[-1], "what was reported is still there"
        assert marks(engine) == {float(found.step)}
        save(engine, resumed, 40)
        assert {uri.split("/")[-3] for uri in objects(store, "/checkpoints/")} == {"step-40"}, "no garbage stays"
        if committed[-1] == 30 and store.writes:
            break
    assert crashed == writes >= 10


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
        time.sleep(0.05)
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


def test_the_best_by_the_evaluation_stays_beside_the_newest(engine, store):
    saver = checkpoints(engine, store, 1, keep=1, best="highest")
    saver.resume()
    for step, metric in ((10, 0.5), (20, 0.9), (30, 0.7), (40, 0.8)):
        save(engine, saver, step)
        saver.grade(step, metric)
    saver.save(position(50))
    assert [(kept.step, kept.metric) for kept in head(store).kept] == [(50, None), (20, 0.9)]
    assert {uri.split("/")[-3] for uri in objects(store, "/checkpoints/")} == {"step-50", "step-20"}


def test_a_grade_that_could_not_be_noted_comes_with_the_next_commit(engine, store):
    """Or the best would fall off the list for want of its grade, and be deleted."""
    saver = checkpoints(engine, store, 1, keep=1, best="highest")
    saver.resume()
    save(engine, saver, 10)
    store.before = Once("HEAD", StorageUnavailable("away"))
    saver.grade(10, 0.9)
    saver.wait()
    save(engine, saver, 20)
    saver.grade(20, 0.5)
    saver.save(position(30))
    assert [(kept.step, kept.metric) for kept in head(store).kept] == [(30, None), (10, 0.9)]
    assert len(objects(store, "/step-10/")) == 2


def test_what_another_metric_gave_is_no_grade(engine, store):
    """0.9 would be the lowest perplexity for ever."""
    for generation, best, metric, grades in (
        (1, "highest", "Accuracy", {10: 0.9, 20: 0.5}),
        (2, "lowest", "Perplexity", {30: 7.0, 40: 8.0}),
    ):
        saver = checkpoints(engine, store, generation, keep=1, best=best, metric=metric)
        saver.resume()
        for step, value in grades.items():
            save(engine, saver, step)
            saver.grade(step, value)
        saver.wait()
    assert [(kept.step, kept.metric) for kept in head(store).kept] == [(40, 8.0), (30, 7.0)]
    third = checkpoints(engine, store, 3, keep=1, best="lowest", metric="Perplexity")
    third.resume()
    save(engine, third, 50)
    assert [(kept.step, kept.metric) for kept in head(store).kept] == [(50, None), (30, 7.0)]
    assert head(store).graded_by == "Perplexity"


@pytest.mark.parametrize("metric", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("best", ["lowest", "highest"])
def test_what_is_not_finite_is_never_the_best(engine, store, best, metric):
    saver = checkpoints(engine, store, 1, keep=1, best=best)
    saver.resume()
    for step, measured in ((10, 5.0), (20, metric), (30, None)):
        save(engine, saver, step)
        if measured is not None:
            saver.grade(step, measured)
    saver.wait()
    assert [(kept.step, kept.metric) for kept in head(store).kept] == [(30, None), (10, 5.0)]


def test_a_rollback_waits_for_a_grade_under_way_and_neither_is_lost(engine, store):
    saver = checkpoints(engine, store, 1, best="highest")
    saver.resume()
    save(engine, saver, 10)
    here, sent = threading.current_thread(), threading.Event()

    def hold(method, uri):
        if uri.endswith("HEAD") and threading.current_thread() is not here and not sent.is_set():
            sent.set()
            time.sleep(0.3)

    store.before = hold
    saver.grade(10, 0.9)
    sent.wait(60)
    assert saver.roll_back(10, (80, 88)) == 1
    assert (head(store).rollbacks, [kept.metric for kept in head(store).kept]) == (1, [0.9])


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


def test_a_rollback_starts_the_next_generation_before_it_and_skips_the_range(engine, two_saved, tmp_path):
    saver = checkpoints(engine, two_saved, 2, pod=tmp_path)
    saver.resume()
    save(engine, saver, 30)
    two_saved.before = Once("rank-00000.safetensors", StorageUnavailable("away"))
    saver.begin_save(position(35))
    assert saver.roll_back(35, (280, 288)) == 1
    found, resumed = checkpoints(engine, two_saved, 3, pod=tmp_path).resume()
    assert found == replace(position(30), skipped_ranges=((3, 5), (280, 288)))
    assert marks(engine) == {30.0}, "what was staged after the newest commit is void"
    assert (resumed.source, resumed.rollbacks, resumed.skipped_samples) == (ResumeSource.STORAGE, 1, 10)
    again = checkpoints(engine, two_saved, 4)
    assert again.resume()[1].rollbacks == again.rollbacks == 1, "a crash right after it loses neither count nor range"


def test_another_job_is_continued_without_writing_there(engine, two_saved):
    theirs = dict(two_saved.objects)
    other = FaultyStore()
    other.objects.update({uri.replace("/team/job", "/team/other"): body for uri, body in theirs.items()})
    before = dict(other.objects)
    saver = checkpoints(engine, other, 1, digest="another recipe", resume_from="s3://bucket/team/other@10")
    assert saver.resume() == (position(10), Resumed(10, ResumeSource.OTHER_JOB, skipped_samples=2))
    assert marks(engine) == {10.0}
    save(engine, saver, 11)
    assert {uri: body for uri, body in other.objects.items() if "/other/" in uri} == before
    again = checkpoints(engine, other, 2, digest="another recipe", resume_from="s3://bucket/team/other@10")
    assert again.resume()[1].source == ResumeSource.STORAGE, "its own checkpoints come first"


def test_another_jobs_optimizer_does_not_override_this_ones(engine, two_saved):
    (group, *_) = engine.optimizer.param_groups
    told = {name: group[name] for name in ("weight_decay", "betas", "eps")}
    group.update(weight_decay=0.25, betas=(0.5, 0.6), eps=1e-3)
    try:
        theirs = {uri.replace("/team/job", "/team/other"): body for uri, body in two_saved.objects.items()}
        two_saved.objects.clear()
        two_saved.objects.update(theirs)
        saver = checkpoints(engine, two_saved, 1, digest="another recipe", resume_from="s3://bucket/team/other")
        assert saver.resume()[0] == position(20)
        assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.25, (0.5, 0.6), 1e-3)
    finally:
        group.update(told)


def test_a_source_that_deletes_while_it_is_read_is_read_again(engine, two_saved):
    """Its job still runs, and keeps no more than it was told to."""
    source = "s3://bucket/team/other"
    ours = FaultyStore()
    ours.objects.update({uri.replace("/team/job", "/team/other"): body for uri, body in two_saved.objects.items()})
    theirs = checkpoints(engine, two_saved, 2, keep=1)
    theirs.resume()
    save(engine, theirs, 30)
    later = {uri.replace("/team/job", "/team/other"): body for uri, body in two_saved.objects.items()}
    read = ours.get

    def get(uri, *part):
        if uri.endswith("manifest.json") and f"{source}/checkpoints/step-20/" in uri:
            ours.objects.clear()
            ours.objects.update(later)
        return read(uri, *part)

    ours.get = get
    saver = checkpoints(engine, ours, 1, digest="another recipe", resume_from=source)
    assert saver.resume()[0] == position(30)
    assert marks(engine) == {30.0}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "s3://bucket/team/job@15",
            "there is no checkpoint of step 15 below s3://bucket/team/job; steps there: 20, 10",
        ),
        ("s3://bucket/team/nobody", "s3://bucket/team/nobody/HEAD does not exist"),
    ],
    ids=["a step that was never kept", "no job"],
)
def test_a_source_that_is_not_there_is_refused(engine, two_saved, source, says):
    mine = Checkpoints(
        engine=engine,
        store=two_saved,
        prefix="s3://bucket/team/mine",
        generation=1,
        retention=Retention(2),
        recipe_digest="mine",
        staging=[Path(tempfile.mkdtemp())],
        resume_from=source,
    )
    with pytest.raises(BadConfig, match=says):
        mine.resume()
