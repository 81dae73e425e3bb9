"""One transaction of element operations, as one run of octets for the kernel.

All that vcproxy programs is elements of a few big maps, so this is the hot path, and it has two forms. A first load is
a million elements: arrays of records, cut into messages. A change is three elements: there the fixed octets of a
message are made once per map and joined with key and data, which is ten times cheaper than any array.

Sizes that the kernel dictates (net/netfilter/nf_tables_api.c, nfnetlink.c): an element list is one attribute of at most
65,535 octets; a message holds one list; a batch holds any number of messages and is one transaction.
"""

import enum
import functools
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vcproxy_nftables import wire
from vcproxy_nftables.elements import (
    INTERVAL_END,
    LIST_ELEMENTS,
    LIST_SET,
    LIST_TABLE,
    MapSpec,
    Matrix,
    Octets,
    Ranges,
    following,
    layout,
    records,
    rows,
    verdict_records,
)
from vcproxy_nftables.wire import ATTRIBUTE, HEADER, NESTED

SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
BATCH_BEGIN = 0x10
BATCH_END = 0x11
BATCH_GENID = 1

NFPROTO_INET = 1
TABLE = "vcproxy"
_LIST_LIMIT = 65_535 - ATTRIBUTE.size


class Verb(enum.IntEnum):
    """What a message does; the values are the kernel's message types."""

    ADD = 12  # NFT_MSG_NEWSETELEM
    REMOVE = 14  # NFT_MSG_DELSETELEM
    DISCARD = 30  # NFT_MSG_DESTROYSETELEM, kernel 6.3: as REMOVE, but an absent element is no error


class _Frame(NamedTuple):
    """The fixed octets of a message of one element, between which come its sequence number, key and data."""

    start: bytes
    before_key: bytes
    before_data: bytes
    behind: bytes


@functools.cache
def _prefix(table: str, name: str) -> bytes:
    """The attributes in front of the list."""
    return wire.text(LIST_TABLE, table) + wire.text(LIST_SET, name)


def _frame(table: str, family: int, spec: MapSpec, verb: Verb, flags: int) -> _Frame:
    shape = layout(spec, data=verb is Verb.ADD and spec.data_octets > 0)
    octets = _message(table, family, spec, verb, flags, 0, shape.record)
    first = len(octets) - len(shape.record)
    key, data = first + shape.key_at, first + shape.data_at if shape.data_at > 0 else len(octets)
    behind_key = key + spec.key_octets
    before_data = octets[behind_key:data]
    return _Frame(octets[:8], octets[12:key], before_data, octets[data + spec.data_octets :])


def _message(table: str, family: int, spec: MapSpec, verb: Verb, flags: int, sequence: int, elements: bytes) -> bytes:
    """A message around a list of elements."""
    prefix = _prefix(table, spec.name)
    length = wire.PREAMBLE + len(prefix) + ATTRIBUTE.size + len(elements)
    return b"".join(
        (
            HEADER.pack(length, SUBSYSTEM << 8 | verb, wire.NLM_F_REQUEST | flags, sequence, 0),
            wire.GENERIC.pack(family, 0, 0),
            prefix,
            ATTRIBUTE.pack(ATTRIBUTE.size + len(elements), LIST_ELEMENTS | NESTED),
            elements,
        )
    )


