"""Which endpoints count: the internal traffic policy, conditions, and endpoints that are about to go."""

from __future__ import annotations

from tests.conformance.cases_basic import BOTH, EXPOSED
from tests.conformance.cases_external import LOCAL, PUBLIC, THERE
from tests.conformance.model import (
    CLUSTER_IP,
    DROP,
    GONE,
    LEAVING,
    LOAD_BALANCER,
    READY,
    REJECT,
    UNREADY,
    Endpoint,
    Expectation,
    Flow,
    Scenario,
    Service,
    Slice,
    Step,
    masqueraded,
    scenario,
    to,
)

INSIDE = {"internalTrafficPolicy": "Local"}

INTERNAL = [
    scenario(
        "InternalTrafficPolicy",
        "Cluster",
        Service((BOTH,)),
        Flow("client", CLUSTER_IP, to("local-1", "remote-1")),
        Flow("node", CLUSTER_IP, masqueraded("local-1", "remote-1")),
    ),
    Scenario(
        "InternalTrafficPolicy",
        "Local, one endpoint here",
        (
            Step(
                (Service((BOTH,), spec=INSIDE),),
                (
                    Flow("client", CLUSTER_IP, to("local-1")),
                    Flow("local-1", CLUSTER_IP, masqueraded("local-1")),
                    Flow("visitor", CLUSTER_IP, to("local-1")),
                    Flow("node", CLUSTER_IP, masqueraded("local-1")),
                    Flow("outside", CLUSTER_IP, masqueraded("local-1")),
                ),
            ),
            Step(
                (Service((THERE,), spec=INSIDE),),
                tuple(Flow(client, CLUSTER_IP, DROP) for client in ("client", "node", "outside")),
                after="the local endpoint has gone",
            ),
            Step(
                (Service((Slice(),), spec=INSIDE),),
                tuple(Flow(client, CLUSTER_IP, REJECT) for client in ("client", "node", "outside")),
                after="all endpoints have gone",
            ),
            Step(
                (Service((BOTH,), spec=INSIDE),),
                (Flow("client", CLUSTER_IP, to("local-1")), Flow("node", CLUSTER_IP, masqueraded("local-1"))),
                after="they are back",
            ),
        ),
    ),
    scenario(
        "InternalTrafficPolicy",
        "Local, several endpoints here",
        Service((Slice((Endpoint("local-1"), Endpoint("local-2"), Endpoint("remote-1"))),), spec=INSIDE),
        Flow("client", CLUSTER_IP, to("local-1", "local-2")),
        Flow("node", CLUSTER_IP, masqueraded("local-1", "local-2")),
    ),
    scenario(
        "InternalTrafficPolicy",
        "Local, endpoints elsewhere only",
        Service((THERE,), spec=INSIDE, **EXPOSED),
        *(Flow(client, CLUSTER_IP, DROP) for client in ("client", "visitor", "node", "outside")),
        *(Flow("outside", target, masqueraded("remote-1")) for target in PUBLIC),
    ),
    scenario(
        "InternalTrafficPolicy",
        "Local on both sides, endpoints elsewhere only",
        Service((THERE,), spec=INSIDE | LOCAL, **EXPOSED),
        Flow("client", CLUSTER_IP, DROP),
        *(Flow("outside", target, DROP) for target in PUBLIC),
        *(Flow("client", target, to("remote-1")) for target in PUBLIC),
        *(Flow("node", target, masqueraded("remote-1")) for target in PUBLIC),
    ),
    scenario(
        "InternalTrafficPolicy",
        "Local, an endpoint without a node",
        Service((Slice((Endpoint("local-1", on=""),)),), spec=INSIDE),
        Flow("client", CLUSTER_IP, DROP),
    ),
    Scenario(
        "InternalTrafficPolicy",
        "switched",
        tuple(
            Step(
                (Service((BOTH,), spec={"internalTrafficPolicy": policy}),),
                (Flow("client", CLUSTER_IP, expect), Flow("local-1", CLUSTER_IP, hairpin)),
                after=after,
            )
            for policy, expect, hairpin, after in (
                ("Cluster", to("local-1", "remote-1"), masqueraded("local-1") | to("remote-1"), ""),
                ("Local", to("local-1"), masqueraded("local-1"), "it is Local"),
                ("Cluster", to("local-1", "remote-1"), masqueraded("local-1") | to("remote-1"), "it is Cluster again"),
            )
        ),
    ),
]


def _terminating(
    name: str, endpoints: tuple[Endpoint, ...], inside: Expectation, outside: Expectation, spec: dict[str, str]
) -> Scenario:
    policy = "Local" if spec else "Cluster"
    return scenario(
        "TerminatingEndpoints",
        f"{policy}, {name}",
        Service((Slice(endpoints),), **EXPOSED, spec=spec),
        Flow("client", CLUSTER_IP, inside),
        *(Flow("outside", target, outside) for target in PUBLIC),
    )


