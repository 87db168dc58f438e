"""``make demo``: a real Kubernetes on this machine, the operator by Helm, and the sentiment example on two nodes.

Model and data are prepared while the operator is installed. What the job tells in its status is printed as it changes. Everything is left
running for a look around, and the last lines say how to look and how to take it down.

With ``--context`` the demo uses a cluster of yours: the images must be where it can pull them, and the store where its pods reach it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.console import ClusterError, say, step
from tests.cluster.installation import CRDS_RELEASE, RELEASE, ROOT, SYSTEM_NAMESPACE, Images, install_operator

NAMESPACE = "team-a"
JOB = "sentiment"
EXAMPLE = ROOT / "examples/sentiment"
SENTENCES = ("A tender, funny and beautifully acted film.", "Dreadful: two hours of my life I want back.")
FOLLOW_SECONDS = 2.0
DEMO_LIMIT_SECONDS = 3600.0


@dataclass(frozen=True)
class Target:
    """Where the demo runs: programs with their environment, images, and the store as pods and this machine reach it."""

    environment: Mapping[str, str]
    images: Images
    endpoint: str
    credentials: tuple[str, str]
    folder: Path
    computes_bf16: bool = False

    def run(self, *command: str, input: str | None = None) -> str:
        """Run a program of the demo; its output is shown when it fails."""
        done = subprocess.run(
            command, input=input, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command[:4])} …: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        prog="make demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--context", help="kubeconfig context of a cluster of yours")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-demo-") as folder:
            target = _own_cluster(arguments.context, Path(folder)) if arguments.context else None
            return _demo(target, arguments.context)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; `make demo-down` takes down what runs", file=sys.stderr)
        return 130


def _demo(target: Target | None, context: str | None) -> int:
    began = time.monotonic()
    if target is None:
        target = _this_machine()
    with ThreadPoolExecutor() as pool, step("operator installed with Helm; model and data put into S3"):
        installed = pool.submit(_install, target)
        baselines = _prepare(target)
        installed.result()
    _submit(target)
    status = _follow(target)
    if status.get("phase") != "Succeeded":
        print(f"\nThe job ended as {status.get('phase')}: {_message(status)}")
        return 1
    _show_result(target, status, baselines)
    print(f"\nThe whole demo took {time.monotonic() - began:.0f} s.")
    _say_how_to_look(target, context)
    return 0


def _this_machine() -> Target:
    try:
        cluster = Cluster.attach()
        say("using the cluster that is up")
        cluster.load_images()
    except ClusterError:
        cluster = Cluster.start(nodes=2, stays=True)
    return Target(
        environment=cluster.environment(),
        images=Images(operator=cluster.operator_image, trainer=cluster.trainer_image),
        endpoint=cluster.s3.endpoint,
        credentials=(cluster.s3.access_key, cluster.s3.secret_key),
        folder=cluster.directory,
        computes_bf16=not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split()),
    )


def _own_cluster(context: str, folder: Path) -> Target:
    """Return a target in a cluster of the user's: a kubeconfig of that one context, and what the environment says."""
    needed = ("OPERATOR_IMAGE", "TRAINER_IMAGE", "S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise ClusterError(
            f"CONTEXT={context} needs these environment variables too: {', '.join(missing)}.\n"
            "Build and push the images with Dockerfile.operator and Dockerfile.trainer; S3_ENDPOINT is a URL that both"
            " this machine and the cluster's pods reach."
        )
    kubeconfig = folder / "kubeconfig"
    with kubeconfig.open("w") as file:
        command = ["kubectl", "config", "view", "--minify", "--flatten", "--raw", "--context", context]
        if subprocess.run(command, stdout=file, check=False).returncode:
            raise ClusterError(f"there is no context {context!r} in your kubeconfig")
    return Target(
        environment={"KUBECONFIG": str(kubeconfig)},
        images=Images(operator=os.environ["OPERATOR_IMAGE"], trainer=os.environ["TRAINER_IMAGE"]),
        endpoint=os.environ["S3_ENDPOINT"],
        credentials=(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]),
        folder=folder,
    )


def _install(target: Target) -> None:
    install_operator(target.run, target.folder, images=target.images, endpoints=[target.endpoint])


def _prepare(target: Target) -> str:
    key, secret = target.credentials
    store = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}
    prepared = subprocess.run(
        [sys.executable, str(EXAMPLE / "prepare.py"), "--endpoint", target.endpoint],
        env={**os.environ, **store},
        capture_output=True,
        text=True,
        check=False,
    )
    if prepared.returncode:
        raise ClusterError(f"examples/sentiment/prepare.py failed:\n{prepared.stdout}{prepared.stderr}")
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    credentials = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s3-credentials", "namespace": NAMESPACE},
        "stringData": {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret},
    }
    for document in (namespace, credentials):
        target.run("kubectl", "apply", "-f", "-", input=json.dumps(document))
    return prepared.stdout


