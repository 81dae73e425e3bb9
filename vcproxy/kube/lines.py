"""A byte stream cut into lines, without trusting the sender to ever end one.

The reader of a watch gets chunks as the network delivers them. Cutting them here, and not with the HTTP library's
`readline`, makes the longest line a number of ours (not twice the library's receive buffer, past which it fails),
lets a line that is too long be skipped while the ones after it are still read, and hands over all lines of a chunk in
one step.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = 4096
"""How much of an oversized line is kept, in bytes: enough to find the object's name in its metadata."""


@dataclass(frozen=True, slots=True)
class Oversized:
    """A line longer than the limit: its length in bytes (so far as it was read) and how it began."""

    size: int
    head: bytes


Line = bytes | Oversized


class LineCutter:
    """Cuts chunks into lines of at most `limit` bytes; empty lines vanish. Holds `limit` bytes at most meanwhile."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest: list[bytes] = []
        self._size = 0
        self._head = b""

    @property
    def unfinished(self) -> bool:
        """Whether a line has begun and not ended: at the end of a stream that means it was cut off."""
        return self._size > 0

    def feed(self, chunk: bytes) -> list[Line]:
        """All lines that this chunk completes, in order."""
        first, *others = chunk.split(b"\n")
        if not others:
            self._keep(first)
            return []
        self._keep(first)
        lines: list[Line] = [self._end()]
        last = others.pop()
        lines.extend(line if len(line) <= self._limit else Oversized(len(line), line[:HEAD]) for line in others)
        self._keep(last)
        return [line for line in lines if line]

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if len(self._head) < HEAD:
            self._head += part[: HEAD - len(self._head)]
        self._rest.append(part)
        if self._size > self._limit:
            self._rest.clear()

    def _end(self) -> Line:
        line: Line = Oversized(self._size, self._head) if self._size > self._limit else b"".join(self._rest)
        self._rest.clear()
        self._size, self._head = 0, b""
        return line
