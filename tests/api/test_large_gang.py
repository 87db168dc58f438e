"""A gang of 200 under the longest name there may be, and labels that only the API server's rules allow: applied, trained, failed, done.

The API server and the operator are real, pods and their agents are played (tests/operator/fleet.py).
"""

import time
from collections import Counter
from pathlib import Path

import pytest

from finetune_api.contract import JOB_NAME_LIMIT
from tests.operator.documents import job_body
from tests.operator.fleet import a_fleet
from tests.operator.real_api import running_api

pytestmark = pytest.mark.cluster

NODES = 200
PROGRESS_SECONDS = 10.0  # progress alone is written no more often
NAME = "0-" + "n" * (JOB_NAME_LIMIT - 4) + "-9"
LABELS = {
    "empty": "",
    "example.com/" + "k" * 63: "v" * 63,
    "Under_score.and-dot": "0",
    "app.kubernetes.io/managed-by": "Helm",
    "finetune.dev/rank": "not-a-number",
}


async def test_200_ranks_with_a_long_name_and_odd_labels_train_recover_and_succeed(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api, api.client() as client, a_fleet(api, client, tmp_path, "large") as fleet:
        began = time.monotonic()
        await fleet.create(job_body(name=NAME, labels=LABELS, nodes=NODES))
        job = fleet.jobs[NAME]
        await fleet.until("all ranks train", lambda: fleet.train([NAME]))
        members = job.gang["members"]
        assert [member["rank"] for member in members] == list(range(NODES))
        assert {member["uid"] for member in members} == job.pods
        assert all(len(member["pod"]) <= 63 for member in members), "a pod's name is its host's"
        assert {fleet.kubelets.agents[member["uid"]].mind.rank for member in members} == set(range(NODES))
        assert job.body["metadata"]["labels"] == LABELS

        fleet.fail([NAME])
        await fleet.until("all ranks train again", lambda: job.generation == 2 and fleet.train([NAME]))
        assert {member["uid"] for member in job.gang["members"]} == job.pods, "in the pods that there were"
        assert job.status["restarts"]["total"] == 1

        fleet.succeed()
        await fleet.until("the job is complete", lambda: job.status["phase"] == "Succeeded")
        writes = Counter((write.verb, write.resource) for write in api.writes() if write.name.startswith(NAME))
        assert writes["create", "pods"] == NODES
        progress = (time.monotonic() - began) / PROGRESS_SECONDS
        assert writes["patch", "finetunejobs/status"] <= 20 + progress, "not one for each rank"
        assert "a bug in the operator" not in fleet.operator.log
