"""The static part of table `inet vcproxy`: a ruleset whose size knows nothing of services, endpoints or tenants.

All state is elements of the maps below (see `specs` for their octets), so the text is written once, and a change of a
service never touches a chain. What is made later, on demand and on a slow path, are chains that differ in a number that
nftables takes as a constant only: one per pool size in use (`numgen ... mod N`) and one per affinity timeout in use;
and, with the first attachment of a tenant, those that look at each packet for its zone: where there is only the super
cluster, no packet pays for them.

The way of a first packet:

    raw         conntrack zone of its tenant, by input device or by source address
    services    frontend maps: what was dialled -> pool, kept in `meta priority` (skb->priority), a scratch register
                here: set, used, and put back to none right behind the nat hook; forwarding overwrites it anyway
    pool        by the pool's size class: a random slot -> endpoint map: (pool, slot) -> address and port
    learn       (behind dnat) which endpoint the client got, for pools with affinity; puts the register back
    postrouting masquerade, by sets and the original destination

A pool value is 32 bits: the upper 12 its size class (see `pools`), the lower 20 its number, of which the highest says
whether the pool has affinity. Class 0 is special: value 0:1 drops, 0:2 rejects. Maps hold data, never verdicts: the
kernel validates a verdict map anew at each commit that touches it. Only `balance` and `affine_pools`, which are small
and seldom touched, hold verdicts.

Session affinity must end with its endpoint, and without a walk over all clients. So a client is not bound to an address
but to a target id (pool number and a number within the pool), which a second map resolves: without the endpoint's
element there, the client's binding leads nowhere and the client is balanced anew, and all others keep theirs. An id
packs as id << 20 | pool number, so that masking gives back the pool. A binding that leads nowhere is deleted on the
way: `update` of an element that is there renews its timeout and leaves its data (nft_dynset_eval), so the client's next
endpoint would not be learnt. That holds for pools of one target too, or a client would not stay with the last one when
others come back. An IPv6 client is the lower 96 bits of its address: nft 1.0.6 gives the key of a map that
is updated 16 octets of registers, and puts the data right behind, over whatever part of a longer key lies there.

Public frontends (external, load-balancer, node ports) have no zone in their key and come after the zone's own. What is
found there is asked further: a load balancer for its wall, and all for exceptions, which only clients outside get
(`*_outside`). A packet to none of all these, as most are, pays one look-up for each kind of frontend.

A client is local by its source or by the device that it entered by, whichever a detector looks at; the set of the other
is empty. Where local devices are given, packets without a device count as local, unless they are the node's own: what
br_netfilter shows of a packet that is translated back onto its own bridge has lost its device by postrouting.

Mid-commit: element lookups of one packet may straddle a commit. So a class without its chain and a slot that has just
gone fall back on slot 0, which every live pool has; if even that misses, the packet is dropped and its sender tries
again. Nothing that was meant for a service ever goes on untranslated and gets a conntrack entry of that form.

`nft` facts that shaped the text: keys must be `typeof` and per protocol and family; `dnat` to an address and port from
a map wants `meta l4proto` in its rule; `priority dstnat` is refused on the output hook by nft 1.0.6; concatenations may
hold a masked field, but the data of `update` may not be a map lookup.

Sets of ranges with more than one field (pipapo) use vector registers, which a process has to get back: 0.5 to 1 us of
the first packet here. So what packets of the super cluster always meet has one field (a tree), and no zone.
"""

import hashlib
from collections.abc import Iterable

from vcproxy_nftables.pools import AFFINE, SIZES

TABLE = "vcproxy"
PROTOCOLS = ("tcp", "udp", "sctp")
FAMILIES = (4, 6)
ZONING_CHAINS = ("raw_prerouting", "raw_output")
READY_SIZES = range(2, 17)  # balance chains that come with the table: the usual sizes, 2 ms at start
AFFINITY_CLIENTS = 1_000_000  # per family; when full, further clients are balanced without being bound

_IP = {4: "ip", 6: "ip6"}
_CLIENT = {4: "ip saddr", 6: "@nh,96,96"}  # of affinity: for IPv6 the lower 96 bits of the source address
_AFFINE = f"meta priority & {AFFINE >> 16:x}:0 == {AFFINE >> 16:x}:0"
_OUTSIDE = "ct zone 0 {ip} saddr != @local_prefixes{f} ct zone . iifname != @local_interfaces fib saddr type != local"


