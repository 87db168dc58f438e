"""Checkpoints that somebody has deleted are waited for: a job that has committed never starts again from nothing."""

import pickle

import pytest

from finetune_api.protocol import ResumeSource
from finetune_trainer.checkpoint.head import Head, encode
from finetune_trainer.checkpoint.lost_bucket import gone_is_lost
from finetune_trainer.errors import BadData, CheckpointsLost
from finetune_trainer.object_store import NoBucket
from tests.trainer.checkpoint.incarnations import HEAD, PREFIX, checkpoints, head, objects, position, save


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
