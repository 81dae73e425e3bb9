"""Set and map elements in the kernel's octets: what maps look like, and records of elements.

Every element of one call has the same shape, so n elements are an array of n records of one size, of which numpy fills
the columns: a million in a tenth of a second. `batch` makes messages of the records, `dumps` reads them back.

Keys and data are the kernel's own octets (`nft_data`), which callers lay out: each field of a concatenation is padded
to four octets, a lone field is not padded.

    ct zone                       2 octets, host order    (4 within a concatenation: 2 and two zero octets)
    meta priority, meta mark      4 octets, host order
    numgen                        4 octets, host order
    tcp dport (udp, sctp)         2 octets, big endian    (4 within a concatenation)
    ip saddr, ip6 saddr           4 or 16 octets as on the wire
    iifname                       16 octets, NUL-padded

Sets of ranges come in two forms. With one field (rbtree) a range is two elements, its first key and, flagged as an end,
the key behind its last one. With several fields (pipapo) it is one element with KEY and KEY_END, field by field. Both
are written here as first and last key, both inclusive. All fields compare as big-endian numbers, and rules that look
into a set of ranges turn host-order fields around first: **in a set of ranges, ct zone and meta priority are big
endian** (zone 7 is 00 07 00 00 in a concatenation), else they are in host order.
"""

import enum
import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vcproxy_nftables import wire
from vcproxy_nftables.wire import ATTRIBUTE, NESTED

LIST_TABLE, LIST_SET, LIST_ELEMENTS = 1, 2, 3
LIST_ELEM = 1
ELEM_KEY, ELEM_DATA, ELEM_FLAGS, ELEM_TIMEOUT, ELEM_EXPIRATION, ELEM_USERDATA = 1, 2, 3, 4, 5, 6
ELEM_KEY_END = 10
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
INTERVAL_END = 1  # NFT_SET_ELEM_INTERVAL_END
COMMENT = 0  # NFTNL_UDATA_SET_ELEM_COMMENT
COMMENT_OCTETS = 127  # nft's NFTNL_UDATA_COMMENT_MAXLEN is 128 with its NUL

VERDICTS = {"accept": 1, "drop": 0, "continue": -1, "break": -2, "jump": -3, "goto": -4, "return": -5}

Octets: TypeAlias = npt.NDArray[np.uint8] | bytes
Matrix: TypeAlias = npt.NDArray[np.uint8]


class Ranges(enum.IntEnum):
    """Whether a set holds ranges, and how (flags interval)."""

    NONE = 0
    SINGLE = 1  # one field: start and end elements
    CONCATENATED = 2  # several fields: KEY and KEY_END


class MapSpec(NamedTuple):
    """A map or set. `data_octets` 0: a set, or a verdict map if `verdict`."""

    name: str
    key_octets: int
    data_octets: int = 0
    verdict: bool = False
    ranges: Ranges = Ranges.NONE


class Elements(NamedTuple):
    """What a dump found; rows correspond, n of them, in the kernel's order (ranges of SINGLE: sorted).

    `keys` u1[n, key_octets]; `data` u1[n, data_octets]; `comments`: n texts, "" without one; `timeouts` and
    `expirations`: u8[n], milliseconds, 0 without (an expiration is what is left); `ends`: for sets of ranges the last
    keys u1[n, key_octets], inclusive, else None; `verdicts`: n texts as in nft ("goto x", "drop"), empty for others.
    """

    keys: Matrix
    data: Matrix
    comments: Sequence[str]
    timeouts: npt.NDArray[np.uint64]
    expirations: npt.NDArray[np.uint64]
    ends: Matrix | None
    verdicts: Sequence[str]


class Layout(NamedTuple):
    """One element's octets with the places of what varies; -1: not there."""

    record: bytes
    key_at: int
    end_at: int
    data_at: int
    expiration_at: int
    comment_at: int


@functools.cache
def layout(
    spec: MapSpec, *, data: bool, end: bool = False, flags: int = 0, comment: int = 0, expires: bool = False
) -> Layout:
    """The shape of one element. `comment`: octets of the comment's text with its NULs; `expires`: has an EXPIRATION."""
    parts: list[bytes] = []
    size = ATTRIBUTE.size

    def put(octets: bytes, lead: int) -> int:
        nonlocal size
        at = size + lead
        parts.append(octets)
        size += len(octets)
        return at

    def value(kind: int, octets: int) -> int:
        return put(wire.nest(kind, wire.attribute(DATA_VALUE, bytes(octets))), 2 * ATTRIBUTE.size)

    key_at = value(ELEM_KEY, spec.key_octets)
    end_at = value(ELEM_KEY_END, spec.key_octets) if end else -1
    data_at = value(ELEM_DATA, spec.data_octets) if data else -1
    if flags:
        put(wire.attribute(ELEM_FLAGS, struct.pack(">I", flags)), 0)
    expiration_at = put(wire.attribute(ELEM_EXPIRATION, bytes(8)), ATTRIBUTE.size) if expires else -1
    comment_at = -1
    if comment:
        comment_at = put(wire.attribute(ELEM_USERDATA, bytes([COMMENT, comment]) + bytes(comment)), ATTRIBUTE.size + 2)
    record = ATTRIBUTE.pack(size, LIST_ELEM | NESTED) + b"".join(parts)
    return Layout(record, key_at, end_at, data_at, expiration_at, comment_at)