def _map(name: str, typeof: str, *more: str) -> str:
    lines = "".join(f"\n    {line}" for line in (f"typeof {typeof}", *more))
    return f"  map {name} {{{lines}\n  }}\n"


def _set(name: str, typeof: str, *more: str) -> str:
    return _map(name, typeof, *more).replace("  map ", "  set ", 1)


def _chain(name: str, *rules: str) -> str:
    lines = "".join(f"\n    {rule}" for rule in rules)
    return f"  chain {name} {{{lines}\n  }}\n"


def _global_sets() -> str:
    return (
        _set("tenants", "ct zone")
        + _map("zone_by_interface", "iifname : ct zone")
        + _set("local_interfaces", "ct zone . iifname", "flags interval")
        + _set("masquerade_all", "meta nfproto")
        + _set("masquerade_nonlocal", "meta nfproto")
    )


def _family_sets(f: int) -> str:
    ip = _IP[f]
    return (
        _map(f"zone_by_address{f}", f"{ip} saddr : ct zone")
        + _map(f"endpoints{f}", f"meta priority . numgen random mod 65536 : {ip} daddr . tcp dport")
        + _map(f"balance{f}", "meta priority : verdict")
        + _map(
            f"affinity{f}",
            f"meta priority . {_CLIENT[f]} : meta priority",
            f"size {AFFINITY_CLIENTS}",
            "flags dynamic,timeout",
        )
        + _map(f"affine_pools{f}", "meta priority : verdict")
        + _map(f"affine_targets{f}", f"meta priority : {ip} daddr . tcp dport")
        + _map(f"affine_ids{f}", f"meta priority . {ip} daddr . tcp dport : meta priority")
        + _set(f"virtual_ips{f}", f"ct zone . {ip} daddr")
        + _set(f"virtual_ranges{f}", f"ct zone . {ip} daddr", "flags interval")
        + _set(f"super_ranges{f}", f"{ip} daddr", "flags interval")
        + _set(f"local_prefixes{f}", f"{ip} saddr", "flags interval")
        + _set(f"hairpin{f}", f"ct zone . {ip} saddr . {ip} daddr")
        + _set(f"node_addresses{f}", f"{ip} daddr")
    )


def _protocol_sets(p: str, f: int) -> str:
    ip, name = _IP[f], f"{p}{f}"
    public, port = f"{ip} daddr . {p} dport", f"{p} dport"
    return (
        _map(f"{name}_frontends", f"ct zone . {public} : meta priority")
        + _map(f"{name}_public_frontends", f"{public} : meta priority")
        + _map(f"{name}_public_outside", f"{public} : meta priority")
        + _map(f"{name}_nodeports", f"{port} : meta priority")
        + _map(f"{name}_nodeports_outside", f"{port} : meta priority")
        + _set(f"{name}_firewalled", public)
        + _set(f"{name}_allowed", f"{public} . {ip} saddr", "flags interval")
        + _set(f"{name}_masquerade", public)
        + _set(f"{name}_masquerade_host", public)
        + _set(f"{name}_nodeports_masquerade", port)
        + _set(f"{name}_nodeports_masquerade_host", port)
    )


