"""A stand-in for an API server; the real one is the session's cluster's, with the CRD, as the tests of the API have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.conftest import api  # noqa: F401
from tests.kubectl.stand_in import StandIn, standing_in


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    with standing_in(tmp_path) as server:
        yield server
