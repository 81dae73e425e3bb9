"""The kernel side of the backend: one table of one network namespace, its chains as nft text, its elements as netlink.

Chains are made by running `nft`: rarely, a few milliseconds each time, and in a child, because a fault in libnftables
ends the process that it is in. Elements never are (see `batch`).
"""

import os
import shutil
import subprocess
from collections.abc import Collection, Iterable

from vcproxy.backend.protocol import BackendError, BackendUnavailable
from vcproxy_nftables import chains, table
from vcproxy_nftables.batch import Batch
from vcproxy_nftables.conntrack import Conntrack
from vcproxy_nftables.netlink import Nfnetlink, TableMissing
from vcproxy_nftables.planned import Plan
from vcproxy_nftables.pools import NUMBER_BITS, SIZES
from vcproxy_nftables.specs import ATTACHMENT, FAMILY, WANTED

NFT_TIMEOUT = 120.0  # seconds; a table of a million elements takes some to list


def run_nft(*arguments: str, text: str | None = None) -> str:
    """Run nft in the current network namespace; `text` is its standard input. Raises BackendError with what it says."""
    try:
        done = subprocess.run(
            ["nft", *arguments], input=text, capture_output=True, text=True, timeout=NFT_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"cannot run nft: {error}") from error
    if done.returncode:
        raise BackendError(f"nft {' '.join(arguments)} failed: {done.stderr.strip()[:1000]}")
    return done.stdout


def _load(text: str) -> None:
    run_nft("-f", "-", text=text)


_VERDICT_OCTETS = 16  # struct nft_verdict

_SHAPES = {
    spec.name: (spec.key_octets, _VERDICT_OCTETS if spec.verdict else spec.data_octets)
    for spec in (*WANTED, *(spec for f in FAMILY.values() for spec in (f.endpoints, f.balance, f.affinity)))
}
"""Lengths of all maps and sets, by name: what is wanted, and endpoints, balance and affinity."""


class Kernel:
    """Everything that the backend has open. Belongs to the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        """Opens the sockets. Raises BackendUnavailable with the cure where this node cannot do it."""
        if os.geteuid():
            raise BackendUnavailable("the nftables backend needs root, or CAP_NET_ADMIN as uid 0 of a user namespace")
        if shutil.which("nft") is None:
            raise BackendUnavailable("`nft` is not installed; install the package nftables (1.0.6 or newer)")
        try:
            self.netlink = Nfnetlink()
            # Before the table is read for the first time: what changes between the two must be seen.
            self.monitor = self.netlink.monitor()
            self.conntrack = Conntrack()
        except OSError as error:
            raise BackendUnavailable(
                f"cannot open a netfilter netlink socket ({error}); load the modules nf_tables and "
                "nf_conntrack_netlink, and run with CAP_NET_ADMIN in the node's network namespace"
            ) from error
        self._chains: frozenset[str] = frozenset()
        self._pending = False

    def close(self) -> None:
        """Close all sockets; the table stays."""
        self.netlink.close()
        self.conntrack.close()

    def create_table(self) -> None:
        """Make the table, without elements. Raises BackendUnavailable if this kernel or nft cannot."""
        try:
            self._load(table.skeleton())
        except BackendError as error:
            raise BackendUnavailable(
                f"this node cannot hold the table: {error}; needed are Linux 5.13, nft 1.0.6, and the modules "
                "nft_ct, nft_nat, nft_masq, nft_numgen, nft_fib_inet, nft_reject_inet"
            ) from error
        self._chains = frozenset(chains.read())

    def is_sound(self) -> bool:
        """True if the table has all the chains, rules and maps that it should have, and no others."""
        found = chains.read()
        self._chains = frozenset(found)
        facts = self.netlink.sets()
        wanted = self._wanted(found, facts)
        return (
            found == chains.expected(wanted, _load)
            and facts.keys() == _SHAPES.keys()
            and all((facts[name].key_octets, facts[name].data_octets) == shape for name, shape in _SHAPES.items())
            and all(self._leads_to_all(family, wanted) for family in FAMILY)
        )

    def _wanted(self, found: Collection[str], known: Collection[str]) -> chains.Extra:
        """The chains on demand that there should be, of those found and the maps known: those that there are, and where
        the table holds attachments, those that look at them."""
        extra = chains.extra(found)
        if extra.zoning:
            return extra
        return extra._replace(
            zoning=any(len(self.netlink.dump(spec).keys) for spec in ATTACHMENT if spec.name in known)
        )

    def _leads_to_all(self, family: int, wanted: chains.Extra) -> bool:
        held = self.netlink.dump(FAMILY[family].balance)
        classes = held.keys.view("=u4").reshape(-1) >> NUMBER_BITS
        leads = dict(zip(classes.tolist(), held.verdicts, strict=True))
        should = {0: "goto special"}
        for number in (*table.READY_SIZES, *wanted.classes[family]):
            should[number] = f"jump {table.balance_chain(family, SIZES[number])}"
        return leads == should

    def mend_chains(self) -> None:
        """Make chains, rules and maps what they should be, in one transaction and without touching elements.

        Where the kernel will not have that (a map of that name has another shape, as after an upgrade from a very
        different layout), the table is made anew, empty.
        """
        found = chains.read()
        known = self.netlink.sets().keys()
        wanted = self._wanted(found, known)
        emptied = "".join(f"flush map inet {table.TABLE} {specs.balance.name}\n" for specs in FAMILY.values())
        emptied = emptied if {specs.balance.name for specs in FAMILY.values()} <= known else ""
        try:
            self._load(emptied + chains.mending_text(found, known, _SHAPES, wanted))
            if self.is_sound():
                return
        except BackendError:
            pass
        self._load(f"delete table inet {table.TABLE}\n" + table.skeleton())
        self._chains = frozenset(chains.read())

    def ensure(self, plan: Plan) -> None:
        """Make the chains that a plan's elements need."""
        text = ""
        for family in table.FAMILIES:
            classes = self._missing(
                (table.balance_chain(family, SIZES[number]), number) for number in plan.classes[family]
            )
            timeouts = self._missing((table.learn_chain(family, seconds), seconds) for seconds in plan.timeouts[family])
            text += table.balance_text(family, classes) if classes else ""
            text += table.learn_text(family, timeouts) if timeouts else ""
        if plan.zoning and not self._chains.issuperset(table.ZONING_CHAINS):
            text += table.zoning_text()
        if text:
            if not self.netlink.exists():  # or nft would make a table of these chains alone
                raise TableMissing("the table is gone", errno=2, name=table.TABLE)
            self._load(text)
            self._chains = frozenset(chains.read())

    def _missing(self, needed: Iterable[tuple[str, int]]) -> list[int]:
        return [number for name, number in needed if name not in self._chains]

    def _load(self, text: str) -> None:
        """Run nft, whose changes are ours although another socket than ours made them: what the monitor has seen
        meanwhile is forgotten unless it began before."""
        seen = self.monitor.drain()
        _load(text)
        self.monitor.drain()
        self._pending |= bool(seen)

    def drifted(self) -> bool:
        """True once after somebody else changed the table."""
        changed = bool(self.monitor.drain()) or self._pending
        self._pending = False
        return changed

    def send(self, batches: Iterable[Batch]) -> int:
        """Commit transactions in turn; returns how many operations. Raises NetlinkError and its kinds."""
        count = 0
        for batch in batches:
            self.netlink.commit(batch)
            count += len(batch)
        return count
