"""What a kube-proxy, of whatever mode, has on this node: found, named, removed. Removes only what kube-proxy made.

    nftables  tables `ip kube-proxy` and `ip6 kube-proxy`
    iptables  chains KUBE-... in the tables nat, filter and mangle. Those of iptables-nft are nftables tables, and are
              handled as such, rule by handle; those of legacy iptables need its own tools.
    ipvs      the device kube-ipvs0, virtual servers, ipsets KUBE-..., and some of the chains

Removal keeps established connections where the kernel does: what nftables or iptables has translated once is
conntrack's from then on, provided that some nat chain goes on existing. So vcproxy's own table comes first. IPVS
forwards every packet itself, and its connections end with it.

A process is looked for in this network namespace only, and is never touched: it is named, and whoever runs it ends it.
"""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KUBE_PROXY = "kube-proxy"
IPVS_DEVICE = "kube-ipvs0"
_CHAINS = frozenset(
    "KUBE-" + name
    for name in (
        "SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ", "PROXY-CANARY", "EXTERNAL-SERVICES", "FORWARD",
        "PROXY-FIREWALL", "NODE-PORT", "LOAD-BALANCER", "SOURCE-RANGES-FIREWALL", "IPVS-FILTER", "IPVS-OUT-FILTER",
    )
)  # fmt: skip
_PER_SERVICE = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-XLB-", "KUBE-EXT-")
_TABLES = ("nat", "filter", "mangle")
_TIMEOUT = 120.0
_LEGACY = {
    "ip": ("iptables-legacy", "/proc/thread-self/net/ip_tables_names"),
    "ip6": ("ip6tables-legacy", "/proc/thread-self/net/ip6_tables_names"),
}


class LeftoverError(Exception):
    """Something of kube-proxy's could not be removed; the message says what, and what to do."""


class Process(NamedTuple):
    """A running kube-proxy."""

    pid: int
    command: str


class Chains(NamedTuple):
    """kube-proxy's chains in one table of iptables. `legacy`: of legacy iptables, else of iptables-nft."""

    family: str
    table: str
    names: tuple[str, ...]
    legacy: bool = False

    def __str__(self) -> str:
        kind = "legacy iptables" if self.legacy else "iptables-nft"
        shown = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return f"{len(self.names)} chains of kube-proxy's in {kind} table {self.family} {self.table} ({shown})"


class Leftovers(NamedTuple):
    """All of it. `tables`: nftables mode, "ip kube-proxy". `unknown`: what could not be looked into, and why."""

    processes: tuple[Process, ...] = ()
    tables: tuple[str, ...] = ()
    chains: tuple[Chains, ...] = ()
    ipvs_device: bool = False
    virtual_servers: int = 0
    ipsets: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def rules(self) -> list[str]:
        """What there is to remove, in words."""
        return [
            *(f"nftables table {table}" for table in self.tables),
            *map(str, self.chains),
            *([f"device {IPVS_DEVICE}"] if self.ipvs_device else ()),
            *([f"{self.virtual_servers} IPVS virtual servers"] if self.virtual_servers else ()),
            *([f"ipsets {', '.join(self.ipsets)}"] if self.ipsets else ()),
        ]


def is_kube_proxys(chain: str) -> bool:
    """True for the name of a chain that kube-proxy makes; kubelet's KUBE-FIREWALL and the like are none."""
    return chain in _CHAINS or chain.startswith(_PER_SERVICE)


# --- finding ---------------------------------------------------------------------------------------------------------

Run = Callable[[Sequence[str]], str | None]
"""Runs a command; its output, or None if it fails or is not installed."""


def find() -> Leftovers:
    """What is on this node now, in the network namespace of the calling thread."""
    # Chains tell of tables: to list those, nft 1.0.6 reads every element of each, half a minute for a million.
    listed = _objects(_output(("nft", "-j", "list", "chains")))
    legacy, unknown = _legacy_chains(_output)
    if listed is None:
        unknown = ("nftables and iptables-nft: nft is not installed, or cannot list chains", *unknown)
    ipvs = _text("/proc/thread-self/net/ip_vs")
    sets = (_output(("ipset", "list", "-n")) or "").split()
    return Leftovers(
        processes=tuple(processes()),
        tables=tuple(_kube_proxy_tables(listed or ())),
        chains=(*_nft_chains(listed or ()), *legacy),
        ipvs_device=any(name == IPVS_DEVICE for _, name in socket.if_nameindex()),
        virtual_servers=len(re.findall(r"^(?:TCP|UDP|SCTP) ", ipvs, re.MULTILINE)),
        ipsets=tuple(name for name in sets if name.startswith("KUBE-")),
        unknown=unknown,
    )


def _objects(listed: str | None) -> list[Any] | None:
    """The objects that `nft -j list` prints; None if it failed, or printed what is no JSON (1.0.6 does for some)."""
    try:
        found: list[Any] = json.loads(listed or "")["nftables"]
    except (ValueError, KeyError, TypeError):
        return None
    return found


def processes() -> Iterator[Process]:
    """Every kube-proxy that runs in this network namespace."""
    here = _namespace("thread-self")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or _text(f"/proc/{entry.name}/comm").strip() != KUBE_PROXY:
            continue
        if here is None or _namespace(entry.name) == here:
            command = _text(f"/proc/{entry.name}/cmdline").replace("\0", " ").strip()
            yield Process(int(entry.name), command or KUBE_PROXY)


