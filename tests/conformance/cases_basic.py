"""Services without endpoints, ClusterIPs, and which clients they masquerade."""

from __future__ import annotations

from tests.conformance.model import (
    CLUSTER_IP,
    DROP,
    EXTERNAL_IP,
    LOAD_BALANCER,
    MASQUERADES,
    NODE_PORT,
    REJECT,
    UNALLOCATED,
    Endpoint,
    Flow,
    Ingress,
    Port,
    Scenario,
    Service,
    Slice,
    Target,
    masqueraded,
    scenario,
    to,
)
from tests.conformance.objects import port

BOTH = Slice((Endpoint("local-1"), Endpoint("remote-1")))
EXPOSED = {"type": "LoadBalancer", "external_ips": 1, "ingress": (Ingress(),)}

NO_ENDPOINTS = [
    scenario(
        "NoEndpointsReject",
        name,
        Service(slices, **EXPOSED, spec=spec),
        *(
            Flow(client, target, REJECT)
            for client in ("client", "visitor", "node", "outside")
            for target in (CLUSTER_IP, EXTERNAL_IP, NODE_PORT, LOAD_BALANCER)
        ),
    )
    for name, slices, spec in (
        ("no slice", (), {}),
        ("an empty slice, policies Local", (Slice(),), {"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"}),
        ("none that is ready or serves", (Slice((Endpoint("local-1", ready=False), Endpoint("remote-1", ready=False, serving=False, terminating=True))),), {}),
    )
]  # fmt: skip

_DNS = (
    port(80, 8080, protocols=("TCP",)),
    port(443, 8081, protocols=("TCP",)),
    Port(53, 8082, "dns-u", ("UDP",)),
    Port(53, 8081, "dns-t", ("TCP",)),
)

CLUSTER_IPS = [
    scenario(
        "ClusterIPGeneral",
        "one endpoint",
        Service((Slice((Endpoint("local-1"),)),)),
        Flow("client", CLUSTER_IP, to("local-1")),
        Flow("local-2", CLUSTER_IP, to("local-1")),
        Flow("local-1", CLUSTER_IP, masqueraded("local-1")),
        Flow("visitor", CLUSTER_IP, to("local-1")),
        Flow("node", CLUSTER_IP, masqueraded("local-1")),
        Flow("outside", CLUSTER_IP, masqueraded("local-1")),
        Flow("client", UNALLOCATED, DROP),
        Flow("node", UNALLOCATED, DROP),
        Flow("outside", UNALLOCATED, DROP),
        Flow("client", Target("ClusterIP", 443), REJECT),
        Flow("node", Target("ClusterIP", 443), REJECT),
        Flow("outside", Target("ClusterIP", 443), REJECT),
    ),
    scenario(
        "ClusterIPGeneral",
        "endpoints on both nodes",
        Service((BOTH,)),
        Flow("client", CLUSTER_IP, to("local-1", "remote-1")),
        Flow("local-1", CLUSTER_IP, masqueraded("local-1") | to("remote-1")),
        Flow("node", CLUSTER_IP, masqueraded("local-1", "remote-1")),
        Flow("outside", CLUSTER_IP, masqueraded("local-1", "remote-1")),
    ),
    scenario(
        "ClusterIPGeneral",
        "TCP and UDP on one port, with target ports",
        Service((BOTH,), ports=_DNS),
        Flow("client", Target("ClusterIP", 80, protocol="TCP"), to("local-1", "remote-1")),
        Flow("client", Target("ClusterIP", 443, protocol="TCP"), to("local-1:8081", "remote-1:8081")),
        Flow("client", Target("ClusterIP", 53, protocol="TCP"), to("local-1:8081", "remote-1:8081")),
        Flow("client", Target("ClusterIP", 53, protocol="UDP"), to("local-1:8082", "remote-1:8082")),
        Flow("client", Target("ClusterIP", 80, protocol="UDP"), REJECT),
        Flow("client", Target("ClusterIP", 443, protocol="UDP"), REJECT),
        protocols=("TCP",),
    ),
    scenario(
        "ClusterIPGeneral",
        "two Services, a port of one",
        (
            Service((Slice((Endpoint("local-1"),)),), name="web"),
            Service((Slice((Endpoint("local-2"),)),), name="other", ports=(port(80, 8080), port(443, 8081))),
        ),
        Flow("client", CLUSTER_IP, to("local-1")),
        Flow("client", Target("ClusterIP", 443), REJECT),
        Flow("client", Target("ClusterIP", 80, "other"), to("local-2")),
        Flow("client", Target("ClusterIP", 443, "other"), to("local-2:8081")),
    ),
]

# What clients get under the four configurations of detector and masqueradeAll. Without a detector nobody is known to
# come from outside, so nobody is masqueraded to a ClusterIP, and no pod is known to be one, so none is short-circuited.
_WITHOUT, _ALL, _ALL_WITHOUT = MASQUERADES[1:]
_EVERYBODY = ("local-1", "remote-1")


def _masquerades(name: str, *, internal: tuple[str, ...], external: tuple[str, ...], spec: dict[str, str]) -> Scenario:
    local = spec.get("externalTrafficPolicy") == "Local"
    flows = [
        Flow("client", CLUSTER_IP, to(*internal), {_ALL: masqueraded(*internal), _ALL_WITHOUT: masqueraded(*internal)})
    ]
    for client in ("node", "outside"):
        flows.append(Flow(client, CLUSTER_IP, masqueraded(*internal), {_WITHOUT: to(*internal)}))
    for target in (NODE_PORT, LOAD_BALANCER, EXTERNAL_IP):
        if local:
            unknown = {_WITHOUT: to(*external), _ALL_WITHOUT: to(*external)}
            flows.append(Flow("client", target, to(*_EVERYBODY), unknown))
            flows.append(Flow("node", target, masqueraded(*_EVERYBODY)))
            flows.append(Flow("outside", target, to(*external)))
        else:
            flows += [Flow(client, target, masqueraded(*external)) for client in ("client", "node", "outside")]
    return scenario(
        "InternalExternalMasquerade", name, Service((BOTH,), **EXPOSED, spec=spec), *flows, configurations=MASQUERADES
    )


MASQUERADE = [
    _masquerades("both policies Cluster", internal=_EVERYBODY, external=_EVERYBODY, spec={}),
    _masquerades(
        "external policy Local", internal=_EVERYBODY, external=("local-1",), spec={"externalTrafficPolicy": "Local"}
    ),
    _masquerades(
        "internal policy Local", internal=("local-1",), external=_EVERYBODY, spec={"internalTrafficPolicy": "Local"}
    ),
]

SCENARIOS = [*NO_ENDPOINTS, *CLUSTER_IPS, *MASQUERADE]
