"""A job that starts from another's checkpoint reads it, and leaves it alone."""

import tempfile
from pathlib import Path

import pytest

from finetune_api.protocol import Resumed, ResumeSource
from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.head import Retention
from finetune_trainer.errors import BadConfig
from tests.trainer.checkpoint.faulty_store import FaultyStore
from tests.trainer.checkpoint.incarnations import checkpoints, marks, position, save
from tests.trainer.checkpoint.trainee import Case, new_engine, train


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


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    ("theirs", "ours", "kept"), [("FP16", "FP16", True), ("FP16", "BF16", False), ("BF16", "FP16", False)]
)
def test_a_loss_scale_goes_along_only_between_jobs_that_both_have_one(alone, theirs, ours, kept, stage):
    """At stage 0 DeepSpeed's BF16 has a scale too, which is 1, and by which it divides."""
    old = new_engine(Case("theirs", stage=stage, precision=theirs, loss_scale_power=16))
    train(old, range(4))
    new = new_engine(Case("ours", stage=stage, precision=ours, loss_scale_power=10))
    own = state.scalars(new)["lossScale"]
    state.begin_restore(new)
    state.finish_restore(new, state.scalars(old), own=False)
    assert state.scalars(new)["lossScale"] == (state.scalars(old)["lossScale"] if kept else own)
    train(new, range(4, 6))


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
