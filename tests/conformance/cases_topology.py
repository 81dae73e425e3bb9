"""Topology hints, as a node in zone-a, in a zone without endpoints (zone-c) and without a zone sees them."""

from __future__ import annotations

from tests.conformance.cases_basic import EXPOSED
from tests.conformance.cases_external import LOCAL
from tests.conformance.model import (
    CLUSTER_IP,
    DROP,
    LOAD_BALANCER,
    NODE_PORT,
    REJECT,
    Endpoint,
    Expectation,
    Flow,
    Scenario,
    Service,
    Slice,
    Step,
    To,
    masqueraded,
    scenario,
    to,
)

NO_ZONE, ZONE_C = "no detector", "masquerade all"
ALL = ("base", NO_ZONE, ZONE_C)
A, B, C = ("zone-a",), ("zone-b",), ("zone-c",)


def _hinted(
    name: str, *endpoints: Endpoint, a: Expectation, none: Expectation | None = None, c: Expectation | None = None
) -> Scenario:
    """What a pod gets in zone-a, in no zone and in zone-c (default: all of them as in zone-a)."""
    everywhere = {NO_ZONE: none or a, ZONE_C: _seen(c or none or a)}
    return scenario(
        "Topology", name, Service((Slice(endpoints),)), Flow("client", CLUSTER_IP, a, everywhere), configurations=ALL
    )


def _seen(expectation: Expectation) -> Expectation:
    """The same where everything is masqueraded."""
    if not isinstance(expectation, To):
        return expectation
    return masqueraded(*(hit.endpoint for hit in expectation.hits))


HINTS = [
    _hinted(
        "every endpoint for its zone",
        Endpoint("local-1", hint_zones=A),
        Endpoint("remote-1", hint_zones=B),
        a=to("local-1"),
        none=to("local-1", "remote-1"),
    ),
    _hinted(
        "hints, not places, decide",
        Endpoint("local-1", hint_zones=B),
        Endpoint("remote-1", hint_zones=A),
        a=to("remote-1"),
        none=to("local-1", "remote-1"),
    ),
    _hinted(
        "an endpoint without a hint",
        Endpoint("local-1", hint_zones=A),
        Endpoint("remote-1", hint_zones=B),
        Endpoint("remote-2"),
        a=to("local-1", "remote-1", "remote-2"),
    ),
    _hinted(
        "an endpoint without a hint that is not ready",
        Endpoint("local-1", hint_zones=A),
        Endpoint("remote-1", hint_zones=B),
        Endpoint("remote-2", ready=False),
        a=to("local-1"),
        none=to("local-1", "remote-1"),
    ),
    _hinted(
        "several zones in a hint",
        Endpoint("local-1", hint_zones=A),
        Endpoint("remote-1", hint_zones=B),
        Endpoint("remote-2", hint_zones=(*A, *B, *C)),
        a=to("local-1", "remote-2"),
        none=to("local-1", "remote-1", "remote-2"),
        c=to("remote-2"),
    ),
    _hinted(
        "no endpoint for this zone",
        Endpoint("local-1", hint_zones=B),
        Endpoint("remote-1", hint_zones=B),
        a=to("local-1", "remote-1"),
    ),
    _hinted(
        "the only endpoint for this zone is not ready",
        Endpoint("local-1", hint_zones=A, ready=False),
        Endpoint("remote-1", hint_zones=B),
        Endpoint("remote-2", hint_zones=B),
        a=to("remote-1", "remote-2"),
    ),
    _hinted(
        "one of the endpoints for this zone is not ready",
        Endpoint("local-1", hint_zones=A, ready=False),
        Endpoint("local-2", hint_zones=A),
        Endpoint("remote-1", hint_zones=B),
        a=to("local-2"),
        none=to("local-2", "remote-1"),
    ),
    _hinted(
        "terminating endpoints have no say and no zone",
        Endpoint("local-1", hint_zones=B, ready=False, serving=True, terminating=True),
        Endpoint("remote-1", hint_zones=A, ready=False, serving=True, terminating=True),
        a=to("local-1", "remote-1"),
    ),
    _hinted(
        "a terminating endpoint for this zone, a ready one for another",
        Endpoint("local-1", hint_zones=A, ready=False, serving=True, terminating=True),
        Endpoint("remote-1", hint_zones=B),
        a=to("remote-1"),
    ),
    _hinted("no endpoint that is ready", Endpoint("local-1", hint_zones=A, ready=False), a=REJECT),
    _hinted("no hints", Endpoint("local-1"), Endpoint("remote-1"), a=to("local-1", "remote-1")),
    _hinted(
        "every endpoint for its node",
        Endpoint("local-1", hint_nodes=("here",)),
        Endpoint("remote-1", hint_nodes=("there",)),
        a=to("local-1"),
    ),
    _hinted(
        "this node and others in a hint",
        Endpoint("local-1", hint_nodes=("here",)),
        Endpoint("remote-1", hint_nodes=("here", "there")),
        Endpoint("remote-2", hint_nodes=("there",)),
        a=to("local-1", "remote-1"),
    ),
    _hinted(
        "the node before the zone",
        Endpoint("local-1", hint_zones=A, hint_nodes=("here",)),
        Endpoint("remote-1", hint_zones=A, hint_nodes=("there",)),
        a=to("local-1"),
    ),
    _hinted(
        "no endpoint for this node: those for the zone",
        Endpoint("local-1", hint_zones=B, hint_nodes=("there",)),
        Endpoint("remote-1", hint_zones=A, hint_nodes=("there",)),
        a=to("remote-1"),
        none=to("local-1", "remote-1"),
    ),
    _hinted(
        "no endpoint for this node nor the zone: all",
        Endpoint("local-1", hint_zones=B, hint_nodes=("there",)),
        Endpoint("remote-1", hint_zones=B, hint_nodes=("there",)),
        a=to("local-1", "remote-1"),
    ),
    _hinted(
        "a node hint missing: those for the zone",
        Endpoint("local-1", hint_zones=B, hint_nodes=("here",)),
        Endpoint("remote-1", hint_zones=A),
        a=to("remote-1"),
        none=to("local-1", "remote-1"),
    ),
    _hinted(
        "a node hint missing, no zone hints: all",
        Endpoint("local-1", hint_nodes=("here",)),
        Endpoint("remote-1"),
        a=to("local-1", "remote-1"),
    ),
]

