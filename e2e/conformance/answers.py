"""What an answer means: which endpoint it was, whether it saw the client's own address, or what happened instead."""

from __future__ import annotations

from dataclasses import dataclass

from tests.conformance.model import DROP, REJECT, UNTOUCHED, Expectation, Hit, Verdict
from tests.conformance.objects import Cast
from vcproxy.lab import Outcome, Refused, Reply, TimedOut, Unreachable


@dataclass(frozen=True)
class Strange:
    """Something that no case expects, in words."""

    text: str

    def __str__(self) -> str:
        return self.text


Observation = Expectation | Strange


@dataclass(frozen=True)
class Judge:
    """Reads outcomes of dials by a tenant's client ("" for the super cluster's), which may be the node itself.

    Whether the source was kept is told by the address that the server saw; for the node itself, whose address a
    masquerade does not change, by the port, which `fully-random` does.
    """

    cast: Cast
    tenant: str
    of_node: bool

    def read(self, outcome: Outcome, address: str, port: int) -> Hit | Verdict | Strange:
        match outcome:
            case Reply():
                return self._answered(outcome, (address, port))
            case Refused():
                return REJECT
            case TimedOut():
                return DROP
            case Unreachable("ENETUNREACH" | "EHOSTUNREACH"):
                return UNTOUCHED
        return Strange(str(outcome))

    def _answered(self, reply: Reply, dialled: tuple[str, int]) -> Hit | Verdict | Strange:
        if reply.local == dialled:
            return UNTOUCHED
        if self.tenant and not reply.pod.startswith(f"{self.tenant}/") and reply.pod != "one":
            return Strange(f"answered by {reply.pod}")
        changed = reply.peer != reply.source if self.of_node else reply.peer[0] != reply.source[0]
        return Hit(f"{self.cast.role(reply.local[0])}:{reply.local[1]}", changed)
