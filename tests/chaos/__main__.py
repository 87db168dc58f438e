"""``python -m tests.chaos --seed 17 | --seeds 1-100 [--beside 3] | --plan --seeds 1-5000``.

On the cluster that ``python -m tests.cluster up`` has started, or on one of its own. The operator's replicas have clocks that are off.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.chaos.images import load_skewed_operator
from tests.chaos.plan_seeds import play
from tests.chaos.run import Chaos
from tests.cluster import ownership
from tests.cluster.cluster import Cluster
from tests.cluster.installation import install_on
from tests.cluster.training_inputs import make_namespace, upload_inputs


def main() -> int:
    """Play the seeds; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int)
    which.add_argument("--seeds", help="FIRST-LAST")
    parser.add_argument("--plan", action="store_true", help="the operator's decisions alone, without a cluster")
    parser.add_argument("--beside", type=int, default=1, help="how many seeds to play at a time on the cluster")
    arguments = parser.parse_args()
    first, _, last = (arguments.seeds or str(arguments.seed)).partition("-")
    seeds = range(int(first), int(last or first) + 1)
    return _plan(seeds) if arguments.plan else _cluster(seeds, arguments.beside)


def _plan(seeds: range) -> int:
    for seed in seeds:
        play(seed)
    print(f"{len(seeds)} seeds: all promises kept")
    return 0


def _cluster(seeds: range, beside: int) -> int:
    outcomes = []
    with _running_cluster() as cluster, TemporaryDirectory() as folder:
        install_on(cluster, {"image": {"reference": load_skewed_operator(cluster)}})
        upload_inputs(cluster, Path(folder))
        namespace = f"chaos-{secrets.token_hex(3)}"
        make_namespace(cluster, namespace)
        for outcome in Chaos(cluster, namespace).play(seeds, beside=beside):
            outcomes.append(outcome)
            print(outcome, flush=True)
            if outcome.broken:
                print(outcome.story, flush=True)
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")
    broken = [outcome for outcome in outcomes if outcome.broken]
    print(f"{len(outcomes)} seeds, {len(broken)} broke a promise")
    for outcome in broken:
        print(f"{outcome.scenario.replay}: {'; '.join(outcome.broken)}")
    return 1 if broken else 0


@contextmanager
def _running_cluster() -> Iterator[Cluster]:
    owner = ownership.current()
    if owner is not None and owner.holds:
        yield Cluster.attach()
        return
    cluster = Cluster.start(nodes=2)
    try:
        yield cluster
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main())
