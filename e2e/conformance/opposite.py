"""The second tenant: the first one's ClusterIPs and ports, with the opposite expectations.

Where the first tenant's clients are answered, the second one has a Service without endpoints; where they are refused or
dropped, it has an endpoint on a port that the first one never uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tests.conformance.model import CONFIGURATIONS, REJECT, Case, Target, Verdict, to
from tests.conformance.objects import Cast, Object, Plan, dialled
from vcproxy.lab.cluster import endpoint_slice, service

NAMESPACE = "opposite"
ANSWERING = "local-2:8082"


def opposite_cases(cases: Sequence[Case]) -> list[Case]:
    """The second tenant's cases: the client of each of these on every ClusterIP that the first one's dials."""
    found = {}
    for case in cases:
        if not _virtual(case.flow.targets):
            continue
        answer = to(ANSWERING, masqueraded=CONFIGURATIONS[case.configuration].masquerade_all)
        expect = answer if isinstance(case.expect, Verdict) else REJECT
        flow = dataclasses.replace(
            case.flow, client="client", target=case.flow.targets[0], expect=expect, otherwise={}, held=False
        )
        found[case.id] = dataclasses.replace(case, flow=flow)
    return list(found.values())


def opposite_objects(plan: Plan, cast: Cast, cases: Sequence[Case]) -> list[Object]:
    """Its Services: one an address and port, for both protocols."""
    wanted: dict[tuple[str, int], dict[str, bool]] = {}
    for case in cases:
        if _virtual(case.flow.targets):
            address, port, protocol = dialled(plan, cast, case)[0]
            wanted.setdefault((address, port), {})[protocol] = isinstance(case.expect, Verdict)
    made: list[Object] = []
    for number, ((address, port), answers) in enumerate(wanted.items()):
        name, family = f"opposite-{number}", "IPv6" if ":" in address else "IPv4"
        ports = [(protocol.lower(), protocol, port, 8082) for protocol in answers]
        made.append(service(name, [address], ports, namespace=NAMESPACE))
        open_ports = [(protocol.lower(), protocol, 8082) for protocol, answer in answers.items() if answer]
        held = [(cast.address("local-2", 6 if family == "IPv6" else 4), cast.nodes["here"])]
        made.append(endpoint_slice(name, family, held if open_ports else [], open_ports, namespace=NAMESPACE))
    return made


def _virtual(targets: Sequence[Target]) -> bool:
    return all(target.kind in ("ClusterIP", "Unallocated") for target in targets)
