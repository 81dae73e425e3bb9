"""The table's elements in the kernel: commit transactions, dump maps, ask what is there.

One Nfnetlink is two sockets of the network namespace it was opened in: one that only commits, so that a monitor can
tell its changes from other people's by the port id, and one that only asks. No program is run and nothing is waited
for: a commit's outcome is known when sendmsg returns (see `wire`).

What is retried here and what is raised:

    EINTR, EAGAIN       retried: a signal, or a module that had to be loaded first; nothing was done
    a torn dump         retried: the ruleset changed while it was read, or the kernel grew the map's hash table
    ENOENT, the table   TableMissing: somebody deleted it; build it again
    ENOENT otherwise    NetlinkError with the map's name, and the key if it is an element that is not there
    EEXIST, EBUSY       NetlinkError with the key: the element is there already (with other data, or a range overlaps)
    ENOBUFS             OutcomeUnknown: the transaction was done or not, but the answer is lost; dump and diff
    ERESTART            GenerationChanged, only for a commit that names its generation
    all others          NetlinkError

How a dump of elements is torn, and how that is found out. nf_tables_dump_set marks nothing with NLM_F_DUMP_INTR, and
walks the map from its start for every 32 KiB, passing over as many elements as it has passed already.

A hash table that grows between two pieces (a worker does that, for some time after a large load, in no transaction)
brings the elements into another order: some are told twice, others never. Of a table of 100,000 just loaded, 87,000
were told. But what is passed over and what is told add up to the number of elements, so where no key is repeated, none
is missing.

A transaction between two pieces gives old values next to new ones, or moves elements past the reader. Own commits wait
for own dumps. For others, the generation must be the same before and behind. It counts a transaction up after the new
elements are in and before the old ones are out; so in front, it is asked for and then what is under way is waited for,
and behind, the other way round. An empty batch waits for the kernel's commit mutex and is no generation.
"""

import errno
import struct
import threading
from typing import NamedTuple, NoReturn

from vcproxy_nftables import dumps, wire
from vcproxy_nftables.batch import NFPROTO_INET, NO_OPERATION, SUBSYSTEM, TABLE, Batch
from vcproxy_nftables.elements import LIST_ELEMENTS, LIST_SET, LIST_TABLE, Elements, MapSpec, Matrix, Ranges, records
from vcproxy_nftables.monitor import SUSPEND_FROM, Changes, Monitor
from vcproxy_nftables.wire import (
    DUMP_ATTEMPTS,
    Answer,
    Channel,
    DumpInterrupted,
    GenerationChanged,
    NetlinkError,
    OutcomeUnknown,
    TableMissing,
)

__all__ = [
    "Batch",
    "Changes",
    "DumpInterrupted",
    "Elements",
    "GenerationChanged",
    "MapSpec",
    "Monitor",
    "NetlinkError",
    "Nfnetlink",
    "OutcomeUnknown",
    "Ranges",
    "SetFacts",
    "TableMissing",
]

_GETTABLE = SUBSYSTEM << 8 | 1
_GETSET = SUBSYSTEM << 8 | 10
_GETSETELEM = SUBSYSTEM << 8 | 13
_GETGEN = SUBSYSTEM << 8 | 16
_TABLE_NAME = 1
_GEN_ID = 1
_SET_NAME, _SET_FLAGS, _SET_KEY_LEN, _SET_DATA_LEN, _SET_COUNT = 2, 3, 5, 7, 20
_ERESTART = 85  # never leaves the kernel but through nfnetlink
_ANSWER_ATTEMPTS = 5
_ASKED_AT_ONCE = 500  # each answer takes 4 KiB of the receive buffer until it is read

_CURES = {
    errno.EBUSY: "the element is there with other data: dump and diff",
    errno.EEXIST: "the element is there already, or its range overlaps another's: dump and diff",
    errno.ENOENT: "it is not there: dump and diff",
    errno.ENFILE: "the map is full: raise its size",
    errno.EPERM: "CAP_NET_ADMIN is needed in this network namespace",
    errno.ENOMEM: "the kernel is out of memory: commit less at once",
    errno.EINVAL: "the map is of another shape than wanted: build the table again",
}


class SetFacts(NamedTuple):
    """A set or map as the kernel has it: lengths in octets, flags NFT_SET_* of linux/netfilter/nf_tables.h.

    `elements`: how many there are; None where the kernel does not tell (before NFTA_SET_COUNT).
    """

    key_octets: int
    data_octets: int
    flags: int
    elements: int | None


