"""What is there, newest first, committed or not; and what it means when HEAD does not say."""

import json

from tests.cli.command import finetune
from tests.cli.tampering import Copy
from tests.storage.seaweedfs import S3Server
from tests.trainer.launch import Case

JOB = "full-bf16-zero-2"


def test_a_table_for_people(server: S3Server, jobs: dict[str, Case]) -> None:
    ran = finetune(server, "ls", f"s3://jobs/{JOB}")
    assert (ran.code, ran.stderr) == (0, "")
    header, *rows = (line.split() for line in ran.stdout.splitlines())
    assert header == ["STEP", "COMMITTED", "SIZE", "RANKS", "ZERO", "GENERATION", "METRIC"]
    assert [(row[0], *row[4:]) for row in rows] == [
        ("12", "2", "2", "1", "newest"),
        ("8", "2", "2", "1"),
        ("4", "2", "2", "1"),
    ]
    assert "\x1b" not in ran.stdout, "no colour off a terminal"


def test_a_document_for_programs(server: S3Server, jobs: dict[str, Case]) -> None:
    head = Copy(server, JOB).head
    ran = finetune(server, "ls", f"s3://jobs/{JOB}/", "--output", "json")
    assert ran.json == {
        "prefix": f"s3://jobs/{JOB}",
        "generation": 1,
        "sequence": head["sequence"],
        "problem": None,
        "checkpoints": [
            {
                "step": kept["step"],
                "commitTime": kept["commitTime"],
                "sizeBytes": kept["sizeBytes"],
                "manifest": kept["manifest"],
                "metric": None,
                "worldSize": 2,
                "zeroStage": 2,
                "generation": 1,
                "problem": None,
            }
            for kept in head["kept"]
        ],
        "uncommitted": [],
    }


def test_what_an_evaluation_gave_is_told_where_the_job_keeps_its_best(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "ls-graded")
    head = copy.head
    head["kept"][1]["metric"] = 0.71
    copy.put("HEAD", json.dumps(head).encode())
    assert [each["metric"] for each in finetune(server, "ls", copy.prefix, "-o", "json").json["checkpoints"]] == [
        None,
        0.71,
        None,
    ]
    assert finetune(server, "ls", copy.prefix).stdout.splitlines()[2].split()[-1] == "0.71"


def test_saves_that_were_never_committed_are_told_apart(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "with-remains")
    copy.change_head(generation=2)
    copy.put("checkpoints/step-16/g1-a/rank-00000.safetensors", b"1234")
    copy.put("checkpoints/step-16/g2-b/rank-00000.safetensors", b"12")
    copy.put("checkpoints/step-16/g2-b/rank-00001.safetensors", b"123")
    copy.put("checkpoints/notes.txt", b"nobody's")
    ran = finetune(server, "ls", copy.prefix, "-o", "json")
    assert ran.json["uncommitted"] == [
        {
            "folder": "checkpoints/step-16/g2-b/",
            "step": 16,
            "generation": 2,
            "objects": 2,
            "sizeBytes": 5,
            "dead": False,
        },
        {
            "folder": "checkpoints/step-16/g1-a/",
            "step": 16,
            "generation": 1,
            "objects": 1,
            "sizeBytes": 4,
            "dead": True,
        },
    ]
    *_, under_way, dead = finetune(server, "ls", copy.prefix).stdout.splitlines()
    assert under_way.split() == [
        "16",
        "2",
        "2",
        "5",
        "B",
        *["a", "save", "under", "way,", "or", "remains", "of", "one"],
    ]
    assert dead.split() == ["16", "1", "1", "4", "B", "remains"]


def test_a_missing_head_is_told_and_what_is_there_is_listed(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "ls-without-head")
    copy.delete("HEAD")
    ran = finetune(server, "ls", copy.prefix, "-o", "json")
    assert ran.code == 1
    assert ran.stderr.startswith(f"error: {copy.prefix}/HEAD is missing although there are checkpoints")
    assert ran.json["problem"] == ran.stderr.removeprefix("error: ").strip()
    assert ran.json["checkpoints"] == []
    assert [attempt["step"] for attempt in ran.json["uncommitted"]] == [12, 8, 4]


def test_a_head_of_nothing_is_no_error(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy(server, "only-fenced")
    head = {"version": 1, "sequence": 1, "generation": 1, "nonce": "a", "kept": []}
    copy.put("HEAD", json.dumps(head).encode())
    ran = finetune(server, "ls", copy.prefix)
    assert (ran.code, ran.stdout) == (0, "HEAD of generation 1 lists no checkpoint yet.\n")


def test_a_manifest_that_is_not_the_committed_one_is_told_in_its_row(server: S3Server, jobs: dict[str, Case]) -> None:
    copy = Copy.of(server, JOB, "ls-without-manifest")
    copy.delete(copy.manifest_key)
    first = finetune(server, "ls", copy.prefix).stdout.splitlines()[1]
    assert first.endswith(f"newest; {copy.prefix}/{copy.manifest_key} is missing")


def test_nothing_there_is_not_known_to_be_a_job(server: S3Server, jobs: dict[str, Case]) -> None:
    ran = finetune(server, "ls", "s3://jobs/no-such-job")
    assert ran.code == 2
    assert ran.stderr.startswith("error: there are no checkpoints below s3://jobs/no-such-job: check the prefix")
    assert ran.stderr.count("\n") == 1
