"""The commands against a real API server: programs of their own, with the status written by the tests.

No operator may be on the cluster: it would write another status.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from finetune_api.job import FineTuneJob
from tests.api.api_server import ApiServer, Json
from tests.api.manifests import recipe_job
from tests.cluster import Cluster
from tests.kubectl.command import ROOT, Ran, environment, finetune, finetune_alone
from tests.kubectl.jobs import FAILED, RUNNING, SUCCEEDED

PODS = "/api/v1/namespaces/{}/pods"
PATIENCE_SECONDS = 30.0  # for rights, which the API server learns of by its own watches


@pytest.fixture
def job(api: ApiServer, request: pytest.FixtureRequest) -> Iterator[Json]:
    """A job that the operator has not seen."""
    number = abs(hash(request.node.name)) % 10**6
    created = api.create(recipe_job(f"sentiment-{number}"))
    yield created
    api.delete(created)


def command(api: ApiServer, *arguments: str) -> Ran:
    return finetune(api.kubeconfig, *arguments, "--namespace", api.namespace)


def write_status(api: ApiServer, job: Json, status: Json) -> None:
    api.merge(job, {"status": status}, subresource="status")


def manifest(tmp_path: Path, document: Json) -> str:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(document))
    return str(file)


def test_a_job_is_submitted_from_a_file_and_from_stdin(api: ApiServer, tmp_path: Path):
    namespace = ("--namespace", api.namespace)
    first, second = recipe_job("from-file"), recipe_job("from-stdin")
    ran = finetune_alone(api.kubeconfig, "submit", manifest(tmp_path, first), *namespace)
    assert (ran.code, ran.stdout, ran.stderr) == (0, f"{api.namespace}/from-file is submitted\n", "")
    ran = finetune_alone(api.kubeconfig, "submit", "-", "-o", "json", *namespace, stdin=yaml.safe_dump(second))
    assert [job["name"] for job in ran.json["jobs"]] == ["from-stdin"]
    names = [job["name"] for job in command(api, "get", "-o", "json").json["jobs"]]
    assert names == ["from-file", "from-stdin"]
    for job in (first, second):
        api.delete(job)


def test_a_name_that_is_taken_is_refused(api: ApiServer, job: Json, tmp_path: Path):
    ran = command(api, "submit", manifest(tmp_path, recipe_job(job["metadata"]["name"])))
    assert (ran.code, ran.stdout) == (1, "")
    assert "exists already; what may change of it: kubectl apply" in ran.stderr


def test_what_only_the_api_server_sees_is_told_with_its_line_and_nothing_is_made(api: ApiServer, tmp_path: Path):
    document = recipe_job("labelled")
    document["metadata"]["labels"] = {"team": "not a label"}
    file = manifest(tmp_path, document)
    for arguments in ((), ("--dry-run", "server")):
        ran = command(api, "submit", file, *arguments)
        line = next(n for n, text in enumerate(Path(file).read_text().splitlines(), 1) if "labels" in text)
        assert (ran.code, ran.stdout) == (1, "")
        assert ran.stderr.startswith(f"error: {file}:{line}: metadata.labels: ")
    assert command(api, "get", "labelled").code == 2


def test_a_dry_run_on_the_server_makes_nothing(api: ApiServer, tmp_path: Path):
    ran = command(api, "submit", manifest(tmp_path, recipe_job("dry")), "--dry-run", "server")
    assert (ran.code, ran.stdout) == (0, f"{api.namespace}/dry is valid\n")
    assert command(api, "get", "dry").code == 2


def test_a_namespace_that_is_not_there_or_not_the_manifests(api: ApiServer, tmp_path: Path):
    ran = finetune(api.kubeconfig, "submit", manifest(tmp_path, recipe_job("a")), "-n", "nowhere")
    assert (ran.code, ran.stderr) == (2, 'error: namespaces "nowhere" not found\n')
    elsewhere = recipe_job("a")
    elsewhere["metadata"]["namespace"] = "elsewhere"
    ran = command(api, "submit", manifest(tmp_path, elsewhere))
    assert (ran.code, ran.stderr) == (2, f"error: a is of namespace elsewhere, and --namespace says {api.namespace}\n")


def test_what_the_operator_writes_is_shown(api: ApiServer, job: Json):
    write_status(api, job, RUNNING)
    name = job["metadata"]["name"]
    shown = command(api, "status", name).stdout
    assert shown.startswith(
        f"{api.namespace}/{name}: Running\ngeneration 3 trains on 2 nodes\n\nTrained     120 of 330"
    )
    document = command(api, "status", name, "-o", "json").json
    assert document["attempts"] == json.loads(json.dumps(RUNNING["attempts"]))
    assert document["prefix"].endswith(f"/{api.namespace}/{name}-{job['metadata']['uid'][:8]}")
    rows = [line.split()[:3] for line in command(api, "get", "-A").stdout.splitlines()]
    assert [api.namespace, name, "Running"] in rows


def test_a_job_is_suspended_and_goes_on(api: ApiServer, job: Json):
    name = job["metadata"]["name"]
    write_status(api, job, RUNNING)
    resumed = command(api, "resume", name)
    assert (resumed.code, resumed.stdout) == (
        0,
        f"{api.namespace}/{name} goes on; the newest checkpoint is of step 110\n",
    )
    assert not api.merge(job, {})["spec"]["suspend"]
    assert command(api, "suspend", name).code == 0
    assert api.merge(job, {})["spec"]["suspend"]
    assert "has not looked at the newest change" in command(api, "status", name).stdout


def seen_while_waiting(kubeconfig: Path, *arguments: str, then: Callable[[], None]) -> Ran:
    """Wait for a job in a process of its own; when it has told how the job is, let something happen."""
    command = [sys.executable, "-m", "finetune_cli.kubectl", "wait", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(kubeconfig)) as waiting:
        assert waiting.stderr is not None
        first = waiting.stderr.readline()
        then()
        stdout, stderr = waiting.communicate(timeout=60)
    return Ran(waiting.returncode, stdout, first + stderr)


@pytest.mark.parametrize(("status", "code"), [(SUCCEEDED, 0), (FAILED, 1)], ids=["succeeds", "fails"])
def test_waiting_ends_with_the_job(status: Json, code: int, api: ApiServer, job: Json):
    write_status(api, job, RUNNING)
    ended = status | {"gang": RUNNING["gang"]}  # its number never falls
    arguments = (job["metadata"]["name"], "-n", api.namespace, "--timeout", "60s")
    ran = seen_while_waiting(api.kubeconfig, *arguments, then=lambda: write_status(api, job, ended))
    assert ran.code == code
    phases = [line.split(": ")[1].split(",")[0] for line in ran.stderr.splitlines() if not line.startswith("error")]
    assert phases == ["Running", status["phase"]]


def test_waiting_ends_when_the_job_is_deleted_or_the_time_is_over(api: ApiServer):
    created = api.create(recipe_job("deleted"))
    assert command(api, "wait", "deleted", "--timeout", "1s").code == 3
    arguments = ("deleted", "-n", api.namespace, "--timeout", "60s")
    ran = seen_while_waiting(api.kubeconfig, *arguments, then=lambda: api.delete(created))
    assert (ran.code, ran.stderr.splitlines()[-1]) == (2, f"error: {api.namespace}/deleted was deleted")


def test_events_are_those_of_the_job_and_its_pods(api: ApiServer, job: Json):
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    pod = f"{name}-{uid[:5]}-0-1"
    subjects = [("FineTuneJob", name, uid, "Late"), ("Pod", pod, "p", "Early"), ("Pod", "other", "q", "Stranger"),
                ("FineTuneJob", name, "older-job-of-that-name", "Past")]  # fmt: skip
    for index, (kind, subject, subject_uid, reason) in enumerate(subjects):
        event = {
            "metadata": {"name": f"{name}-{index}", "namespace": api.namespace},
            "involvedObject": {"kind": kind, "name": subject, "namespace": api.namespace, "uid": subject_uid},
            "reason": reason, "message": f"{reason} it is", "type": "Warning", "count": 2,
            "lastTimestamp": f"2026-01-01T11:0{9 - index}:00Z",
        }  # fmt: skip
        api.request("POST", f"/api/v1/namespaces/{api.namespace}/events", event)
    ran = command(api, "events", name, "-o", "json")
    assert ran.json["events"] == [
        {"time": "2026-01-01T11:08:00Z", "type": "Warning", "reason": "Early", "object": f"Pod/{pod}", "message": "Early it is", "count": 2},
        {"time": "2026-01-01T11:09:00Z", "type": "Warning", "reason": "Late", "object": f"FineTuneJob/{name}", "message": "Late it is", "count": 2},
    ]  # fmt: skip
    assert [line.split()[3] for line in command(api, "events", name).stdout.splitlines()[1:]] == ["Early", "Late"]


def test_a_job_that_is_not_there_has_names_that_are_like_it(api: ApiServer, job: Json):
    name = job["metadata"]["name"]
    ran = command(api, "status", name[:-1])
    assert (ran.code, ran.stdout) == (2, "")
    assert f"did you mean {name}" in ran.stderr


def test_who_has_no_right_is_told_which(api: ApiServer, cluster: Cluster, job: Json, tmp_path: Path):
    nobody = cluster.user_kubeconfig("eve")
    ran = finetune(nobody, "get", "-n", api.namespace)
    assert (ran.code, ran.stdout) == (2, "")
    assert 'User "eve" cannot list resource "finetunejobs"' in ran.stderr


def test_who_may_only_look_can_look_and_wait_and_no_more(api: ApiServer, cluster: Cluster, job: Json, tmp_path: Path):
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "looks", "namespace": api.namespace}}
    rules = [{"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["get", "list", "watch"]}]
    subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "viewer"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "looks"}
    cluster.apply(
        [
            role | {"kind": "Role", "rules": rules},
            role | {"kind": "RoleBinding", "subjects": [subject], "roleRef": reference},
        ]
    )
    viewer, name = cluster.user_kubeconfig("viewer"), job["metadata"]["name"]
    until = time.monotonic() + PATIENCE_SECONDS
    while finetune(viewer, "get", "-n", api.namespace).code and time.monotonic() < until:
        time.sleep(0.2)
    write_status(api, job, SUCCEEDED)
    assert finetune(viewer, "wait", name, "-n", api.namespace, "--timeout", "10s").code == 0
    ran = finetune(viewer, "submit", manifest(tmp_path, recipe_job("new")), "-n", api.namespace)
    assert (ran.code, 'User "viewer" cannot create resource "finetunejobs"' in ran.stderr) == (2, True)
    ran = finetune(viewer, "logs", name, "-n", api.namespace)
    assert (ran.code, 'cannot list resource "pods"' in ran.stderr) == (2, True)


def test_kubectl_finds_it_and_hands_it_its_options(api: ApiServer, cluster: Cluster, job: Json, tmp_path: Path):
    for program, function in (("kubectl-finetune", "main"), ("kubectl_complete-finetune", "complete")):
        file = tmp_path / program
        file.write_text(
            f"#!/bin/sh\nexec {sys.executable} -c 'from finetune_cli.kubectl import {function}; {function}()' \"$@\"\n"
        )
        file.chmod(0o755)
    environ = environment(api.kubeconfig)
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"

    def kubectl(*arguments: str) -> str:
        words = [str(cluster.programs["kubectl"]), *arguments]
        return subprocess.run(words, capture_output=True, text=True, env=environ, check=True).stdout

    name = job["metadata"]["name"]
    assert json.loads(kubectl("finetune", "status", name, "-n", api.namespace, "-o", "json"))["name"] == name
    assert kubectl("__complete", "finetune", "status", "-n", api.namespace, name[:-2]).split()[0] == name


def test_what_is_submitted_is_what_was_written(api: ApiServer):
    """The client neither fills in nor leaves out: defaults are the API server's."""
    file = ROOT / "examples/sentiment/job.yaml"
    document = yaml.safe_load(file.read_text())
    document["metadata"] = {"name": "example"}
    document["spec"]["suspend"] = True
    ran = finetune_alone(api.kubeconfig, "submit", "-", "-n", api.namespace, stdin=yaml.safe_dump(document))
    assert ran.code == 0
    stored = api.merge(document, {})
    assert contains(stored["spec"], document["spec"])
    assert FineTuneJob.model_validate(stored)
    api.delete(document)


def contains(whole: object, part: object) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return whole == part
