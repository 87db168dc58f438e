"""Plays seeds on a running cluster and says which promises were broken.

A seed: its jobs are created, and when all of them train its faults come, each at its time. When all faults are over, the light jobs are told to
end their work, and everything must come to an end. Seeds that touch nobody else's jobs run beside one another.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.chaos import processes
from tests.chaos.faults import DETECTION_SECONDS, Missed, World, patiently
from tests.chaos.images import load_light
from tests.chaos.promises import Start, broken_by_outcome, broken_by_starts, lives
from tests.chaos.scenario import ChaosJob, Fault, Scenario, scenario
from tests.chaos.watch import Watch, Watched, wait_for
from tests.cluster.cluster import Cluster
from tests.cluster.console import ClusterError, say
from tests.cluster.installation import operator_log
from tests.cluster.training_inputs import SECRET, recipe_spec

BUCKET = "chaos"
START_SECONDS = 600.0
END_SECONDS = 600.0
LEAVE_SECONDS = 120.0
RECIPE_STEPS = 800
_LOOK_SECONDS = 1.0


@dataclass
class Outcome:
    """What became of a seed."""

    scenario: Scenario
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    touches: list[str] = field(default_factory=list)
    story: str = ""
    """What helps to understand it, if a promise was broken."""

    def __str__(self) -> str:
        result = "; ".join(self.broken) or "kept"
        return f"seed {self.scenario.seed} ({self.seconds:.0f} s): {result} | {' | '.join(self.told)}"


class Chaos:
    """Seeds on one cluster, in one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._folder = secrets.token_hex(3)  # in the bucket: the same seed may have been played before
        self._store = cluster.s3.client()
        if BUCKET not in [bucket["Name"] for bucket in self._store.list_buckets()["Buckets"]]:
            self._store.create_bucket(Bucket=BUCKET)
        self._image = load_light(cluster)
        self._watch = Watch(cluster, namespace)
        self._world = World(cluster, namespace, self._watch)

    def play(self, seeds: Sequence[int], *, beside: int = 1) -> Iterator[Outcome]:
        """Play seeds, so many at a time; those that cut a node off come last, one by one."""
        scenarios = [scenario(seed) for seed in seeds]
        alone = [each for each in scenarios if each.is_exclusive]
        with self._watch, ThreadPoolExecutor(beside) as pool:
            yield from pool.map(self._play, [each for each in scenarios if not each.is_exclusive])
            yield from map(self._play, alone)

    def _play(self, told: Scenario) -> Outcome:
        outcome, began = Outcome(told), time.monotonic()
        say(str(told))
        jobs = {job.name: job for job in told.jobs}
        try:
            self._create(told.jobs)
            with self._workers_looked_at(jobs, outcome):
                self._wait_for_training(jobs)
                self._befall(told.faults, jobs, outcome)
                self._finish(jobs)
                self._wait_for_end(jobs)
            self._judge(jobs, outcome)
        except (TimeoutError, ClusterError) as error:
            outcome.broken.append(str(error))
        for name in jobs:
            outcome.broken += [f"{name}: {each}" for each in self._watch.job(name).broken]
        outcome.seconds = time.monotonic() - began
        if outcome.broken:
            outcome.story = self._story(told)
        self._delete(jobs)
        say(str(outcome))
        return outcome

    # The jobs.

    def _create(self, jobs: Sequence[ChaosJob]) -> None:
        documents = [
            {
                "apiVersion": "finetune.dev/v1alpha1",
                "kind": "FineTuneJob",
                "metadata": {"name": job.name, "namespace": self._namespace},
                "spec": self._recipe() if job.recipe else self._light(job),
            }
            for job in jobs
        ]
        patiently(lambda: self._cluster.apply(documents))

    def _light(self, job: ChaosJob) -> dict[str, Any]:
        address = self._cluster.s3.endpoint.removeprefix("http://")
        command = ["python", "-m", "light_trainer", address, BUCKET, f"{self._folder}/{job.name}"]
        return {
            "script": {"command": command, "image": self._image},
            "storage": {"uri": f"s3://{BUCKET}", "endpoint": self._cluster.s3.endpoint, "secretName": SECRET},
            "workers": {
                "nodes": job.nodes,
                "processesPerNode": job.processes,
                "spares": job.spares,
                "resources": {
                    "cpu": "150m",
                    "memory": "256Mi",
                },  # a limit too: with less, Python takes a minute to start
            },
        }

    def _recipe(self) -> dict[str, Any]:
        spec = recipe_spec(self._cluster, steps=RECIPE_STEPS)
        spec["workers"]["resources"] = {"cpu": "300m", "memory": "2Gi"}
        return spec

    def _wait_for_training(self, jobs: dict[str, ChaosJob]) -> None:
        def train() -> bool:
            states = [self._watch.job(name).status for name in jobs]
            return all(state.get("phase") == "Running" and "progress" in state for state in states)

        wait_for("all jobs train", train, START_SECONDS)

    def _befall(self, faults: Sequence[Fault], jobs: dict[str, ChaosJob], outcome: Outcome) -> None:
        began = time.monotonic()

        def befall(fault: Fault) -> None:
            time.sleep(max(0.0, began + fault.at - time.monotonic()))
            try:
                outcome.touches += self._world.befall(fault, jobs)
                outcome.told.append(str(fault))
            except Missed as error:
                outcome.told.append(f"{fault}, missed: {str(error).splitlines()[-1]}")

        with ThreadPoolExecutor(max(1, len(faults))) as pool:
            for done in [pool.submit(befall, fault) for fault in faults]:
                done.result()

    def _finish(self, jobs: dict[str, ChaosJob]) -> None:
        for name in jobs:
            self._store.put_object(Bucket=BUCKET, Key=f"{self._folder}/{name}/finish", Body=b"")

    def _wait_for_end(self, jobs: dict[str, ChaosJob]) -> None:
        def over() -> bool:
            return all(self._watch.job(name).status.get("completionTime") for name in jobs)

        wait_for("all jobs have ended", over, END_SECONDS)

    def _delete(self, jobs: dict[str, ChaosJob]) -> None:
        patiently(
            lambda: self._cluster.kubectl(
                "delete", "ftj", "-n", self._namespace, "--wait=false", "--ignore-not-found", *jobs
            )
        )

    # What is looked at.

    @contextmanager
    def _workers_looked_at(self, jobs: dict[str, ChaosJob], outcome: Outcome) -> Iterator[None]:
        """Once a second: no job is Ready for longer than it takes to notice that a member has no worker."""
        ended = threading.Event()

        def look() -> None:
            idle_since: dict[str, float] = {}
            while not ended.wait(_LOOK_SECONDS):
                running, now = processes.of_pods(processes.WORKER), time.monotonic()
                for name in jobs:
                    if not self._world.is_calm() or not _only_claims_to_train(self._watch.job(name), running):
                        idle_since.pop(name, None)
                    elif now - idle_since.setdefault(name, now) > DETECTION_SECONDS:
                        outcome.broken.append(f"{name} was Ready for {DETECTION_SECONDS:.0f} s without all its workers")
                        idle_since[name] = now

        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        try:
            yield
        finally:
            ended.set()
            looker.join()

    def _judge(self, jobs: dict[str, ChaosJob], outcome: Outcome) -> None:
        for name, job in jobs.items():
            watched, touches = self._watch.job(name), outcome.touches.count(name)
            outcome.told.append(f"{name} {_summary(watched)}, touched {touches} times")
            broken = list(broken_by_outcome(watched.body, touches))
            if job.recipe:
                broken += _broken_by_progress(watched)
            else:
                broken += broken_by_starts(self._starts(name), watched.gangs, job.processes)
                broken += self._broken_by_store(name, watched)
            outcome.broken += [f"{name}: {each}" for each in broken]
        with suppress(TimeoutError):
            wait_for("no pod is left", lambda: not any(map(self._lives_on, jobs)), LEAVE_SECONDS)
        outcome.broken += [f"{name} has ended, and has pods that run on" for name in jobs if self._lives_on(name)]

    def _lives_on(self, name: str) -> bool:
        return any(map(lives, self._watch.job(name).pods.values()))

    def _starts(self, name: str) -> list[Start]:
        prefix = f"{self._folder}/{name}/started/"
        pages = self._store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [entry["Key"].removeprefix(prefix).split("/") for page in pages for entry in page.get("Contents", ())]
        return [(int(generation), int(rank), process.rpartition("-")[0]) for generation, rank, process in keys]

    def _broken_by_store(self, name: str, watched: Watched) -> Iterator[str]:
        try:
            head = json.loads(self._store.get_object(Bucket=BUCKET, Key=f"{self._folder}/{name}/head")["Body"].read())
        except self._store.exceptions.NoSuchKey:
            yield "never committed anything"
            return
        told = (watched.status.get("checkpoint") or {}).get("step", 0)
        if head["generation"] != watched.status["gang"]["generation"] or head["step"] < told:
            yield f"status tells of step {told}, the store has {head}"

    def _story(self, told: Scenario) -> str:
        names = [job.name for job in told.jobs]
        jobs = self._cluster.kubectl("get", "ftj", "-n", self._namespace, "-o", "yaml", *names, check=False)
        pods = self._cluster.kubectl(
            "get", "pods", "-n", self._namespace, "-o", "wide", "-l", f"finetune.dev/job in ({','.join(names)})",
            check=False,
        )  # fmt: skip
        logs = "".join(
            self._cluster.kubectl(
                "logs", "-n", self._namespace, "-l", f"finetune.dev/job={name}", "--tail=40", "--prefix", check=False
            )
            for name in names
        )
        return f"{told}\n{told.replay}\n{jobs}\n{pods}\n{logs}\n{operator_log(self._cluster)[-6000:]}"


def _only_claims_to_train(job: Watched, running: dict[str, list[int]]) -> bool:
    """Tell whether a job says that it trains although a member has no worker."""
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in job.status.get("conditions", ()))
    if not ready or job.status.get("phase") != "Running":
        return False
    return any(member["uid"] not in running for member in job.status["gang"]["members"])


def _broken_by_progress(job: Watched) -> Iterator[str]:
    step = (job.status.get("progress") or {}).get("step")
    if step != RECIPE_STEPS:
        yield f"ended after step {step} of {RECIPE_STEPS}"


def _summary(job: Watched) -> str:
    attempts = ", ".join(attempt["reason"] for attempt in job.status.get("attempts", ()))
    generation = (job.status.get("gang") or {}).get("generation")
    return f"{job.status.get('phase')} in generation {generation}" + (f" ({attempts})" if attempts else "")
