"""The chains and rules that the kernel has, compared with those that the text would make.

`nft list` is no way to check a table: it fetches a million elements to print forty rules. So rules are read by netlink
as the kernel's own octets, and those to compare with are made by loading the same text with the same nft where it does
nothing. Equal texts give equal octets; what somebody added, removed or changed shows. There are no anonymous sets in
the text because their names would differ.

Where that is depends on what this process may do. A network namespace that exists for a moment leaves no trace in the
node's own, but needs CAP_SYS_ADMIN. With CAP_NET_ADMIN alone, as in a container, it is a second table of the node's
that exists for a moment, without hooks, so that no packet ever sees it; the hooks are then told from the text. (A
dormant table would keep its hooks to itself, but `nft -j list` of 1.0.6 crashes on one, whoever runs it.)
"""

import ctypes
import errno
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, TypeVar

from vcproxy.backend.protocol import BackendError
from vcproxy_nftables import table, wire
from vcproxy_nftables.batch import NFPROTO_INET, SUBSYSTEM
from vcproxy_nftables.pools import SIZES, size_class
from vcproxy_nftables.wire import Channel, Reply

_GETCHAIN = SUBSYSTEM << 8 | 4
_GETRULE = SUBSYSTEM << 8 | 7
_TABLE = 1  # NFTA_CHAIN_TABLE, NFTA_RULE_TABLE
_CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 3, 4, 5, 7
_RULE_CHAIN, _RULE_EXPRESSIONS = 2, 4
_CLONE_NEWNET = 0x40000000

REFERENCE = f"{table.TABLE}_reference"
_HOOKED = re.compile(
    r"(?P<head>  chain (?P<chain>\S+) \{\n)"
    r"    type (?P<type>\w+) hook (?P<hook>\w+) priority (?P<priority>\S+); policy accept;\n"
)
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")  # enum nf_inet_hooks
_PRIORITIES = {"raw": "-300", "dstnat": "-100", "srcnat": "100"}
_ACCEPT = (1).to_bytes(4, "big")

_BALANCE = re.compile(r"balance([46])_(\d+)")
_LEARN = re.compile(r"learn([46])_(\d+)")

T = TypeVar("T")


class Chain(NamedTuple):
    """A chain: its base attributes (hook, policy, type; empty for others) and its rules' expressions, as octets."""

    base: tuple[bytes, ...]
    rules: tuple[bytes, ...]


class Extra(NamedTuple):
    """Chains made on demand. By family: size classes and affinity timeouts. `zoning`: those that tell zones."""

    classes: dict[int, list[int]]
    timeouts: dict[int, list[int]]
    zoning: bool

    def text(self) -> str:
        """What makes them."""
        balance = (table.balance_text(f, numbers) for f, numbers in self.classes.items() if numbers)
        learn = (table.learn_text(f, seconds) for f, seconds in self.timeouts.items() if seconds)
        return "".join((*balance, *learn, table.zoning_text() if self.zoning else ""))


def read(name: str = table.TABLE) -> dict[str, Chain]:
    """A table's chains by name; none if it is missing. Raises OSError, BackendError."""
    channel, wanted = Channel(), name.encode() + b"\0"
    try:
        rules: dict[str, list[bytes]] = {}
        for reply in _dump(channel, _GETRULE, name):
            if (found := _attributes(reply)).get(_TABLE) == wanted:
                rules.setdefault(_text(found[_RULE_CHAIN]), []).append(found.get(_RULE_EXPRESSIONS, b""))
        chains: dict[str, Chain] = {}
        for reply in _dump(channel, _GETCHAIN, name):
            if (found := _attributes(reply)).get(_TABLE) == wanted:
                chain = _text(found[_CHAIN_NAME])
                base = tuple(found.get(kind, b"") for kind in (_CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE))
                chains[chain] = Chain(base, tuple(rules.get(chain, ())))
        return chains
    finally:
        channel.close()


