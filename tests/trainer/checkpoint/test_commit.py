"""What a commit leaves in the store, whoever dies, comes too late or gets an unclear answer: one real engine, one rank, a store in memory."""

import pytest

from finetune_api.protocol import Resumed, ResumeSource
from finetune_trainer.checkpoint.commit import ATTEMPTS
from finetune_trainer.checkpoint.manifest import Position
from finetune_trainer.errors import BadConfig, NoPermission, Stale, StorageUnavailable
from finetune_trainer.object_store import Ambiguous, PreconditionFailed
from tests.trainer.checkpoint.faulty_store import Crash, FaultyStore, IgnoresConditions, Once
from tests.trainer.checkpoint.incarnations import HEAD, PREFIX, checkpoints, head, mark, marks, objects, position, save
from tests.trainer.checkpoint.trainee import weights_digest


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