FAR = Slice((Endpoint("local-1", hint_zones=B), Endpoint("remote-1", hint_zones=A)))
NEAR = Slice((Endpoint("local-1", hint_zones=A), Endpoint("remote-1", hint_zones=B)))

POLICIES = [
    scenario(
        "Topology",
        "external policy Local knows no topology, its short circuit does",
        Service((FAR,), **EXPOSED, spec=LOCAL),
        Flow("outside", LOAD_BALANCER, to("local-1")),
        Flow("outside", NODE_PORT, to("local-1")),
        Flow("client", LOAD_BALANCER, to("remote-1")),
        Flow("node", LOAD_BALANCER, masqueraded("remote-1")),
        Flow("client", CLUSTER_IP, to("remote-1")),
    ),
    scenario(
        "Topology",
        "external policy Cluster",
        Service((NEAR,), **EXPOSED),
        *(Flow(client, target, masqueraded("local-1")) for client in ("client", "node", "outside") for target in (LOAD_BALANCER, NODE_PORT)),
    ),
    scenario(
        "Topology",
        "internal policy Local knows no topology",
        Service((FAR,), spec={"internalTrafficPolicy": "Local"}),
        Flow("client", CLUSTER_IP, to("local-1")),
    ),
    scenario(
        "Topology",
        "internal policy Local, the endpoint for this zone is elsewhere",
        Service((Slice((Endpoint("remote-1", hint_zones=A),)),), spec={"internalTrafficPolicy": "Local"}),
        Flow("client", CLUSTER_IP, DROP),
    ),
    *(
        scenario(
            "Topology",
            f"trafficDistribution {said} without hints",
            Service((Slice((Endpoint("local-1"), Endpoint("remote-1"))),), spec={"trafficDistribution": said}),
            Flow("client", CLUSTER_IP, to("local-1", "remote-1")),
        )
        for said in ("PreferClose", "PreferSameZone", "PreferSameNode")
    ),
    Scenario(
        "Topology",
        "hints come and go",
        tuple(
            Step((Service((held,)),), (Flow("client", CLUSTER_IP, expect),), after=after)
            for held, expect, after in (
                (Slice((Endpoint("local-1"), Endpoint("remote-1"))), to("local-1", "remote-1"), ""),
                (NEAR, to("local-1"), "every endpoint has a hint for its zone"),
                (FAR, to("remote-1"), "the hints have changed places"),
                (Slice((Endpoint("local-1"), Endpoint("remote-1"))), to("local-1", "remote-1"), "the hints have gone"),
            )
        ),
    ),
]  # fmt: skip

SCENARIOS = [*HINTS, *POLICIES]
