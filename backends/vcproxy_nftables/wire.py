"""Netfilter netlink at the level of octets: messages, attributes, one socket, typed errors.

The kernel side is net/netlink/af_netlink.c and net/netfilter/nfnetlink.c. Three of its habits shape this module.

Requests are worked on inside sendmsg(2): when `send` returns, every answer to a request that is no dump is either in
the socket's receive queue or lost. So answers are collected without waiting, no timeout is needed, and an answer that
is not there is a fact (ENOBUFS or a kernel bug), not slowness.

An error answer normally echoes the whole request, which for our 64 KiB messages would overflow the queue that is to
tell what went wrong. NETLINK_CAP_ACK leaves the echo out, NETLINK_EXT_ACK adds the offset of the offending attribute.

A dump is produced piece by piece while it is read, under no lock: where the kernel marks pieces that may not fit
together with NLM_F_DUMP_INTR, the only cure is to start again. (It does not mark those of elements: see `netlink`.)

A socket belongs to the network namespace of the thread that opens it, and may then be used from every thread.
"""

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

from vcproxy.backend.protocol import BackendError

HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port id
GENERIC = struct.Struct(">BBH")  # nfgenmsg: family, version, resource id (big endian)
ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
PREAMBLE = HEADER.size + GENERIC.size

NESTED = 0x8000
TYPE_MASK = 0x3FFF

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLMSGERR_ATTR_MSG = 1
NLMSGERR_ATTR_OFFS = 2

SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_DROP_MEMBERSHIP = 2
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_NETFILTER = 12
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33

DUMP_ATTEMPTS = 8
_RECEIVE = 1 << 17  # the kernel never fills more than 32 KiB of a dump, or one skb of notifications
_SEND_BUFFER = 4 << 20
_RECEIVE_BUFFER = 4 << 20


class NetlinkError(BackendError):
    """The kernel refused a request, and nothing of it was done.

    `errno`: positive. `name`: the map, set or table meant, if known. `key`: the offending element's key, if the kernel
    told. `failures`: how many messages of the request failed; the attributes speak of the first.
    """

    def __init__(self, message: str, *, errno: int, name: str = "", key: bytes = b"", failures: int = 1) -> None:
        super().__init__(message)
        self.errno = errno
        self.name = name
        self.key = key
        self.failures = failures


class TableMissing(NetlinkError):
    """The table is not there: somebody deleted it, or it was never made. The cure is to build it again."""


class OutcomeUnknown(NetlinkError):
    """The kernel's answer was lost (ENOBUFS): all of a transaction was done, or nothing. The cure is dump and diff."""


class GenerationChanged(NetlinkError):
    """The ruleset is not of the generation that the transaction was meant for. The cure is dump and diff."""


class DumpInterrupted(NetlinkError):
    """The ruleset kept changing while it was read, however often that was tried."""


class Answer(NamedTuple):
    """One NLMSG_ERROR: `error` is 0 or a positive errno; `offset` of the bad attribute in the request, or -1."""

    sequence: int
    error: int
    offset: int
    text: str


class Reply(NamedTuple):
    """One message: `data[start:end]` is what follows nfgenmsg."""

    kind: int
    data: bytes
    start: int
    end: int


def pad(length: int) -> int:
    """Octets that bring `length` to a multiple of four."""
    return -length & 3


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(payload), kind) + payload + bytes(pad(len(payload)))


