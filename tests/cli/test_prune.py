"""Fewer checkpoints, nothing else: beside a running job, never the last one, and only what can be done without."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from finetune_cli.checkpoints.pruning import Best, Pruning, carry_out, plan_pruning
from finetune_cli.errors import CannotTell, Damaged
from finetune_trainer.checkpoint import manifest as manifests
from finetune_trainer.checkpoint.commit import HeadWriter
from finetune_trainer.checkpoint.head import Kept, Retention
from finetune_trainer.checkpoint.manifest import Manifest, Position
from finetune_trainer.checkpoint.pruning import prune
from finetune_trainer.object_store import Ambiguous, MemoryObjectStore
from tests.cli.command import finetune
from tests.cli.tampering import Copy
from tests.storage.seaweedfs import S3Server
from tests.trainer.launch import Case

JOB = "full-bf16-zero-2"


def steps(copy: Copy) -> set[str]:
    return {key.split("/")[1] for key in copy.keys("checkpoints/")}


def test_the_newest_stay_and_are_still_whole(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "prune-two")
    before = copy.head
    ran = finetune(server, "prune", copy.prefix, "--keep", "2", "--yes", "-o", "json")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.json == {
        "prefix": copy.prefix,
        "done": True,
        "sizeBytes": before["kept"][2]["sizeBytes"],
        "checkpoints": [4],
        "uncommitted": [],
        "staying": [12, 8],
    }
    assert copy.head == before | {"sequence": before["sequence"] + 1, "kept": before["kept"][:2]}
    assert steps(copy) == {"step-12", "step-8"}
    assert finetune(server, "verify", "--all", copy.prefix).code == 0
    again = finetune(server, "prune", copy.prefix, "--keep", "2", "--yes")
    assert again.stdout.startswith("nothing to delete\n")
    assert copy.head["sequence"] == before["sequence"] + 1


def test_a_dry_run_shows_and_leaves(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "prune-dry")
    before, keys = copy.head, copy.keys()
    ran = finetune(server, "prune", copy.prefix, "--keep", "1", "--dry-run")
    assert ran.code == 0
    lines = ran.stdout.splitlines()
    assert [line.split(" of ")[0] for line in lines[:2]] == ["would delete step 8", "would delete step 4"]
    assert lines[2].endswith("in all; steps that stay: 12")
    assert (copy.head, copy.keys()) == (before, keys)


def test_nobody_to_ask_is_a_no(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "prune-unasked")
    keys = copy.keys()
    ran = finetune(server, "prune", copy.prefix, "--keep", "1")
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr == "error: nobody can be asked here: say --yes, or --dry-run\n"
    assert copy.keys() == keys


def test_remains_go_unless_they_may_be_a_save_under_way(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "prune-remains")
    copy.change_head(generation=2)
    remains = {
        "checkpoints/step-16/g1-a/rank-00000.safetensors",
        "checkpoints/step-12/g0-x/rank-00000.safetensors",
    }
    others = {
        "checkpoints/step-16/g2-b/rank-00000.safetensors",
        "checkpoints/step-16/g3-c/rank-00000.safetensors",
        "checkpoints/notes.txt",
    }
    for key in remains | others:
        copy.put(key, b"1")
    finetune(server, "prune", copy.prefix, "--keep", "3", "--yes")
    left = set(copy.keys())
    assert not left & remains
    assert left > others
    assert finetune(server, "verify", "--all", copy.prefix).code == 0


def test_what_an_interrupted_prune_left_goes_with_the_next(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "prune-interrupted")
    copy.change_head(kept=copy.head["kept"][:1])
    ran = finetune(server, "prune", copy.prefix, "--keep", "1", "--yes", "-o", "json")
    assert [folder.split("/")[1] for folder in ran.json["uncommitted"]] == ["step-8", "step-4"]
    assert steps(copy) == {"step-12"}


TORN: dict[str, tuple[Callable[[Copy], None], str]] = {
    "a shard is missing": (lambda copy: copy.delete(copy.shard_key(1)), "step 12 would stay, but "),
    "a shard is cut off": (
        lambda copy: copy.change(copy.shard_key(1), lambda body: body[:-1]),
        "step 12 would stay, but ",
    ),
    "the manifest is another one": (lambda copy: copy.put(copy.manifest_key, b"{}"), "{prefix}/checkpoints/step-12/"),
    "HEAD is missing": (lambda copy: copy.delete("HEAD"), "{prefix}/HEAD is missing although there are checkpoints"),
    "HEAD is none": (lambda copy: copy.put("HEAD", b"{}"), "{prefix}/HEAD is not a HEAD that can be read"),
}


@pytest.mark.parametrize(("tear", "message"), TORN.values(), ids=TORN.keys())
def test_nothing_goes_while_what_would_stay_is_torn(
    tear: Callable[[Copy], None],
    message: str,
    server: S3Server,
    jobs: dict[str, Case],
    request: pytest.FixtureRequest,
) -> None:
    copy = Copy.of(server, JOB, f"prune-torn-{list(TORN).index(request.node.callspec.id)}")
    tear(copy)
    keys = copy.keys()
    ran = finetune(server, "prune", copy.prefix, "--keep", "1", "--yes")
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: " + message.format(prefix=copy.prefix))
    assert copy.keys() == keys


PREFIX = "s3://bucket/job"


def checkpoint(step: int) -> Kept:
    return Kept(step, f"checkpoints/step-{step}/g1-a/manifest.json", "", 1, "")


def committed(store: MemoryObjectStore, *steps: int) -> HeadWriter:
    writer = HeadWriter(store=store, prefix=PREFIX, generation=1, retention=Retention(9), pause=lambda _: None)
    writer.fence()
    for step in steps:
        writer.commit(checkpoint(step))
    return writer


def test_a_running_job_commits_after_a_prune_as_if_nothing_had_been() -> None:
    store = MemoryObjectStore()
    writer = committed(store, 10, 20, 30)
    prune(store, PREFIX, [checkpoint(10), checkpoint(20)])
    assert [kept.step for kept in writer.commit(checkpoint(40)).kept] == [40, 30]


def test_a_prune_between_a_commit_and_its_answer_leaves_the_commit_a_success() -> None:
    class Interrupted(MemoryObjectStore):
        def put_if_match(self, uri: str, body: bytes, etag: str) -> str:
            super().put_if_match(uri, body, etag)
            if b"step-40" in body:
                prune(plain, PREFIX, [checkpoint(10), checkpoint(20)])
                raise Ambiguous(uri)
            return ""

    plain, interrupted = MemoryObjectStore(), Interrupted()
    interrupted.objects = plain.objects
    writer = committed(interrupted, 10, 20, 30)
    assert [kept.step for kept in writer.commit(checkpoint(40)).kept] == [40, 30]


@pytest.mark.parametrize("arrived", [True, False], ids=["and the write had arrived", "and it had not"])
def test_a_prune_whose_answer_is_lost_is_asked_about_and_made_once(arrived: bool) -> None:
    class Lost(MemoryObjectStore):
        lost = False

        def put_if_match(self, uri: str, body: bytes, etag: str) -> str:
            if self.lost:
                return super().put_if_match(uri, body, etag)
            self.lost = True
            if arrived:
                super().put_if_match(uri, body, etag)
            raise Ambiguous(uri)

    store, lost = MemoryObjectStore(), Lost()
    committed(store, 10, 20, 30)
    lost.objects = store.objects
    head = prune(lost, PREFIX, [checkpoint(10)], pause=lambda _: None)
    assert [kept.step for kept in head.kept] == [30, 20]
    assert head.sequence == 5


def test_a_grade_that_comes_between_does_not_hide_a_checkpoint_from_the_prune() -> None:
    store = MemoryObjectStore()
    writer = committed(store, 10, 20, 30)
    writer.grade(10, 0.7)
    assert [kept.step for kept in prune(store, PREFIX, [checkpoint(10)]).kept] == [30, 20]


GRADED = {
    "the highest": (Best.HIGHEST, [30, 20]),
    "the lowest": (Best.LOWEST, [30, 10]),
    "not the best": (Best.NONE, [30]),
}


@pytest.mark.parametrize(("best", "stay"), GRADED.values(), ids=GRADED.keys())
def test_of_graded_checkpoints_stays(best: Best, stay: list[int]) -> None:
    assert [kept.step for kept in plan_pruning(graded(), PREFIX, 1, best).staying] == stay


def test_which_end_of_a_metric_is_good_is_not_guessed() -> None:
    with pytest.raises(CannotTell, match=r"step 20 \(0\.9\), 10 \(0\.7\); say --keep-best highest, lowest or none$"):
        plan_pruning(graded(), PREFIX, 1)
    assert [kept.step for kept in plan_pruning(graded(), PREFIX, 3).staying] == [30, 20, 10]


def graded() -> MemoryObjectStore:
    store = MemoryObjectStore()
    body = manifests.encode(Manifest(Position(1, 1), 1, 1, 1, "", (), {}, ()))
    writer = HeadWriter(store=store, prefix=PREFIX, generation=1, retention=Retention(9), pause=lambda _: None)
    writer.fence()
    for step in (10, 20, 30):
        store.put(f"{PREFIX}/{checkpoint(step).manifest}", body)
        writer.commit(replace(checkpoint(step), sha256=manifests.digest(body)))
    writer.grade(10, 0.7)
    writer.grade(20, 0.9)
    return store


def test_a_commit_that_comes_between_is_kept_whatever_the_number() -> None:
    class Commits(MemoryObjectStore):
        def read(self, uri: str):  # the job commits between the prune's look and its write
            stored = super().read(uri)
            if not self.done:
                self.done = True
                writer.commit(checkpoint(40))
            return stored

        done = False

    store, commits = MemoryObjectStore(), Commits()
    writer = committed(store, 10, 20, 30)
    commits.objects = store.objects
    head = prune(commits, PREFIX, [checkpoint(10), checkpoint(20)], pause=lambda _: None)
    assert [kept.step for kept in head.kept] == [40, 30]


def test_a_job_that_drops_what_was_to_stay_stops_the_prune() -> None:
    store = MemoryObjectStore()
    writer = committed(store, 10, 20)
    pruning = Pruning(PREFIX, doomed=(checkpoint(10),), staying=(checkpoint(20),), remains=())
    writer.drop((checkpoint(20),))
    with pytest.raises(Damaged, match=f"^{PREFIX}/HEAD no longer lists what was to stay, and nothing was pruned"):
        carry_out(store, pruning)


def test_a_job_without_checkpoints_yet_has_nothing_to_prune() -> None:
    store = MemoryObjectStore()
    committed(store)
    pruning = plan_pruning(store, PREFIX, 1)
    assert (pruning.doomed, pruning.remains) == ((), ())