def _submit(target: Target) -> None:
    """Apply the example as it stands, but for the store's address, and BF16 on a machine that computes it."""
    manifest = re.sub(r"endpoint: \S+", f"endpoint: {target.endpoint}", (EXAMPLE / "job.yaml").read_text())
    if target.computes_bf16:
        manifest = manifest.replace("precision: FP32", "precision: BF16")
    target.run("kubectl", "delete", "ftj", JOB, "-n", NAMESPACE, "--ignore-not-found", "--wait")
    print(f"\nkubectl apply -f examples/sentiment/job.yaml -n {NAMESPACE}")
    print(target.run("kubectl", "apply", "-n", NAMESPACE, "-f", "-", input=manifest).strip(), flush=True)


def _follow(target: Target) -> dict[str, Any]:
    """Print what the status tells whenever it tells something else, until the job has ended."""
    told, began = "", time.monotonic()
    while time.monotonic() - began < DEMO_LIMIT_SECONDS:
        job = json.loads(target.run("kubectl", "get", "ftj", JOB, "-n", NAMESPACE, "-o", "json"))
        status: dict[str, Any] = job.get("status", {})
        line = _line(status)
        if line != told:
            print(f"{time.monotonic() - began:5.0f} s  {line}", flush=True)
            told = line
        if status.get("completionTime"):
            return status
        time.sleep(FOLLOW_SECONDS)
    raise ClusterError(
        f"the job has not ended within {DEMO_LIMIT_SECONDS:.0f} s: `kubectl describe ftj {JOB} -n {NAMESPACE}`"
    )


def _line(status: Mapping[str, Any]) -> str:
    phase, progress = status.get("phase", "Pending"), status.get("progress")
    if phase != "Running" or progress is None:
        return f"{phase:10} {_message(status)}"
    line = f"{phase:10} step {progress['step']}/{progress.get('totalSteps', '?')} ({progress.get('percent', 0)} %)"
    if "loss" in progress:
        line += f"  loss {progress['loss']:.3f}"
    if "tokensPerSecond" in progress:
        line += f"  {progress['tokensPerSecond']:.0f} tokens/s"
    if "evaluation" in status:
        line += f"  | evaluation at {status['evaluation']['step']}: {_metrics(status)}"
    if "checkpoint" in status:
        line += f"  | checkpoint at {status['checkpoint']['step']}"
    return line


def _message(status: Mapping[str, Any]) -> str:
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    return str(conditions.get("Ready", {}).get("message", "waiting for the operator"))


def _metrics(status: Mapping[str, Any]) -> str:
    return ", ".join(f"{metric['name']} {metric['value']}" for metric in status["evaluation"]["metrics"])


def _show_result(target: Target, status: Mapping[str, Any], baselines: str) -> None:
    key, secret = target.credentials
    store = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}
    print(f"\nEvaluation of the fine-tuned model: {_metrics(status)}")
    print("\n".join(line for line in baselines.splitlines() if line.startswith("macro F1")))
    print(f"The model: {status['model']['uri']}\n", flush=True)
    where = ("--endpoint", target.endpoint, "--model", status["model"]["uri"])
    subprocess.run(
        [sys.executable, str(EXAMPLE / "classify.py"), *where, *SENTENCES], env={**os.environ, **store}, check=True
    )


def _say_how_to_look(target: Target, context: str | None) -> None:
    kubectl = f"kubectl --context {context}" if context else "kubectl"
    print("\nLook around:")
    if context is None:
        print(f"  export KUBECONFIG={target.environment['KUBECONFIG']}")
    print(
        f"""  {kubectl} get ftj -A
  {kubectl} get ftj {JOB} -n {NAMESPACE} -o yaml
  {kubectl} logs -n {NAMESPACE} -l finetune.dev/job={JOB} -c trainer --prefix
  {kubectl} logs -n {SYSTEM_NAMESPACE} -l finetune.dev/leader=true"""
    )
    if context is None:
        print("(`python -m tests.cluster shell` has kubectl, helm and the store's credentials set up.)")
        print("Take it down: make demo-down")
        return
    print(
        f"""Take it down; the model and the checkpoints in the store stay:
  {kubectl} delete namespace {NAMESPACE}
  helm --kube-context {context} uninstall {RELEASE} -n {SYSTEM_NAMESPACE}
  helm --kube-context {context} uninstall {CRDS_RELEASE} -n {SYSTEM_NAMESPACE}    # keeps the CRD, and with it all jobs
  {kubectl} delete crd finetunejobs.finetune.dev    # deletes all jobs of the cluster"""
    )


if __name__ == "__main__":
    sys.exit(main())