def _namespace(process: str) -> tuple[int, int] | None:
    try:
        found = Path("/proc", process, "ns/net").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _kube_proxy_tables(listed: Iterable[Any]) -> list[str]:
    found = {(chain["family"], chain["table"]) for entry in listed if (chain := entry.get("chain"))}
    return [f"{family} {table}" for family, table in sorted(found) if family in ("ip", "ip6") and table == KUBE_PROXY]


def _nft_chains(listed: Iterable[Any]) -> Iterator[Chains]:
    found: dict[tuple[str, str], list[str]] = {}
    for entry in listed:
        chain = entry.get("chain")
        if chain and chain["family"] in ("ip", "ip6") and chain["table"] in _TABLES and is_kube_proxys(chain["name"]):
            found.setdefault((chain["family"], chain["table"]), []).append(chain["name"])
    for (family, table), names in sorted(found.items()):
        yield Chains(family, table, tuple(sorted(names)))


def _legacy_chains(run: Run) -> tuple[list[Chains], tuple[str, ...]]:
    found, unknown = [], []
    for family, (tool, listing) in _LEGACY.items():
        for table in (name for name in _text(listing).split() if name in _TABLES):
            saved = run((f"{tool}-save", "-t", table))
            if saved is None:
                unknown.append(f"legacy iptables table {family} {table}: {tool}-save is not installed or fails")
            elif names := tuple(sorted(filter(is_kube_proxys, re.findall(r"^:(\S+) ", saved, re.MULTILINE)))):
                found.append(Chains(family, table, names, legacy=True))
    return found, tuple(unknown)


# --- removing --------------------------------------------------------------------------------------------------------


def remove(found: Leftovers) -> None:
    """Remove what `find` has found, all that can be (of what is unknown, nothing). Raises LeftoverError that names
    what stays."""
    failed: list[str] = []
    for table in found.tables:
        _attempt(failed, f"nftables table {table}", ("nft", "delete", "table", *table.split()))
    for chains in found.chains:
        _remove_chains(chains, failed)
    if found.virtual_servers:
        _attempt(failed, "IPVS virtual servers", ("ipvsadm", "--clear"))
    if found.ipvs_device:
        _attempt(failed, f"device {IPVS_DEVICE}", ("ip", "link", "delete", IPVS_DEVICE))
    for name in found.ipsets:
        _attempt(failed, f"ipset {name}", ("ipset", "destroy", name))
    if failed:
        raise LeftoverError(
            f"of kube-proxy there stays: {'; '.join(failed)}; run `kube-proxy --cleanup` on this node, or boot it"
        )


def _remove_chains(chains: Chains, failed: list[str]) -> None:
    if chains.legacy:
        tool = _LEGACY[chains.family][0]
        saved = _output((f"{tool}-save", "-t", chains.table)) or ""
        _attempt(failed, str(chains), (f"{tool}-restore", "--noflush"), restore_text(saved))
        return
    listed = _objects(_output(("nft", "-j", "list", "table", chains.family, chains.table)))
    if listed is None:
        failed.append(f"{chains}: nft cannot list it")
    else:
        _attempt(failed, str(chains), ("nft", "-f", "-"), nft_text(chains, listed))


def nft_text(chains: Chains, listed: Iterable[Any]) -> str:
    """nft commands, one transaction, that take the chains out of a table: first all rules elsewhere that lead there."""
    where, names = f"{chains.family} {chains.table}", frozenset(chains.names)
    lines = [
        f"delete rule {where} {rule['chain']} handle {int(rule['handle'])}"
        for entry in listed
        if (rule := entry.get("rule")) and rule["chain"] not in names and _targets(rule["expr"]) & names
    ]
    lines += [f"flush chain {where} {name}" for name in chains.names]
    lines += [f"delete chain {where} {name}" for name in chains.names]
    return "\n".join(lines) + "\n"


def _targets(expressions: Iterable[Any]) -> set[str]:
    return {
        verdict["target"]
        for expression in expressions
        if isinstance(expression, dict)
        for kind in ("jump", "goto")
        if isinstance(verdict := expression.get(kind), dict)
    }


def restore_text(saved: str) -> str:
    """iptables-restore input for --noflush, from iptables-save output of one table, that does the same."""
    table = re.search(r"^\*(\S+)$", saved, re.MULTILINE)
    names = [name for name in re.findall(r"^:(\S+) ", saved, re.MULTILINE) if is_kube_proxys(name)]
    links = [
        f"-D {rule}"
        for rule in re.findall(r"^-A (.*)$", saved, re.MULTILINE)
        if not is_kube_proxys(rule.split()[0])
        and (target := re.search(r" -[jg] (\S+)", rule))
        and is_kube_proxys(target[1])
    ]
    lines = [f"*{table[1] if table else 'nat'}", *(f":{name} - [0:0]" for name in names), *links]
    return "\n".join([*lines, *(f"-X {name}" for name in names), "COMMIT"]) + "\n"


def _attempt(failed: list[str], what: str, command: Sequence[str], text: str = "") -> None:
    if shutil.which(command[0]) is None:
        failed.append(f"{what}: {command[0]} is not installed")
        return
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        failed.append(f"{what}: {error}")
        return
    if done.returncode:
        failed.append(f"{what}: {' '.join(done.stderr.split())[:300]}")


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
