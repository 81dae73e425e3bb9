"""What is tested on a kernel is tested in a network namespace that goes with the test."""

from collections.abc import Iterator

import pytest

from tests.unit.namespaces import own_namespace


@pytest.fixture
def namespace() -> Iterator[None]:
    """This thread, and what it starts, is in a network namespace of its own."""
    with own_namespace():
        yield