def _pods(*said: tuple[str, dict[str, bool]]) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(pod, **conditions) for pod, conditions in said)


_READY, _LEAVING, _GONE, _UNREADY = dict(READY), dict(LEAVING), dict(GONE), dict(UNREADY)

TERMINATING = [
    _terminating(
        "ready endpoints exist",
        _pods(("local-1", _READY), ("local-2", _LEAVING), ("remote-1", _READY), ("remote-2", _GONE)),
        to("local-1", "remote-1"),
        masqueraded("local-1", "remote-1"),
        {},
    ),
    _terminating(
        "only terminating endpoints",
        _pods(("local-1", _LEAVING), ("local-2", _GONE), ("remote-1", _LEAVING), ("remote-2", _UNREADY)),
        to("local-1", "remote-1"),
        masqueraded("local-1", "remote-1"),
        {},
    ),
    _terminating(
        "the ready one is elsewhere",
        _pods(("local-1", _LEAVING), ("remote-1", _READY)),
        to("remote-1"),
        masqueraded("remote-1"),
        {},
    ),
    _terminating("terminating ones elsewhere only", _pods(("remote-1", _LEAVING)), to("remote-1"), masqueraded("remote-1"), {}),
    _terminating("none usable", _pods(("local-1", _GONE), ("remote-1", _UNREADY)), REJECT, REJECT, {}),
    _terminating(
        "ready endpoints exist",
        _pods(("local-1", _READY), ("local-2", _LEAVING), ("remote-1", _READY)),
        to("local-1"),
        to("local-1"),
        INSIDE | LOCAL,
    ),
    _terminating(
        "only terminating endpoints here",
        _pods(("local-1", _LEAVING), ("local-2", _GONE), ("remote-1", _READY)),
        to("local-1"),
        to("local-1"),
        INSIDE | LOCAL,
    ),
    _terminating("terminating ones elsewhere only", _pods(("local-1", _GONE), ("remote-1", _LEAVING)), DROP, DROP, INSIDE | LOCAL),
    _terminating("none usable", _pods(("local-1", _GONE), ("remote-1", _UNREADY)), REJECT, REJECT, INSIDE | LOCAL),
    Scenario(
        "TerminatingEndpoints",
        "the last endpoint's way out",
        tuple(
            Step(
                (Service((Slice(endpoints),), **EXPOSED, spec=LOCAL),),
                (Flow("client", CLUSTER_IP, inside), Flow("outside", LOAD_BALANCER, outside)),
                after=after,
            )
            for endpoints, inside, outside, after in (
                (_pods(("local-1", _READY)), to("local-1"), to("local-1"), ""),
                (_pods(("local-1", _LEAVING)), to("local-1"), to("local-1"), "it terminates"),
                (_pods(("local-1", _GONE)), REJECT, REJECT, "it does not serve any more"),
                ((), REJECT, REJECT, "it has gone"),
                (_pods(("remote-1", _READY)), to("remote-1"), DROP, "another has come elsewhere"),
            )
        ),
    ),
]  # fmt: skip

CONDITIONS = [
    scenario(
        "Conditions",
        name,
        Service((Slice((Endpoint("local-1", **said), Endpoint("remote-1", **other))),)),  # type: ignore[arg-type]
        Flow("client", CLUSTER_IP, expect),
    )
    for name, said, other, expect in (
        ("ready not said", {}, {"ready": False}, to("local-1")),
        ("nothing said", {}, {}, to("local-1", "remote-1")),
        ("not ready, but serving", {"ready": False, "serving": True}, {}, to("remote-1")),
        ("not ready, but serving, and no other", {"ready": False, "serving": True}, {"ready": False}, REJECT),
        ("terminating, serving not said", {"ready": False, "terminating": True}, {"ready": False, "serving": False}, to("local-1")),
        ("ready and terminating, as publishNotReadyAddresses makes it", {"ready": True, "terminating": True}, {"ready": False}, to("local-1")),
        ("ready and not serving", {"ready": True, "serving": False}, {"ready": False}, to("local-1")),
    )
] + [
    scenario(
        "Conditions",
        "publishNotReadyAddresses is not the proxy's business",
        Service((Slice((Endpoint("local-1", ready=False), Endpoint("remote-1", ready=True))),), spec={"publishNotReadyAddresses": True}),
        Flow("client", CLUSTER_IP, to("remote-1")),
    ),
]  # fmt: skip

SCENARIOS = [*INTERNAL, *TERMINATING, *CONDITIONS]
