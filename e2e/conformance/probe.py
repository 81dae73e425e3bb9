"""What really happens to a flow: packets from the client, judged by who answers and what the server saw.

A random choice is watched until all that is expected has been seen and enough more to meet what is not. Whether the
source was kept is told by the address that the server saw; for the node itself, whose address a masquerade does not
change, by the port, which `fully-random` does. A single changed port proves nothing (the kernel changes one where two
connections would become the same), so the majority decides.
"""

from __future__ import annotations

import errno
import itertools
import socket
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from e2e.conformance.ground import Ground
from tests.conformance.model import (
    DROP,
    NODE,
    REJECT,
    UNTOUCHED,
    Apart,
    Case,
    Expectation,
    Hit,
    To,
    Verdict,
)
from tests.conformance.objects import Cast, Plan, dialled
from vcproxy.lab import Outcome, Refused, Reply, TimedOut, Unreachable, netns, tcp_request, udp_request
from vcproxy.lab.dial import Place

PATIENCE, IMPATIENCE = 3.0, 0.4
"""Seconds that an answer may take where one is expected, and where none is."""
ENOUGH, TOO_MANY = 8, 80
"""Connections per flow: so many and three for each endpoint, or until all were met."""
THREADS = 24


@dataclass(frozen=True)
class Strange:
    """Something that no case expects, in words."""

    text: str

    def __str__(self) -> str:
        return self.text


# UDP's flows outlive their sockets in connection tracking, so no two may have the same source port. Not those that
# nodes and pods listen on, and not node ports.
_SOURCE_PORTS = itertools.cycle((*range(10_000, 30_000), *range(33_000, 61_000)))

Observation = Expectation | Strange
Dialled = tuple[str, int, str]


def observe_all(ground: Ground, plan: Plan, tenant: str, cases: Sequence[Case]) -> dict[str, Observation]:
    """What happens to each case's flow, side by side, by the cases' ids."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip((case.id for case in cases), pool.map(lambda case: observe(ground, plan, tenant, case), cases), strict=True))  # fmt: skip


def observe(ground: Ground, plan: Plan, tenant: str, case: Case) -> Observation:
    """What happens to one case's flow."""
    cast = ground.casts[tenant]
    prober = Prober(ground.place(tenant, case.flow.client), cast, tenant, of_node=case.flow.client == NODE)
    return prober.watch(dialled(plan, cast, case), case.expect)


class Prober:
    """Dials from one place, as one tenant's."""

    def __init__(self, place: Place, cast: Cast, tenant: str, *, of_node: bool) -> None:
        self._place, self._cast, self._prefix, self._of_node = place, cast, f"{tenant}/" if tenant else "", of_node

    def watch(self, targets: Sequence[Dialled], expected: Expectation) -> Observation:
        """Dial until it is clear what happens."""
        if isinstance(expected, Verdict):
            timeout = IMPATIENCE if expected is DROP else PATIENCE
            found = {self._dial(target, timeout) for target in (*targets, *targets)}
            return found.pop() if len(found) == 1 else Strange(f"by turns {', '.join(sorted(map(str, found)))}")
        if isinstance(expected, Apart):
            return self._apart(targets, expected)
        seen: defaultdict[str, list[bool]] = defaultdict(list)
        enough = ENOUGH + 3 * len(expected.hits)
        for count, target in enumerate(itertools.cycle(targets), start=1):
            outcome = self._dial(target, PATIENCE)
            if not isinstance(outcome, Hit):
                return outcome if count == 1 else Strange(f"{outcome} after {count - 1} answers of {sorted(seen)}")
            seen[outcome.endpoint].append(outcome.masqueraded)
            found_now = To(
                frozenset(Hit(name, 2 * sum(changed) > len(changed)) for name, changed in seen.items()),
                expected.sticky and len(seen) == 1,
            )
            if count < enough:
                continue
            if expected.sticky:
                return expected if found_now.sticky and found_now.hits <= expected.hits else found_now
            if found_now == expected or count >= TOO_MANY:
                return found_now
        raise AssertionError("a flow has a target")

    def _apart(self, targets: Sequence[Dialled], expected: Apart) -> Observation:
        chosen: set[Hit] = set()
        for target in targets:
            found = {self._dial(target, PATIENCE) for _ in range(4)}
            if len(found) != 1:
                return Strange(f"port {target[1]}: by turns {', '.join(sorted(map(str, found)))}")
            (hit,) = found
            if not isinstance(hit, Hit):
                return hit
            chosen.add(hit)
        if len(chosen) == 1:
            return To(frozenset(chosen), sticky=True)
        return expected if chosen <= expected.hits else Apart(frozenset(chosen))

    def _dial(self, target: Dialled, timeout: float) -> Hit | Verdict | Strange:
        address, port, protocol = target
        if protocol == "TCP":
            outcome = tcp_request(self._place, address, port, timeout=timeout)
        else:
            outcome = udp_request(self._place, address, port, timeout=timeout, source_port=next(_SOURCE_PORTS))
        if protocol == "UDP" and outcome == Unreachable("EPERM"):
            outcome = _denied(self._place, address, port, timeout)
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

    def _answered(self, reply: Reply, dialled_as: tuple[str, int]) -> Hit | Verdict | Strange:
        if reply.local == dialled_as:
            return UNTOUCHED
        if not reply.pod.startswith(self._prefix) and reply.pod != "one":
            return Strange(f"answered by {reply.pod}")
        changed = reply.peer != reply.source if self._of_node else reply.peer[0] != reply.source[0]
        return Hit(f"{self._cast.role(reply.local[0])}:{reply.local[1]}", changed)


def _denied(place: Place, address: str, port: int, timeout: float) -> Outcome:
    """What a host's own kernel does to its datagram. Sending fails either way; a refusal is then told to the socket."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with netns.socket_in(place.ns, family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.connect((address, port))
        try:
            sock.send(b"who?")
        except PermissionError:
            pass
        try:
            sock.recv(1)
        except ConnectionRefusedError:
            return Refused()
        except TimeoutError:
            return TimedOut()
        except OSError as error:
            return Unreachable(errno.errorcode[error.errno or 0])
    return Unreachable("EPERM")
