"""Whom the agent tells what it has done: the brain, by way of the session, and the disk, by way of the cache.

Protocols, so that the agent knows neither: it is the one that decides, and is tested with both scripted.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from vcproxy.backend.protocol import Rejection
from vcproxy.model.node import NodeFacts
from vcproxy.model.services import PortKey


class Acknowledge(Protocol):
    """Where the agent reports to; the session, which tells the brain."""

    def committed(
        self, uid: str, revision: int, digest: bytes, rejections: tuple[Rejection, ...], microseconds: int
    ) -> None:
        """This revision is programmed, but for `rejections`: all ports of the tenant that are in quarantine now."""

    def failed(self, uid: str, revision: int, error: str) -> None:
        """This revision could not be programmed; it is tried again."""


class Memory(Protocol):
    """Where the agent remembers its last good state; the cache."""

    def changed(self, uid: str, touched: Iterable[PortKey] | None) -> None:
        """What is held of the tenant differs in these service ports; None: perhaps in all."""

    def keep(self, uid: str) -> None:
        """The tenant's committed state changed: write it, soon."""

    def forget(self, uid: str) -> None:
        """The tenant is gone: delete it."""

    def keep_node(self, facts: NodeFacts | None, placement: Mapping[bytes, str] | None) -> None:
        """What the brain told of this node changed; None: it has told nothing yet."""
