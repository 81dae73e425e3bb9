"""Notices that somebody else changed the table.

The kernel tells every change of the ruleset to a multicast group (NFNLGRP_NFTABLES): a message for each object and
element, then one for the new generation, all of them with the committing socket's port id in nlmsg_pid
(nf_tables_setelem_notify, nf_tables_gen_notify). Own changes must be left out, and cheaply:

    tell them apart when reading     a load of a million elements is 100 MB of messages, which overflows any queue
    a filter in the kernel           the socket filter compares nlmsg_pid before a message is queued: nothing arrives.
                                     All messages in one buffer are of one transaction, so it looks at the first
    unsubscribe during own loads     as long as anybody is subscribed, the kernel sets aside a page for each element
                                     until the commit: 100,000 elements take 400 MB and several times as long

So small transactions are filtered, and `suspended` unsubscribes for large ones. What others do meanwhile goes unseen,
but not unnoticed: each transaction, whosever, makes a new generation of the ruleset, and there must be exactly one more
behind the load than before it. Otherwise `drain` says "overflow": perhaps it was our table that they changed.

What the packet path does (learnt affinity, expiry) is not told at all, and needs not be.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vcproxy_nftables import wire
from vcproxy_nftables.batch import NFPROTO_INET, SUBSYSTEM, TABLE
from vcproxy_nftables.wire import GENERIC, SO_RCVBUFFORCE

NFNLGRP_NFTABLES = 7
SUSPEND_FROM = 500  # operations of a transaction: 2 MB of pages
_DELTABLE = SUBSYSTEM << 8 | 2
_NEWGEN = SUBSYSTEM << 8 | 15
_TABLE = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, NFTA_SET_ELEM_LIST_TABLE, ...
_RECEIVE = 1 << 17
_RECEIVE_BUFFER = 1 << 20

_SO_ATTACH_FILTER = 26
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS: reads big endian
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_PORT_AT = 12  # nlmsg_pid in nlmsghdr
_INSTRUCTION = struct.Struct("=HBBI")  # sock_filter
_PROGRAM = struct.Struct("@HP")  # sock_fprog


class Changes(NamedTuple):
    """What happened since the last look, as far as it was not done by ourselves.

    `foreign`: somebody changed our table. `overflow`: somebody changed something that could not be seen, perhaps our
    table. `table_gone`: our table was deleted, and may have been made anew since.
    """

    foreign: bool
    overflow: bool
    table_gone: bool

    def __bool__(self) -> bool:
        """True if the table may not be what it was."""
        return self.foreign or self.overflow or self.table_gone


class Monitor:
    """Watches one table in the network namespace that it is opened in. Made by `Nfnetlink.monitor`."""

    def __init__(
        self, *, own_port: int, table: str = TABLE, family: int = NFPROTO_INET, receive_buffer: int = _RECEIVE_BUFFER
    ) -> None:
        """`own_port`: the port id whose changes are not told.

        Open it before the table is first read, or a change between the two goes unseen. Raises OSError.
        """
        self._table = table.encode() + b"\0"
        self._family = family
        with contextlib.ExitStack() as stack:
            self._socket = stack.enter_context(
                socket.socket(
                    socket.AF_NETLINK,
                    socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                    wire.NETLINK_NETFILTER,
                )
            )
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
            self._ignore(own_port)
            self._socket.bind((0, 0))
            self._missed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self._missed)
            # One descriptor for both: readable when either is.
            self._poll = stack.enter_context(select.epoll())
            self._poll.register(self._socket, select.EPOLLIN)
            self._poll.register(self._missed, select.EPOLLIN)
            self._member(wire.NETLINK_ADD_MEMBERSHIP)
            self._resources = stack.pop_all()

    def _member(self, option: int) -> None:
        self._socket.setsockopt(wire.SOL_NETLINK, option, NFNLGRP_NFTABLES)

    def _ignore(self, port: int) -> None:
        """Drop what comes from a port before it is queued (classic BPF, as FRR's zebra does with its own routes)."""
        program = b"".join(
            (
                _INSTRUCTION.pack(_LOAD_WORD, 0, 0, _PORT_AT),
                _INSTRUCTION.pack(_JUMP_EQUAL, 0, 1, socket.htonl(port)),
                _INSTRUCTION.pack(_RETURN, 0, 0, 0),
                _INSTRUCTION.pack(_RETURN, 0, 0, 0xFFFFFFFF),
            )
        )
        held = ctypes.create_string_buffer(program, len(program))
        filled = _PROGRAM.pack(len(program) // _INSTRUCTION.size, ctypes.addressof(held))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filled)

    def fileno(self) -> int:
        """A descriptor that turns readable when somebody else changed some table; -1 when closed."""
        return -1 if self._poll.closed else self._poll.fileno()

    def close(self) -> None:
        """Close the descriptors."""
        self._resources.close()

    @contextlib.contextmanager
    def suspended(self, generation: Callable[[], int]) -> Iterator[None]:
        """Around one large own transaction: do not have the kernel tell of it, but notice if there were others.

        `generation`: asks the kernel for the ruleset's generation.
        """
        # Asked for outside of the gap on both sides: a change at its edges may be told twice, never not at all.
        expected = generation()
        self._member(wire.NETLINK_DROP_MEMBERSHIP)
        try:
            yield
            expected += 1
        finally:
            self._member(wire.NETLINK_ADD_MEMBERSHIP)
            if generation() != expected:
                os.eventfd_write(self._missed, 1)

    def drain(self) -> Changes:
        """Read what is queued and say what it means for the table; never blocks. Raises OSError."""
        foreign = gone = False
        overflow = self._was_missed()
        while True:
            try:
                received = self._socket.recv(_RECEIVE)
            except BlockingIOError:
                return Changes(foreign, overflow, gone)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                overflow = True
                continue
            for kind, _, _, _, start, end in wire.messages(received):
                if kind >> 8 == SUBSYSTEM and kind != _NEWGEN and self._ours(received, start, end):
                    foreign = True
                    gone |= kind == _DELTABLE

    def _was_missed(self) -> bool:
        try:
            return os.eventfd_read(self._missed) > 0
        except BlockingIOError:
            return False

    def _ours(self, data: bytes, start: int, end: int) -> bool:
        """True if a message speaks of the table: its name is attribute 1 of all kinds of objects, and comes first."""
        if data[start] != self._family:
            return False
        for kind, first, last in wire.attributes(data, start + GENERIC.size, end):
            return kind == _TABLE and data[first:last] == self._table
        return False
