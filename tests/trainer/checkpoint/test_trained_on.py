"""A job is continued only on what its checkpoints were trained on: one real engine, one rank, a store in memory."""

import pytest

from finetune_api.protocol import ResumeSource
from finetune_trainer.checkpoint.trained_on import require_unchanged
from finetune_trainer.errors import BadData
from tests.trainer.checkpoint.incarnations import PREFIX, checkpoints, head, position, save

CONFIG, WEIGHTS, DATA = "s3://models/bert/config.json", "s3://models/bert/model.safetensors", "s3://data/train.jsonl"
SOURCES = {"model": {CONFIG: "c1"}, "base": {WEIGHTS: "w1"}, "train": {DATA: "d1"}}
OTHERS = {
    "data": ({"train": {DATA: "d2"}}, f"{DATA} has changed: it was version d1 and is version d2. Checkpoint "),
    "a tokenizer more": (
        {"model": {CONFIG: "c1", "s3://models/bert/tokenizer.json": "t1"}},
        "s3://models/bert/tokenizer.json has changed: it was not there and is version t1. Checkpoint ",
    ),
    "a configuration less": ({"model": {}}, f"{CONFIG} has changed: it was version c1 and is not there. Checkpoint "),
    "another base": ({"base": {WEIGHTS: "w2"}}, f"{WEIGHTS} has changed: it was version w1 and is version w2. "),
}
TO_DO = "put back what was there, or start a new job, which may take up the checkpoint by spec.checkpoint.resumeFrom"


def saved(engine, store, pod, sources=SOURCES):
    """Step 10, committed by generation 1, and still in its pod."""
    first = checkpoints(engine, store, 1, sources=sources, pod=pod)
    first.resume()
    save(engine, first, 10)
    return store


@pytest.mark.parametrize("place", ["storage", "memory"])
@pytest.mark.parametrize(("changed", "says"), OTHERS.values(), ids=OTHERS.keys())
def test_what_changed_is_refused_by_name(engine, store, tmp_path, changed, says, place):
    saved(engine, store, tmp_path)
    pod = tmp_path if place == "memory" else None
    with pytest.raises(BadData) as refused:
        checkpoints(engine, store, 2, sources=SOURCES | changed, pod=pod).resume()
    assert str(refused.value).startswith(says)
    assert str(refused.value).endswith(TO_DO)
    assert ("of step 10 in memory" if place == "memory" else head(store).kept[0].manifest) in str(refused.value)


@pytest.mark.parametrize("place", ["storage", "memory"])
@pytest.mark.parametrize(
    ("then", "now"),
    [
        pytest.param(SOURCES, SOURCES, id="the same"),
        pytest.param(None, SOURCES, id="a checkpoint that says nothing"),
        pytest.param({"model": {CONFIG: "c1"}}, SOURCES, id="a checkpoint that says nothing of the data"),
        pytest.param(SOURCES, {"model": {CONFIG: "c1"}}, id="data whose version cannot be told"),
    ],
)
def test_what_cannot_be_told_to_have_changed_is_continued(engine, store, tmp_path, then, now, place):
    saved(engine, store, tmp_path, sources=then)
    again = checkpoints(engine, store, 2, sources=now, pod=tmp_path if place == "memory" else None)
    found, resumed = again.resume()
    assert (found, resumed.source) == (position(10), ResumeSource(place.capitalize()))


def test_another_job_s_checkpoint_is_taken_up_with_other_data_and_another_tokenizer(engine, store, tmp_path):
    saved(engine, store, tmp_path)
    other = {**SOURCES, "model": {CONFIG: "c2"}, "train": {DATA: "d2"}}
    mine = checkpoints(engine, store, 1, sources=other, prefix="s3://bucket/team/mine", resume_from=PREFIX)
    assert mine.resume()[1].source == ResumeSource.OTHER_JOB
    save(engine, mine, 11)
    again = checkpoints(engine, store, 2, sources=other, prefix="s3://bucket/team/mine", resume_from=PREFIX)
    assert again.resume()[0].step == 11, "its own checkpoints say what it was trained on itself"


@pytest.mark.parametrize("shards", [{WEIGHTS: "w2"}, {WEIGHTS: "w1", f"{WEIGHTS}.index.json": "i1"}])
def test_another_job_s_adapters_fit_no_other_base(engine, store, tmp_path, shards):
    saved(engine, store, tmp_path)
    other = SOURCES | {"base": shards}
    with pytest.raises(BadData, match=r"has changed: .* The adapters of checkpoint s3://.* fit no other weights"):
        checkpoints(engine, store, 1, sources=other, prefix="s3://bucket/team/mine", resume_from=PREFIX).resume()


def test_a_base_elsewhere_may_be_a_copy(engine, store, tmp_path):
    saved(engine, store, tmp_path)
    other = SOURCES | {"base": {"s3://mirror/bert/model.safetensors": "w9"}}
    mine = checkpoints(engine, store, 1, sources=other, prefix="s3://bucket/team/mine", resume_from=PREFIX)
    assert mine.resume()[1].source == ResumeSource.OTHER_JOB


def test_groups_of_a_trainer_to_come_are_not_judged():
    require_unchanged({"train": {DATA: "d1"}, "weather": {"s3://w": "rain"}}, SOURCES, "c")
