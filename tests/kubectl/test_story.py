"""What ``get`` and ``status`` show at the moments in which somebody looks; the texts are what users see."""

from __future__ import annotations

import pytest

from finetune_cli.jobs.listing import jobs_to_json, show_jobs
from finetune_cli.jobs.story import show_status, status_to_json, troubles
from tests.kubectl.jobs import (
    FAILED,
    NOW,
    RUNNING,
    STALLED,
    SUCCEEDED,
    SUSPENDED,
    SUSPENDING,
    UNKNOWN,
    a_job,
    a_status,
)

SHOWN = {
    "not seen yet": (None, "team-a/sentiment: not seen by the operator yet\n"),
    "it runs, with a past and a worry": (
        RUNNING,
        """\
team-a/sentiment: Running
generation 3 trains on 2 nodes

Trained     120 of 330 steps (36 %), epoch 0.73, loss 0.6125, 5120 tokens/s
Ends        in about 14m
Evaluated   step 100: Accuracy 0.71, MacroF1 0.69
Checkpoint  step 110, 4m20s ago, 1.2 GiB, s3://checkpoints/team-a/team-a/sentiment-0b2a1f6e/checkpoints/step-110
Saving      step 120, for 10s
Gang        attempt 3, 2 of 2 nodes run, spares standing by: 1; keeps away from gpu-17 (NodeLost)
Goodput     91.23 %; lost 35s starting, 62s recovering, 4m steps done again
Restarts    2: 1 NodeLost (1 of 8 used), 1 RolledBack (free)

CheckpointsDelayed: SavePutOff, for 3m
  saves are due sooner than the store takes them
  next:  A save is put off until there is room for it; nothing else.
  to do: A longer checkpoint.interval (status.saves.recommendedIntervalSeconds), more stagingMemory, or a faster store.

ATTEMPT  ENDED    REASON        RANK  NODE    AT STEP  LOST STEPS  MESSAGE
1        40m ago  NodeLost      1     gpu-17  80       30          pod sentiment-0b2a1-1-1 (rank 1) is on node gpu-17, which is not ready
2        21m ago  WorkerFailed  0             100      0           rank 0 ended with exit code 1: ValueError: \\x1b[31mno\\x1b[0m
""",
    ),
    "it waits for somebody": (
        STALLED,
        """\
team-a/sentiment: Pending

Gang        attempt 1, 0 of 2 nodes run

Stalled: SecretMissing, for 3m
  rank 0 of 2: container trainer of pod sentiment-0b2a1-0-1 cannot be configured: secret "s3" not found
  next:  The kubelet looks again every few seconds.
  to do: Create the secret that the message names in the job's namespace, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
""",
    ),
    "it has failed": (
        FAILED,
        """\
team-a/sentiment: Failed

Ended       57m ago, after 90s

Failed: BadData, for 3m
  s3://datasets/reviews.jsonl line 7: label 'good' is not one of negative, positive
  next:  Failed at once, without a restart.
  to do: Mend the data or the recipe, and submit a new job. One with checkpoint.resumeFrom goes on from the last checkpoint.
""",
    ),
    "it has succeeded": (
        SUCCEEDED,
        """\
team-a/sentiment: Succeeded
trained 330 steps; the model is at s3://checkpoints/model

Trained     330 of 330 steps (100 %), epoch 0.73, loss 0.6125
Model       s3://checkpoints/model
Ended       3m ago, after 56m
""",
    ),
    "nobody knows": (
        UNKNOWN,
        """\
team-a/sentiment: Running

Gang        attempt 1, 2 of 2 nodes run

perhaps not Ready: NoAgentHeard, for 3m
  no agent of any job has been heard since 11:58; training needs no operator
  next:  Training goes on; nothing is restarted for it. Status is late until agents are heard again.
  to do: Look at the operator's Service and the network policies around it.
""",
    ),
    "it is being suspended": (SUSPENDING, "team-a/sentiment: Suspended\n2 pods are saving and leaving\n"),
}


def without_trailing_blanks(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.mark.parametrize(("status", "text"), SHOWN.values(), ids=SHOWN.keys())
def test_status(status, text: str, capsys: pytest.CaptureFixture[str]):
    show_status(a_job(status), NOW)
    assert without_trailing_blanks(capsys.readouterr().out) == text


def test_a_change_that_the_operator_has_not_seen_is_told(capsys: pytest.CaptureFixture[str]):
    show_status(a_job(SUSPENDED | {"observedGeneration": 0}), NOW)
    assert "has not looked at the newest change" in capsys.readouterr().out


def test_a_reason_of_a_newer_operator_is_told_without_an_explanation(capsys: pytest.CaptureFixture[str]):
    show_status(a_job(a_status("Pending", ("Stalled", "True", "MoonTooFull", "wait for the new moon"))), NOW)
    assert capsys.readouterr().out.splitlines()[-2:] == ["Stalled: MoonTooFull, for 3m", "  wait for the new moon"]


@pytest.mark.parametrize("status", [RUNNING | {"conditions": RUNNING["conditions"][:3]}, SUCCEEDED, SUSPENDED, None])
def test_a_job_that_is_well_has_no_troubles(status):
    assert troubles(a_job(status)) == []


def test_a_list_of_jobs(capsys: pytest.CaptureFixture[str]):
    show_jobs([a_job(RUNNING), a_job(STALLED, name="other"), a_job(SUCCEEDED, name="third")], NOW, namespaces=True)
    assert (
        without_trailing_blanks(capsys.readouterr().out)
        == """\
NAMESPACE  NAME       PHASE      PROGRESS  STEP  LOSS    NODES  RESTARTS  ETA  AGE
team-a     sentiment  Running    36%       120   0.6125  2/2    2         14m  60m
team-a     other      Pending                            0/2                   60m
team-a     third      Succeeded  100%      330   0.6125  0/2                   60m
"""
    )


SUMMARY = {"namespace", "name", "uid", "creationTime", "phase", "startTime", "completionTime", "nodes", "nodesReady", "restarts", "progress"}  # fmt: skip
STATUS = SUMMARY | {
    *("reason", "message", "ready", "observed", "suspend", "troubles", "prefix", "maxRestarts", "restartsByReason"),
    *("attempts", "gang", "evaluation", "checkpoint", "saves", "resumed", "goodput", "model"),
}


@pytest.mark.parametrize("status", [None, RUNNING, STALLED, FAILED, SUCCEEDED])
def test_documents_have_the_same_fields_whatever_the_job_does(status):
    assert set(status_to_json(a_job(status))) == STATUS
    assert [set(job) for job in jobs_to_json([a_job(status)])["jobs"]] == [SUMMARY]


def test_a_document_has_what_the_status_has():
    document = status_to_json(a_job(RUNNING))
    assert document["progress"] == RUNNING["progress"]
    assert document["attempts"] == RUNNING["attempts"]
    assert document["prefix"] == "s3://checkpoints/team-a/team-a/sentiment-0b2a1f6e"
    assert [trouble["reason"] for trouble in document["troubles"]] == ["SavePutOff"]
