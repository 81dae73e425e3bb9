"""What the tests of vcproxy.kube share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.apiserver import FakeApiServer
from tests.unit.kube.recording import Recorder


@pytest.fixture
async def api() -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer() as server:
        yield server


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
