"""Element lists of the kernel, read with numpy.

A dump of a million elements is a few thousand messages, each a list of elements that nearly always have one shape (the
same attributes of the same lengths at the same places). So no element is parsed: one of a group is, its attribute
headers become a mask, and all elements of the same length whose masked octets are equal are cut into columns at once.
Elements that differ (another comment length, a timeout more) form the next group. The number of groups is the number of
shapes, not of elements.

The lists are those of nf_tables_fill_setelem (net/netfilter/nf_tables_api.c). A catch-all element has no key and is
left out: vcproxy makes none, and what has no key can neither be wanted nor be removed by key.
"""

import secrets
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vcproxy_nftables import wire
from vcproxy_nftables.elements import (
    COMMENT,
    DATA_VALUE,
    DATA_VERDICT,
    ELEM_DATA,
    ELEM_EXPIRATION,
    ELEM_FLAGS,
    ELEM_KEY,
    ELEM_KEY_END,
    ELEM_TIMEOUT,
    ELEM_USERDATA,
    INTERVAL_END,
    LIST_ELEMENTS,
    VERDICT_CHAIN,
    VERDICT_CODE,
    VERDICTS,
    Elements,
    MapSpec,
    Matrix,
    Ranges,
)
from vcproxy_nftables.wire import ATTRIBUTE, Reply, attributes, pad

_WORDS = {code: word for word, code in VERDICTS.items()}
_NUMBERS = (ELEM_FLAGS, ELEM_TIMEOUT, ELEM_EXPIRATION)
_LIST_OCTETS = 60_000


class _Shape(NamedTuple):
    """Where the attributes of an element are: (start, end) of payloads. `mask`: octets that are headers."""

    mask: npt.NDArray[np.bool_]
    places: dict[int, tuple[int, int]]


class _Group(NamedTuple):
    """Elements of one shape: u1[n, size]."""

    octets: Matrix
    places: dict[int, tuple[int, int]]

    def column(self, kind: int) -> Matrix | None:
        place = self.places.get(kind)
        return None if place is None else self.octets[:, place[0] : place[1]]

    def numbers(self, kind: int, dtype: str) -> npt.NDArray[np.uint64]:
        column = self.column(kind)
        if column is None:
            return np.zeros(len(self.octets), np.uint64)
        return np.ascontiguousarray(column).view(dtype).reshape(-1).astype(np.uint64)


def _shape(element: bytes) -> _Shape:
    """Parse one element, its own header included. Raises ValueError."""
    mask = np.zeros(len(element), np.bool_)
    mask[: ATTRIBUTE.size] = True
    places: dict[int, tuple[int, int]] = {}
    for kind, start, end in attributes(element, ATTRIBUTE.size, len(element)):
        mask[start - ATTRIBUTE.size : start] = True
        if kind in (ELEM_KEY, ELEM_KEY_END, ELEM_DATA):
            for inner, first, last in attributes(element, start, end):
                mask[first - ATTRIBUTE.size : first] = True
                if inner == DATA_VALUE:
                    places[kind] = (first, last)
                elif inner == DATA_VERDICT:
                    places[-DATA_VERDICT] = (first, last)
        else:
            places[kind] = (start, end)
    return _Shape(mask, places)


def _lists(replies: Iterable[Reply]) -> Iterable[Matrix]:
    """The octets of each reply's element list."""
    for reply in replies:
        for kind, start, end in attributes(reply.data, reply.start, reply.end):
            if kind == LIST_ELEMENTS and end > start:
                yield np.frombuffer(reply.data, np.uint8, end - start, start)


