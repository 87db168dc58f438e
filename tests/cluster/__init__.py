"""A real Kubernetes with several nodes on one machine, for tests, demos and benchmarks: see cluster.py."""

from tests.cluster.cluster import Cluster
from tests.cluster.console import ClusterError

__all__ = ["Cluster", "ClusterError"]
