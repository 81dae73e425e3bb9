"""What must be true of a node before vcproxy can work on it, each with its cure. Reads only; changes nothing.

Everything is looked at through small readers that tests replace by a dict and a function, so that the table of
findings is tested without a broken machine at hand.
"""

import enum
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

OLDEST_KERNEL = (5, 13)  # nat `reject` in prerouting came with 5.9; kube-proxy's nftables mode asks for 5.13
OLDEST_NFT = (1, 0, 1)
_NET_ADMIN = 12  # <linux/capability.h>
_NEARLY_FULL = 0.9


class State(enum.StrEnum):
    """How a check came out. Only ERROR keeps vcproxy from working."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class Check(msgspec.Struct, frozen=True):
    """One finding; `cure` is empty when all is well."""

    name: str
    state: State
    found: str
    cure: str = ""


class Machine(msgspec.Struct, frozen=True):
    """Where facts come from: a file's text or None, a command's output or None if it fails or is missing."""

    read: Callable[[str], str | None]
    run: Callable[[tuple[str, ...]], str | None]
    release: str


def this_machine() -> Machine:
    """The machine, and the network namespace, that this process is in."""
    return Machine(read=_read, run=_run, release=os.uname().release)


def preflight(machine: Machine) -> list[Check]:
    """All checks, in the order in which one would mend what they find."""
    return [
        _privileges(machine),
        _kernel(machine),
        _nft(machine),
        *_forwarding(machine),
        *_bridges(machine),
        *_reverse_path(machine),
        *_conntrack(machine),
        *_rivals(machine),
    ]


def _privileges(machine: Machine) -> Check:
    status = machine.read("/proc/self/status") or ""
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if effective and int(effective[1], 16) >> _NET_ADMIN & 1:
        return Check("privileges", State.OK, "CAP_NET_ADMIN")
    return Check("privileges", State.ERROR, "no CAP_NET_ADMIN", "run as root, or grant the container CAP_NET_ADMIN")


def _kernel(machine: Machine) -> Check:
    version = _version(machine.release)
    if version >= OLDEST_KERNEL:
        return Check("kernel", State.OK, machine.release)
    return Check("kernel", State.ERROR, machine.release, f"boot a kernel >= {_dotted(OLDEST_KERNEL)}")


_CHAINS = ("nft", "list", "chains")
"""To list tables, or one chain, nft 1.0.6 reads every element of every table."""


def _nft(machine: Machine) -> Check:
    output = machine.run(("nft", "--version"))
    if output is None:
        return Check("nft", State.ERROR, "not installed", "install the package nftables")
    found = re.search(r"v(\d[\d.]*)", output)
    version = found[1] if found else output.strip()
    if _version(version) < OLDEST_NFT:
        return Check("nft", State.ERROR, version, f"install nftables >= {_dotted(OLDEST_NFT)}")
    if machine.run(_CHAINS) is None:
        return Check("nft", State.ERROR, f"{version}, but it cannot list chains", "load the kernel module nf_tables")
    return Check("nft", State.OK, version)


def _forwarding(machine: Machine) -> Iterator[Check]:
    for name, path in (
        ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
        ("net.ipv6.conf.all.forwarding", "/proc/sys/net/ipv6/conf/all/forwarding"),
    ):
        value = (machine.read(path) or "").strip()
        if value == "1":
            yield Check(name, State.OK, value)
        elif value:
            yield Check(name, State.ERROR, value, f"sysctl -w {name}=1: pods' packets are not forwarded without it")


def _bridges(machine: Machine) -> Iterator[Check]:
    """Pods on one Linux bridge reach each other without the IP stack unless br_netfilter hands it their packets."""
    for name in ("net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"):
        value = (machine.read("/proc/sys/" + name.replace(".", "/")) or "").strip()
        if value == "0":
            yield Check(
                name,
                State.WARNING,
                value,
                f"sysctl -w {name}=1 if pods share a bridge: else answers between two of them miss their translation",
            )


def _reverse_path(machine: Machine) -> Iterator[Check]:
    value = (machine.read("/proc/sys/net/ipv4/conf/all/rp_filter") or "").strip()
    if value == "1":
        yield Check(
            "net.ipv4.conf.all.rp_filter",
            State.WARNING,
            "1 (strict)",
            "sysctl -w net.ipv4.conf.all.rp_filter=2 where tenants' routes are in tables of their own",
        )


def _conntrack(machine: Machine) -> Iterator[Check]:
    most = (machine.read("/proc/sys/net/netfilter/nf_conntrack_max") or "").strip()
    used = (machine.read("/proc/sys/net/netfilter/nf_conntrack_count") or "").strip()
    if not most or not used:
        yield Check(
            "conntrack", State.WARNING, "not loaded yet", "modprobe nf_conntrack; loading the table does it too"
        )
    elif int(most) and int(used) > _NEARLY_FULL * int(most):
        yield Check("conntrack", State.WARNING, f"{used} of {most} entries", "raise net.netfilter.nf_conntrack_max")
    else:
        yield Check("conntrack", State.OK, f"{used} of {most} entries")


def _rivals(machine: Machine) -> Iterator[Check]:
    """kube-proxy's leftovers, or kube-proxy itself, translate the super cluster's packets before or beside us."""
    cure = "leave it only if vcproxy has no super cluster; else stop kube-proxy, and `vcproxy run --cleanup`"
    table = ""
    for line in (machine.run(_CHAINS) or "").splitlines():
        match line.split():
            case ["table", family, name, *_]:
                table = f"{family} {name}"
                if table in ("ip kube-proxy", "ip6 kube-proxy"):
                    yield Check("kube-proxy", State.WARNING, f"table {table}", cure)
            case ["chain", "KUBE-SERVICES", *_] if table in ("ip nat", "ip6 nat"):
                yield Check("kube-proxy", State.WARNING, f"chain KUBE-SERVICES in table {table}", cure)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def _run(argv: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
