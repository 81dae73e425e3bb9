"""What changes do to connections that are made, and changes of the node and of the ranges of ClusterIPs.

TCP connections outlive everything. UDP flows end, to begin anew, when their endpoint does not serve any more, and when
an address that they went to on their own becomes a Service's; policies and topology do not end them.
"""

from __future__ import annotations

from tests.conformance.cases_basic import BOTH, EXPOSED
from tests.conformance.cases_external import HERE, THERE
from tests.conformance.cases_topology import NEAR
from tests.conformance.model import (
    CLUSTER_IP,
    COLUMNS,
    DROP,
    GONE,
    INTERPRETER,
    LEAVING,
    LOAD_BALANCER,
    NODE_PORT,
    REJECT,
    UNTOUCHED,
    Endpoint,
    Expectation,
    Flow,
    Ingress,
    Scenario,
    Service,
    Slice,
    Step,
    Target,
    masqueraded,
    to,
)

_REAL = tuple(column for column in COLUMNS if column != INTERPRETER)
_HELD = {"columns": _REAL, "why": "the interpreter knows first packets only"}
NOTHING = Slice()


def _held(client: str, target: Target, expect: Expectation) -> Flow:
    return Flow(client, target, expect, held=True)


def _three(inside: Expectation, balanced: Expectation, node_port: Expectation | None = None) -> tuple[Flow, ...]:
    """Lines to a ClusterIP, a load balancer and a node port (default: as the load balancer)."""
    return (
        _held("client", CLUSTER_IP, inside),
        _held("outside", LOAD_BALANCER, balanced),
        _held("outside", NODE_PORT, node_port or balanced),
    )


_HERE, _THERE = (to("local-1"), masqueraded("local-1")), (to("remote-1"), masqueraded("remote-1"))


def _steps(*steps: tuple[tuple[Service, ...], tuple[Flow, ...], str]) -> tuple[Step, ...]:
    return tuple(Step(services, flows, after=after) for services, flows, after in steps)


def _web(held: Slice, **more: object) -> tuple[Service, ...]:
    return (Service((held,), **{**EXPOSED, **more}),)  # type: ignore[arg-type]


MADE = [
    Scenario(
        "Established",
        "TCP connections stay",
        _steps(
            (_web(HERE), _three(*_HERE), ""),
            (_web(THERE), (*_three(*_HERE), Flow("client", CLUSTER_IP, to("remote-1"))), "another endpoint has come for theirs"),
            (_web(NOTHING), _three(*_HERE), "all endpoints have gone"),
            (_web(HERE, spec={"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"}), _three(*_HERE), "policies are Local"),
            ((), _three(*_HERE), "the Service has gone"),
        ),
        protocols=("TCP",),
        **_HELD,
    ),
    Scenario(
        "Established",
        "UDP flows go where the endpoints go",
        _steps(
            (_web(HERE), _three(*_HERE), ""),
            (_web(BOTH), _three(*_HERE), "an endpoint has come"),
            (_web(THERE), _three(*_THERE), "theirs has gone"),
            (_web(NOTHING), _three(REJECT, REJECT, masqueraded("remote-1")), "all have gone"),
            (_web(HERE), _three(*_HERE), "the first is back"),
            ((), _three(*_HERE), "the Service has gone"),
            (_web(THERE), _three(*_THERE), "another of its name has come"),
        ),
        protocols=("UDP",),
        **_HELD,
    ),
    Scenario(
        "Established",
        "UDP flows that are older than the endpoints",
        _steps((_web(NOTHING), _three(REJECT, REJECT), ""), (_web(HERE), _three(*_HERE), "an endpoint has come")),
        protocols=("UDP",),
        **_HELD,
    ),
    Scenario(
        "Established",
        "UDP flows that are older than the Service",
        _steps(((), _three(DROP, UNTOUCHED), ""), (_web(HERE), _three(*_HERE), "it has come")),
        protocols=("UDP",),
        **_HELD,
    ),
    Scenario(
        "Established",
        "UDP flows stay with an endpoint that serves while it terminates",
        _steps(
            (_web(HERE), _three(*_HERE), ""),
            (
                _web(Slice((Endpoint("local-1", **LEAVING), Endpoint("remote-1")))),
                (*_three(*_HERE), Flow("client", CLUSTER_IP, to("remote-1"))),
                "it terminates, another has come",
            ),
            (_web(Slice((Endpoint("local-1", **GONE), Endpoint("remote-1")))), _three(*_THERE), "it does not serve any more"),
        ),
        protocols=("UDP",),
        **_HELD,
    ),
    Scenario(
        "Established",
        "UDP flows know no policies and no topology",
        _steps(
            (_web(THERE), _three(*_THERE), ""),
            (
                _web(BOTH, spec={"internalTrafficPolicy": "Local"}),
                (*_three(*_THERE), Flow("client", CLUSTER_IP, to("local-1"))),
                "the internal policy is Local, an endpoint here has come",
            ),
            (_web(NEAR), (*_three(*_THERE), Flow("client", CLUSTER_IP, to("local-1"))), "it is for this zone"),
        ),
        protocols=("UDP",),
        **_HELD,
    ),
]  # fmt: skip

NODE_CHANGES = [
    Scenario(
        "Topology",
        "the node's zone label changes",
        tuple(
            Step((Service((NEAR,)),), (Flow("client", CLUSTER_IP, expect),), after=after)
            for expect, after in (
                (to("local-1"), ""),
                (to("remote-1"), "it is another zone's"),
                (to("local-1", "remote-1"), "it has gone"),
                (to("local-1"), "it is the first again"),
            )
        ),
        configurations=("zone label changes",),
    ),
]

_EXTRA = Target("ExtraRange")

RANGES = [
    Scenario(
        "ServiceCIDRs",
        "a range comes and goes",
        tuple(
            Step((Service((HERE,)),), tuple(Flow(client, _EXTRA, UNTOUCHED) for client in ("client", "node", "outside")), after=after, extra_range=there)
            for there, after in ((False, ""), (True, "it has come"), (False, "it has gone"))
        ),
    ),
]  # fmt: skip

SPECIAL = [
    Scenario(
        "LoadBalancer",
        "a link-local address",
        (
            Step(
                (Service((HERE,), type="LoadBalancer", ingress=(Ingress(literal="169.254.7.7"), Ingress())),),
                tuple(
                    flow
                    for client in ("client", "node", "outside")
                    for flow in (
                        Flow(client, Target("Literal", literal="169.254.7.7"), masqueraded("local-1")),
                        Flow(client, Target("LoadBalancer", number=1), masqueraded("local-1")),
                    )
                ),
            ),
        ),
        families=(4,),
    ),
]

SCENARIOS = [*MADE, *NODE_CHANGES, *RANGES, *SPECIAL]
