"""A minute of changes under load, vcproxy beside kube-proxy. `python -m benchmarks churn`.

The same node, API server, Services and changes for both, one after the other: see e2e.churn for what is done.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.results import quantile
from e2e.churn import ENDPOINTS, RATE, SERVICES, churn, kube_proxy, scene, vcproxy


def report(show: Callable[[Any], None]) -> None:
    """Both proxies, and one table."""
    drawn = Table(title=f"{SERVICES:,} services x {ENDPOINTS}, {RATE} endpoint changes/s for a minute")
    headings = ("", "start", "changes/s", "connections", "failed", "change: p50", "p99", "CPU", "peak memory")
    for heading in headings:
        drawn.add_column(heading, justify="right" if heading else "left")
    with tempfile.TemporaryDirectory(prefix="vcproxy-bench-") as directory, scene(Path(directory)) as found:
        for name, command in (
            ("vcproxy", vcproxy(found, Path(directory))),
            ("kube-proxy", kube_proxy(found.plane, found.node, Path(directory))),
            (
                "kube-proxy, minSyncPeriod 1ns",
                kube_proxy(found.plane, found.node, Path(directory), min_sync_period="1ns"),
            ),
        ):
            seen = churn(found, name, command, Path(directory))
            drawn.add_row(
                name,
                f"{seen.start:.2f} s",
                f"{seen.changes / seen.seconds:.0f}",
                f"{seen.connections:,}",
                ", ".join(f"{count} {what}" for what, count in seen.failures.items()) or "0",
                f"{statistics.median(seen.late) * 1e3:.0f} ms",
                f"{quantile(seen.late, 0.99) * 1e3:.0f} ms",
                f"{seen.cpu:.0%}",
                f"{seen.memory:.0f} MiB",
            )
    show(drawn)
