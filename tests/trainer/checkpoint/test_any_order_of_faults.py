"""Saves, crashes, resumes, rivals, damage and unclear answers in any order: what was committed and not damaged is what is resumed."""

import tempfile

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

from finetune_trainer.checkpoint.head import decode
from finetune_trainer.errors import BadData, Stale, StorageUnavailable
from tests.trainer.checkpoint.faulty_store import Ambiguous, Crash, FaultyStore, Once, PreconditionFailed
from tests.trainer.checkpoint.incarnations import HEAD, PREFIX, checkpoints, mark, marks, position
from tests.trainer.checkpoint.trainee import Case, new_engine, train


class FaultsInAnyOrder(RuleBasedStateMachine):
    """One prefix, one incarnation after another, and those that should be gone but still try."""

    def __init__(self, engine):
        super().__init__()
        self.engine = engine
        self.store = FaultyStore()
        self.generation = 0
        self.step = 0
        self.sequence = 0
        self.replaced = []
        self.backups = {}
        self.saver = None

    @property
    def kept(self):
        return decode(self.store.objects[HEAD]).kept

    def is_damaged(self, kept):
        return any(uri.startswith(f"{PREFIX}/{kept.folder}") for uri in self.backups)

    @initialize(keep=st.integers(1, 3))
    def start(self, keep):
        self.keep = keep
        self.resume()

    def resume(self):
        if self.saver is not None:
            self.replaced.append(self.saver)
        self.store.heal()
        self.generation += 1
        self.saver = checkpoints(self.engine, self.store, self.generation, keep=self.keep)
        listed = self.kept if HEAD in self.store.objects else ()
        loadable = [kept.step for kept in listed if not self.is_damaged(kept)]
        mark(self.engine, -1)
        if listed and not loadable:
            with pytest.raises(BadData, match="none of the"):
                self.saver.resume()
            self.store.objects.update(self.backups)
            self.backups.clear()
            return self.resume()
        found, _ = self.saver.resume()
        if not listed:
            assert found.step == 0
            return None
        assert found == position(loadable[0])
        assert marks(self.engine) == {float(loadable[0])}
        assert self.kept[0].step == loadable[0]
        return None

    def save(self):
        self.step += 1
        mark(self.engine, self.step)
        report = self.saver.save(position(self.step))
        assert report.step == self.kept[0].step == self.step
        assert len(self.kept) <= self.keep

    @rule()
    def save_undisturbed(self):
        self.save()

    @rule(
        suffix=st.sampled_from(["HEAD", "manifest.json"]),
        error=st.sampled_from([Ambiguous, PreconditionFailed]),
        when=st.sampled_from(["before", "after"]),
    )
    def save_with_an_unclear_answer(self, suffix, error, when):
        setattr(self.store, when, Once(suffix, error("unclear")))
        self.save()
        self.store.heal()

    @rule(writes=st.integers(0, 8))
    def save_and_die(self, writes):
        self.store.crash_after(writes)
        before = self.kept
        try:
            self.save()
        except Crash:
            assert self.kept == before or self.kept[0].step == self.step
        self.resume()

    @rule(applied=st.booleans())
    def save_that_is_never_confirmed(self, applied):
        def never(method, uri):
            if uri == HEAD:
                raise Ambiguous(uri)

        if applied:
            self.store.after = Once("HEAD", Crash())  # the swap happens, its sender never hears of it
            with pytest.raises(Crash):
                self.save()
        else:
            self.store.before = never
            with pytest.raises(StorageUnavailable):
                self.save()
        self.store.heal()

    @rule()
    def die(self):
        self.resume()

    @precondition(lambda self: self.replaced)
    @rule(data=st.data())
    def one_that_was_replaced_saves(self, data):
        before = self.kept
        with pytest.raises(Stale):
            data.draw(st.sampled_from(self.replaced)).save(position(self.step + 1000))
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
            head = decode(self.store.objects[HEAD])
            assert head.sequence >= self.sequence
            assert head.generation == self.generation
            self.sequence = head.sequence

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
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        ),
    )
