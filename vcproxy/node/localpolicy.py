"""What Local traffic policies come to on this node: service ports that drop, and what load balancers are told.

kube-proxy asks this of all its Services at every sync. Here each service port with a Local policy, and there are few,
is asked when it is resolved, and what it said is kept: a change costs its own ports, and those of other Services are
not looked at. Two readers want it: the gauge of Services without local endpoints, and the health-check node ports.

The rules are kube-proxy's (pkg/proxy/topology.go CategorizeEndpoints, pkg/proxy/endpointschangetracker.go
LocalReadyEndpoints at 1.37). A port is unserved by a policy if it has usable endpoints, none of them here. A load
balancer is told how many distinct addresses on this node are Ready over all ports of a Service, of one family; those
that are terminating still serve and do not count, since new connections should go elsewhere.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from vcproxy.model.endpoints import NO_NODE, READY, SERVING, TERMINATING, endpoint_dtype
from vcproxy.model.services import PortKey, ServicePort

FAMILY_NAMES = {4: "IPv4", 6: "IPv6"}
POLICIES = ("internal", "external")


class ServiceId(NamedTuple):
    """A Service of a tenant."""

    tenant: str
    namespace: str
    name: str


class Unserved(NamedTuple):
    """Labels of kube-proxy's gauge: `policy` is internal or external, `family` IPv4 or IPv6."""

    policy: str
    family: str


class LocalPort(msgspec.Struct, frozen=True):
    """A service port with a Local policy as it is on this node.

    `families`: in which it can be dialled, 4 and 6. `ready`: by family, its Ready addresses on this node (4 or 16
    octets); only with a health-check node port.
    """

    key: PortKey
    unserved: tuple[Unserved, ...] = ()
    health_check_node_port: int = 0
    families: tuple[int, ...] = ()
    ready: Mapping[int, frozenset[bytes]] = {}


class HealthCheck(NamedTuple):
    """Where a Service is asked about: a node port, in these families."""

    port: int
    families: tuple[int, ...]


def local_ports(ports: Sequence[ServicePort], node_id: int) -> tuple[LocalPort, ...]:
    """Those of the ports that have a Local policy; the others cost a look at two flags. Pure.

    `node_id`: this node, as model.endpoints.name_id gives it.
    """
    return tuple(_local_port(port, node_id) for port in ports if port.internal_local or port.external_local)


_USABLE = frozenset(flags for flags in range(8) if flags & READY or (flags & SERVING and flags & TERMINATING))


def _layout(family: int) -> tuple[int, int, int, int]:
    """Where the address ends, where flags and node stand in a record, and its size."""
    dtype = endpoint_dtype(family)
    fields: Any = dtype.fields
    return fields["port"][1], fields["flags"][1], fields["node"][1], dtype.itemsize


_LAYOUT = {family: _layout(family) for family in FAMILY_NAMES}


def _local_port(port: ServicePort, node_id: int) -> LocalPort:
    """Octets are looked at where they lie: for the few records of one port that is faster than columns of numpy."""
    unserved: list[Unserved] = []
    ready: dict[int, frozenset[bytes]] = {}
    families, me = port.families, node_id.to_bytes(8, "little")
    for family in families:
        packed = port.endpoints4 if family == 4 else port.endpoints6
        width, flags_at, node_at, size = _LAYOUT[family]
        here: list[int] = []
        if node_id != NO_NODE and me in packed:
            here = [at for at in range(0, len(packed), size) if packed[at + node_at : at + size] == me]
        if _USABLE.isdisjoint(packed[at + flags_at] for at in here) and not _USABLE.isdisjoint(packed[flags_at::size]):
            name = FAMILY_NAMES[family]
            unserved += [Unserved("internal", name)] * port.internal_local
            unserved += [Unserved("external", name)] * port.external_local
        if port.health_check_node_port:
            ready[family] = frozenset(packed[at : at + width] for at in here if packed[at + flags_at] & READY)
    return LocalPort(port.key, tuple(unserved), port.health_check_node_port, families, ready)


