"""``python -m tests.cluster up | down | status | shell | logs | build``: the cluster by hand."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.cluster import ownership
from tests.cluster.cluster import DEFAULT_NAME, Cluster, build_images, clear_builds, take_down
from tests.cluster.console import ClusterError


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return int(arguments.act(arguments))
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what had been started is gone again", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(required=True)
    up = commands.add_parser("up", help="start a cluster and leave it running")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--name", default=DEFAULT_NAME)
    up.add_argument("--no-images", action="store_true", help="do not build or load the project's images")
    up.set_defaults(act=_up)
    for name, act, text in (
        ("down", _down, "remove the cluster, or what a crash has left of one"),
        ("status", _status, "nodes, pods, S3 and where the kubeconfig is"),
        ("build", _build, "build the project's images, and load them on a running cluster's nodes"),
    ):
        commands.add_parser(name, help=text).set_defaults(act=act)
    shell = commands.add_parser(
        "shell", help="a shell (or a command) with KUBECONFIG, kubectl, helm and S3 credentials"
    )
    shell.add_argument("command", nargs=argparse.REMAINDER)
    shell.set_defaults(act=_shell)
    logs = commands.add_parser("logs", help="print the log of a component; without one, list them")
    logs.add_argument("component", nargs="?")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.set_defaults(act=_logs)
    return parser


def _up(arguments: argparse.Namespace) -> int:
    Cluster.start(arguments.nodes, name=arguments.name, load_images=not arguments.no_images, stays=True)
    return _status(arguments)


def _down(arguments: argparse.Namespace) -> int:
    take_down()
    clear_builds()
    return 0


def _status(arguments: argparse.Namespace) -> int:
    cluster = Cluster.attach()
    print(ownership.current())
    print(cluster.kubectl("get", "nodes", "-o", "wide"))
    print(cluster.kubectl("get", "pods", "--all-namespaces", "-o", "wide") or "no pods\n")
    print(f"S3          {cluster.s3.endpoint}  (credentials: `python -m tests.cluster shell`)")
    print(f"images      {' '.join(cluster.images().values()) or 'none loaded'}")
    print(f"kubeconfig  {cluster.kubeconfig}")
    ended = [name for name in cluster.supervisor.names() if not cluster.supervisor.find(name).alive]
    print(f"ended       {', '.join(ended)}" if ended else "components  all alive")
    return 0


def _shell(arguments: argparse.Namespace) -> int:
    command = arguments.command or [os.environ.get("SHELL", "/bin/bash")]
    return subprocess.call(command, env={**os.environ, **Cluster.attach().environment()})


def _logs(arguments: argparse.Namespace) -> int:
    supervisor = Cluster.attach().supervisor
    if arguments.component is None:
        print("\n".join(supervisor.names()))
        return 0
    supervisor.find(arguments.component)
    return _print_file(supervisor.log(arguments.component), follow=arguments.follow)


def _print_file(file: Path, *, follow: bool) -> int:
    return subprocess.call(["tail", "-n", "+1", *(["-f"] if follow else []), str(file)])


def _build(arguments: argparse.Namespace) -> int:
    for name, image in build_images().items():
        print(f"{name}  {image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
