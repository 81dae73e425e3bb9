"""Where vcproxy differs from kube-proxy on purpose. Whatever else differs is a fault, and fails.

A difference says which cases it is about and what happens there instead; the columns hold vcproxy to that as strictly as
to kube-proxy's behaviour elsewhere. `docs/kube-proxy-differences.md` is made of this list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.conformance.model import (
    CONFIGURATIONS,
    DROP,
    FLAT,
    INTERPRETER,
    KUBE_PROXY,
    OVERLAY,
    PODS,
    REJECT,
    SUPER,
    UNTOUCHED,
    Case,
    Expectation,
    To,
)

VCPROXY = (SUPER, OVERLAY, FLAT)


@dataclass(frozen=True)
class Difference:
    """`applies`: to a case in one of `columns`; `instead`: what happens in place of what the case expects."""

    name: str
    kube_proxy: str
    vcproxy: str
    reason: str
    columns: tuple[str, ...]
    applies: Callable[[Case], bool]
    instead: Callable[[Case], Expectation]


def _short_circuit_without_detector(case: Case) -> bool:
    """A pod on this node dials a public address of a Service whose external policy is Local, and nobody said which
    addresses are pods'.
    """
    step = case.scenario.steps[case.step]
    local = {one.name for one in step.services if one.spec.get("externalTrafficPolicy") == "Local"}
    public = case.flow.target_kinds <= {"NodePort", "ExternalIP", "LoadBalancer"}
    here = PODS.get(case.flow.client) == "here"
    known = CONFIGURATIONS[case.configuration].detector
    return here and public and not known and all(target.service in local for target in case.flow.targets)


def _flow_of_a_service_that_has_gone(case: Case) -> bool:
    here = {one.name for one in case.scenario.steps[case.step].services}
    went_on = case.flow.held and isinstance(case.expect, To)
    return went_on and case.protocol == "UDP" and not any(one.service in here for one in case.flow.targets)


def _flow_to_a_node_port_without_endpoints(case: Case) -> bool:
    services = {one.name: one for one in case.scenario.steps[case.step].services}
    used = [services[one.service] for one in case.flow.targets if one.service in services]
    empty = used and not any(held.endpoints for one in used for held in one.slices)
    going_on = case.flow.held and case.protocol == "UDP" and case.flow.target_kinds == {"NodePort"}
    return bool(empty) and going_on and isinstance(case.expect, To)


def _extra_range(case: Case) -> bool:
    return case.flow.target_kinds == {"ExtraRange"} and case.scenario.steps[case.step].extra_range


DIFFERENCES = (
    Difference(
        name="A tenant's pods are known without a detector",
        kube_proxy="Without a detector of local traffic (no `--cluster-cidr`) no client is known to be a pod, so pods "
        "that dial a node port, external or load-balancer IP of a Service with `externalTrafficPolicy: Local` get its "
        "local endpoints only.",
        vcproxy="A tenant's pods on this node are short-circuited to all endpoints all the same.",
        reason="Their attachment says that they are the tenant's pods. The detector is about the super cluster's.",
        columns=(FLAT,),
        applies=_short_circuit_without_detector,
        instead=lambda case: case.flow.expected("base"),
    ),
    Difference(
        name="UDP flows end with their Service",
        kube_proxy="When a Service is deleted, UDP flows to it go on to the endpoint that they had, for as long as "
        "their sender does not pause.",
        vcproxy="They end: what follows meets a ClusterIP that nobody has, or goes on as if there were no proxy.",
        reason="The address may soon be another Service's, and the endpoint's address another pod's.",
        columns=VCPROXY,
        applies=_flow_of_a_service_that_has_gone,
        instead=lambda case: DROP if case.flow.target_kinds == {"ClusterIP"} else UNTOUCHED,
    ),
    Difference(
        name="UDP flows to a node port end with the last endpoint",
        kube_proxy="When a Service loses its last endpoint, UDP flows to its ClusterIP and load-balancer IPs end, those "
        "to its node port go on to where the endpoint was.",
        vcproxy="They end, too, and are rejected.",
        reason="kube-proxy would have to tell flows to the node from others to that port number; vcproxy knows on which "
        "addresses it accepts node ports.",
        columns=VCPROXY,
        applies=_flow_to_a_node_port_without_endpoints,
        instead=lambda case: REJECT,
    ),
    Difference(
        name="A ServiceCIDR counts when it comes",
        kube_proxy="Addresses without a Service in a ServiceCIDR that was added while kube-proxy runs are not dropped "
        "before its next full sync, up to an hour later.",
        vcproxy="They are dropped at once, and left alone at once when the range goes.",
        reason="Until then a packet to a stale ClusterIP leaves the cluster by the default route.",
        columns=(INTERPRETER, *VCPROXY),
        applies=_extra_range,
        instead=lambda case: DROP,
    ),
    Difference(
        name="Some addresses are never a Service's",
        kube_proxy="A load-balancer status may name any address, also a loopback, link-local or multicast one.",
        vcproxy="Such an address is refused, and the packets to it are left alone; the Service's others work.",
        reason="Who may write a Service's status could otherwise take over the node's metadata service.",
        columns=(INTERPRETER, *VCPROXY),
        applies=lambda case: case.flow.target_kinds == {"Literal"},
        instead=lambda case: UNTOUCHED,
    ),
)


UNSHOWN = (
    "Two Services that want one public address and port: the first keeps it, the other is told and gets it later. In "
    "kube-proxy the last one written wins.",
    "Affinity timeouts have three significant digits, rounded up: 10800 s are kept for 10800 s, 12345 s for 12400 s.",
    "IPv6 clients that differ in nothing but the first 32 bits of their address share an affinity binding.",
)
"""Differences that the table has no case for; other tests hold vcproxy to them."""


@dataclass(frozen=True)
class Beyond:
    """A difference of the process, not of what happens to a packet. `seen`: the test that shows it."""

    name: str
    kube_proxy: str
    vcproxy: str
    reason: str
    seen: str


BEYOND = (
    Beyond(
        name="A node that changes is followed",
        kube_proxy="Ends when its Node's addresses change, with `NodeCIDR` when its podCIDRs do, and when its Node is "
        "deleted; whoever started it starts it again. With `NodeCIDR` it programs nothing for up to five minutes while "
        "there are no podCIDRs, and then ends.",
        vcproxy="Goes by the new addresses and podCIDRs at once. A Node that is deleted changes nothing until there is "
        "one again, but that `/healthz` is 503. Without podCIDRs Services work, and no client counts as a local pod.",
        reason="Ending is how kube-proxy reads its configuration anew. There is nothing here that would need it, and a "
        "process that ends programs nothing meanwhile.",
        seen="e2e/test_dropin.py::test_node_ports_follow_the_nodes_addresses",
    ),
    Beyond(
        name="NodePorts follow addresses that appear later",
        kube_proxy="With CIDRs in `--nodeport-addresses`, the node's addresses are looked up in full syncs only: one "
        "that appears later may wait for an hour.",
        vcproxy="Addresses are followed by rtnetlink.",
        reason="It costs one element.",
        seen="tests/unit/node/test_nodestate.py::test_where_node_ports_are_accepted",
    ),
    Beyond(
        name="`primary` is about both families",
        kube_proxy="A family in which the Node has no address is one that `--nodeport-addresses` says nothing about, "
        "and so NodePorts are accepted on all its addresses (with a message in the log).",
        vcproxy="Such a family has no primary address, and NodePorts are accepted on none. CIDRs of one family alone "
        "mean what they mean to kube-proxy: all addresses of the other, with a warning.",
        reason="Who says `primary` wants fewer addresses.",
        seen="tests/unit/node/test_nodestate.py::test_where_node_ports_are_accepted",
    ),
    Beyond(
        name="`all` means the addresses on the node's devices",
        kube_proxy="Whatever the routing table calls local (`fib daddr type local`) but loopback: so prefixes that are "
        "routed to the node as a whole (`ip route add local ...`), too.",
        vcproxy="Every address of a device but loopback.",
        reason="Where node ports are accepted is a set of addresses; the ruleset has one form for all of this.",
        seen="tests/unit/node/test_nodestate.py::test_where_node_ports_are_accepted",
    ),
    Beyond(
        name="`localhost` needs no feature gate",
        kube_proxy="NodePorts on loopback (TCP, relayed in user space) exist with the alpha gate "
        "`KubeProxyNFTablesLocalhostNodePorts`. With it, what is not served on loopback is rejected by a rule.",
        vcproxy="They exist wherever `localhost`, or a loopback CIDR, stands in `--nodeport-addresses`; the gate set to "
        "false turns them off. What is not served is refused by the kernel, as nobody listens. After a restart they are "
        "there once the brain has spoken; connections end with the process, as kube-proxy's do.",
        reason="Naming it is asking for it.",
        seen="e2e/test_dropin.py::test_node_ports_on_loopback",
    ),
    Beyond(
        name="No mode is nftables mode",
        kube_proxy="Unset, the mode is iptables, in which unset `--nodeport-addresses` mean all addresses, loopback "
        "among them.",
        vcproxy="There is one way to program a node, which is closest to nftables mode; unset `--nodeport-addresses` "
        "mean `primary`, as in that mode. `iptables` and `ipvs` are accepted, with a warning.",
        reason="nftables mode is where kube-proxy is going (KEP-5343).",
        seen="tests/unit/kubeproxy/test_configuration.py",
    ),
    Beyond(
        name="Leftovers of other modes stay until they are asked to go",
        kube_proxy="Removes what its other modes left, before it programs anything.",
        vcproxy="Names them; `--take-over` removes them when the super cluster's Services are programmed.",
        reason="Nothing is to be interrupted, and on a node where kube-proxy keeps the super cluster its rules are none "
        "of ours.",
        seen="e2e/test_dropin.py::test_no_connection_notices_that_vcproxy_takes_over",
    ),
    Beyond(
        name="An empty `--metrics-bind-address` means none",
        kube_proxy="Refuses it.",
        vcproxy="Serves no metrics.",
        reason="Some want none.",
        seen="tests/unit/kubeproxy/test_flags.py",
    ),
)


def difference(case: Case, column: str) -> Difference | None:
    """The difference that a case shows in a column of vcproxy's."""
    if column == KUBE_PROXY:
        return None
    return next((one for one in DIFFERENCES if column in one.columns and one.applies(case)), None)


def expected(case: Case, column: str) -> Expectation:
    """What must happen to a case in a column."""
    found = difference(case, column)
    return found.instead(case) if found else case.expect
