"""Tests. A package, so that `python -m tests.cluster` and `from tests.cluster import Cluster` work."""
