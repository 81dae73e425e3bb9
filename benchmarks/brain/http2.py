"""As much of HTTP/2 and gRPC as reading a stream needs, so that a thousand readers cost little beside their writer.

A connection with one call, a flow-control window that never closes, no Huffman code, no trailers worth reading. RFC
9113 sections 4 and 6, RFC 7541 section 6.2.2, and gRPC over HTTP2 (PROTOCOL-HTTP2.md).
"""

import asyncio
import struct
from collections.abc import Callable, Iterable
from typing import NoReturn, cast

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_ACK, _END_HEADERS = 1, 4
_WIDE = (1 << 31) - 1
_PATH = b"/vcproxy.v1.Distribution/Watch"


class Call(asyncio.Protocol):
    """One call of Watch. `said` gets each message, as it arrives."""

    def __init__(self, first: bytes, said: Callable[["Call", memoryview], None]) -> None:
        self._first = first
        self._said = said
        self._frames = bytearray()
        self._messages = bytearray()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        settings = struct.pack(">HIHI", 4, _WIDE, 5, 1 << 20)  # windows of streams, the largest frame
        headers = (
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", _PATH),
            (b":authority", b"brain"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        )
        transport.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW, 0, 0, struct.pack(">I", _WIDE - 65535))
            + _frame(_HEADERS, _END_HEADERS, 1, _headers(headers))
        )
        self.send(self._first)

    def send(self, message: bytes) -> None:
        """Say something on the call."""
        self._transport.write(_frame(_DATA, 0, 1, b"\0" + struct.pack(">I", len(message)) + message))

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        frames = self._frames
        frames += data
        at = 0
        while len(frames) - at >= 9:
            length, kind, flags = int.from_bytes(frames[at : at + 3], "big"), frames[at + 3], frames[at + 4]
            if len(frames) - at < 9 + length:
                break
            body = bytes(frames[at + 9 : at + 9 + length])
            at += 9 + length
            if kind == _DATA:
                self._received(body)
            elif kind in (_SETTINGS, _PING) and not flags & _ACK:
                self._transport.write(_frame(kind, _ACK, 0, body if kind == _PING else b""))
            elif kind in (_RESET, _GOAWAY) or (kind == _HEADERS and flags & 1):
                _ended(body)
        del frames[:at]

    def _received(self, body: bytes) -> None:
        messages = self._messages
        messages += body
        at = 0
        while len(messages) - at >= 5:
            length = int.from_bytes(messages[at + 1 : at + 5], "big")
            if len(messages) - at < 5 + length:
                break
            self._said(self, memoryview(bytes(messages[at + 5 : at + 5 + length])))
            at += 5 + length
        del messages[:at]


def _ended(body: bytes) -> NoReturn:
    raise RuntimeError(f"the brain ended a call: {body!r}")


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + body


def _headers(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Literal fields, not indexed, with new names; all shorter than 127 octets."""
    return b"".join(b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields)