class Batch:
    """One transaction for `Nfnetlink.commit`: element operations in the order in which they were asked for.

    Keys and data are given as u1 matrices, one row per element, or as the same octets packed into `bytes`. All methods
    raise ValueError for octets that do not fit the spec; the kernel is not asked before the commit. `len(batch)` is
    the number of element operations, `octets` the size on the wire.
    """

    def __init__(self, *, table: str = TABLE, family: int = NFPROTO_INET) -> None:
        self.table = table
        self.family = family
        self.octets = 0
        self._operations = 0
        self._messages: list[bytes] = []
        self._specs: list[MapSpec] = []  # of each message
        self._frames = _frames(table, family)

    def __len__(self) -> int:
        return self._operations

    def add(
        self,
        spec: MapSpec,
        keys: Octets,
        data: Octets | None = None,
        *,
        comments: Sequence[str] | None = None,
        verdicts: Sequence[str] | None = None,
        expirations: npt.NDArray[np.uint64] | None = None,
        exclusive: bool = False,
    ) -> None:
        """Add elements: n keys; n values for a data map, n `verdicts` ("goto x") for a verdict map.

        An element that is there with the same value is no error unless `exclusive` (EEXIST); with another value it is
        EBUSY: see `replace`. `expirations`: milliseconds left to live, for maps with a timeout.
        """
        flags = wire.NLM_F_CREATE | (wire.NLM_F_EXCL if exclusive else 0)
        if (data is None) != (spec.data_octets == 0) or (verdicts is None) == spec.verdict:
            raise ValueError(f"map {spec.name}: data and verdicts must be given as its spec says: {spec}")
        if (
            comments is None
            and expirations is None
            and verdicts is None
            and self._one(Verb.ADD, spec, flags, keys, data)
        ):
            return
        self._must_not_be_ranges(spec)
        matrix = rows(keys, spec.key_octets, f"keys of {spec.name}")
        values = None if data is None else rows(data, spec.data_octets, f"data of {spec.name}")
        given = (("data", values), ("comments", comments), ("verdicts", verdicts), ("expirations", expirations))
        for what, column in given:
            if column is not None and len(column) != len(matrix):
                raise ValueError(f"map {spec.name}: {len(matrix)} keys, but {len(column)} {what}")
        if verdicts is not None:
            self._separate(Verb.ADD, spec, flags, verdict_records(spec, matrix, verdicts))
        else:
            made = records(spec, matrix, data=values, comments=comments, expirations=expirations)
            self._many(Verb.ADD, spec, flags, made)
        self._operations += len(matrix)

    def remove(self, spec: MapSpec, keys: Octets, *, missing_ok: bool = False) -> None:
        """Remove elements by key. One that is absent fails the transaction with ENOENT, unless `missing_ok`.

        `missing_ok` is for elements that the kernel may have let expire meanwhile. It needs kernel 6.3.
        """
        verb = Verb.DISCARD if missing_ok else Verb.REMOVE
        if self._one(verb, spec, 0, keys, None):
            return
        self._must_not_be_ranges(spec)
        matrix = rows(keys, spec.key_octets, f"keys of {spec.name}")
        self._many(verb, spec, 0, records(spec, matrix))
        self._operations += len(matrix)

    def replace(self, spec: MapSpec, keys: Octets, data: Octets) -> None:
        """Give elements that are there another value: removed and added in this one transaction."""
        self.remove(spec, keys)
        self.add(spec, keys, data)

    def add_interval(
        self, spec: MapSpec, first: Octets, last: Octets, *, comments: Sequence[str] | None = None
    ) -> None:
        """Add ranges to a set of ranges: n first and n last keys, both inclusive.

        The kernel refuses overlaps: EEXIST, or ENOTEMPTY where they overlap in part.
        """
        self._interval(Verb.ADD, spec, wire.NLM_F_CREATE, first, last, comments)

    def remove_interval(self, spec: MapSpec, first: Octets, last: Octets) -> None:
        """Remove ranges, given exactly as they were added."""
        self._interval(Verb.REMOVE, spec, 0, first, last, None)

    def message(self, generation: int | None = None) -> bytes:
        """The transaction's octets: sequence numbers count its messages from 1; the last one asks for an ACK.

        Raises ValueError when nothing was asked for: the kernel would not answer.
        """
        if not self._messages:
            raise ValueError("an empty batch cannot be committed")
        condition = b"" if generation is None else wire.attribute(BATCH_GENID, struct.pack(">I", generation))
        begin = wire.message(kind=BATCH_BEGIN, flags=0, sequence=0, family=0, payload=condition, resource=SUBSYSTEM)
        # The kernel answers errors always and successes when asked. Only the last message asks: its ACK says that the
        # batch was read to its end. (BATCH_END itself is acknowledged by newer kernels only.)
        last = self._messages[-1]
        length, kind, flags = _START.unpack_from(last)
        final = (_START.pack(length, kind, flags | wire.NLM_F_ACK), last[8:])
        return b"".join((begin, *self._messages[:-1], *final, _END))

    def last_sequence(self) -> int:
        """The sequence number of the message that asks for the ACK."""
        return len(self._messages)

    def spec_of(self, sequence: int) -> MapSpec | None:
        """Which map a sequence number of `message` speaks of; None: of the transaction."""
        return self._specs[sequence - 1] if 0 < sequence <= len(self._specs) else None

    def verb_of(self, sequence: int) -> Verb:
        """What the message of this sequence number does."""
        (kind,) = struct.unpack_from("=H", self._messages[sequence - 1], 4)
        return Verb(kind & 0xFF)

    def key_at(self, sequence: int, offset: int) -> bytes:
        """The key of the element `offset` octets into a message, as ext-ack has it; b"" if no element is there."""
        spec = self.spec_of(sequence)
        if spec is None or offset <= wire.PREAMBLE + len(_prefix(self.table, spec.name)):
            return b""
        start = offset + 3 * ATTRIBUTE.size  # of the element, its key, the key's value
        return self._messages[sequence - 1][start : start + spec.key_octets]

    @staticmethod
    def _must_not_be_ranges(spec: MapSpec) -> None:
        if spec.ranges:
            raise ValueError(f"set {spec.name} holds ranges: use add_interval and remove_interval")

    def _one(self, verb: Verb, spec: MapSpec, flags: int, keys: Octets, data: Octets | None) -> bool:
        """The fast path for one element; False if there are more (or none)."""
        if isinstance(keys, np.ndarray):
            if len(keys) != 1:
                return False
            keys = rows(keys, spec.key_octets, spec.name).tobytes()
        elif len(keys) != spec.key_octets:
            return False
        if data is None:
            data = b""
        elif isinstance(data, np.ndarray):
            data = data.tobytes()
        frame = self._frames.get((spec, verb, flags))
        if frame is None:
            self._must_not_be_ranges(spec)
            frame = self._frames[spec, verb, flags] = _frame(self.table, self.family, spec, verb, flags)
        if verb is Verb.ADD and len(data) != spec.data_octets:
            raise ValueError(f"map {spec.name}: one key, but {len(data)} octets of data instead of {spec.data_octets}")
        self._specs.append(spec)
        start, before_key, before_data, behind = frame
        sequence = len(self._specs).to_bytes(4, sys.byteorder)
        made = b"".join((start, sequence, before_key, keys, before_data, data, behind))
        self._messages.append(made)
        self.octets += len(made)
        self._operations += 1
        return True

    def _interval(
        self, verb: Verb, spec: MapSpec, flags: int, first: Octets, last: Octets, comments: Sequence[str] | None
    ) -> None:
        starts = rows(first, spec.key_octets, f"first keys of {spec.name}")
        lasts = rows(last, spec.key_octets, f"last keys of {spec.name}")
        if len(starts) != len(lasts) or (comments is not None and len(comments) != len(starts)):
            raise ValueError(f"set {spec.name}: {len(starts)} first keys, {len(lasts)} last keys, comments must match")
        if spec.ranges is Ranges.NONE or spec.data_octets or spec.verdict:
            raise ValueError(f"set {spec.name}: no set of ranges: {spec}")
        self._operations += len(starts)
        if spec.ranges is Ranges.CONCATENATED:
            self._many(verb, spec, flags, records(spec, starts, ends=lasts, comments=comments))
            return
        behind, endless = following(lasts)
        opened = records(spec, starts, comments=comments)
        closed = records(spec, behind, flags=INTERVAL_END)
        # A start and its end stay neighbours, in ascending order: the tree judges overlaps element by element. A range
        # up to the last key of all has no end.
        self._separate(
            verb,
            spec,
            flags,
            [
                opened[index].tobytes() + (b"" if endless[index] else closed[index].tobytes())
                for index in np.lexsort(starts.T[::-1])
            ],
        )

    def _many(self, verb: Verb, spec: MapSpec, flags: int, made: Matrix) -> None:
        """Messages of records of one size."""
        if not len(made):
            return
        size = made.shape[1]
        step = _LIST_LIMIT // size
        octets = made.tobytes()
        for at in range(0, len(made), step):
            self._append(verb, spec, flags, octets[at * size : (at + step) * size])

    def _separate(self, verb: Verb, spec: MapSpec, flags: int, made: Sequence[bytes]) -> None:
        """Messages of records of any sizes."""
        held: list[bytes] = []
        size = 0
        for record in made:
            if size + len(record) > _LIST_LIMIT:
                self._append(verb, spec, flags, b"".join(held))
                held, size = [], 0
            held.append(record)
            size += len(record)
        if held:
            self._append(verb, spec, flags, b"".join(held))

    def _append(self, verb: Verb, spec: MapSpec, flags: int, elements: bytes) -> None:
        self._specs.append(spec)
        made = _message(self.table, self.family, spec, verb, flags, len(self._specs), elements)
        self._messages.append(made)
        self.octets += len(made)


_START = struct.Struct("=IHH")
_END = wire.message(kind=BATCH_END, flags=0, sequence=0, family=0, resource=SUBSYSTEM)
NO_OPERATION = wire.message(kind=BATCH_BEGIN, flags=0, sequence=0, family=0, resource=SUBSYSTEM) + _END
"""A batch of nothing: the kernel waits for the transactions under way, and does not answer."""


@functools.cache
def _frames(table: str, family: int) -> dict[tuple[MapSpec, Verb, int], _Frame]:
    """Frames made so far for a table: shared by its batches, since a batch lives for one transaction."""
    return {}
