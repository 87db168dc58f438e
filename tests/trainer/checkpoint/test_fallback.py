"""Resuming from an older checkpoint: when the newest is damaged or suspected, and never because it cannot be told what is there."""

import logging
import threading
from dataclasses import replace

import pytest

from finetune_api.protocol import ResumeSource
from finetune_trainer.errors import BadConfig, BadData, NoPermission, StorageUnavailable
from finetune_trainer.object_store import MemoryObjectStore
from tests.trainer.checkpoint.faulty_store import Once
from tests.trainer.checkpoint.incarnations import HEAD, checkpoints, head, marks, objects, position, save
from tests.trainer.checkpoint.trainee import Case, new_engine


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


def test_a_rollback_that_waits_for_an_upload_says_that_it_lives(engine, store):
    """What is silent for a minute counts as hanging, and would be killed before it has told from where not to go on."""
    beats, release = [], threading.Event()
    saver = checkpoints(engine, store, 1, alive=lambda: (beats.append(1), release.set()))
    saver.resume()
    save(engine, saver, 10)
    store.before = lambda method, uri: release.wait(30) if method == "upload" else None
    saver.begin_save(position(20))
    assert saver.last_good(20) == 20
    assert beats
    release.clear()
    saver.begin_save(position(30))
    beats.clear()
    assert saver.roll_back(20, (40, 42)) == 1
    assert beats


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


def test_nothing_loadable_is_an_error_and_never_a_fresh_start(engine, two_saved):
    """One is missing, but the other is damaged, and that is nobody's to put back."""
    missing, damaged = objects(two_saved, ".safetensors")
    del two_saved.objects[missing]
    two_saved.objects[damaged] = flip(two_saved.objects[damaged])
    with pytest.raises(BadData, match=r"none of the 2 checkpoints .* can be loaded \(step 20: .* has other bytes"):
        checkpoints(engine, two_saved, 2).resume()
    assert len(head(two_saved).kept) == 2, "what might come back stays listed"


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
