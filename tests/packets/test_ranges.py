"""Sets of ranges: whatever they hold, one transaction makes them hold anything else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import pytest

from tests.packets.programmed import Programmed
from vcproxy.backend.protocol import Drift
from vcproxy.lab import Lab
from vcproxy.model.addresses import Prefix, parse_prefix
from vcproxy.model.tenant import SUPER_UID

pytestmark = pytest.mark.packets

CONTENTS = {
    "nothing": "",
    "everything": "0.0.0.0/0 ::/0",
    "one": "10.0.0.0/8 fd00::/8",
    "the halves of it": "10.0.0.0/9 10.128.0.0/9 fd00::/9 fd80::/9",
    "a part of it": "10.7.0.0/16 fd00:7::/32",
    "what ends where it begins": "9.0.0.0/8 fc00::/8",
    "its neighbours": "9.0.0.0/8 11.0.0.0/8 fc00::/8 fe00::/8",
    "the first and the last": "0.0.0.0/8 255.255.255.255/32 ::/128 ffff::/16",
}


@pytest.fixture(scope="module")
def backend() -> Iterator[Programmed]:
    with Lab("vcp-ranges") as lab:
        backend = Programmed(lab.node("one"))
        try:
            yield backend
        finally:
            backend.cleanup()


def prefixes(name: str) -> tuple[Prefix, ...]:
    return tuple(map(parse_prefix, CONTENTS[name].split()))


@pytest.mark.parametrize("uid", [SUPER_UID, "acme", "detector"])
def test_ranges_replace_each_other(backend: Programmed, uid: str) -> None:
    """As a detector of local sources, as ServiceCIDRs of the super cluster and of a tenant."""
    for before, after in permutations(CONTENTS, 2):
        for name in (before, after):
            if uid == "detector":
                backend.set_node(local_sources=prefixes(name))
            else:
                backend.put(uid, ranges=prefixes(name))
        assert backend.repair() == Drift(missing=0, foreign=0, rebuilt=False), f"{before}, then {after}"


def test_ranges_are_adopted(backend: Programmed) -> None:
    for name in CONTENTS:
        backend.set_node(local_sources=prefixes(name))
        for uid in (SUPER_UID, "acme"):
            backend.put(uid, ranges=prefixes(name))
        backend = backend.reopened()
        backend.set_node(local_sources=prefixes(name))
        for uid in (SUPER_UID, "acme"):
            assert not backend.put(uid, ranges=prefixes(name), complete=True).operations, name
    backend.backend.close()
