"""What was measured, kept as JSON: one file a benchmark in docs/benchmarks, which the report is made of.

A figure that was taken several times is kept as its median, least, most and how many. Each part of a file says on what
machine and at what load it was taken, since parts may be taken on different days.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import machine

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"

Document = dict[str, Any]
Show = Callable[[Any], None]


def load(name: str, folder: Path = FOLDER) -> Document:
    """What is kept of a benchmark; empty if nothing."""
    file = folder / f"{name}.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def save(name: str, document: Document, folder: Path = FOLDER) -> None:
    """Keep it; a reader sees the old file or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.part"
    part.write_text(json.dumps(_rounded(document), indent=1) + "\n")
    part.replace(folder / f"{name}.json")


def _rounded(value: Any) -> Any:
    """Four significant digits are more than any figure here has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def spread(values: Sequence[float]) -> Document:
    """Several runs of one figure."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "runs": len(values)}


def quantiles(values: Sequence[float]) -> Document:
    """Median and 99th percentile of many."""
    return {"p50": statistics.median(values), "p99": quantile(values, 0.99), "count": len(values)}


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


class Tables:
    """A benchmark that only shows tables, or lines: they are kept as they were shown."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._tables: list[Document] = []
        self._lines: list[str] = []

    def __call__(self, shown: Any) -> None:
        """Show it, and note it."""
        self._show(shown)
        if isinstance(shown, Table):
            columns = [[str(column.header), *map(str, column.cells)] for column in shown.columns]
            rows = [list(row) for row in zip(*columns, strict=True)]
            self._tables.append({"title": str(shown.title), "rows": rows})
        else:
            self._lines.append(str(shown))

    def document(self) -> Document:
        """For the file."""
        return {"machine": machine.facts(), "tables": self._tables, "lines": self._lines}
