"""What a generation takes up from the memory of the pods it starts in, and what it must not: one real engine, one rank."""

import json
import subprocess

import pytest

from finetune_api.protocol import ResumeSource
from finetune_trainer.checkpoint.head import Head, Kept
from finetune_trainer.checkpoint.memory import candidates
from finetune_trainer.checkpoint.staging import SLOTS, SaveId, Staging
from finetune_trainer.errors import StorageUnavailable
from tests.trainer.checkpoint.faulty_store import Crash, Once
from tests.trainer.checkpoint.incarnations import checkpoints, head, mark, marks, position, save


@pytest.fixture
def pod(tmp_path):
    return tmp_path / "staging"


def dies(engine, store, pod, *, at):
    """Generation 1 commits step 10 and dies when the object whose name ends so is about to be written for step 20."""
    saver = checkpoints(engine, store, 1, pod=pod)
    saver.resume()
    save(engine, saver, 10)
    store.before = Once(at, Crash())
    with pytest.raises(Crash):
        save(engine, saver, 20)
    store.heal()
    mark(engine, -1)


DEATHS = {
    "before the upload": "rank-00000.safetensors",
    "before the manifest": "manifest.json",
    "before the commit": "HEAD",
}


@pytest.mark.parametrize("at", DEATHS.values(), ids=DEATHS.keys())
def test_a_staged_step_is_taken_up_and_committed_by_the_next_generation(engine, store, pod, at):
    dies(engine, store, pod, at=at)
    assert [kept.step for kept in head(store).kept] == [10]
    again = checkpoints(engine, store, 2, pod=pod)
    found, resumed = again.resume()
    assert (found, resumed.source) == (position(20), ResumeSource.MEMORY)
    assert marks(engine) == {20.0}
    (finished,) = again.wait()
    assert finished.checkpoint.step == 20
    assert [kept.step for kept in head(store).kept] == [20, 10]
    mark(engine, -1)
    found, resumed = checkpoints(engine, store, 3).resume()
    assert (found, resumed.source) == (position(20), ResumeSource.STORAGE)
    assert marks(engine) == {20.0}


def test_a_committed_step_is_taken_up_from_memory_without_reading_it_from_storage(engine, store, pod, monkeypatch):
    saver = checkpoints(engine, store, 1, pod=pod)
    saver.resume()
    save(engine, saver, 10)
    mark(engine, -1)
    monkeypatch.setattr(store, "get", None)
    again = checkpoints(engine, store, 2, pod=pod)
    assert again.resume()[1].source == ResumeSource.MEMORY
    assert marks(engine) == {10.0}
    assert again.wait() == [], "there is nothing left to commit"


def tear(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"torn")


def buffers(pod):
    return sorted(pod.glob("*.shard"), key=lambda path: path.stat().st_mtime)