def datagrams(received: Sequence[bytes]) -> list[Reply]:
    """Datagrams of one message each as replies; those of one length as one reply, whose lists follow each other.

    So what was asked for key by key is cut into columns as a dump is. Raises ValueError for what is no element list.
    """
    by_length: dict[int, list[bytes]] = {}
    for each in received:
        by_length.setdefault(len(each), []).append(each)
    replies = []
    for length, group in by_length.items():
        at = wire.PREAMBLE
        places = {kind: (start, end) for kind, start, end in attributes(group[0], at, length)}
        if LIST_ELEMENTS not in places:
            raise ValueError(f"a message of {length} octets is no list of elements")
        start, end = places[LIST_ELEMENTS]
        octets = np.frombuffer(b"".join(group), np.uint8).reshape(-1, length)
        lists = np.ascontiguousarray(octets[:, start:end]).tobytes()
        # One attribute cannot hold them all: its length has 16 bits. So they are cut again, at whole elements.
        step = max(1, _LIST_OCTETS // (end - start)) * (end - start)
        for first in range(0, len(lists), step):
            data = wire.attribute(LIST_ELEMENTS, lists[first : first + step])
            replies.append(Reply(0, data, 0, len(data)))
    return replies


def _length(octets: Matrix, at: int) -> int:
    """The length of the element that starts there, with its padding."""
    (size,) = struct.unpack_from("=H", octets.data, at)
    return int(size) + pad(size)


def _by_length(lists: Iterable[Matrix]) -> dict[int, Matrix]:
    """All elements as u1[n, length], by their length (padding included)."""
    found: dict[int, list[Matrix]] = {}
    for octets in lists:
        size = _length(octets, 0)
        if size >= ATTRIBUTE.size and len(octets) % size == 0:
            table = octets.reshape(-1, size)
            if (table[:, :2] == table[0, :2]).all():
                found.setdefault(size, []).append(table)
                continue
        at = 0
        while at < len(octets):
            size = _length(octets, at)
            if size < ATTRIBUTE.size or at + size > len(octets):
                raise ValueError(f"element at octet {at} of a list has the impossible length {size}")
            found.setdefault(size, []).append(octets[at : at + size].reshape(1, -1))
            at += size
    return {size: np.concatenate(tables) for size, tables in found.items()}


def _groups(tables: dict[int, Matrix]) -> Iterable[_Group]:
    for table in tables.values():
        rest = table
        while len(rest):
            shape = _shape(rest[0].tobytes())
            same = (rest[:, shape.mask] == rest[0, shape.mask]).all(axis=1)
            if ELEM_KEY in shape.places:
                yield _Group(rest[same] if not same.all() else rest, shape.places)
            rest = rest[~same]


def _comment(userdata: bytes) -> str:
    """The comment among nft's type-length-value records, "" without one."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == COMMENT:
            return userdata[at + 2 : at + 2 + length].split(b"\0", 1)[0].decode(errors="replace")
        at += 2 + length
    return ""


def _verdict(octets: bytes) -> str:
    word, chain = "", ""
    for kind, start, end in attributes(octets, 0, len(octets)):
        if kind == VERDICT_CODE:
            (code,) = struct.unpack_from(">i", octets, start)
            word = _WORDS.get(code, str(code))
        elif kind == VERDICT_CHAIN:
            chain = octets[start:end].split(b"\0", 1)[0].decode()
    return f"{word} {chain}".rstrip()


def _texts(group: _Group) -> list[str]:
    column = group.column(ELEM_USERDATA)
    return [""] * len(group.octets) if column is None else [_comment(row.tobytes()) for row in column]


def decode(spec: MapSpec, replies: Sequence[Reply]) -> Elements:
    """A dump's replies as columns. Raises ValueError if the kernel's set is not of the spec's shape."""
    groups = list(_groups(_by_length(_lists(replies))))
    verdicts: list[str] = []
    ends: list[Matrix] = []
    keys: list[Matrix] = [np.empty((0, spec.key_octets), np.uint8)]
    data: list[Matrix] = [np.empty((0, spec.data_octets), np.uint8)]
    comments: list[str] = []
    for group in groups:
        key = group.column(ELEM_KEY)
        value = group.column(ELEM_DATA)
        end = group.column(ELEM_KEY_END)
        if key is None or key.shape[1] != spec.key_octets or (value is not None and value.shape[1] != spec.data_octets):
            raise ValueError(
                f"map {spec.name}: the kernel's keys and data have {'no' if key is None else key.shape[1]} and "
                f"{'no' if value is None else value.shape[1]} octets, wanted are {spec}"
            )
        keys.append(key)
        data.append(np.zeros((len(key), spec.data_octets), np.uint8) if value is None else value)
        ends.append(key if end is None else end)
        comments += _texts(group)
        if spec.verdict:
            column = group.column(-DATA_VERDICT)
            verdicts += [""] * len(key) if column is None else [_verdict(row.tobytes()) for row in column]
    none = [np.empty(0, np.uint64)]
    found = Elements(
        keys=np.concatenate(keys),
        data=np.concatenate(data),
        comments=comments,
        timeouts=np.concatenate([*none, *(group.numbers(ELEM_TIMEOUT, ">u8") for group in groups)]),
        expirations=np.concatenate([*none, *(group.numbers(ELEM_EXPIRATION, ">u8") for group in groups)]),
        ends=np.concatenate([keys[0], *ends]) if spec.ranges is Ranges.CONCATENATED else None,
        verdicts=verdicts,
    )
    if spec.ranges is not Ranges.SINGLE:
        return found
    flags = np.concatenate([*none, *(group.numbers(ELEM_FLAGS, ">u4") for group in groups)])
    return _paired(found, (flags & np.uint64(INTERVAL_END)) != 0)


def repeats(keys: Matrix) -> bool:
    """True if a row of u1[n, width] is there twice. (Or if 64-bit hashes of two meet; the next call takes others.)"""
    if len(keys) < 2:
        return False
    words = -(-keys.shape[1] // 8)
    padded = np.zeros((len(keys), words * 8), np.uint8)
    padded[:, : keys.shape[1]] = keys
    columns = padded.view(np.uint64)
    mixed = columns[:, 0].copy()
    for column in columns.T[1:]:
        mixed *= np.uint64(secrets.randbits(64) | 1)
        mixed ^= mixed >> np.uint64(32)
        mixed += column
    mixed.sort()
    return bool((mixed[1:] == mixed[:-1]).any())


def _paired(found: Elements, is_end: npt.NDArray[np.bool_]) -> Elements:
    """Start and end elements of a tree as ranges, sorted.

    A range ends in front of the next element whatever it is, and at the very last key if there is none. nft puts an end
    in front of the first range of a set; it closes nothing.
    """
    # By key, ends first: of two ranges that touch, the former's end and the latter's start have the same key.
    order = np.lexsort((*(column for column in (~is_end, *found.keys.T[::-1])),))
    keys, closes = found.keys[order], is_end[order]
    behind = np.full_like(keys, 0)  # 0 - 1 is the last key of all
    behind[:-1] = keys[1:]
    last = _preceding(behind)
    starts = order[~closes]
    return Elements(
        keys=found.keys[starts],
        data=found.data[starts],
        comments=[found.comments[index] for index in starts],
        timeouts=found.timeouts[starts],
        expirations=found.expirations[starts],
        ends=last[~closes],
        verdicts=[found.verdicts[index] for index in starts] if found.verdicts else [],
    )


def _preceding(keys: Matrix) -> Matrix:
    """keys - 1 as big-endian numbers, modulo their width."""
    zeros = keys == 0
    reached = np.ones_like(zeros)
    reached[:, :-1] = np.logical_and.accumulate(zeros[:, ::-1], axis=1)[:, ::-1][:, 1:]
    lower: Matrix = keys - reached.astype(np.uint8)
    return lower
