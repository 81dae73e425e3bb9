"""A table as a dict of maps, as strict as the kernel: adding what is there and removing what is not are errors.

It stands where `Nfnetlink` does for planning and reading, and counts what transactions cost.
"""

from collections.abc import Sequence

import numpy as np

from vcproxy_nftables.changes import Changes
from vcproxy_nftables.elements import Elements, MapSpec, Matrix
from vcproxy_nftables.netlink import SetFacts


def _rows(octets: Matrix | bytes, width: int) -> list[bytes]:
    packed = octets if isinstance(octets, bytes) else octets.tobytes()
    assert len(packed) % width == 0
    return [packed[at : at + width] for at in range(0, len(packed), width)]


class FakeBatch:
    """Records operations; `FakeTable.commit` does all of them or none."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, MapSpec, bytes, bytes, str, str]] = []

    def __len__(self) -> int:
        return len(self.operations)

    def add(
        self,
        spec: MapSpec,
        keys: Matrix | bytes,
        data: Matrix | bytes | None = None,
        *,
        comments: Sequence[str] | None = None,
        verdicts: Sequence[str] | None = None,
    ) -> None:
        found = _rows(keys, spec.key_octets)
        assert (data is None) == (not spec.data_octets)
        assert (verdicts is None) == (not spec.verdict)
        values = [b""] * len(found) if data is None else _rows(data, spec.data_octets)
        texts = [""] * len(found) if comments is None else comments
        words = [""] * len(found) if verdicts is None else verdicts
        for key, value, comment, verdict in zip(found, values, texts, words, strict=True):
            self.operations.append(("add", spec, key, value, comment, verdict))

    def remove(self, spec: MapSpec, keys: Matrix | bytes) -> None:
        self.operations += (("remove", spec, key, b"", "", "") for key in _rows(keys, spec.key_octets))

    def add_interval(self, spec: MapSpec, first: bytes, last: bytes) -> None:
        for start, end in zip(_rows(first, spec.key_octets), _rows(last, spec.key_octets), strict=True):
            self.operations.append(("add", spec, start + end, b"", "", ""))

    def remove_interval(self, spec: MapSpec, first: bytes, last: bytes) -> None:
        for start, end in zip(_rows(first, spec.key_octets), _rows(last, spec.key_octets), strict=True):
            self.operations.append(("remove", spec, start + end, b"", "", ""))


class FakeTable:
    """`maps`: by map and key: (data, comment, verdict). Ranges have first and last key joined for a key."""

    def __init__(self) -> None:
        self.maps: dict[MapSpec, dict[bytes, tuple[bytes, str, str]]] = {}

    def commit(self, changes: Changes, *, limit: int = 100_000) -> list[FakeBatch]:
        """Do what changes say; returns the batches."""
        batches = changes.transactions(FakeBatch, limit=limit)  # type: ignore[arg-type]
        for batch in batches:
            for verb, spec, key, *value in batch.operations:  # type: ignore[attr-defined]
                held = self.maps.setdefault(spec, {})
                if verb == "add":
                    assert key not in held, f"EEXIST: {spec.name} {key.hex()}"
                    held[key] = tuple(value)
                else:
                    assert key in held, f"ENOENT: {spec.name} {key.hex()}"
                    del held[key]
        return batches  # type: ignore[return-value]

    def sets(self) -> dict[str, SetFacts]:
        """As Nfnetlink.sets."""
        return {
            spec.name: SetFacts(spec.key_octets, spec.data_octets, 0, len(held)) for spec, held in self.maps.items()
        }

    def get(self, spec: MapSpec, keys: Matrix) -> Elements | None:
        """As Nfnetlink.get."""
        held, wanted = self.maps.get(spec, {}), _rows(keys, spec.key_octets)
        if any(key not in held for key in wanted):
            return None
        asked = FakeTable()
        asked.maps[spec] = {key: held[key] for key in wanted}
        return asked.dump(spec)

    def dump(self, spec: MapSpec) -> Elements:
        """As Nfnetlink.dump."""
        held = self.maps.get(spec, {})
        width = spec.key_octets

        def matrix(rows: list[bytes], octets: int) -> Matrix:
            return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), octets)

        none = np.zeros(len(held), np.uint64)
        return Elements(
            keys=matrix([key[:width] for key in held], width),
            data=matrix([data for data, _, _ in held.values()], spec.data_octets),
            comments=[comment for _, comment, _ in held.values()],
            timeouts=none,
            expirations=none,
            ends=matrix([key[width:] for key in held], width) if spec.ranges else None,
            verdicts=[verdict for _, _, verdict in held.values()] if spec.verdict else [],
        )
