"""Saves, crashes, resumes, rivals, damage, rollbacks and unclear answers in any order: what is resumed is what was committed last and
not damaged, or what lies whole and newer in the memory of the pod.

One rank over a store in memory, so that thousands of orders can be tried; real ranks and a real server are in test_crash_points.
"""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from finetune_api.protocol import ResumeSource
from finetune_trainer.checkpoint.head import decode
from finetune_trainer.errors import BadData, CheckpointsLost, NoPermission, Stale, StorageUnavailable
from tests.trainer.checkpoint.faulty_store import Ambiguous, Crash, FaultyStore, Once, PreconditionFailed
from tests.trainer.checkpoint.incarnations import HEAD, PREFIX, at, checkpoints, close_all, mark, marks
from tests.trainer.checkpoint.trainee import Case, new_engine, train

SUFFIXES = st.sampled_from(["HEAD", "manifest.json"])
UNCLEAR = st.sampled_from([Ambiguous, PreconditionFailed])
WHEN = st.sampled_from(["before", "after"])


class FaultsInAnyOrder(RuleBasedStateMachine):
    """One prefix, one incarnation after another, and those that should be gone but still try."""

    def __init__(self, engine):
        super().__init__()
        self.engine = engine
        self.store = FaultyStore()
        self.generation = 0
        self.step = 0
        self.sequence = 0
        self.pod = None
        self.skipped = ()
        self.replaced = []
        self.backups = {}
        self.saver = None

    @property
    def head(self):
        return decode(self.store.objects[HEAD])

    @property
    def kept(self):
        return self.head.kept

    def is_damaged(self, kept):
        return any(uri.startswith(f"{PREFIX}/{kept.folder}") for uri in self.backups)

    def is_deleted(self, kept):
        damaged = (uri for uri in self.backups if uri.startswith(f"{PREFIX}/{kept.folder}"))
        return any(uri not in self.store.objects for uri in damaged)

    def position(self, step):
        """Where training stands behind a step: it leaves out what every rollback so far has found."""
        return at(step, self.skipped)

    @initialize(keep=st.integers(1, 3), best=st.sampled_from([None, "highest", "lowest"]))
    def start(self, keep, best):
        self.keep, self.best = keep, best
        self.resume(in_same_pod=False)

    def resume(self, *, in_same_pod):
        self.store.heal()
        self.generation += 1
        if not in_same_pod:
            if self.saver is not None:
                self.replaced.append(self.saver)
            self.pod = Path(tempfile.mkdtemp())
        listed = self.kept if HEAD in self.store.objects else ()
        self.saver = checkpoints(
            self.engine,
            self.store,
            self.generation,
            keep=self.keep,
            best=self.best,
            pod=self.pod,
            has_checkpoint=bool(listed),
        )
        loadable = [kept.step for kept in listed if not self.is_damaged(kept)]
        in_memory = self.newest_in_memory()
        mark(self.engine, -1)
        if in_memory is None and listed and not loadable:
            with pytest.raises(CheckpointsLost if all(map(self.is_deleted, listed)) else BadData, match="none of the"):
                self.saver.resume()
            self.store.objects.update(self.backups)
            self.backups.clear()
            return self.resume(in_same_pod=True)
        found, resumed = self.saver.resume()
        assert all(outcome.error is None for outcome in self.saver.wait())
        expected = in_memory or (loadable or [0])[0]
        assert found.step == expected
        assert marks(self.engine) == {float(expected or -1)}
        assert (resumed.source == ResumeSource.MEMORY) == (in_memory is not None)
        assert (
            found == self.position(expected) if expected else found.skipped_ranges == tuple(sorted(set(self.skipped)))
        )
        if expected:
            assert self.kept[0].step == expected
        return resumed

    def newest_in_memory(self):
        """The newest step that the pod holds whole, of this lineage, and not older than what is committed."""
        if HEAD not in self.store.objects:
            return None
        newest = self.kept[0].step if self.kept else 0
        seals = [json.loads(path.read_text())["save"] for path in self.pod.glob("*.seal")]
        return max(
            (step for lineage, step, _ in seals if lineage == self.head.lineage and step >= newest), default=None
        )

    def begin(self):
        self.step += 1
        mark(self.engine, self.step)
        self.saver.begin_save(self.position(self.step))
        self.saver.wait_for_copy()

    def save(self):
        self.step += 1
        mark(self.engine, self.step)
        report = self.saver.save(self.position(self.step))
        assert report.step == self.kept[0].step == self.step
        assert len(self.kept) <= self.keep + (self.best is not None)

    def until_nothing_is_under_way(self):
        """Let those who are to die do so: a process ends at once, its background only when it is told."""
        while True:
            try:
                return self.saver.wait()
            except Crash:
                continue

    def teardown(self):
        close_all()

    @rule()
    def save_undisturbed(self):
        self.save()
        assert self.unlisted_folders_of_this_generation() == set()

    def unlisted_folders_of_this_generation(self):
        keys = (uri.removeprefix(f"{PREFIX}/") for uri in self.store.objects)
        folders = {key.rpartition("/")[0] + "/" for key in keys if f"/g{self.generation}-" in key}
        return folders - {kept.folder for kept in self.kept}

    @rule(first=st.booleans(), second=st.booleans(), error=st.sampled_from([StorageUnavailable, NoPermission, BadData]))
    def save_twice_beside_training(self, first, second, error):
        """Two saves are under way at once; each may fail, and costs nothing but itself."""
        failing = [self.step + 1 + number for number, fails in enumerate((first, second)) if fails]

        def fail(method, uri):
            if any(f"/step-{step}/" in uri and uri.endswith(".safetensors") for step in failing) and method == "upload":
                raise error("away")

        self.store.before = fail
        self.begin()
        self.begin()
        outcomes = self.saver.wait()
        self.store.heal()
        assert [(outcome.step, outcome.error is not None) for outcome in outcomes] == [
            (step, step in failing) for step in (self.step - 1, self.step)
        ]
        if len(failing) < 2:
            assert self.kept[0].step == max({self.step - 1, self.step} - set(failing))

    @rule(suffix=SUFFIXES, error=UNCLEAR, when=WHEN)
    def save_with_an_unclear_answer(self, suffix, error, when):
        setattr(self.store, when, Once(suffix, error("unclear")))
        self.save()
        self.store.heal()

    @rule(writes=st.integers(0, 8), in_same_pod=st.booleans())
    def save_and_die(self, writes, in_same_pod):
        self.store.crash_after(writes)
        before = self.kept
        try:
            self.save()
        except Crash:
            assert self.kept == before or self.kept[0].step == self.step
        self.until_nothing_is_under_way()
        self.resume(in_same_pod=in_same_pod)

    @rule(writes=st.integers(0, 12), in_same_pod=st.booleans())
    def die_with_two_saves_under_way(self, writes, in_same_pod):
        self.store.crash_after(writes)
        self.begin()
        self.begin()
        self.until_nothing_is_under_way()
        self.resume(in_same_pod=in_same_pod)

    @rule(applied=st.booleans())
    def save_that_is_never_confirmed(self, applied):
        def never(method, uri):
            if uri == HEAD:
                raise Ambiguous(uri)

        if applied:
            self.store.after = Once(
                "HEAD", StorageUnavailable("away")
            )  # the swap happens, its sender never hears of it
        else:
            self.store.before = never
        with pytest.raises(StorageUnavailable):
            self.save()
        self.store.heal()

    @rule(in_same_pod=st.booleans())
    def die(self, in_same_pod):
        self.resume(in_same_pod=in_same_pod)

    @rule(in_same_pod=st.booleans(), error=UNCLEAR, when=WHEN, first=st.integers(0, 50), suspect=st.integers(0, 3))
    def roll_back(self, in_same_pod, error, when, first, suspect):
        """Exactly once, whatever the answers; and nothing that was staged before is ever taken up again."""
        suspect_from = self.step - suspect
        self.saver.wait()
        before = self.head
        setattr(self.store, when, Once("HEAD", error("unclear")))
        assert self.saver.roll_back(suspect_from, (first, first + 2)) == before.rollbacks + 1
        assert self.kept == (tuple(kept for kept in before.kept if kept.step <= suspect_from) or before.kept[-1:])
        assert bool(self.kept) == bool(before.kept), "a checkpoint is left where there was one"
        self.skipped += ((first, first + 2),)
        resumed = self.resume(in_same_pod=in_same_pod)
        assert resumed.source != ResumeSource.MEMORY
        assert (self.head.lineage, self.head.rollbacks) == (before.lineage + 1, before.rollbacks + 1)

    @precondition(lambda self: self.kept)
    @rule(metric=st.floats(0, 1), data=st.data())
    def evaluate_and_save(self, metric, data):
        """The best of what was kept stays."""
        step = data.draw(st.sampled_from([kept.step for kept in self.kept]))
        before = {kept.step: kept.metric for kept in self.kept} | {step: metric}
        self.saver.grade(step, metric)
        self.save()
        best_of = {"highest": max, "lowest": min}.get(self.best)
        if best_of is not None:
            graded = [value for value in before.values() if value is not None]
            assert best_of(kept.metric for kept in self.kept if kept.metric is not None) == best_of(graded)

    @precondition(lambda self: self.kept)
    @rule(saves=st.integers(1, 3))
    def somebody_deletes_head_and_puts_it_back(self, saves):
        deleted = self.store.objects.pop(HEAD)
        for _ in range(saves):
            with pytest.raises(CheckpointsLost, match="HEAD: it is gone"):
                self.save()
        assert HEAD not in self.store.objects
        self.store.objects[HEAD] = deleted
        self.save()

    @precondition(lambda self: self.kept)
    @rule()
    def somebody_deletes_everything_and_the_next_one_does_not_start_afresh(self):
        deleted, self.store.objects = self.store.objects, {}
        self.generation += 1
        with pytest.raises(CheckpointsLost, match="everything is gone"):
            checkpoints(self.engine, self.store, self.generation, has_checkpoint=True, pod=self.pod).resume()
        assert HEAD not in self.store.objects
        self.store.objects = deleted
        self.resume(in_same_pod=True)

    @precondition(lambda self: self.replaced)
    @rule(data=st.data())
    def one_that_was_replaced_saves(self, data):
        before = self.kept
        with pytest.raises(Stale):
            data.draw(st.sampled_from(self.replaced)).save(self.position(self.step + 1000))
        assert self.kept == before

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), how=st.sampled_from(["deleted", "cut", "flipped"]))
    def damage(self, data, how):
        kept = data.draw(st.sampled_from(self.kept))
        objects = [uri for uri in sorted(self.store.objects) if uri.startswith(f"{PREFIX}/{kept.folder}")]
        if not objects or self.is_damaged(kept):
            return
        uri = data.draw(st.sampled_from(objects))
        body = self.backups[uri] = self.store.objects.pop(uri)
        if how != "deleted":
            self.store.objects[uri] = body[:-1] if how == "cut" else body[:-1] + bytes([body[-1] ^ 16])

    @invariant()
    def the_sequence_never_falls(self):
        if HEAD in self.store.objects:
            assert self.head.sequence >= self.sequence
            assert self.head.generation == self.generation
            self.sequence = self.head.sequence

    @invariant()
    def what_head_lists_is_there(self):
        for kept in self.kept if HEAD in self.store.objects else ():
            assert self.is_damaged(kept) or f"{PREFIX}/{kept.manifest}" in self.store.objects


def test_any_order_of_faults_resumes_what_was_committed(alone, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("finetune_trainer.checkpoint.commit.FIRST_PAUSE_SECONDS", 0.0)
    engine = new_engine(Case("alone", stage=1))
    train(engine, range(1))
    run_state_machine_as_test(
        lambda: FaultsInAnyOrder(engine),
        settings=settings(
            max_examples=20,
            stateful_step_count=30,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        ),
    )
