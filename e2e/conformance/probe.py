"""What really happens to a flow: packets from the client, until it is clear who answers and what the server sees.

A random choice is watched until all that is expected has been seen and enough more to meet what is not. A single changed
source port proves no masquerade (the kernel changes one where two connections would become the same), so the majority
decides.
"""

from __future__ import annotations

import errno
import itertools
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from e2e.conformance.answers import Judge, Observation, Strange
from e2e.conformance.ground import Ground
from e2e.conformance.lines import Lines
from tests.conformance.model import (
    DROP,
    NODE,
    Apart,
    Case,
    Expectation,
    Hit,
    To,
    Verdict,
)
from tests.conformance.objects import Plan, dialled
from vcproxy.lab import Outcome, Refused, TimedOut, Unreachable, netns, sctp_request, tcp_request, udp_request
from vcproxy.lab.dial import Place

PATIENCE, IMPATIENCE = 3.0, 0.4
"""Seconds that an answer may take where one is expected, and where none is."""
ENOUGH, TOO_MANY = 8, 80
"""Connections per flow: so many and three for each endpoint, or until all were met."""
THREADS = 24


SETTLED_WITHIN = 10.0
"""Seconds that a change of a Node may take beyond the canary of its step: only Services and slices are in order."""
# UDP's flows outlive their sockets in connection tracking, so no two may have the same source port. Not those that
# nodes and pods listen on, and not node ports.
_SOURCE_PORTS = itertools.cycle((*range(10_000, 30_000), *range(33_000, 61_000)))

Dialled = tuple[str, int, str]


def observe_all(ground: Ground, plan: Plan, tenant: str, cases: Sequence[Case], lines: Lines) -> dict[str, Observation]:
    """What happens to each case's flow, side by side, by the cases' ids."""

    def observe(case: Case) -> Observation:
        cast, client = ground.casts[tenant], case.flow.client
        place, judge = ground.place(tenant, client), Judge(cast, tenant, of_node=client == NODE)
        targets = dialled(plan, cast, case)
        if case.flow.held:
            key = (case.scenario.family, case.scenario.name, client, *targets)
            return lines.watch(key, place, judge, targets[0], case.expect)
        prober = Prober(place, judge)
        seen, deadline = prober.watch(targets, case.expect), time.monotonic() + SETTLED_WITHIN
        while case.step and seen != case.expect and time.monotonic() < deadline:
            seen = prober.watch(targets, case.expect)
        return seen

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip((case.id for case in cases), pool.map(observe, cases), strict=True))


class Prober:
    """Dials from one place."""

    def __init__(self, place: Place, judge: Judge) -> None:
        self._place, self._judge = place, judge

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
        elif protocol == "SCTP":
            outcome = sctp_request(self._place, address, port, timeout=timeout, source_port=next(_SOURCE_PORTS))
        else:
            outcome = self._ask(address, port, timeout)
        if protocol == "UDP" and outcome == Unreachable("EPERM"):
            outcome = _denied(self._place, address, port, timeout)
        return self._judge.read(outcome, address, port)

    def _ask(self, address: str, port: int, timeout: float) -> Outcome:
        """UDP from a source port of its own; one that another socket of the place happens to have is passed over."""
        while True:
            try:
                return udp_request(self._place, address, port, timeout=timeout, source_port=next(_SOURCE_PORTS))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise


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
