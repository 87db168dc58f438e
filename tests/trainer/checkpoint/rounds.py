"""What the ranks of a launch do, for all cases in turn; started by test_round_trips.py under torchrun.

    rounds.py ENDPOINT PREFIX FOLDER save|recall|resume|reshape|die|save_to_move|move...

``save`` trains without checkpoints and once more with a save on the way, whose copy is slow; ``recall`` takes that up in new processes from the memory of
their pods, ``resume`` in other pods from storage; ``reshape``
loads into another ZeRO stage or world size and saves again; ``die`` kills a rank in the middle of a save. ``save_to_move`` and ``move`` do
what matrix.py lists, of what these ranks have a part in. After each of them a rank writes what it saw to FOLDER as JSON.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import deepspeed
import torch.distributed as dist

from finetune_api.protocol import ResumeSource
from finetune_trainer.checkpoint import saving
from finetune_trainer.checkpoint.checkpoints import Checkpoints
from finetune_trainer.checkpoint.head import Retention
from finetune_trainer.checkpoint.manifest import Position
from finetune_trainer.checkpoint.shard import Copy
from finetune_trainer.object_store import S3ObjectStore
from tests.trainer.checkpoint.matrix import MOVES, engine_of, train_dealt
from tests.trainer.checkpoint.trainee import Case, new_engine, train, weights_digest

SAVE_AT, STEPS = 4, 8

PRECISIONS = ("FP32", "BF16", "FP16")
CASES = {
    case.name: case
    for case in (
        *(Case(f"zero {stage} {precision}", stage, precision) for stage in range(4) for precision in PRECISIONS),
        *(Case(f"lora on zero {stage}", stage, "BF16", lora=True) for stage in range(4)),
        *(Case(f"offload on zero {stage}", stage, "BF16", offload=True) for stage in (1, 2, 3)),
        Case("round robin gradients", 2, "BF16", zero={"round_robin_gradients": True}),
        Case("accumulation", 2, "BF16", accumulation=2),
        Case("small groups on zero 3", 3, "BF16", zero={"sub_group_size": 100}),
        Case("autocast on zero 0", 0, autocast=True),
        Case("autocast on zero 3", 3, autocast=True),
    )
}
RESHAPES = {
    3: [(name, name) for name in ("zero 0 BF16", "zero 1 FP32", "zero 2 BF16", "zero 3 FP32")],
    2: [
        ("zero 2 BF16", "zero 3 BF16"),
        ("zero 3 FP32", "zero 1 FP32"),
        ("zero 0 BF16", "zero 3 BF16"),
        ("zero 3 BF16", "zero 0 BF16"),
        ("zero 1 FP16", "zero 2 BF16"),
        ("lora on zero 2", "lora on zero 3"),
    ],
    1: [(name, name) for name in ("zero 0 FP32", "zero 1 BF16", "zero 2 FP16", "zero 3 BF16", "lora on zero 3")],
}
FALLS_BACK = "zero 2 FP32"


class DiesUploading(S3ObjectStore):
    """Rank 1 is killed when its upload is half way: after the object is there, before anybody knows."""

    armed = False

    def upload(self, body, uri, **options):
        super().upload(body, uri, **options)
        if self.armed and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def slow_copies():
    """Let training get as far as it may before a save has copied its numbers."""

    class SlowCopy(Copy):
        def run(self):
            time.sleep(0.1)
            super().run()

    with mock.patch.object(saving, "Copy", SlowCopy):
        yield


def slug(name):
    return name.replace(",", "").replace(" ", "-").lower()


class Rounds:
    def __init__(self, endpoint, prefix, folder):
        self.endpoint = endpoint
        self.pods = Path(folder) / "pods"
        self.prefix = prefix
        self.seen = {}

    def checkpoints(self, engine, name, generation, *, store=None, pod=None, resume_from=None):
        return Checkpoints(
            engine=engine,
            store=store or S3ObjectStore(self.endpoint),
            prefix=f"{self.prefix}/{slug(name)}",
            generation=generation,
            retention=Retention(9),
            recipe_digest="recipe",
            staging=[pod or Path(tempfile.mkdtemp())],
            resume_from=resume_from,
        )

    def save(self):
        for name, case in CASES.items():
            engine = new_engine(case)
            straight = train(engine, range(STEPS))
            digest, skipped = weights_digest(engine), engine.skipped_steps
            engine = new_engine(case)
            checkpoints = self.checkpoints(engine, name, 1, pod=self.pods / slug(name))
            assert checkpoints.resume()[0].step == 0
            losses = train(engine, range(SAVE_AT))
            with slow_copies():
                checkpoints.begin_save(position(SAVE_AT))
                losses += train(engine, range(SAVE_AT, STEPS))
            [outcome] = checkpoints.wait()
            checkpoints.close()
            undisturbed = losses == straight and weights_digest(engine) == digest
            self.seen[name] = {
                "losses": straight,
                "digest": digest,
                "undisturbed": undisturbed,
                "skipped": skipped,
                "uri": outcome.checkpoint.uri,
            }
        self.two_saves()

    def two_saves(self):
        engine = new_engine(CASES[FALLS_BACK])
        checkpoints = self.checkpoints(engine, "falls back", 1)
        checkpoints.resume()
        train(engine, range(SAVE_AT))
        checkpoints.save(position(SAVE_AT))
        train(engine, range(SAVE_AT, SAVE_AT + 1))
        self.seen["falls back"] = {"uri": checkpoints.save(position(SAVE_AT + 1)).uri}

    def recall(self):
        for name, case in CASES.items():
            self.take_up(name, case, 2, pod=self.pods / slug(name))

    def resume(self):
        for name, case in {**CASES, "falls back": CASES[FALLS_BACK], "killed": CASES[FALLS_BACK]}.items():
            self.take_up(name, case, 3)
        told = f"{self.prefix}/{slug(FALLS_BACK)}" if dist.get_rank() == 0 else None
        self.take_up("told apart", CASES[FALLS_BACK], 1, resume_from=told)

    def take_up(self, name, case, generation, *, pod=None, resume_from=None):
        engine = new_engine(case)
        checkpoints = self.checkpoints(engine, name, generation, pod=pod, resume_from=resume_from)
        found, resumed = checkpoints.resume()
        checkpoints.close()
        losses = train(engine, range(found.step, STEPS))
        self.seen[name] = {
            "source": resumed.source.value,
            "position": [found.step, found.samples_consumed, [list(pair) for pair in found.skipped_ranges]],
            "losses": losses,
            "digest": weights_digest(engine),
            "skipped": engine.skipped_steps,
        }

    def reshape(self):
        for number, (source, target) in enumerate(RESHAPES[dist.get_world_size()]):
            generation = 60 // dist.get_world_size() + number  # first three ranks, then two, then one
            engine = new_engine(CASES[target])
            checkpoints = self.checkpoints(engine, source, generation)
            found, _ = checkpoints.resume()
            report = checkpoints.save(found)
            checkpoints.close()
            self.seen[f"{source} to {target}"] = {"uri": report.uri, "losses": train(engine, range(found.step, STEPS))}

    def die(self):
        engine = new_engine(CASES[FALLS_BACK])
        store = DiesUploading(self.endpoint)
        checkpoints = self.checkpoints(engine, "killed", 1, store=store)
        checkpoints.resume()
        train(engine, range(SAVE_AT))
        checkpoints.save(position(SAVE_AT))
        train(engine, range(SAVE_AT, SAVE_AT + 1))
        store.armed = True
        checkpoints.save(position(SAVE_AT + 1))

    def save_to_move(self):
        for move in MOVES:
            if move.ranks == dist.get_world_size():
                engine = engine_of(move, move.stage)
                checkpoints = self.checkpoints(engine, move.name, 1)
                checkpoints.resume()
                losses = train_dealt(engine, range(SAVE_AT))
                uri = checkpoints.save(position(SAVE_AT)).uri
                checkpoints.close()
                losses += train_dealt(engine, range(SAVE_AT, STEPS))
                self.seen[move.name] = {"losses": losses, "uri": uri}

    def move(self):
        for move in MOVES:
            if move.to_ranks == dist.get_world_size():
                engine = engine_of(move, move.to_stage)
                checkpoints = self.checkpoints(engine, move.name, 2)
                found, resumed = checkpoints.resume()
                assert (found, resumed.source) == (position(SAVE_AT), ResumeSource.STORAGE)
                uri = checkpoints.save(found).uri
                checkpoints.close()
                self.seen[move.name] = {"losses": train_dealt(engine, range(SAVE_AT, STEPS)), "uri": uri}


def position(step):
    return Position(step, 6 * step, ((1, 3), (7, 8)))


def main():
    endpoint, prefix, folder, *activities = sys.argv[1:]
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for activity in activities:
        rounds = Rounds(endpoint, prefix, folder)
        getattr(rounds, activity)()
        name = f"{activity}-{dist.get_world_size()}-{dist.get_rank()}.json"
        Path(folder, name).write_text(json.dumps(rounds.seen))


if __name__ == "__main__":
    main()
    os._exit(0)  # as the trainer leaves: the end of a process group may abort while a peer is still in it