def _protocol_chains(p: str, f: int) -> str:
    ip, name = _IP[f], f"{p}{f}"
    dialled, outside = f"{ip} daddr . {p} dport", _OUTSIDE.format(ip=ip, f=f)
    wall = f"{dialled} @{name}_firewalled {dialled} . {ip} saddr != @{name}_allowed drop"
    original = f"ct original {ip} daddr . ct original proto-dst"
    node_port = f"ct original {ip} daddr @node_addresses{f} ct original proto-dst"
    known = f"meta l4proto {p} ct protocol {p}"
    first = _chain(
        name,
        f"meta priority set ct zone . {dialled} map @{name}_frontends goto pool{f}",
        f"meta priority set {dialled} map @{name}_public_frontends goto public_{name}",
        f"{ip} daddr @node_addresses{f} meta priority set {p} dport map @{name}_nodeports goto nodeport_{name}",
        f"ct zone . {ip} daddr @virtual_ips{f} goto refuse",
        f"ct zone 0 {ip} daddr @super_ranges{f} drop",
        f"ct zone != 0 ct zone . {ip} daddr @virtual_ranges{f} drop",
    )
    exceptions = "".join(
        _chain(
            f"{kind}_{name}",
            *walls,
            f"meta priority set {key} map @{exceptional} goto outside_{kind}_{name}",
            f"goto pool{f}",
        )
        + _chain(
            f"outside_{kind}_{name}",
            f"{outside} goto pool{f}",
            f"meta priority set {key} map @{usual} goto pool{f}",
            "drop",
        )
        for kind, key, usual, exceptional, walls in (
            ("public", dialled, f"{name}_public_frontends", f"{name}_public_outside", (wall,)),
            ("nodeport", f"{p} dport", f"{name}_nodeports", f"{name}_nodeports_outside", ()),
        )
    )
    return (
        first
        + exceptions
        + _chain(
            f"masquerade_{name}",
            f"{known} {original} @{name}_masquerade goto masquerade_now",
            f"{known} {original} @{name}_masquerade_host fib saddr type local goto masquerade_now",
            f"{known} {node_port} @{name}_nodeports_masquerade goto masquerade_now",
            f"{known} {node_port} @{name}_nodeports_masquerade_host fib saddr type local goto masquerade_now",
        )
    )


def _random_slot(f: int, size: int) -> list[str]:
    key = f"meta priority . numgen random mod {size}"
    return [f"meta l4proto {p} dnat {_IP[f]} to {key} map @endpoints{f}" for p in PROTOCOLS]


def _bound(f: int) -> str:
    return f"{_AFFINE} meta priority set meta priority . {_CLIENT[f]} map @affinity{f} jump affine{f}"


def _balance_chain(f: int, size: int) -> str:
    return _chain(
        balance_chain(f, size),
        "meta priority set meta priority & f:ffff",
        _bound(f),
        *_random_slot(f, size),
    )


def _family_chains(f: int) -> str:
    ip = _IP[f]
    return (
        _chain(
            f"affine{f}",
            *(f"meta l4proto {p} dnat {ip} to meta priority map @affine_targets{f}" for p in PROTOCOLS),
            f"delete @affinity{f} {{ meta priority & f:ffff . {_CLIENT[f]} : meta priority }}",
            "meta priority set meta priority & f:ffff",
        )
        + _chain(
            f"pool{f}",
            f"meta priority & fff0:0 vmap @balance{f}",
            "meta priority set meta priority & f:ffff",
            _bound(f),
            *_random_slot(f, 1),
            "drop",
        )
        + _chain(
            f"masquerade_cluster_ip{f}",
            "meta nfproto @masquerade_all goto masquerade_now",
            # The family is said once more: nft 1.1 believes that a look-up of it says that it is none.
            f"meta nfproto @masquerade_nonlocal meta nfproto ipv{f} ct zone 0"
            f" {ip} saddr != @local_prefixes{f} jump nonlocal",
        )
        + "".join(_protocol_chains(p, f) for p in PROTOCOLS)
        + _chain(
            f"masquerade{f}",
            f"ct zone . {ip} saddr . {ip} daddr @hairpin{f} goto masquerade_now",
            f"ct zone . ct original {ip} daddr @virtual_ips{f} goto masquerade_cluster_ip{f}",
            *(f"meta l4proto {p} goto masquerade_{p}{f}" for p in PROTOCOLS),
        )
    )


def _hooks() -> str:
    return (
        "".join(_chain(f"services{f}", *(f"meta l4proto {p} goto {p}{f}" for p in PROTOCOLS)) for f in FAMILIES)
        + _chain("services", *(f"meta nfproto ipv{f} goto services{f}" for f in FAMILIES))
        + _chain("prerouting", "type nat hook prerouting priority dstnat; policy accept;", "jump services")
        + _chain("output", "type nat hook output priority -100; policy accept;", "jump services")
        + _chain(
            "learn",
            *(f"meta nfproto ipv{f} meta priority vmap @affine_pools{f}" for f in FAMILIES),
        )
        + _chain("behind_dnat", f"{_AFFINE} jump learn", "meta priority set 0:0")
        + _chain(
            "learn_prerouting",
            "type filter hook prerouting priority -99; policy accept;",
            "ct state new ct status dnat jump behind_dnat",
        )
        + _chain(
            "learn_output",
            "type filter hook output priority -99; policy accept;",
            "ct state new ct status dnat jump behind_dnat",
        )
        + _chain(
            "postrouting",
            "type nat hook postrouting priority srcnat; policy accept;",
            "ct status & dnat == 0 accept",
            *(f"meta nfproto ipv{f} jump masquerade{f}" for f in FAMILIES),
        )
    )