def rows(octets: Octets, width: int, what: str) -> Matrix:
    """Packed octets or a matrix, as u1[n, width]. Raises ValueError if the shape is another."""
    if isinstance(octets, bytes):
        if not width or len(octets) % width:
            raise ValueError(f"{what}: {len(octets)} octets are no multiple of {width}")
        return np.frombuffer(octets, np.uint8).reshape(-1, width)
    if octets.ndim != 2 or octets.shape[1] != width or octets.dtype != np.uint8:
        raise ValueError(f"{what}: need u1[n, {width}], not {octets.dtype.str}{list(octets.shape)}")
    return octets


def _packed_comments(comments: Sequence[str]) -> tuple[int, Matrix]:
    """All comments as one matrix, NUL-padded to the longest; nft reads up to the first NUL."""
    encoded = [comment.encode() for comment in comments]
    longest = max(map(len, encoded))
    if longest > COMMENT_OCTETS:
        raise ValueError(f"a comment has {longest} octets; {COMMENT_OCTETS} are allowed")
    width = longest + 1
    packed = b"".join(comment.ljust(width, b"\0") for comment in encoded)
    return width, np.frombuffer(packed, np.uint8).reshape(-1, width)


def encode_verdict(verdict: str) -> bytes:
    """`goto x`, `jump x`, `drop`, ... as NFTA_SET_ELEM_DATA. Raises ValueError for anything else."""
    word, _, chain = verdict.partition(" ")
    if word not in VERDICTS or bool(chain) != (word in ("jump", "goto")):
        raise ValueError(f"{verdict!r} is no verdict: need 'goto CHAIN', 'jump CHAIN', or one of {', '.join(VERDICTS)}")
    code = wire.attribute(VERDICT_CODE, struct.pack(">i", VERDICTS[word]))
    target = wire.text(VERDICT_CHAIN, chain) if chain else b""
    return wire.nest(ELEM_DATA, wire.nest(DATA_VERDICT, code, target))


def following(last: Matrix) -> tuple[Matrix, npt.NDArray[np.bool_]]:
    """last + 1 as big-endian numbers, u1[n, width], and which rows have no successor (all ones)."""
    ones = last == 0xFF
    # The carry reaches an octet when all octets behind it are ones.
    carry = np.logical_and.accumulate(ones[:, ::-1], axis=1)[:, ::-1]
    reached = np.ones_like(ones)
    reached[:, :-1] = carry[:, 1:]
    return last + reached.astype(np.uint8), carry[:, 0]


def records(
    spec: MapSpec,
    keys: Matrix,
    *,
    ends: Matrix | None = None,
    data: Matrix | None = None,
    comments: Sequence[str] | None = None,
    expirations: npt.NDArray[np.uint64] | None = None,
    flags: int = 0,
) -> Matrix:
    """n elements as u1[n, size of one]; columns given must have n rows. Raises ValueError for too long a comment."""
    width, texts = _packed_comments(comments) if comments else (0, None)
    shape = layout(
        spec, data=data is not None, end=ends is not None, flags=flags, comment=width, expires=expirations is not None
    )
    made = np.empty((len(keys), len(shape.record)), np.uint8)
    made[:] = np.frombuffer(shape.record, np.uint8)
    left = None if expirations is None else expirations.astype(">u8").view(np.uint8).reshape(-1, 8)
    for at, column in (
        (shape.key_at, keys),
        (shape.end_at, ends),
        (shape.data_at, data),
        (shape.expiration_at, left),
        (shape.comment_at, texts),
    ):
        if column is not None:
            made[:, at : at + column.shape[1]] = column
    return made


def verdict_records(spec: MapSpec, keys: Matrix, verdicts: Sequence[str]) -> list[bytes]:
    """Elements of a verdict map, one by one: chain names have many lengths, and verdict maps few elements."""
    made = []
    for key, verdict in zip(keys, verdicts, strict=True):
        value = wire.nest(ELEM_KEY, wire.attribute(DATA_VALUE, key.tobytes()))
        made.append(wire.nest(LIST_ELEM, value, encode_verdict(verdict)))
    return made
