"""One cluster for all tests that want a real one."""

from tests.cluster.conftest import cluster

__all__ = ["cluster"]
