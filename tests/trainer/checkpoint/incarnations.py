"""One incarnation of a job after another, over one store and one engine whose whole state has one value at a time."""

import tempfile
from pathlib import Path

from finetune_trainer.checkpoint import deepspeed_state as state
from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.head import Retention, decode
from finetune_trainer.checkpoint.manifest import Position

PREFIX = "s3://bucket/team/job"
HEAD = f"{PREFIX}/HEAD"


MADE = []
"""What is to be closed at the end of a test: each incarnation has threads and groups of its own."""


def checkpoints(
    engine,
    store,
    generation,
    *,
    keep=2,
    best=None,
    metric=None,
    digest="recipe-1",
    pod=None,
    resume_from=None,
    has_checkpoint=False,
    sources=None,
    prefix=PREFIX,
    **more,
):
    made = Checkpoints(
        engine=engine,
        store=store,
        prefix=prefix,
        generation=generation,
        retention=Retention(keep, best, metric),
        recipe_digest=digest,
        staging=[Path(pod or tempfile.mkdtemp())],
        resume_from=resume_from,
        has_checkpoint=has_checkpoint,
        sources=sources,
        **more,
    )
    MADE.append(made)
    return made


def close_all():
    while MADE:
        MADE.pop().close()


def position(step):
    return at(step, ((3, 5),))


def at(step, skipped):
    return Position(step, 8 * step, tuple(sorted(set(skipped))))


def mark(engine, value):
    """Give the whole state one value, as if training had brought it there."""
    for part in state.held(engine):
        for number, view in enumerate(part.views):
            view.fill_(value + number)


def marks(engine):
    return {view[0].item() - number for part in state.held(engine) for number, view in enumerate(part.views)}


def save(engine, saver, step):
    mark(engine, step)
    return saver.save(position(step))


def head(store):
    return decode(store.objects[HEAD])


def objects(store, part):
    return sorted(uri for uri in store.objects if part in uri)