def _dump(channel: Channel, kind: int, name: str) -> list[Reply]:
    payload = wire.text(_TABLE, name)
    replies, verdict = channel.dump(kind=kind, family=NFPROTO_INET, payload=payload)
    if verdict.error not in (0, errno.ENOENT):
        raise BackendError(f"table {name}: cannot read its rules: {wire.explain(verdict.error)}")
    return replies


def _attributes(reply: Reply) -> dict[int, bytes]:
    return {kind: reply.data[first:last] for kind, first, last in wire.attributes(reply.data, reply.start, reply.end)}


def _text(octets: bytes) -> str:
    return octets.rstrip(b"\0").decode()


def extra(names: Collection[str]) -> Extra:
    """Which of these chains were made on demand. A name that we would not give is not among them."""
    found = Extra({4: [], 6: []}, {4: [], 6: []}, any(name in names for name in table.ZONING_CHAINS))
    for name in sorted(names):
        if match := _BALANCE.fullmatch(name):
            number = size_class(int(match[2])) if 1 < int(match[2]) <= SIZES[-1] else 0
            if number not in (0, *table.READY_SIZES) and table.balance_chain(int(match[1]), SIZES[number]) == name:
                found.classes[int(match[1])].append(number)
        elif (match := _LEARN.fullmatch(name)) and 1 <= int(match[2]) <= 86_400 and not match[2].startswith("0"):
            found.timeouts[int(match[1])].append(int(match[2]))
    return found


def expected(wanted: Extra, load: Callable[[str], object]) -> dict[str, Chain]:
    """The chains that the text makes; `load` runs nft. Raises what it raises, and BackendError."""
    text = table.skeleton() + wanted.text()

    def make() -> dict[str, Chain]:
        load(text)
        return read()

    try:
        return _in_new_namespace(make)
    except PermissionError:
        return in_second_table(text, load)


def in_second_table(text: str, load: Callable[[str], object]) -> dict[str, Chain]:
    """The chains that a text makes, by way of a second table."""
    hooks = {match["chain"]: _base(match) for match in _HOOKED.finditer(text)}
    unhooked = _HOOKED.sub(lambda match: match["head"], text).replace(f"inet {table.TABLE} ", f"inet {REFERENCE} ")
    load(without_reference() + unhooked)
    try:
        return {name: Chain(hooks.get(name, chain.base), chain.rules) for name, chain in read(REFERENCE).items()}
    finally:
        load(without_reference())


def _base(match: re.Match[str]) -> tuple[bytes, ...]:
    """What the kernel tells of a base chain: hook and priority, policy, type."""
    priority = int(_PRIORITIES.get(match["priority"], match["priority"]))
    hook = wire.attribute(1, _HOOKS.index(match["hook"]).to_bytes(4, "big")) + wire.attribute(
        2, priority.to_bytes(4, "big", signed=True)
    )
    return hook, _ACCEPT, match["type"].encode() + b"\0"


def without_reference() -> str:
    """nft text that removes the second table, whether it is there (somebody was killed in between) or not."""
    return f"add table inet {REFERENCE}\ndelete table inet {REFERENCE}\n"


def _in_new_namespace(function: Callable[[], T]) -> T:
    """Run a function in a thread with a network namespace of its own, which ends with the thread.

    Raises PermissionError if this process may not make one.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"cannot make a network namespace: {os.strerror(number)}")
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="nftables-reference")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def mending_text(found: Iterable[str], sets: Iterable[str], known_sets: Iterable[str], wanted: Extra) -> str:
    """nft text that makes all chains what they should be, in one transaction, without touching an element."""
    held = sorted(found)
    ours = {match[1] for match in re.finditer(r"^  chain (\S+) \{", table.skeleton() + wanted.text(), re.MULTILINE)}
    lines: Iterator[str] = (f"flush chain inet {table.TABLE} {name}\n" for name in held)
    foreign = (f"delete chain inet {table.TABLE} {name}\n" for name in held if name not in ours)
    stray = (f"delete set inet {table.TABLE} {name}\n" for name in sorted(set(sets) - set(known_sets)))
    return "".join((*lines, table.skeleton(), wanted.text(), *foreign, *stray))
