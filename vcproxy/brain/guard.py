"""What a tenant may not do, decided before anything is compiled.

A tenant is system:masters in its own API server: every address and port it writes is a wish, not a fact. The guard is
the one place that says yes or no, as plain functions of a `Policy`, so that each rule is one row of a table test. It
judges single values; the compiler leaves out what was refused and goes on with the rest, so a refused external IP
costs the Service that external IP and nothing else.

Two kinds of rules. Some addresses are never right, whoever names them, the operator's own super cluster included:
loopback, link-local (which holds the clouds' metadata service), multicast, unspecified and reserved ones, as VIP or as
endpoint (CVE-2021-25737, CVE-2020-8554; the checks of k8s.io/kubernetes pkg/apis/core/validation
ValidateNonSpecialIP). The others are the operator's to grant: `UNRESTRICTED` is the super cluster's policy.

Refusals are data, at most one for each (object, field, reason) with an example and a count, so that a thousand bad
endpoints are one record: `status` and `explain` show them, metrics count them.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from vcproxy.kube.errors import printable
from vcproxy.model.addresses import Prefix, covered, format_address, never_allowed
from vcproxy.model.services import FrontendKind

LONGEST_VALUE = 64
"""Characters of a refused value that are kept."""


class Reason(enum.StrEnum):
    """Why something was refused; the values are labels of a metric."""

    NEVER_ALLOWED = "never-allowed"
    OUTSIDE_VIRTUAL_RANGES = "outside-virtual-ranges"
    EXTERNAL_IP = "external-ip-not-granted"
    NODE_PORT = "node-port-not-granted"
    NODE_PORT_RANGE = "node-port-outside-range"
    NOT_OWN_POD = "not-own-pod"
    OTHER_TENANTS_POD = "other-tenants-pod"
    NODE_ADDRESS = "node-address"
    DENIED_RANGE = "denied-range"
    LIMIT = "over-limit"
    MALFORMED = "malformed"


CURES = {
    Reason.NEVER_ALLOWED: "use an address that is not loopback, link-local, multicast, unspecified or reserved",
    Reason.OUTSIDE_VIRTUAL_RANGES: "use a ClusterIP inside the operator's virtualIPRanges, or ask for the range",
    Reason.EXTERNAL_IP: "ask the operator to grant the address in externalIPRanges",
    Reason.NODE_PORT: "ask the operator to grant the port in nodePorts",
    Reason.NODE_PORT_RANGE: "use a port inside the operator's nodePorts (kube-apiserver --service-node-port-range)",
    Reason.NOT_OWN_POD: "use addresses of the tenant's running pods, or ask the operator to grant the range in egress",
    Reason.OTHER_TENANTS_POD: "use addresses of the tenant's own pods; where tenants have networks of their own, the "
    "operator sets podNetwork: own",
    Reason.NODE_ADDRESS: "use addresses of pods, not of nodes",
    Reason.DENIED_RANGE: "use an address outside of the operator's deniedRanges",
    Reason.LIMIT: "delete objects that are no longer needed, or ask the operator for a higher limit",
    Reason.MALFORMED: "correct the field",
}


BACKEND_REASONS = frozenset((Reason.NOT_OWN_POD, Reason.OTHER_TENANTS_POD, Reason.NODE_ADDRESS, Reason.DENIED_RANGE))
"""Why an endpoint that is an address like any other is refused: these may change without the slice."""


class Refusal(msgspec.Struct, frozen=True):
    """Part of one object that is not used.

    `kind` Service or EndpointSlice; `field` an API path ("spec.externalIPs"); `value` an example of what was refused,
    bounded; `count` how many there are; `uid` the object's, "" if unknown.
    """

    kind: str
    namespace: str
    name: str
    field: str
    reason: Reason
    value: str = ""
    count: int = 1
    cure: str = ""
    uid: str = ""

    def __str__(self) -> str:
        several = f" (and {self.count - 1} more)" if self.count > 1 else ""
        where = f"{self.kind} {self.namespace}/{self.name}: {self.field}"
        return f"{where}: {self.value!r}{several}: {self.reason}; {self.cure}"


def for_tenant(refusal: Refusal) -> tuple[Reason, str]:
    """Reason and cure as the tenant may know them: not whose an address is that is not its own."""
    if refusal.reason in BACKEND_REASONS:
        return Reason.NOT_OWN_POD, CURES[Reason.NOT_OWN_POD]
    return refusal.reason, refusal.cure


class Unusable(Exception):
    """An object that cannot be used as a whole: its last good form stays. `field` is an API path."""

    def __init__(self, field: str, value: str, *, cure: str = CURES[Reason.MALFORMED]) -> None:
        self.field, self.value, self.cure = field, printable(value, LONGEST_VALUE), cure
        super().__init__(f"{field}: {self.value!r}; {cure}")


class Refusals:
    """Collects the refusals of one object while it is read."""

    def __init__(self, kind: str, namespace: str, name: str, uid: str = "") -> None:
        self._object = (kind, namespace, name)
        self._uid = uid
        self._found: dict[tuple[str, Reason], tuple[str, int, str]] = {}

    def add(self, field: str, reason: Reason, value: str, *, cure: str = "") -> None:
        """One more value of `field` was refused."""
        example, count, said = self._found.get((field, reason), (printable(value, LONGEST_VALUE), 0, cure))
        self._found[field, reason] = (example, count + 1, said)

    def add_address(self, field: str, reason: Reason, address: bytes) -> None:
        """Like `add`, of an address that could be read."""
        self.add(field, reason, format_address(address))

    def records(self) -> tuple[Refusal, ...]:
        """All of them, in the order they were met."""
        if not self._found:
            return ()
        uid = printable(self._uid, LONGEST_VALUE)
        return tuple(
            Refusal(*self._object, field, reason, example, count, cure or CURES[reason], uid)
            for (field, reason), (example, count, cure) in self._found.items()
        )


class Limits(msgspec.Struct, frozen=True):
    """What one tenant may hold.

    `endpoints` and `endpoints_per_service` count (address, port) pairs of slices: what compiled state costs.
    """

    services: int = 10_000
    endpoints: int = 100_000
    endpoints_per_service: int = 5_000


class PortRange(NamedTuple):
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.first != self.last else str(self.first)


ALL_PORTS = (PortRange(1, 65535),)
KUBERNETES_PORTS = (PortRange(30000, 32767),)
"""Default of kube-apiserver's --service-node-port-range."""