def reseal(pod, **changes):
    for path in pod.glob("*.seal"):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "a buffer that was written over": lambda pod: [tear(path) for path in pod.glob("*.shard")],
    "a buffer of another size": lambda pod: [path.write_bytes(b"short") for path in pod.glob("*.shard")],
    "no seal": lambda pod: [path.unlink() for path in pod.glob("*.seal")],
    "a torn seal": lambda pod: [path.write_text("{") for path in pod.glob("*.seal")],
    "another rank's": lambda pod: reseal(pod, rank=1),
    "another world's": lambda pod: reseal(pod, worldSize=2),
    "another stage's": lambda pod: reseal(pod, zeroStage=3),
    "another job's": lambda pod: reseal(pod, prefix="s3://bucket/team/other"),
    "another recipe's": lambda pod: reseal(pod, recipe="other"),
    "another lineage's": lambda pod: reseal(pod, save=[7, 20, 1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_not_whole_or_not_ours_is_read_from_storage_instead(engine, store, pod, damage):
    dies(engine, store, pod, at="HEAD")
    damage(pod)
    found, resumed = checkpoints(engine, store, 2, pod=pod).resume()
    assert (found, resumed.source) == (position(10), ResumeSource.STORAGE)
    assert marks(engine) == {10.0}


def test_one_torn_buffer_leaves_the_other(engine, store, pod):
    dies(engine, store, pod, at="HEAD")
    by_step = {json.loads(path.read_text())["step"]: path.with_suffix(".shard") for path in pod.glob("*.seal")}
    assert by_step.keys() == {10, 20}
    tear(by_step[20])
    found, resumed = checkpoints(engine, store, 2, pod=pod).resume()
    assert (found, resumed.source) == (position(10), ResumeSource.MEMORY)
    assert marks(engine) == {10.0}


def test_a_worker_killed_while_it_fills_a_buffer_leaves_no_seal_on_it(engine, store, pod, monkeypatch):
    saver = checkpoints(engine, store, 1, pod=pod)
    saver.resume()
    for step in (10, 11):
        save(engine, saver, step)

    def die(*arguments):
        raise Crash

    monkeypatch.setattr("finetune_trainer.checkpoint.shard.copy_in", die)
    saver.begin_save(position(12))
    with pytest.raises(Crash):
        saver.wait_for_copy()
    assert [json.loads(path.read_text())["step"] for path in pod.glob("*.seal")] == [11]


def test_what_was_not_taken_up_is_forgotten(engine, store, pod, tmp_path):
    """Generation 2 lost a pod and trained from step 10 on; a third must not find the step 20 of the first."""
    dies(engine, store, pod, at="HEAD")
    reseal(pod, worldSize=2)
    checkpoints(engine, store, 2, pod=pod).resume()
    assert list(pod.glob("*.seal")) == []


def saves(*steps, lineage=0, generation=1):
    return {SaveId(lineage, step, generation) for step in steps}


HEAD_AT_20 = Head(3, 1, "n", (Kept(20, "m", "", 1, ""),), lineage=1)
CANDIDATES = {
    "nobody holds anything": ([set(), set()], []),
    "one rank holds nothing": ([saves(30, lineage=1), set()], []),
    "all hold two": ([saves(30, 40, lineage=1)] * 2, [40, 30]),
    "only the older is held by all": ([saves(30, 40, lineage=1), saves(30, lineage=1)], [30]),
    "older than what is committed": ([saves(10, lineage=1)] * 2, []),
    "as new as what is committed": ([saves(20, lineage=1)] * 2, [20]),
    "before a rollback": ([saves(40)] * 2, []),
    "one step by two generations": ([saves(30, lineage=1), saves(30, lineage=1, generation=2)], []),
}


@pytest.mark.parametrize(("held", "steps"), CANDIDATES.values(), ids=CANDIDATES.keys())
def test_only_what_all_ranks_hold_of_this_lineage_may_be_taken_up(held, steps):
    assert [save.step for save in candidates(held, HEAD_AT_20)] == steps


def test_where_memory_has_no_room_the_next_folder_serves(tmp_path, caplog, small_tmpfs):
    staging = Staging([small_tmpfs, tmp_path / "disk"], rank=0, size_bytes=3 * 2**20)
    assert len(list((tmp_path / "disk").glob("*.shard"))) == len(staging.slots) == SLOTS
    assert list(small_tmpfs.iterdir()) == [], "what did fit is given back"
    assert "raise spec.checkpoint.stagingMemory" in caplog.text


def test_no_room_anywhere_is_told_before_the_first_step(small_tmpfs):
    with pytest.raises(StorageUnavailable, match=r"no room to stage checkpoints in .*: rank 0 needs 2 times 3 MiB"):
        Staging([small_tmpfs], rank=0, size_bytes=3 * 2**20)


@pytest.fixture
def small_tmpfs(tmp_path):
    """A memory-backed folder of four MiB: room for one buffer of three."""
    folder = tmp_path / "memory"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)
