"""What is whole is told so; every kind of damage is named with its object and its bytes."""

from collections.abc import Callable
from typing import Any

import pytest

from finetune_cli.checkpoints.chunks import read_chunk
from finetune_cli.checkpoints.layout import Fault, layout_faults
from finetune_trainer.checkpoint.manifest import Interval, Manifest, Parameter, Position, Shard, digest
from finetune_trainer.object_store import MemoryObjectStore
from tests.cli.command import finetune
from tests.cli.tampering import Copy
from tests.storage.seaweedfs import S3Server
from tests.trainer.launch import Case

JOB = "full-bf16-zero-2"


@pytest.mark.parametrize(
    "name", ["full-bf16-zero-2", "full-fp32-zero-3", "full-fp16-zero-1", "lora-bf16-zero-3-drawn-pooler"]
)
def test_what_a_job_wrote_is_whole(name: str, server: S3Server, jobs: dict[str, Case]) -> None:
    ran = finetune(server, "verify", "--all", f"s3://jobs/{name}", "-o", "json")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.json["whole"] is True
    assert [(each["step"], each["faults"]) for each in ran.json["checkpoints"]] == [(12, []), (8, []), (4, [])]


@pytest.mark.parametrize(("at", "step"), [("", 12), ("@8", 8)], ids=["the newest", "the step that is asked for"])
def test_one_checkpoint_is_read_unless_all_are_asked_for(
    at: str, step: int, server: S3Server, jobs: dict[str, Case]
) -> None:
    ran = finetune(server, "verify", f"s3://jobs/{JOB}{at}")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"step {step}: whole (")
    assert ran.stdout.count("\n") == 1


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda body: body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :]


def drop_an_interval(manifest: Any) -> None:
    del manifest["shards"][0]["intervals"][0]


def repeat_an_interval(manifest: Any) -> None:
    manifest["shards"][1]["intervals"].append(manifest["shards"][0]["intervals"][0])


def forget_a_hash(manifest: Any) -> None:
    manifest["shards"][0]["sha256"] = []


def of_another_step(manifest: Any) -> None:
    manifest["step"] = 11


# id: (what happens to a copy, the object that is named, the beginning of the problem, its bytes: None, "chunk" or "header")
TAMPERED: dict[str, tuple[Callable[[Copy], None], str, str, str | None]] = {
    "a bit of the numbers has flipped": (
        lambda copy: copy.change(copy.shard_key(1), flip(-100)),
        "rank-00001.safetensors",
        "has other bytes than were written",
        "chunk",
    ),
    "a shard is cut off": (
        lambda copy: copy.change(copy.shard_key(0), lambda body: body[:-4]),
        "rank-00000.safetensors",
        "has ",
        None,
    ),
    "a shard is missing": (
        lambda copy: copy.delete(copy.shard_key(1)),
        "rank-00001.safetensors",
        "is missing",
        None,
    ),
    "the manifest is missing": (lambda copy: copy.delete(copy.manifest_key), "manifest.json", "is missing", None),
    "the manifest is another one": (
        lambda copy: copy.change(copy.manifest_key, lambda body: body + b" "),
        "manifest.json",
        "has other bytes than were committed",
        None,
    ),
    "numbers are in no shard": (
        lambda copy: copy.change_manifest(drop_an_interval),
        "manifest.json",
        "no shard holds the numbers 0 to ",
        None,
    ),
    "numbers are in two shards": (
        lambda copy: copy.change_manifest(repeat_an_interval),
        "manifest.json",
        "two shards hold the numbers 0 to ",
        None,
    ),
    "hashes are missing": (
        lambda copy: copy.change_manifest(forget_a_hash),
        "manifest.json",
        "contradicts itself about rank-00000.safetensors: 0 hashes for 1 chunks",
        None,
    ),
    "the manifest is of another step": (
        lambda copy: copy.change_manifest(of_another_step),
        "manifest.json",
        "is of step 11, HEAD says 12",
        None,
    ),
    "a header names another tensor, and hashes vouch for it": (
        lambda copy: copy.change_shard(0, lambda body: body.replace(b"embeddings", b"embroidery", 1)),
        "rank-00000.safetensors",
        "its header lacks bert.embeddings",
        "header",
    ),
    "a header is none, and hashes vouch for it": (
        lambda copy: copy.change_shard(0, lambda body: b"\xff" * 8 + body[8:]),
        "rank-00000.safetensors",
        "is no safetensors file: its header would be 18446744073709551615 bytes long",
        "header",
    ),
}