class Policy(msgspec.Struct, frozen=True):
    """What the operator grants one tenant.

    `virtual_ip_ranges`: where ClusterIPs must lie; None: anywhere. `external_ip_ranges`, `load_balancer_ip_ranges`:
    where external and load-balancer IPs must lie; None: anywhere; empty: there are none. `node_ports`,
    `health_check_node_ports`: ports on the shared nodes' own addresses.

    Endpoints: `own_pods_only`: they must be pods of the tenant, or in `egress`. Whether or not, they may be none of
    what is denied: `denied_ranges`, node addresses (`deny_nodes`), other tenants' pods (`deny_other_pods`).
    `shared_network`: other tenants' pods are where this one's addresses lead; `unique_addresses`: and no two pods of
    whatever tenants have one address.

    `limits` None: unlimited.
    """

    virtual_ip_ranges: tuple[Prefix, ...] | None = None
    external_ip_ranges: tuple[Prefix, ...] | None = ()
    load_balancer_ip_ranges: tuple[Prefix, ...] | None = ()
    node_ports: tuple[PortRange, ...] = ()
    health_check_node_ports: tuple[PortRange, ...] = ()
    own_pods_only: bool = False
    egress: tuple[Prefix, ...] = ()
    denied_ranges: tuple[Prefix, ...] = ()
    deny_nodes: bool = True
    deny_other_pods: bool = True
    shared_network: bool = True
    unique_addresses: bool = False
    limits: Limits | None = Limits()

    @property
    def judges_backends(self) -> bool:
        """Whether any endpoint address that is not `never_allowed` may be refused."""
        return bool(self.own_pods_only or self.denied_ranges or self.deny_nodes or self.denies_other_pods)

    @property
    def denies_other_pods(self) -> bool:
        """In a network of the tenant's own, other tenants' addresses are other places."""
        return self.deny_other_pods and self.shared_network


UNRESTRICTED = Policy(
    external_ip_ranges=None,
    load_balancer_ip_ranges=None,
    node_ports=ALL_PORTS,
    health_check_node_ports=ALL_PORTS,
    deny_nodes=False,
    deny_other_pods=False,
    limits=None,
)
"""The super cluster's: only what is never allowed is refused."""


def judge_virtual_ip(address: bytes, policy: Policy) -> Reason | None:
    """Why an address may not be a ClusterIP; None: it may."""
    if never_allowed(address):
        return Reason.NEVER_ALLOWED
    if policy.virtual_ip_ranges is not None and not covered(address, policy.virtual_ip_ranges):
        return Reason.OUTSIDE_VIRTUAL_RANGES
    return None


def judge_external_ip(address: bytes, policy: Policy, kind: FrontendKind = FrontendKind.EXTERNAL_IP) -> Reason | None:
    """Why an address may not be an external or (`kind`) load-balancer IP; None: it may."""
    if never_allowed(address):
        return Reason.NEVER_ALLOWED
    balanced = kind is FrontendKind.LOAD_BALANCER
    ranges = policy.load_balancer_ip_ranges if balanced else policy.external_ip_ranges
    if ranges is not None and not covered(address, ranges):
        return Reason.EXTERNAL_IP
    return None


def judge_port(port: int, granted: Sequence[PortRange]) -> Reason | None:
    """Why a port of the shared nodes' own addresses may not be had, be it for NodePorts or health checks; None: it may.

    The ranges are what keeps a tenant, whose API server gives out whatever it is told to, from the ports that the
    nodes' own programs and the super cluster's Services have.
    """
    if not granted:
        return Reason.NODE_PORT
    return None if any(first <= port <= last for first, last in granted) else Reason.NODE_PORT_RANGE


def judge_virtual_ranges(asked: Iterable[Prefix], policy: Policy) -> tuple[Prefix, ...]:
    """The ranges in which an address without a Service is dropped: a tenant's ServiceCIDRs within what it was granted.

    A tenant may write a ServiceCIDR of 0.0.0.0/0; within its own zone that only cuts off its own pods, but where the
    operator named ranges, what lies outside of them is no VIP. Sorted, without duplicates.
    """
    if policy.virtual_ip_ranges is None:
        return tuple(sorted(set(asked)))
    found: set[Prefix] = set()
    for wish in asked:
        for granted in policy.virtual_ip_ranges:
            if granted.length <= wish.length and granted.covers(wish.address):
                found.add(wish)
            elif wish.covers(granted.address):
                found.add(granted)
    return tuple(sorted(found))
