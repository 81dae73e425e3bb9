"""Which packets are whose: configuration, links and placement to the backend's attachments. Pure.

Everything here fails closed. A packet that belongs to no attachment is the super cluster's (zone 0), so an interface
that the operator gave to a tenant must not fall back to zone 0 merely because the tenant is not known yet, is gone, or
because two tenants claim it: it goes to QUARANTINE, a zone of its own that holds no Service. Its pods then reach no
virtual address at all, rather than another tenant's.

For the same reason a tenant is attached *before* its first forwarding table is programmed, and stays attached while its
device is there after its table is removed: attached without a table reaches nothing, a table without an attachment
leaves its pods in the super cluster's zone.

Tenant names come from people, so a name that is filled into a glob is taken literally.
"""

import bisect
import fnmatch
import glob
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vcproxy.backend.protocol import Attachments
from vcproxy.model.tenant import SUPER_UID
from vcproxy.node.config import Attachment

# Valid as a uid, and no tenant source makes one like it.
QUARANTINE = "quarantine.vcproxy.dev"

EVERY_TENANT = "*"
LOOPBACK = "lo"

_WILD = re.compile(r"[*?\[]")


class Names(NamedTuple):
    """What attaching needs to know of a tenant."""

    uid: str
    name: str


class Attached(NamedTuple):
    """The attachments, and what is wrong with them, one sentence each, for the log and `status`."""

    attachments: Attachments
    problems: tuple[str, ...] = ()


def attach(
    *,
    links: Collection[str],
    placement: Mapping[bytes, str],
    config: Sequence[Attachment],
    tenants: Iterable[Names],
    node_addresses: Collection[bytes] = (),
) -> Attached:
    """Decide all attachments.

    `links`: names of the node's devices now. `placement`: pod addresses of this node with their tenants' uids.
    `tenants`: those known, two may share a name. `node_addresses`: the node's own, which are never a tenant's even if a
    host-network pod uses them.

    An interface that several tenants claim is a problem and goes to QUARANTINE, as one does whose configured tenant is
    not known. The loopback device is never attached; the super cluster's devices and pods need no attachment.
    """
    known = sorted(set(tenants))
    devices = sorted(name for name in links if name != LOOPBACK)
    claims: dict[str, set[str]] = {}
    addresses: dict[bytes, str] = {}
    for entry in config:
        if entry.interface is not None:
            for uid, pattern in _patterns(entry.interface.tenant, entry.interface.names, known):
                for device in _matching(pattern, devices):
                    claims.setdefault(device, set()).add(uid)
        if entry.address is not None:
            reserved = set(node_addresses)
            addresses = {
                address: uid for address, uid in placement.items() if uid != SUPER_UID and address not in reserved
            }

    names = {tenant.uid: tenant.name for tenant in known}
    interfaces: dict[str, str] = {}
    problems = []
    for device, uids in sorted(claims.items()):
        if len(uids) > 1:
            claimants = ", ".join(sorted(f"{names.get(uid, uid)} ({uid})" for uid in uids))
            problems.append(
                f"interface {device} is claimed by several tenants: {claimants}: it goes to none of them; "
                "make the names under attachments tell them apart"
            )
            interfaces[device] = QUARANTINE
        elif (uid := next(iter(uids))) != SUPER_UID:
            interfaces[device] = uid
            if uid == QUARANTINE:
                problems.append(
                    f"interface {device} is configured for a tenant that is not known here: its pods reach no Service "
                    "until the brain names the tenant; check the tenant name under attachments if that lasts"
                )
    return Attached(Attachments(interfaces, addresses), tuple(problems))


def _patterns(tenant: str, globs: Sequence[str], known: Sequence[Names]) -> Iterator[tuple[str, str]]:
    """(uid, glob) of one configured entry, placeholders filled in."""
    meant = known if tenant == EVERY_TENANT else [each for each in known if each.name == tenant]
    for each in meant:
        for pattern in globs:
            filled = pattern.replace("{tenant}", glob.escape(each.name)).replace("{uid}", glob.escape(each.uid))
            yield each.uid, filled
    if not meant and tenant != EVERY_TENANT:
        for pattern in globs:
            if "{uid}" not in pattern:
                yield QUARANTINE, pattern.replace("{tenant}", glob.escape(tenant))


def _matching(pattern: str, devices: Sequence[str]) -> Iterator[str]:
    """The sorted `devices` that match a glob. Only those with its literal beginning are looked at.

    So a thousand tenants' globs over thousands of devices cost a thousand bisections.
    """
    wild = _WILD.search(pattern)
    prefix = pattern[: wild.start()] if wild else pattern
    at = bisect.bisect_left(devices, prefix)
    while at < len(devices) and devices[at].startswith(prefix):
        if fnmatch.fnmatchcase(devices[at], pattern):
            yield devices[at]
        at += 1
