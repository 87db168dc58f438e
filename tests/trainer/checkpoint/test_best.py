"""The best checkpoint by the evaluation stays beside the newest."""

import threading
import time

import pytest

from finetune_trainer.errors import StorageUnavailable
from tests.trainer.checkpoint.faulty_store import Once
from tests.trainer.checkpoint.incarnations import checkpoints, head, objects, position, save


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