class LocalPorts:
    """The local ports of all tenants, as they are programmed.

    `changed` is called with the Services whose `checks`, or the `addresses` of all of them, are no longer what they
    were. `addresses`: where health-check node ports are accepted, 4 or 16 octets each, zeros for any of the family.
    """

    def __init__(self) -> None:
        self.changed: Callable[[Collection[ServiceId]], None] = lambda services: None
        self.addresses: tuple[bytes, ...] = ()
        self._ports: dict[str, dict[PortKey, LocalPort]] = {}
        self._unserved: dict[str, Counter[Unserved]] = {}
        self._asked: dict[ServiceId, set[PortKey]] = {}  # the ports of Services with a health-check node port
        self._checks: dict[ServiceId, HealthCheck] = {}

    def update(
        self,
        uid: str,
        found: Iterable[LocalPort],
        *,
        tried: Collection[PortKey] | None = None,
        refused: Collection[PortKey] = (),
    ) -> None:
        """What is known of the ports `tried` (None: of all the tenant's) is now `found`.

        A port that was `refused` is not served here, so load balancers are not told of its endpoints.
        """
        held = self._ports.setdefault(uid, {})
        new = {port.key: port for port in found}
        services: dict[ServiceId, None] = {}  # in their order, so that who comes first is served first
        for key in list(held) if tried is None else tried:
            if (old := held.pop(key, None)) is not None:
                self._count(uid, old, -1, services)
        for key, port in new.items():
            held[key] = msgspec.structs.replace(port, ready={}) if key in refused else port
            self._count(uid, port, 1, services)
        self._settle(services)

    def forget(self, uid: str) -> None:
        """The tenant is gone."""
        self.update(uid, ())
        del self._ports[uid]
        self._unserved.pop(uid, None)

    def accept_on(self, addresses: tuple[bytes, ...]) -> None:
        """Node ports are accepted on these addresses now."""
        if addresses != self.addresses:
            self.addresses = addresses
            self.changed(tuple(self._checks))

    def unserved(self, uid: str) -> Mapping[Unserved, int]:
        """How many of a tenant's service ports drop for lack of a local endpoint."""
        return self._unserved.get(uid, Counter())

    @property
    def checks(self) -> Mapping[ServiceId, HealthCheck]:
        """A live read-only view, in the order in which they came."""
        return self._checks

    def ready(self, service: ServiceId, family: int) -> int:
        """Distinct Ready addresses of a Service on this node; only for one with a health-check node port."""
        held = self._ports.get(service.tenant, {})
        addresses = [held[key].ready.get(family, frozenset()) for key in self._asked.get(service, ())]
        return len(frozenset().union(*addresses))

    def _count(self, uid: str, port: LocalPort, step: int, services: dict[ServiceId, None]) -> None:
        if port.unserved:
            counter = self._unserved.setdefault(uid, Counter())
            for labels in port.unserved:
                counter[labels] += step
        if port.health_check_node_port:
            service = ServiceId(uid, port.key.namespace, port.key.service)
            asked = self._asked.setdefault(service, set())
            (asked.add if step > 0 else asked.discard)(port.key)
            services[service] = None

    def _settle(self, services: Iterable[ServiceId]) -> None:
        """Make the checks of these Services those of their ports, which agree but for the moments of a first load."""
        changed: list[ServiceId] = []
        for service in services:
            held = self._ports[service.tenant]
            ports = [held[key] for key in self._asked[service]]
            if ports:
                number, families = ports[0].health_check_node_port, ports[0].families
                if len(ports) > 1:
                    number = max(port.health_check_node_port for port in ports)
                    families = tuple(sorted({family for port in ports for family in port.families}))
                check = HealthCheck(number, families)
                if self._checks.get(service) != check:
                    self._checks[service] = check
                    changed.append(service)
            else:
                del self._asked[service]
                if self._checks.pop(service, None) is not None:
                    changed.append(service)
        if changed:
            self.changed(changed)