@pytest.mark.parametrize(("tamper", "name", "problem", "where"), TAMPERED.values(), ids=TAMPERED.keys())
def test_names_the_damage(
    tamper: Callable[[Copy], None],
    name: str,
    problem: str,
    where: str | None,
    server: S3Server,
    jobs: dict[str, Case],
    request: pytest.FixtureRequest,
) -> None:
    copy = Copy.of(server, JOB, f"tampered-{list(TAMPERED).index(request.node.callspec.id)}")
    folder = copy.manifest_key.rpartition("/")[0]
    tamper(copy)
    ran = finetune(server, "verify", "--all", copy.prefix, "-o", "json")
    assert ran.code == 1
    assert ran.stderr == f"error: broken below {copy.prefix}: step 12; a job that resumes passes over it\n"
    newest, *older = ran.json["checkpoints"]
    fault = next(fault for fault in newest["faults"] if fault["problem"].startswith(problem))
    assert fault["object"] == f"{copy.prefix}/{folder}/{name}"
    assert (fault["firstByte"] is None) == (where is None)
    if where is not None:
        assert 0 == fault["firstByte"] < fault["endByte"]
    assert [each["whole"] for each in older] == [True, True]
    assert f"{fault['object']}" in finetune(server, "verify", copy.prefix).stdout


def test_without_head_everything_is_broken_and_of_a_version_to_come_nothing_is_known(
    server: S3Server, jobs: dict[str, Case]
) -> None:
    copy = Copy.of(server, JOB, "without-head")
    copy.change_head(version=2)
    newer = finetune(server, "verify", copy.prefix)
    assert newer.code == 2
    assert "was written by a newer version" in newer.stderr
    copy.put("HEAD", b"{}")
    assert finetune(server, "verify", copy.prefix).code == 1
    copy.delete("HEAD")
    missing = finetune(server, "verify", copy.prefix)
    assert missing.code == 1
    assert missing.stderr.startswith(f"error: {copy.prefix}/HEAD is missing although there are checkpoints")


def test_bytes_that_broke_on_their_way_are_read_again() -> None:
    class BreaksOnce(MemoryObjectStore):
        broken = False

        def get(self, uri: str, start: int | None = None, length: int | None = None) -> bytes:
            body = super().get(uri, start, length)
            whole, self.broken = self.broken, True
            return body if whole else body[:-1] + b"?"

    store = BreaksOnce()
    store.put("s3://b/shard", b"numbers")
    shard = Shard("shard", 7, (digest(b"numbers"),), ())
    assert read_chunk(store, "s3://b/shard", shard, 0) == b"numbers"
    assert read_chunk(store, "s3://b/shard", Shard("shard", 9, ("00",), ()), 0) == Fault(
        "s3://b/shard", "ends at byte 7", 0, 9
    )


def manifest(*shards: tuple[Interval, ...], numel: int = 10, size: int = 1000) -> Manifest:
    described = tuple(Shard(f"rank-{rank}", size, ("",), intervals) for rank, intervals in enumerate(shards))
    return Manifest(Position(1, 1), 1, len(shards), 2, "", (Parameter("w", numel),), {}, described)


LAYOUTS = {
    "whole in one shard": (manifest((Interval(0, 0, 10, 8),)), []),
    "whole in two": (manifest((Interval(0, 0, 4, 8),), (Interval(0, 4, 6, 8),)), []),
    "a gap at the beginning": (manifest((Interval(0, 1, 9, 8),)), ["no shard holds the numbers 0 to 1 of w"]),
    "a gap in the middle": (
        manifest((Interval(0, 0, 4, 8),), (Interval(0, 5, 5, 8),)),
        ["no shard holds the numbers 4 to 5 of w"],
    ),
    "a gap at the end": (manifest((Interval(0, 0, 9, 8),)), ["no shard holds the numbers 9 to 10 of w"]),
    "twice": (
        manifest((Interval(0, 0, 6, 8),), (Interval(0, 4, 6, 8),)),
        ["two shards hold the numbers 4 to 6 of w"],
    ),
    "behind the end": (
        manifest((Interval(0, 0, 12, 8),)),
        ["a shard holds the numbers 10 to 12, which are behind the end of w"],
    ),
    "intervals over one another": (
        manifest((Interval(0, 0, 5, 8), Interval(0, 5, 5, 12))),
        ["contradicts itself about rank-0: intervals overlap at byte 12"],
    ),
    "an interval behind the object's end": (
        manifest((Interval(0, 0, 10, 900),)),
        ["contradicts itself about rank-0: intervals up to byte 1020 of 1000"],
    ),
    "a parameter that is none": (
        manifest((Interval(0, 0, 10, 8), Interval(1, 0, 1, 128))),
        ["contradicts itself about rank-0: an interval of parameter 1, of which there are 1"],
    ),
}


@pytest.mark.parametrize(("described", "problems"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_number_is_held_exactly_once(described: Manifest, problems: list[str]) -> None:
    assert [fault.problem for fault in layout_faults(described, "s3://b/manifest.json")] == problems