def nest(kind: int, *attributes: bytes) -> bytes:
    """An attribute of attributes."""
    return attribute(kind | NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    """A NUL-terminated string attribute."""
    return attribute(kind, value.encode() + b"\0")


def message(*, kind: int, flags: int, sequence: int, family: int, payload: bytes = b"", resource: int = 0) -> bytes:
    """One whole request."""
    header = HEADER.pack(PREAMBLE + len(payload), kind, flags | NLM_F_REQUEST, sequence, 0)
    return header + GENERIC.pack(family, 0, resource) + payload


def attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(type without flags, payload start, payload end) of each attribute in data[start:end].

    Raises ValueError where a length leads out of bounds.
    """
    while start + ATTRIBUTE.size <= end:
        length, kind = ATTRIBUTE.unpack_from(data, start)
        if length < ATTRIBUTE.size or start + length > end:
            raise ValueError(f"attribute at octet {start} has the impossible length {length}")
        yield kind & TYPE_MASK, start + ATTRIBUTE.size, start + length
        start += length + pad(length)


def messages(data: bytes) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(type, flags, sequence, port id, start, end) of each message that one recv returned, without headers."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, port = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > len(data):
            raise ValueError(f"message at octet {offset} has the impossible length {length}")
        yield kind, flags, sequence, port, offset + HEADER.size, offset + length
        offset += length + pad(length)


def answer(data: bytes, flags: int, sequence: int, start: int, end: int) -> Answer:
    """Decode the body of an NLMSG_ERROR (struct nlmsgerr, then ext-ack attributes)."""
    (code,) = struct.unpack_from("=i", data, start)
    offset, reason = -1, ""
    if flags & NLM_F_ACK_TLVS:
        (echoed,) = struct.unpack_from("=I", data, start + 4)
        skip = HEADER.size if flags & NLM_F_CAPPED else echoed + pad(echoed)
        for kind, first, last in attributes(data, start + 4 + skip, end):
            if kind == NLMSGERR_ATTR_OFFS:
                (offset,) = struct.unpack_from("=I", data, first)
            elif kind == NLMSGERR_ATTR_MSG:
                reason = data[first : last - 1].decode(errors="replace")
    return Answer(sequence, -code, offset, reason)


def explain(code: int) -> str:
    """`ENOENT: No such file or directory`."""
    return f"{errno.errorcode.get(code, code)}: {os.strerror(code)}"


class Channel:
    """One NETLINK_NETFILTER socket of the current network namespace; one request at a time, from any thread."""

    def __init__(self, *, receive_buffer: int = _RECEIVE_BUFFER) -> None:
        """`receive_buffer`: octets that the kernel may queue for us. Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
            self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, _SEND_BUFFER)
        except OSError:
            self._socket.close()
            raise
        self._room = _SEND_BUFFER
        self._lock = threading.Lock()
        self._sequence = 1 << 20
        self.port: int = self._socket.getsockname()[0]

    def fileno(self) -> int:
        """The socket's descriptor, or -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; nothing in the kernel changes."""
        self._socket.close()

    def _send(self, data: bytes) -> None:
        if len(data) > self._room:  # netlink_sendmsg: EMSGSIZE if longer than sk_sndbuf - 32
            self._room = len(data) * 2
            self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, self._room)
        self._socket.send(data)

    def _drain(self) -> None:
        """Forget what an interrupted call may have left."""
        while True:
            try:
                self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def transact(self, data: bytes) -> tuple[list[Answer], bool]:
        """Send one batch and return (its answers, whether answers were lost). Raises OSError where sending fails.

        The caller chooses the sequence numbers; what is still queued from before is dropped when it fits none.
        """
        answers: list[Answer] = []
        lost = False
        with self._lock:
            self._send(data)
            while True:
                try:
                    received = self._socket.recv(4096, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return answers, lost
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    lost = True
                    continue
                for kind, flags, sequence, _, start, end in messages(received):
                    if kind == NLMSG_ERROR:
                        answers.append(answer(received, flags, sequence, start, end))

    def request(self, *, kind: int, family: int, payload: bytes = b"", flags: int = 0) -> tuple[list[Reply], Answer]:
        """One request that is no batch and no dump: its replies, and the kernel's verdict. Raises OSError."""
        with self._lock:
            self._sequence += 1
            wanted = self._sequence
            self._send(message(kind=kind, flags=flags | NLM_F_ACK, sequence=wanted, family=family, payload=payload))
            replies: list[Reply] = []
            verdict: Answer | None = None
            while True:
                try:
                    received = self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return replies, verdict or Answer(wanted, errno.EPROTO, -1, "the kernel did not answer")
                for reply_kind, reply_flags, sequence, _, start, end in messages(received):
                    if sequence != wanted:
                        continue
                    if reply_kind == NLMSG_ERROR:
                        verdict = answer(received, reply_flags, sequence, start, end)
                    else:
                        replies.append(Reply(reply_kind, received, start + GENERIC.size, end))

    def collect(self, *, kind: int, family: int, payload: bytes) -> tuple[list[bytes], Answer]:
        """One request that is answered by one datagram for each thing asked for: these, as they came, and the kernel's
        verdict. Raises OSError, ENOBUFS if answers were lost.

        Nothing is parsed here but the verdict: there may be hundreds, and their reader does it for all at once.
        """
        with self._lock:
            self._sequence += 1
            self._send(message(kind=kind, flags=NLM_F_ACK, sequence=self._sequence, family=family, payload=payload))
            received: list[bytes] = []
            receive = self._socket.recv
            try:
                while True:
                    received.append(receive(_RECEIVE, socket.MSG_DONTWAIT))
            except BlockingIOError:
                pass
            except OSError:
                self._drain()
                raise
            last = received.pop() if received else b""
            for reply_kind, flags, sequence, _, start, end in messages(last):
                if reply_kind == NLMSG_ERROR and sequence == self._sequence:
                    return received, answer(last, flags, sequence, start, end)
        return [], Answer(self._sequence, errno.EPROTO, -1, "the kernel did not answer")

    def dump(self, *, kind: int, family: int, payload: bytes = b"") -> tuple[list[Reply], Answer]:
        """All messages of a dump not marked as torn, and the kernel's verdict. Raises OSError, DumpInterrupted."""
        with self._lock:
            for _ in range(DUMP_ATTEMPTS):
                replies, verdict, torn = self._dump(kind, family, payload)
                if not torn:
                    return replies, verdict
                self._drain()
        raise DumpInterrupted(
            f"the ruleset changed during each of {DUMP_ATTEMPTS} attempts to read it: try again later",
            errno=errno.EINTR,
        )

    def _dump(self, kind: int, family: int, payload: bytes) -> tuple[list[Reply], Answer, bool]:
        self._sequence += 1
        wanted = self._sequence
        self._send(message(kind=kind, flags=NLM_F_DUMP, sequence=wanted, family=family, payload=payload))
        replies: list[Reply] = []
        torn = False
        while True:
            try:
                received = self._socket.recv(_RECEIVE)
            except OSError as error:
                if error.errno in (errno.ENOBUFS, errno.EINTR):
                    return [], Answer(wanted, error.errno, -1, ""), True
                raise
            for reply_kind, flags, sequence, _, start, end in messages(received):
                if sequence != wanted:
                    continue
                torn |= bool(flags & NLM_F_DUMP_INTR)
                if reply_kind == NLMSG_DONE:
                    (code,) = struct.unpack_from("=i", received, start)
                    return replies, Answer(wanted, -code, -1, ""), torn or -code == errno.EINTR
                if reply_kind == NLMSG_ERROR:
                    verdict = answer(received, flags, sequence, start, end)
                    return [], verdict, verdict.error in (errno.EINTR, errno.EAGAIN)
                replies.append(Reply(reply_kind, received, start + GENERIC.size, end))
