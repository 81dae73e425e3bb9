"""The node's own elements: whose packets are whose, where node ports are accepted, who is masqueraded. Pure.

These are few and always given in full, so each call computes all that is wanted and compares it with what is held.
"""

from collections.abc import Mapping

from vcproxy.backend.protocol import Attachments, NodeState
from vcproxy_nftables.changes import Changes
from vcproxy_nftables.elements import MapSpec
from vcproxy_nftables.specs import (
    ATTACHMENT,
    FAMILY,
    LOCAL_INTERFACES,
    MASQUERADE_ALL,
    MASQUERADE_NONLOCAL,
    NFPROTO,
    ORDER,
    ZONE_BY_INTERFACE,
    interface_key,
    interface_name,
    interface_range,
    merge_prefixes,
    prefix_range,
    zone_range_field,
    zone_value,
)
from vcproxy_nftables.zones import SUPER_ZONE

Values = dict[bytes, bytes]
INTERFACE_OCTETS = 15  # IFNAMSIZ without the NUL


def attachment_elements(attachments: Attachments, zones: Mapping[str, int]) -> dict[MapSpec, Values]:
    """The elements of specs.ATTACHMENT. `zones` by uid must know all tenants that are attached.

    The super cluster is what no attachment marks, so attachments that name it need no element; but an interface of it
    needs one where flat tenants' addresses could be seen there: zone 0 is then stated, not just left.
    """
    wanted: dict[MapSpec, Values] = {ZONE_BY_INTERFACE: {}, **{specs.zone_by_address: {} for specs in FAMILY.values()}}
    for name, uid in attachments.interfaces.items():
        wanted[ZONE_BY_INTERFACE][interface_key(name)] = zone_value(zones[uid])
    for address, uid in attachments.addresses.items():
        spec = FAMILY[4 if len(address) == 4 else 6].zone_by_address
        wanted[spec][address] = zone_value(zones[uid])
    return wanted


def attachments_of(elements: Mapping[MapSpec, Values], uids: Mapping[int, str]) -> Attachments:
    """The attachments that elements of specs.ATTACHMENT stand for. `uids`: tenants by zone; other zones are ignored."""
    interfaces, addresses = {}, {}
    for spec in ATTACHMENT:
        for key, value in elements.get(spec, {}).items():
            if (uid := uids.get(int.from_bytes(value, ORDER))) is None:
                continue
            if spec is ZONE_BY_INTERFACE:
                interfaces[interface_name(key)] = uid
            else:
                addresses[key] = uid
    return Attachments(interfaces, addresses)


def node_elements(state: NodeState) -> dict[MapSpec, Values]:
    """The elements of specs.NODE."""
    switched = dict.fromkeys(NFPROTO.values(), b"")
    lead = zone_range_field(SUPER_ZONE)
    detects = state.local_sources is not None or bool(state.local_interfaces)
    # Packets that have lost their device (see `table`) are those of a bridge, if there are local devices at all.
    patterns = (*state.local_interfaces, "") if state.local_interfaces else ()
    wanted: dict[MapSpec, Values] = {
        LOCAL_INTERFACES: {interface_range(lead, pattern): b"" for pattern in patterns},
        MASQUERADE_ALL: switched if state.masquerade_all else {},
        MASQUERADE_NONLOCAL: switched if detects else {},
    }
    for family, specs in FAMILY.items():
        octets = 4 if family == 4 else 16
        sources = tuple(prefix for prefix in state.local_sources or () if len(prefix.address) == octets)
        wanted[specs.local_prefixes] = {prefix_range(b"", prefix): b"" for prefix in merge_prefixes(sources)}
        wanted[specs.node_addresses] = {address: b"" for address in state.node_addresses if len(address) == octets}
    return wanted


def replace(changes: Changes, held: dict[MapSpec, Values], wanted: Mapping[MapSpec, Values]) -> None:
    """Make `held` what is wanted of the maps that `wanted` names, and note the changes."""
    for spec, values in wanted.items():
        before = held.get(spec, {})
        for key in before.keys() | values.keys():
            changes.set(spec, key, before.get(key), values.get(key))
        held[spec] = values