class Nfnetlink:
    """The elements of one table. All methods may be called from any thread, and raise NetlinkError and OSError."""

    def __init__(self, *, table: str = TABLE, family: int = NFPROTO_INET, receive_buffer: int = 4 << 20) -> None:
        """Opens sockets in the calling thread's network namespace; the table need not be there."""
        self.table = table
        self.family = family
        self._lock = threading.Lock()
        self._monitor: Monitor | None = None
        self._commits = Channel(receive_buffer=receive_buffer)
        try:
            self._questions = Channel()
        except OSError:
            self._commits.close()
            raise

    def monitor(self, *, receive_buffer: int = 1 << 20) -> Monitor:
        """Begin to watch the table for changes that do not come from here; the same one at every call.

        It is closed with this object. `receive_buffer`: octets that the kernel may queue. Raises OSError.
        """
        if self._monitor is None:
            self._monitor = Monitor(
                own_port=self._commits.port, table=self.table, family=self.family, receive_buffer=receive_buffer
            )
        return self._monitor

    def close(self) -> None:
        """Close the sockets, the monitor's too; the table stays."""
        if self._monitor is not None:
            self._monitor.close()
        self._commits.close()
        self._questions.close()

    def fileno(self) -> int:
        """The committing socket's descriptor, -1 when closed; it is never readable between calls."""
        return self._commits.fileno()

    def batch(self) -> Batch:
        """An empty transaction for this table."""
        return Batch(table=self.table, family=self.family)

    def commit(self, batch: Batch, *, generation: int | None = None) -> None:
        """Do all of a batch or nothing; an empty one is done at once.

        `generation`: do it only if the ruleset (all tables of the namespace) is still of this generation.
        """
        if not len(batch):
            return
        with self._lock:
            if self._monitor is not None and len(batch) >= SUSPEND_FROM:
                with self._monitor.suspended(self.generation):
                    self._commit(batch, generation)
            else:
                self._commit(batch, generation)

    def _commit(self, batch: Batch, generation: int | None) -> None:
        octets = batch.message(generation)
        for _ in range(_ANSWER_ATTEMPTS):
            answers, lost = self._commits.transact(octets)
            failed = [answer for answer in answers if answer.error]
            if not failed and any(answer.sequence == batch.last_sequence() for answer in answers):
                return
            if not failed:
                raise OutcomeUnknown(
                    f"table {self.table}: the kernel's answer to a transaction of {len(batch)} operations "
                    f"{'was lost' if lost else 'is missing'}: it was done or not; dump and diff",
                    errno=errno.ENOBUFS,
                    name=self.table,
                )
            if failed[0].error not in (errno.EINTR, errno.EAGAIN):
                break
        self._refused(batch, failed)

    def _refused(self, batch: Batch, failed: list[Answer]) -> NoReturn:
        first = failed[0]
        spec = batch.spec_of(first.sequence)
        if first.error == _ERESTART:
            raise GenerationChanged(
                f"table {self.table}: the ruleset changed since it was read: dump and diff", errno=first.error
            )
        if first.error == errno.ENOENT and (first.offset == wire.PREAMBLE or not self.exists()):
            self._missing()
        name = spec.name if spec else self.table
        key = batch.key_at(first.sequence, first.offset)
        doing = f"{batch.verb_of(first.sequence).name.lower()} elements of {name}" if spec else "commit"
        raise NetlinkError(
            f"table {self.table}: cannot {doing}: {wire.explain(first.error)}"
            + (f" at key {key.hex()}" if key else "")
            + (f" ({first.text})" if first.text else "")
            + (f"; {_CURES[first.error]}" if first.error in _CURES else "")
            + (f"; {len(failed)} messages failed" if len(failed) > 1 else ""),
            errno=first.error,
            name=name,
            key=key,
            failures=len(failed),
        )

    def _missing(self) -> NoReturn:
        raise TableMissing(
            f"table {self.table} is gone: somebody deleted it; build it again", errno=errno.ENOENT, name=self.table
        )

    def _check(self, verdict: Answer, name: str) -> None:
        if not verdict.error:
            return
        if verdict.error == errno.ENOENT and not self.exists():
            self._missing()
        raise NetlinkError(
            f"table {self.table}: cannot read {name}: {wire.explain(verdict.error)}"
            + (f" ({verdict.text})" if verdict.text else ""),
            errno=verdict.error,
            name=name,
        )

    def dump(self, spec: MapSpec) -> Elements:
        """All elements of a map, each once, of one generation.

        The kernel's time grows with the square, whoever reads, as it walks the map from its start for every 32 KiB:
        0.5 s for 100,000 elements of 16 octets, 3 s for 250,000, 15 s for 500,000, 53 s for 1,000,000. A transaction of
        anybody's meanwhile, in any table, makes it start again; own ones wait.

        Of a dynamic map, what the packet path adds meanwhile may be told or not. Raises TableMissing, NetlinkError (no
        such map), DumpInterrupted (others commit all the time), and ValueError if the map has another shape.
        """
        payload = wire.text(LIST_TABLE, self.table) + wire.text(LIST_SET, spec.name)
        with self._lock:
            for _ in range(DUMP_ATTEMPTS):
                before = self._begin()
                replies, verdict = self._questions.dump(kind=_GETSETELEM, family=self.family, payload=payload)
                self._check(verdict, spec.name)
                found = dumps.decode(spec, replies)
                if self._unchanged(before) and not dumps.repeats(found.keys):
                    return found
        raise DumpInterrupted(
            f"table {self.table}: map {spec.name} changed during each of {DUMP_ATTEMPTS} attempts to read it: "
            "try again later",
            errno=errno.EINTR,
            name=spec.name,
        )

    def get(self, spec: MapSpec, keys: Matrix) -> Elements | None:
        """The elements of a map with these keys u1[n, key_octets]; None if one of them, or the map, is not there.

        A lookup in the kernel each, 2.5 us with its reading here, however large the map. Of one generation, as `dump`.
        Raises TableMissing, NetlinkError, OSError, and DumpInterrupted if others commit all the time.
        """
        lead = wire.text(LIST_TABLE, self.table) + wire.text(LIST_SET, spec.name)
        asked = records(spec, keys)
        with self._lock:
            for _ in range(DUMP_ATTEMPTS):
                before, received = self._begin(), list[bytes]()
                for at in range(0, len(asked), _ASKED_AT_ONCE):
                    part = asked[at : at + _ASKED_AT_ONCE].tobytes()
                    payload = lead + wire.attribute(LIST_ELEMENTS | wire.NESTED, part)
                    found, verdict = self._questions.collect(kind=_GETSETELEM, family=self.family, payload=payload)
                    if verdict.error == errno.ENOENT and self.exists():
                        return None
                    self._check(verdict, spec.name)
                    received += found
                if self._unchanged(before):
                    return dumps.decode(spec, dumps.datagrams(received))
        raise DumpInterrupted(
            f"table {self.table}: the ruleset changed during each of {DUMP_ATTEMPTS} attempts to read elements of "
            f"{spec.name}: try again later",
            errno=errno.EINTR,
            name=spec.name,
        )

    def _begin(self) -> int:
        """The generation from which a read begins: all of it is done, unless another one has begun by now."""
        generation = self.generation()
        self._commits.transact(NO_OPERATION)
        return generation

    def _unchanged(self, generation: int) -> bool:
        """Whether no transaction was under way since a read of this generation began."""
        self._commits.transact(NO_OPERATION)
        return self.generation() == generation

    def exists(self) -> bool:
        """True if the table is there."""
        _, verdict = self._questions.request(
            kind=_GETTABLE, family=self.family, payload=wire.text(_TABLE_NAME, self.table)
        )
        if verdict.error not in (0, errno.ENOENT):
            raise NetlinkError(
                f"cannot ask for table {self.table}: {wire.explain(verdict.error)}",
                errno=verdict.error,
                name=self.table,
            )
        return verdict.error == 0

    def sets(self) -> dict[str, SetFacts]:
        """The table's sets and maps by name, none if the table is missing. A verdict map has 0 octets of data here."""
        payload = wire.text(LIST_TABLE, self.table)
        replies, verdict = self._questions.dump(kind=_GETSET, family=self.family, payload=payload)
        if verdict.error == errno.ENOENT:
            return {}
        self._check(verdict, "its sets")
        found: dict[str, SetFacts] = {}
        for reply in replies:
            numbers: dict[int, int] = {}
            name = ""
            for kind, start, end in wire.attributes(reply.data, reply.start, reply.end):
                if kind == _SET_NAME:
                    name = reply.data[start : end - 1].decode()
                elif kind in (_SET_FLAGS, _SET_KEY_LEN, _SET_DATA_LEN, _SET_COUNT):
                    (numbers[kind],) = struct.unpack_from(">I", reply.data, start)
            octets, flags = (numbers.get(_SET_KEY_LEN, 0), numbers.get(_SET_DATA_LEN, 0)), numbers.get(_SET_FLAGS, 0)
            found[name] = SetFacts(*octets, flags, numbers.get(_SET_COUNT))
        return found

    def generation(self) -> int:
        """The ruleset's generation: it grows with each transaction in the namespace, whoever's and whatever table's."""
        replies, verdict = self._questions.request(kind=_GETGEN, family=self.family)
        self._check(verdict, "the generation")
        for reply in replies:
            for kind, start, _ in wire.attributes(reply.data, reply.start, reply.end):
                if kind == _GEN_ID:
                    return int(struct.unpack_from(">I", reply.data, start)[0])
        raise NetlinkError("the kernel tells no generation", errno=errno.EPROTO)