def _zoning() -> str:
    return _chain(
        ZONING_CHAINS[0],
        "type filter hook prerouting priority raw; policy accept;",
        "ct zone set iifname map @zone_by_interface accept",
        *(f"ct original zone set {_IP[f]} saddr map @zone_by_address{f}" for f in FAMILIES),
    ) + _chain(
        ZONING_CHAINS[1],
        "type filter hook output priority raw; policy accept;",
        "ct zone set oifname map @zone_by_interface",
    )


def _body() -> str:
    return (
        _global_sets()
        + "".join(_family_sets(f) + "".join(_protocol_sets(p, f) for p in PROTOCOLS) for f in FAMILIES)
        + _chain("refuse", "reject")
        + _chain("special", "meta priority 0:1 drop", "goto refuse")
        + _chain("masquerade_now", "masquerade fully-random")
        + _chain(
            "nonlocal",
            "ct zone . iifname != @local_interfaces goto masquerade_now",
            "fib saddr type local goto masquerade_now",
        )
        + "".join(_family_chains(f) for f in FAMILIES)
        + _hooks()
    )


def _class_handle(number: int) -> str:
    """A pool value of this class and number 0, as nft writes `meta priority`."""
    return f"{number << 4:x}:0"


def layout_chain() -> str:
    """The name of an empty chain that tells which text made the table: `layout_` and 16 hex digits of its hash."""
    return f"layout_{hashlib.blake2b((_body() + _zoning()).encode(), digest_size=8).hexdigest()}"


def balance_chain(family: int, size: int) -> str:
    """The name of the chain that picks one of `size` slots."""
    return f"balance{family}_{size}"


def learn_chain(family: int, seconds: int) -> str:
    """The name of the chain that binds clients for so many seconds."""
    return f"learn{family}_{seconds}"


def balance_text(family: int, classes: Iterable[int]) -> str:
    """nft text that adds the balance chains of these size classes, and the elements that lead to them."""
    wanted = sorted(classes)
    chains = "".join(_balance_chain(family, SIZES[number]) for number in wanted)
    elements = ", ".join(f"{_class_handle(number)} : jump {balance_chain(family, SIZES[number])}" for number in wanted)
    return f"table inet {TABLE} {{\n{chains}}}\nadd element inet {TABLE} balance{family} {{ {elements} }}\n"


def learn_text(family: int, timeouts: Iterable[int]) -> str:
    """nft text that adds the chains that bind clients for these numbers of seconds."""
    ip = _IP[family]
    key = f"meta priority & f:ffff . {_CLIENT[family]}"
    chains = "".join(
        _chain(
            learn_chain(family, seconds),
            *(
                f"meta l4proto {p} meta priority set meta priority . {ip} daddr . {p} dport map @affine_ids{family} "
                f"update @affinity{family} {{ {key} timeout {seconds}s : meta priority }}"
                for p in PROTOCOLS
            ),
        )
        for seconds in sorted(timeouts)
    )
    return f"table inet {TABLE} {{\n{chains}}}\n"


def zoning_text() -> str:
    """nft text that adds the chains which find out packets' zones."""
    return f"table inet {TABLE} {{\n{_zoning()}}}\n"


def skeleton() -> str:
    """nft text that makes the whole table but what is made on demand, to be loaded where it does not exist."""
    special = "".join(f"add element inet {TABLE} balance{f} {{ 0:0 : goto special }}\n" for f in FAMILIES)
    ready = "".join(balance_text(f, READY_SIZES) for f in FAMILIES)
    return f"table inet {TABLE} {{\n{_body()}{_chain(layout_chain())}}}\n{special}{ready}"
