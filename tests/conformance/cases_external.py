"""What clients outside see: load balancers, node ports, external IPs and the external traffic policy."""

from __future__ import annotations

from tests.conformance.cases_basic import BOTH, EXPOSED
from tests.conformance.model import (
    CLUSTER_IP,
    DROP,
    EXTERNAL_IP,
    INTERPRETER,
    KUBE_PROXY,
    LOAD_BALANCER,
    NODE_PORT,
    REJECT,
    SECONDARY,
    SUPER,
    UNTOUCHED,
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

HERE, THERE = Slice((Endpoint("local-1"),)), Slice((Endpoint("remote-1"),))
LOCAL = {"externalTrafficPolicy": "Local"}
SECOND = Target("LoadBalancer", number=1)
PUBLIC = (EXTERNAL_IP, LOAD_BALANCER, NODE_PORT)
_OF_NODE = (INTERPRETER, SUPER, KUBE_PROXY)
_NODES = "the node's own addresses are the super cluster's"
_TWO = {"type": "LoadBalancer", "external_ips": 1, "ingress": (Ingress(), Ingress())}


def _ranges(name: str, *flows: Flow, **more: object) -> Scenario:
    configured = {"configurations": more.pop("configurations")} if "configurations" in more else {}
    return scenario("LoadBalancer", name, Service((HERE,), **{**_TWO, **more}), *flows, **configured)  # type: ignore[arg-type]


LOAD_BALANCERS = [
    _ranges(
        "source ranges",
        Flow("client", CLUSTER_IP, to("local-1")),
        *(Flow(client, NODE_PORT, masqueraded("local-1")) for client in ("outside", "blocked", "client")),
        *(Flow(client, EXTERNAL_IP, masqueraded("local-1")) for client in ("outside", "blocked", "client")),
        *(Flow("outside", target, masqueraded("local-1")) for target in (LOAD_BALANCER, SECOND)),
        *(Flow("node", target, masqueraded("local-1")) for target in (LOAD_BALANCER, SECOND)),
        *(
            Flow(client, target, DROP)
            for client in ("blocked", "client", "visitor")
            for target in (LOAD_BALANCER, SECOND)
        ),
        source_ranges=("outside", "node"),
        padded=True,
    ),
    _ranges(
        "source ranges without the node",
        *(Flow("node", target, DROP) for target in (LOAD_BALANCER, SECOND)),
        Flow("node", NODE_PORT, masqueraded("local-1")),
        Flow("outside", LOAD_BALANCER, masqueraded("local-1")),
        source_ranges=("outside",),
    ),
    _ranges(
        "source ranges with the node, which has the addresses itself",
        *(Flow("node", target, masqueraded("local-1")) for target in (LOAD_BALANCER, SECOND)),
        Flow("outside", LOAD_BALANCER, masqueraded("local-1")),
        Flow("blocked", LOAD_BALANCER, DROP),
        source_ranges=("outside", "node"),
        held=True,
        configurations=("base", "second address"),
    ),
    _ranges(
        "source ranges without the node, which has the addresses itself",
        *(Flow("node", target, DROP) for target in (LOAD_BALANCER, SECOND)),
        Flow("outside", LOAD_BALANCER, masqueraded("local-1")),
        source_ranges=("outside",),
        held=True,
    ),
    _ranges(
        "source ranges, external policy Local",
        Flow("outside", LOAD_BALANCER, to("local-1")),
        Flow("blocked", LOAD_BALANCER, DROP),
        Flow("client", LOAD_BALANCER, DROP),
        Flow("blocked", NODE_PORT, to("local-1")),
        source_ranges=("outside",),
        spec=LOCAL,
    ),
    scenario(
        "LoadBalancer",
        "source ranges, no endpoint",
        Service((), source_ranges=("outside",), **EXPOSED),
        Flow("outside", LOAD_BALANCER, REJECT),
        Flow("blocked", LOAD_BALANCER, DROP),
        Flow("blocked", NODE_PORT, REJECT),
    ),
    *(
        scenario(
            "LoadBalancer",
            f"source ranges of IPv{ip} only, dialled by IPv{dialled}",
            Service(
                (HERE,),
                **EXPOSED,
                spec={"loadBalancerSourceRanges": ["192.168.77.200/32" if ip == 4 else "fd77::200/128"]},
            ),
            Flow("outside", LOAD_BALANCER, masqueraded("local-1")),
            Flow("blocked", LOAD_BALANCER, DROP if ip == dialled else masqueraded("local-1")),
            families=(dialled,),
        )
        for ip in (4, 6)
        for dialled in (4, 6)
    ),
    scenario(
        "LoadBalancer",
        "no source ranges",
        Service((BOTH,), **_TWO),
        *(
            Flow(client, target, masqueraded("local-1", "remote-1"))
            for client in ("client", "visitor", "node", "outside", "blocked")
            for target in (LOAD_BALANCER, SECOND)
        ),
        Flow("local-1", LOAD_BALANCER, masqueraded("local-1", "remote-1")),
    ),
    scenario(
        "LoadBalancer",
        "without node ports",
        Service(
            (HERE,),
            type="LoadBalancer",
            ports=(Port(node_port=False),),
            ingress=(Ingress(),),
            spec={"allocateLoadBalancerNodePorts": False},
        ),
        Flow("outside", LOAD_BALANCER, masqueraded("local-1")),
        Flow("client", LOAD_BALANCER, masqueraded("local-1")),
    ),
    scenario(
        "LoadBalancer",
        "ingress without addresses",
        Service((HERE,), type="LoadBalancer", ingress=(Ingress(hostname="lb.example.com"),)),
        *(Flow(client, LOAD_BALANCER, UNTOUCHED) for client in ("client", "node", "outside")),
        Flow("outside", NODE_PORT, masqueraded("local-1")),
    ),
    *(
        scenario(
            "LoadBalancer",
            f"ipMode {mode or 'not said'}",
            Service((HERE,), type="LoadBalancer", ingress=(Ingress(mode),)),
            *(
                Flow(client, LOAD_BALANCER, UNTOUCHED if mode == "Proxy" else masqueraded("local-1"))
                for client in ("client", "node", "outside")
            ),
            Flow("outside", NODE_PORT, masqueraded("local-1")),
            Flow("client", CLUSTER_IP, to("local-1")),
        )
        for mode in (None, "VIP", "Proxy")
    ),
    scenario(
        "LoadBalancer",
        "ipMode Proxy and source ranges",
        Service((HERE,), type="LoadBalancer", ingress=(Ingress("Proxy"), Ingress("VIP")), source_ranges=("outside",)),
        Flow("blocked", LOAD_BALANCER, UNTOUCHED),
        Flow("blocked", SECOND, DROP),
        Flow("outside", SECOND, masqueraded("local-1")),
    ),
    scenario(
        "LoadBalancer",
        "a port that the Service does not have",
        Service((HERE,), **EXPOSED),
        *(
            Flow(client, Target(kind, 81), UNTOUCHED)
            for client in ("client", "node", "outside")
            for kind in ("LoadBalancer", "ExternalIP")
        ),
    ),
]

_ALL = "masquerade all, no detector"
_LISTED = "second address"

NODE_PORTS = [
    scenario(
        "NodePorts",
        "one endpoint",
        Service((HERE,), type="NodePort"),
        Flow("client", CLUSTER_IP, to("local-1"), {_ALL: masqueraded("local-1")}),
        *(
            Flow(client, NODE_PORT, masqueraded("local-1"), {_LISTED: UNTOUCHED})
            for client in ("client", "visitor", "local-1", "node", "outside")
        ),
        *(
            Flow(client, SECONDARY, UNTOUCHED, {_LISTED: masqueraded("local-1"), _ALL: masqueraded("local-1")})
            for client in ("client", "visitor", "node", "outside")
        ),
        configurations=("base", _LISTED, _ALL),
    ),
    scenario(
        "NodePorts",
        "no endpoint",
        Service((), type="NodePort"),
        *(Flow(client, NODE_PORT, REJECT, {_LISTED: UNTOUCHED}) for client in ("client", "node", "outside")),
        *(
            Flow(client, SECONDARY, UNTOUCHED, {_LISTED: REJECT, _ALL: REJECT})
            for client in ("client", "node", "outside")
        ),
        configurations=("base", _LISTED, _ALL),
    ),
    scenario(
        "NodePorts",
        "external policy Local, endpoints elsewhere",
        Service((THERE,), type="NodePort", spec=LOCAL),
        Flow("outside", NODE_PORT, DROP, {_LISTED: UNTOUCHED}),
        Flow("outside", SECONDARY, UNTOUCHED, {_LISTED: DROP, _ALL: DROP}),
        configurations=("base", _LISTED, _ALL),
    ),
    scenario(
        "NodePorts",
        "one port number for TCP and UDP with different targets",
        Service((HERE,), type="NodePort", ports=(Port(80, 8080, "t", ("TCP",)), Port(80, 8081, "u", ("UDP",)))),
        Flow("outside", Target("NodePort", protocol="TCP"), masqueraded("local-1:8080")),
        Flow("outside", Target("NodePort", protocol="UDP"), masqueraded("local-1:8081")),
        protocols=("TCP",),
    ),
    scenario(
        "NodePorts",
        "one protocol only",
        Service((HERE,), type="NodePort", ports=(Port(protocols=("TCP",)),)),
        Flow("outside", Target("NodePort", protocol="TCP"), masqueraded("local-1")),
        Flow("outside", Target("NodePort", protocol="UDP"), UNTOUCHED),
        protocols=("TCP",),
    ),
]

POLICY_CLUSTER = [
    scenario(
        "ExternalTrafficPolicy",
        "Cluster, endpoints on both nodes",
        Service((BOTH,), **EXPOSED),
        Flow("client", CLUSTER_IP, to("local-1", "remote-1")),
        *(
            Flow(client, target, masqueraded("local-1", "remote-1"))
            for client in ("client", "local-1", "visitor", "node", "outside")
            for target in PUBLIC
        ),
    ),
    scenario(
        "ExternalTrafficPolicy",
        "Cluster, endpoints elsewhere",
        Service((THERE,), **EXPOSED),
        *(
            Flow(client, target, masqueraded("remote-1"))
            for client in ("client", "node", "outside")
            for target in PUBLIC
        ),
    ),
]

POLICY_LOCAL = [
    scenario(
        "ExternalTrafficPolicy",
        "Local, endpoints on both nodes",
        Service((BOTH,), **EXPOSED, spec=LOCAL),
        Flow("client", CLUSTER_IP, to("local-1", "remote-1")),
        *(
            flow
            for target in PUBLIC
            for flow in (
                Flow("client", target, to("local-1", "remote-1")),
                Flow("local-1", target, masqueraded("local-1") | to("remote-1")),
                Flow("node", target, masqueraded("local-1", "remote-1")),
                Flow("outside", target, to("local-1")),
            )
        ),
    ),
    scenario(
        "ExternalTrafficPolicy",
        "Local, two endpoints here",
        Service((Slice((Endpoint("local-1"), Endpoint("local-2"), Endpoint("remote-1"))),), **EXPOSED, spec=LOCAL),
        *(Flow("outside", target, to("local-1", "local-2")) for target in PUBLIC),
    ),
    scenario(
        "ExternalTrafficPolicy",
        "Local, a pod of another node is no client from outside",
        Service((HERE,), **EXPOSED, spec=LOCAL),
        *(Flow("visitor", target, to("local-1")) for target in PUBLIC),
    ),
    scenario(
        "ExternalTrafficPolicy",
        "Local, endpoints elsewhere",
        Service((THERE,), **EXPOSED, spec=LOCAL),
        Flow("client", CLUSTER_IP, to("remote-1")),
        *(
            flow
            for target in PUBLIC
            for flow in (
                Flow("client", target, to("remote-1"), {"no detector": DROP}),
                Flow("node", target, masqueraded("remote-1")),
                Flow("outside", target, DROP),
            )
        ),
        configurations=("base", "no detector"),
    ),
    scenario(
        "ExternalTrafficPolicy",
        "Local means nothing where nothing is external",
        Service((THERE,)),
        Flow("client", CLUSTER_IP, to("remote-1")),
        Flow("node", CLUSTER_IP, masqueraded("remote-1")),
    ),
    scenario(
        "ExternalTrafficPolicy",
        "Local with external IPs of a ClusterIP Service",
        Service((BOTH,), external_ips=2, spec=LOCAL),
        *(
            flow
            for target in (EXTERNAL_IP, Target("ExternalIP", number=1))
            for flow in (
                Flow("client", target, to("local-1", "remote-1")),
                Flow("node", target, masqueraded("local-1", "remote-1")),
                Flow("outside", target, to("local-1")),
            )
        ),
    ),
]

EXTERNAL_IPS = [
    scenario(
        "ExternalIPs",
        "of a ClusterIP Service",
        Service((BOTH,), external_ips=2),
        *(
            Flow(client, target, masqueraded("local-1", "remote-1"))
            for client in ("client", "visitor", "node", "outside")
            for target in (EXTERNAL_IP, Target("ExternalIP", number=1))
        ),
    ),
    scenario(
        "ExternalIPs",
        "the node's own address",
        Service((HERE,), ports=(Port(7780),), spec={"externalIPs": ["192.168.77.11", "fd77::11"]}),
        *(Flow(client, Target("Node", 7780), masqueraded("local-1")) for client in ("client", "node", "outside")),
        *(Flow(client, Target("Node", 7781), UNTOUCHED) for client in ("client", "outside")),
        columns=_OF_NODE,
        why=_NODES,
    ),
]

SCENARIOS = [*LOAD_BALANCERS, *NODE_PORTS, *POLICY_CLUSTER, *POLICY_LOCAL, *EXTERNAL_IPS]
