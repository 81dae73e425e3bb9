"""A wall clock that a test moves, for one process: the machine's own is everybody's, and time namespaces have none.

A program is started with `environment`: then Python's time.time() and time.time_ns() are the machine's plus what `set`
said last, from the first import on (sitecustomize, beside this file). So the whole program runs as it is installed. What
is not moved: clocks read by C code (OpenSSL's, when it judges a certificate), and the times of files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "VCPROXY_TEST_CLOCK"
"""Names a file of eight octets: nanoseconds, signed, in the machine's order."""


class Clock:
    """See the module. `file` is made, with no offset."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0.0)

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of the program whose clock it is."""
        return {VARIABLE: str(self._file), "PYTHONPATH": str(Path(__file__).parent)}

    def set(self, seconds: float) -> None:
        """Make the clock so much later than the machine's. The same octets are rewritten, since programs have the file
        mapped.
        """
        with self._file.open("r+b" if self._file.exists() else "w+b") as file:
            file.write(struct.pack("=q", round(seconds * 1e9)))
