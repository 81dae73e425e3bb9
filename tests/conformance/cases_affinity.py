"""Session affinity by client address."""

from __future__ import annotations

from tests.conformance.cases_basic import EXPOSED
from tests.conformance.cases_external import LOCAL, PUBLIC
from tests.conformance.model import (
    CLUSTER_IP,
    COLUMNS,
    EXTERNAL_IP,
    INTERPRETER,
    LOAD_BALANCER,
    NODE_PORT,
    Apart,
    Endpoint,
    Flow,
    Hit,
    Scenario,
    Service,
    Slice,
    Step,
    Target,
    masqueraded,
    scenario,
    to,
)
from tests.conformance.objects import port

THREE = Slice((Endpoint("local-1"), Endpoint("remote-1"), Endpoint("remote-2")))
NAMES = ("local-1", "remote-1", "remote-2")
CLIENT_IP = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}}}
NONE = {"sessionAffinity": "None", "sessionAffinityConfig": None}
_MANY = tuple(port(8000 + number, 8080) for number in range(20))
_REAL = tuple(column for column in COLUMNS if column != INTERPRETER)

AFFINITY = [
    scenario(
        "SessionAffinity",
        "a client stays",
        Service((THREE,), spec=CLIENT_IP),
        Flow("client", CLUSTER_IP, to(*NAMES, sticky=True)),
        Flow("local-2", CLUSTER_IP, to(*NAMES, sticky=True)),
        Flow("node", CLUSTER_IP, masqueraded(*NAMES, sticky=True)),
        Flow("outside", CLUSTER_IP, masqueraded(*NAMES, sticky=True)),
    ),
    scenario(
        "SessionAffinity",
        "shared by all addresses",
        Service((THREE,), **EXPOSED, spec=CLIENT_IP | LOCAL),
        Flow("client", (CLUSTER_IP, NODE_PORT, LOAD_BALANCER, EXTERNAL_IP), to(*NAMES, sticky=True)),
        Flow("node", (CLUSTER_IP, NODE_PORT, LOAD_BALANCER, EXTERNAL_IP), masqueraded(*NAMES, sticky=True)),
        Flow("outside", PUBLIC, to("local-1", sticky=True)),
    ),
    scenario(
        "SessionAffinity",
        "shared by all addresses, external policy Cluster",
        Service((THREE,), **EXPOSED, spec=CLIENT_IP),
        Flow("outside", (CLUSTER_IP, *PUBLIC), masqueraded(*NAMES, sticky=True)),
        Flow("client", PUBLIC, masqueraded(*NAMES, sticky=True)),
    ),
    scenario(
        "SessionAffinity",
        "each port for itself",
        Service((THREE,), ports=_MANY, spec=CLIENT_IP),
        Flow(
            "client",
            tuple(Target("ClusterIP", one.number) for one in _MANY),
            Apart(frozenset(Hit(f"{name}:8080") for name in NAMES)),
        ),
    ),
    scenario(
        "SessionAffinity",
        "with a policy Local, among the endpoints here",
        Service(
            (Slice((Endpoint("local-1"), Endpoint("local-2"), Endpoint("remote-1"))),),
            spec=CLIENT_IP | {"internalTrafficPolicy": "Local"},
        ),
        Flow("client", CLUSTER_IP, to("local-1", "local-2", sticky=True)),
        Flow("node", CLUSTER_IP, masqueraded("local-1", "local-2", sticky=True)),
    ),
    Scenario(
        "SessionAffinity",
        "ends with its endpoint",
        (
            Step(
                (Service((THREE,), spec=CLIENT_IP),),
                (
                    Flow("client", CLUSTER_IP, to(*NAMES, sticky=True)),
                    Flow("node", CLUSTER_IP, masqueraded(*NAMES, sticky=True)),
                ),
            ),
            Step(
                (Service((Slice((Endpoint("remote-1"),)),), spec=CLIENT_IP),),
                (
                    Flow("client", CLUSTER_IP, to("remote-1", sticky=True)),
                    Flow("node", CLUSTER_IP, masqueraded("remote-1", sticky=True)),
                ),
                after="all endpoints but one have gone",
            ),
            Step(
                (Service((THREE,), spec=CLIENT_IP),),
                (
                    Flow("client", CLUSTER_IP, to("remote-1", sticky=True), columns=_REAL),
                    Flow("node", CLUSTER_IP, masqueraded("remote-1", sticky=True), columns=_REAL),
                ),
                after="they are back: clients stay where they have gone",
            ),
        ),
    ),
    Scenario(
        "SessionAffinity",
        "switched",
        tuple(
            Step((Service((THREE,), spec=spec),), (Flow("client", CLUSTER_IP, to(*NAMES, sticky=sticky)),), after=after)
            for spec, sticky, after in (
                (NONE, False, ""),
                (CLIENT_IP, True, "it is ClientIP"),
                (NONE, False, "it is None again"),
            )
        ),
    ),
]

SCENARIOS = AFFINITY
