"""Which objects a proxy reads, and how: labels, types, families, names of ports, slices, addresses of old."""

from __future__ import annotations

from tests.conformance.cases_basic import BOTH, EXPOSED
from tests.conformance.cases_external import HERE, LOCAL, PUBLIC, THERE
from tests.conformance.model import (
    CLUSTER_IP,
    DROP,
    EXTERNAL_IP,
    FAMILIES,
    INTERPRETER,
    KUBE_PROXY,
    LOAD_BALANCER,
    NODE,
    NODE_PORT,
    PROTOCOLS,
    REJECT,
    SUPER,
    UNTOUCHED,
    Endpoint,
    Flow,
    Port,
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

_REFUSED = "an API server refuses such objects"

_OLD = {"columns": (INTERPRETER,), "why": _REFUSED}
PROXY_NAME, HEADLESS = "service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"


def _http(number: int | None, name: str = "http") -> tuple[tuple[str, str, int | None], ...]:
    """Ports of a slice for a `port` of a Service, on another number."""
    return tuple((f"{name}-{protocol.lower()}", protocol, number) for protocol in PROTOCOLS)


LABELS = [
    scenario(
        "Selection",
        "a Service with the label service-proxy-name",
        Service((BOTH,), labels={PROXY_NAME: "another"}, **EXPOSED),
        *(Flow(client, CLUSTER_IP, DROP) for client in ("client", "node", "outside")),
        *(Flow("outside", target, UNTOUCHED) for target in PUBLIC),
    ),
    scenario(
        "Selection",
        "an EndpointSlice with the label service-proxy-name",
        Service((Slice((Endpoint("local-1"),), labels={PROXY_NAME: "another"}),)),
        Flow("client", CLUSTER_IP, to("local-1")),
    ),
    scenario(
        "Selection",
        "an EndpointSlice with the label headless",
        Service((Slice((Endpoint("local-1"),), labels={HEADLESS: ""}), THERE)),
        Flow("client", CLUSTER_IP, to("remote-1")),
    ),
    scenario(
        "Selection",
        "a Service with the label headless",
        Service((HERE,), labels={HEADLESS: ""}),
        Flow("client", CLUSTER_IP, to("local-1")),
    ),
    Scenario(
        "Selection",
        "the label service-proxy-name comes and goes",
        tuple(
            Step((Service((HERE,), labels=labels, **EXPOSED),), (Flow("client", CLUSTER_IP, expect), Flow("outside", LOAD_BALANCER, public)), after=after)
            for labels, expect, public, after in (
                ({}, to("local-1"), masqueraded("local-1"), ""),
                ({PROXY_NAME: "another"}, DROP, UNTOUCHED, "it has come"),
                ({}, to("local-1"), masqueraded("local-1"), "it has gone"),
            )
        ),
    ),
    scenario(
        "Selection",
        "an EndpointSlice of another Service, and one of none",
        Service((HERE, Slice((Endpoint("remote-1"),), service="another"), Slice((Endpoint("remote-2"),), service=""))),
        Flow("client", CLUSTER_IP, to("local-1")),
    ),
    scenario(
        "Selection",
        "an EndpointSlice of names",
        Service((Slice((Endpoint("local-1"),), declared="FQDN"), THERE)),
        Flow("client", CLUSTER_IP, to("remote-1")),
        **_OLD,
    ),
]  # fmt: skip

TYPES = [
    Scenario(
        "Selection",
        "the type changes",
        (
            Step((Service((HERE,), **EXPOSED),), (Flow("client", CLUSTER_IP, to("local-1")), Flow("outside", LOAD_BALANCER, masqueraded("local-1")), Flow("outside", NODE_PORT, masqueraded("local-1")))),
            Step((Service((HERE,), type="NodePort"),), (Flow("client", CLUSTER_IP, to("local-1")), Flow("outside", LOAD_BALANCER, UNTOUCHED), Flow("outside", NODE_PORT, masqueraded("local-1"))), after="it is NodePort"),
            Step((Service((HERE,)),), (Flow("client", CLUSTER_IP, to("local-1")), Flow("outside", NODE_PORT, UNTOUCHED)), after="it is ClusterIP"),
            Step((Service((HERE,), type="ExternalName"),), (Flow("client", CLUSTER_IP, DROP), Flow("outside", NODE_PORT, UNTOUCHED)), after="it is ExternalName"),
            Step((Service((HERE,), **EXPOSED),), (Flow("client", CLUSTER_IP, to("local-1")), Flow("outside", LOAD_BALANCER, masqueraded("local-1")), Flow("outside", NODE_PORT, masqueraded("local-1"))), after="it is LoadBalancer again"),
        ),
    ),
    Scenario(
        "Selection",
        "a Service goes and comes back",
        tuple(
            Step(services, (Flow("client", CLUSTER_IP, inside), *(Flow("outside", target, outside) for target in PUBLIC)), after=after)
            for services, inside, outside, after in (
                ((Service((HERE,), **EXPOSED),), to("local-1"), masqueraded("local-1"), ""),
                ((), DROP, UNTOUCHED, "it has gone"),
                ((Service((THERE,), **EXPOSED),), to("remote-1"), masqueraded("remote-1"), "another of its name has come"),
            )
        ),
    ),
    Scenario(
        "Selection",
        "ports come and go",
        tuple(
            Step(
                (Service((HERE,), ports=tuple(port(number, 8080) for number in numbers)),),
                tuple(Flow("client", Target("ClusterIP", number), to("local-1") if number in numbers else REJECT) for number in (80, 81, 82)),
                after=after,
            )
            for numbers, after in (((80, 81), ""), ((81, 82), "one has gone, one has come"), ((80, 81, 82), "all are there"))
        ),
    ),
    scenario(
        "Selection",
        "ExternalName with a ClusterIP",
        Service((HERE,), spec={"type": "ExternalName", "externalName": "example.com"}),
        Flow("client", CLUSTER_IP, DROP),
        **_OLD,
    ),
]  # fmt: skip

STACKS = [
    *(
        scenario(
            "DualStack",
            f"IPv{ip} only, dialled by IPv{dialled}",
            Service((HERE,), families=(ip,), **EXPOSED),
            *((Flow("client", CLUSTER_IP, to("local-1")),) if ip == dialled else ()),
            *(
                Flow(client, target, masqueraded("local-1") if ip == dialled else UNTOUCHED)
                for client in ("client", "node", "outside")
                for target in ((EXTERNAL_IP, LOAD_BALANCER, NODE_PORT) if ip == dialled else (LOAD_BALANCER, NODE_PORT))
            ),
            families=(dialled,),
        )
        for ip in FAMILIES
        for dialled in FAMILIES
    ),
    scenario(
        "DualStack",
        "IPv6 first",
        Service((BOTH,), families=(6, 4), **EXPOSED),
        Flow("client", CLUSTER_IP, to("local-1", "remote-1")),
        Flow("outside", LOAD_BALANCER, masqueraded("local-1", "remote-1")),
        Flow("outside", NODE_PORT, masqueraded("local-1", "remote-1")),
    ),
    *(
        scenario(
            "DualStack",
            f"endpoints of IPv{ip} only, dialled by IPv{dialled}",
            Service((Slice(BOTH.endpoints, families=(ip,)),), **EXPOSED),
            Flow("client", CLUSTER_IP, to("local-1", "remote-1") if ip == dialled else REJECT),
            *(Flow("outside", target, masqueraded("local-1", "remote-1") if ip == dialled else REJECT) for target in PUBLIC),
            families=(dialled,),
        )
        for ip in FAMILIES
        for dialled in FAMILIES
    ),
    scenario(
        "DualStack",
        "a local endpoint in one family, elsewhere in the other",
        Service((Slice((Endpoint("local-1"),), families=(4,)), Slice((Endpoint("remote-1"),), families=(6,))), **EXPOSED, spec=LOCAL),
        Flow("outside", LOAD_BALANCER, to("local-1")),
        families=(4,),
    ),
    scenario(
        "DualStack",
        "elsewhere in this family, a local endpoint in the other",
        Service((Slice((Endpoint("local-1"),), families=(4,)), Slice((Endpoint("remote-1"),), families=(6,))), **EXPOSED, spec=LOCAL),
        Flow("outside", LOAD_BALANCER, DROP),
        families=(6,),
    ),
    scenario(
        "DualStack",
        "addresses of another family than their slice says",
        Service((Slice((Endpoint("local-1"),), families=(6,), declared="IPv4"), Slice((Endpoint("remote-1"),), families=(4,)))),
        Flow("client", CLUSTER_IP, REJECT),
        families=(6,),
        **_OLD,
    ),
]  # fmt: skip

SLICES = [
    scenario(
        "EndpointSlices",
        "one endpoint in two slices",
        Service((BOTH, Slice((Endpoint("local-1"), Endpoint("remote-2"))))),
        Flow("client", CLUSTER_IP, to("local-1", "remote-1", "remote-2")),
    ),
    scenario(
        "EndpointSlices",
        "one endpoint twice, terminating and ready",
        Service((Slice((Endpoint("local-1", False, True, True),)), HERE)),
        Flow("client", CLUSTER_IP, to("local-1")),
    ),
    scenario(
        "EndpointSlices",
        "one endpoint twice, ready and terminating",
        Service((HERE, Slice((Endpoint("local-1", False, True, True),)))),
        Flow("client", CLUSTER_IP, to("local-1")),
    ),
    scenario(
        "EndpointSlices",
        "one endpoint twice, terminating and not yet ready: an address used again",
        Service((Slice((Endpoint("local-1", False, True, True),)), Slice((Endpoint("local-1", False, False, False),)))),
        Flow("client", CLUSTER_IP, REJECT),
    ),
    scenario(
        "EndpointSlices",
        "different target ports",
        Service(
            (
                Slice((Endpoint("local-1"),)),
                Slice((Endpoint("remote-1"),), ports=(("http-tcp", "TCP", 8081), ("http-udp", "UDP", 8082))),
            )
        ),
        Flow("client", Target("ClusterIP", protocol="TCP"), to("local-1", "remote-1:8081")),
        Flow("client", Target("ClusterIP", protocol="UDP"), to("local-1", "remote-1:8082")),
        protocols=("TCP",),
    ),
    scenario(
        "EndpointSlices",
        "one pod on two ports",
        Service((HERE, Slice((Endpoint("local-1"),), ports=_http(8081)))),
        Flow("client", CLUSTER_IP, to("local-1", "local-1:8081")),
        Flow("local-1", CLUSTER_IP, masqueraded("local-1", "local-1:8081")),
    ),
    scenario(
        "EndpointSlices",
        "ports are matched by name",
        Service(
            (Slice(BOTH.endpoints, ports=(*_http(8082, "p80"), ("other", "TCP", 8081))),),
            ports=(port(80, 8080), port(81, 8081)),
        ),
        Flow("client", Target("ClusterIP", 80), to("local-1:8082", "remote-1:8082")),
        Flow("client", Target("ClusterIP", 81), REJECT),
    ),
    scenario(
        "EndpointSlices",
        "ports are matched by protocol",
        Service((Slice(BOTH.endpoints, ports=(("http-tcp", "UDP", 8080), ("http-udp", "TCP", 8080))),)),
        Flow("client", CLUSTER_IP, REJECT),
    ),
    scenario(
        "EndpointSlices",
        "a port without a name",
        Service((Slice(BOTH.endpoints, ports=(("", "TCP", 8081),)),), ports=(Port(80, 8080, "", ("TCP",)),)),
        Flow("client", Target("ClusterIP", protocol="TCP"), to("local-1:8081", "remote-1:8081")),
        protocols=("TCP",),
    ),
    scenario(
        "EndpointSlices",
        "a port without a number",
        Service((Slice((Endpoint("local-1"),), ports=_http(None)), THERE)),
        Flow("client", CLUSTER_IP, to("remote-1")),
    ),
    scenario(
        "EndpointSlices",
        "a port whose name is not said",
        Service((Slice((Endpoint("local-1"),), ports=((None, "TCP", 8080),)),), ports=(Port(80, 8080, "", ("TCP",)),)),
        Flow("client", CLUSTER_IP, REJECT),
        protocols=("TCP",),
        **_OLD,
    ),
    Scenario(
        "EndpointSlices",
        "endpoints move between slices",
        tuple(
            Step((Service((Slice(one), Slice(two))),), (Flow("client", CLUSTER_IP, to("local-1", "remote-1")),), after=after)
            for one, two, after in (
                (BOTH.endpoints, (), ""),
                (BOTH.endpoints, BOTH.endpoints, "they are in both"),
                ((), BOTH.endpoints, "they have left the first"),
            )
        ),
    ),
    Scenario(
        "EndpointSlices",
        "slices come before and after their Service",
        (
            Step((Service((), name="later"),), ()),
            Step((Service((BOTH,), name="later"), Service((), name="web")), (Flow("client", Target("ClusterIP", service="later"), to("local-1", "remote-1")), Flow("client", CLUSTER_IP, REJECT)), after="the slices of one, and another Service have come"),
            Step((Service((HERE,), name="later"), Service((THERE,), name="web")), (Flow("client", Target("ClusterIP", service="later"), to("local-1")), Flow("client", CLUSTER_IP, to("remote-1"))), after="all have changed"),
        ),
    ),
]  # fmt: skip

HOST_NETWORK = [
    scenario(
        "HostNetwork",
        name,
        Service((Slice((Endpoint(NODE),)),), **EXPOSED, spec=spec),
        Flow("client", CLUSTER_IP, to(NODE)),
        Flow(NODE, CLUSTER_IP, masqueraded(NODE)),
        # A masquerade happens on the way out; what is delivered on the node itself keeps its source.
        *(Flow(client, target, to(NODE)) for client in ("client", "outside") for target in PUBLIC),
        Flow("outside", CLUSTER_IP, to(NODE)),
        columns=(INTERPRETER, SUPER, KUBE_PROXY),
        why="the host's network is no tenant's",
    )
    for name, spec in (("an endpoint of this node's", {}), ("the same, policies Local", {"internalTrafficPolicy": "Local"} | LOCAL))
]  # fmt: skip

LEGACY = [
    scenario(
        "BadIPs",
        "addresses with leading zeros",
        Service((BOTH,), legacy=True, source_ranges=("outside",), **EXPOSED),
        Flow("client", CLUSTER_IP, to("local-1", "remote-1")),
        Flow("outside", LOAD_BALANCER, masqueraded("local-1", "remote-1")),
        Flow("blocked", LOAD_BALANCER, DROP),
        Flow("outside", EXTERNAL_IP, masqueraded("local-1", "remote-1")),
        families=(4,),
        **_OLD,
    ),
    scenario(
        "BadIPs",
        "ranges with leading zeros",
        Service((HERE,), **EXPOSED, spec={"loadBalancerSourceRanges": ["192.168.077.200/032"]}),
        Flow("outside", LOAD_BALANCER, masqueraded("local-1")),
        Flow("blocked", LOAD_BALANCER, DROP),
        families=(4,),
        **_OLD,
    ),
]

SCENARIOS = [*LABELS, *TYPES, *STACKS, *SLICES, *HOST_NETWORK, *LEGACY]
