"""What is left of compiled service ports when rules have become narrower. Pure.

Compiling anew needs the tenant's objects, and so its API server, which is the tenant's own: one that does not answer
would keep what was taken away from it. Taking away needs no more than what was compiled. What is left may still be more
than compiling would give (limits take nothing away) and is never more than was there.
"""

from collections.abc import Collection, Iterable

import msgspec

from vcproxy.brain.compiler import Change
from vcproxy.brain.guard import Policy, judge_external_ip, judge_port, judge_virtual_ip
from vcproxy.brain.screen import Rights
from vcproxy.brain.slices import addresses_of, leave_out
from vcproxy.model.services import Frontend, FrontendKind, ServicePort


def restrict(
    ports: Iterable[ServicePort],
    old: Policy | None,
    new: Policy,
    rights: Rights | None,
    addresses: Collection[bytes] | None = None,
) -> Change:
    """What changes where `new` rules, and `rights` to endpoint addresses, allow less.

    `old`: by which rules the ports were compiled, None if that is unknown: then ClusterIPs stay, some of which the
    super cluster gave. `addresses`: only these have changed, and the rules have not; None: look at everything.
    """
    change = Change([], [])
    for port in list(ports):
        if addresses is not None and not any(map(port.leads_to, addresses)):
            continue
        left = _endpoints(port, rights)
        if addresses is None:
            kept = tuple(frontend for frontend in left.frontends if _stays(frontend, old, new))
            if kept != left.frontends:
                left = msgspec.structs.replace(left, frontends=kept)
            asked = left.health_check_node_port
            if asked and judge_port(asked, new.health_check_node_ports):
                left = msgspec.structs.replace(left, health_check_node_port=0)
        if not left.frontends:
            change.removed.append(port.key)
        elif left is not port:
            change.put.append(left)
    return change


def _stays(frontend: Frontend, old: Policy | None, new: Policy) -> bool:
    match frontend.kind:
        case FrontendKind.CLUSTER_IP:
            granted = old is not None and judge_virtual_ip(frontend.address, old) is None
            return not granted or judge_virtual_ip(frontend.address, new) is None
        case FrontendKind.NODE_PORT:
            return judge_port(frontend.port, new.node_ports) is None
        case kind:
            return judge_external_ip(frontend.address, new, kind) is None


def _endpoints(port: ServicePort, rights: Rights | None) -> ServicePort:
    """The port without endpoints that its tenant has no right to; the same object if there is none."""
    if rights is None:
        return port
    service = (port.key.namespace, port.key.service)
    there = {*addresses_of(port.endpoints4, 4), *addresses_of(port.endpoints6, 6)}
    refused = rights.refused(there, service)
    return leave_out(port, refused) if refused else port
