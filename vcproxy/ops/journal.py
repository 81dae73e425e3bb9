"""State files that grow by what changed, and are written anew when that is more than they hold. Blocks; no threads.

So a change costs its own octets twice, whatever the size of the file: once behind the content, and once as its share of
the next writing anew. What is not certain is written anew: a file that somebody else changed, one whose last writing
failed half-way.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from vcproxy.model.services import ServicePort
from vcproxy.model.tenant import Operation
from vcproxy.ops import sealed, statedir
from vcproxy.ops.sealed import End

SMALL_OCTETS = 64 << 10
"""Changes that a file may hold whatever its size."""


class Journal:
    """Where the files end that this run has read or written, and the header that each has there."""

    def __init__(self, magic: bytes) -> None:
        self._magic = magic
        self._known: dict[Path, tuple[End, msgspec.Struct]] = {}

    def read(self, path: Path, end: End, header: msgspec.Struct) -> None:
        """The file was read, and is good up to there."""
        self._known[path] = end, header

    def header(self, path: Path) -> msgspec.Struct | None:
        """Of the content that the file has; None: not known."""
        known = self._known.get(path)
        return known[1] if known is not None else None

    def takes_changes(self, path: Path) -> bool:
        """True if what the file has is known, and changes to it are worth to be written alone."""
        if path not in self._known:
            return False
        end, _ = self._known[path]
        try:
            as_left = path.stat().st_size == end.octets
        except OSError:
            as_left = False
        return as_left and end.octets - end.first < max(end.first, SMALL_OCTETS)

    def write(self, path: Path, header: msgspec.Struct, ports: Sequence[ServicePort]) -> None:
        """Make the file this content, or leave it as it is. Raises OSError."""
        self._known.pop(path, None)
        section = sealed.seal(self._magic, header, ports)
        statedir.replace(path, section)
        self._wrote(path, section, header)

    def change(self, path: Path, header: msgspec.Struct, operations: Iterable[Operation]) -> None:
        """Add what leads from the content that the file has to this one. Raises OSError; then it is still the old."""
        end, _ = self._known.pop(path)
        section = sealed.go_on(end, header, operations)
        statedir.append(path, section, at=end.octets)
        self._wrote(path, section, header)

    def delete(self, path: Path) -> None:
        """Delete the file, if it is there. Raises OSError."""
        self._known.pop(path, None)
        path.unlink(missing_ok=True)

    def _wrote(self, path: Path, section: sealed.Section, header: msgspec.Struct) -> None:
        assert section.end is not None
        self._known[path] = section.end, header
