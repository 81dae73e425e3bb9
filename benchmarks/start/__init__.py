"""From the start of the process to the last Service, and what a change takes then: vcproxy beside kube-proxy.

    python -m benchmarks start [--sizes 1000x10 5000x10 ...] [--proxies vcproxy kube-proxy ...] [--resume]

For each size one API server is filled, and the proxies run on the same node one after the other: `vcproxy run`, brain
and agent in one process; kube-proxy in nftables mode with its default minSyncPeriod, and with the smallest one. Each is
started several times; the last one started then takes changes one by one, and a hundred a second. What has been
measured is kept after each proxy, so a run that was cut short goes on with --resume.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import machine, results
from benchmarks.start import changes, floor, proxies
from benchmarks.start.proxies import EAGER, KUBE_PROXY, NAMES, VCPROXY, started
from benchmarks.start.scene import Scene, own_network, scene
from e2e import churn

SIZES = ("100x3", "1000x10", "5000x10", "10000x10")
PAUSE = {VCPROXY: 0.2, KUBE_PROXY: 1.2, EAGER: 0.2}
"""Seconds before a single change, at least: kube-proxy is not to wait for its minSyncPeriod."""
PERIOD = {VCPROXY: 0.2, KUBE_PROXY: 1.0, EAGER: 0.2}
"""Seconds before one of the probe's moves among many changes, at most: at any time of minSyncPeriod."""


def main(argv: Sequence[str]) -> Path:
    """Measure, keep, show; returns the folder."""
    options = _parser().parse_args(argv)
    console = Console(width=130)
    own_network()
    for size in options.sizes:
        services, endpoints = map(int, size.split("x"))
        kept = results.load("start", options.results).get("sizes", {}).get(size, {})
        names = [name for name in options.proxies if not (options.resume and name in kept)]
        names = [name for name in names if name == VCPROXY or services <= options.peer_up_to]
        if not names:
            continue
        _tell(f"{size}: {', '.join(names)}")
        with (
            tempfile.TemporaryDirectory(prefix="vcproxy-bench-") as directory,
            scene(Path(directory), services, endpoints, _tell, lean=options.lean) as found,
        ):
            for name in names:
                figures = measure(found, name, Path(directory), options)
                document = results.load("start", options.results)
                document.setdefault("sizes", {}).setdefault(size, {})[name] = figures
                results.save("start", document, options.results)
    console.print(table(results.load("start", options.results)))
    return options.results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks start", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="SERVICESxENDPOINTS")
    parser.add_argument("--proxies", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--peer-up-to", type=int, default=20_000, help="Services; beyond, kube-proxy takes hours")
    parser.add_argument("--runs", type=int, default=5, help="starts of each")
    parser.add_argument("--patience", type=float, default=240, help="seconds of starts after which there is no other")
    parser.add_argument("--changes", type=int, default=100, help="one by one")
    parser.add_argument("--seconds", type=float, default=60, help="of a hundred changes a second")
    parser.add_argument("--lean", action="store_true", help="objects without what a proxy does not read")
    parser.add_argument("--resume", action="store_true", help="leave out what is kept already")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of start.json")
    return parser


def _tell(what: str) -> None:
    print(f"{time.strftime('%T')} {what}", flush=True)


def measure(scene: Scene, name: str, directory: Path, options: argparse.Namespace) -> results.Document:
    """All figures of one proxy at one size."""
    found: results.Document = {"machine": machine.facts(), "lean": options.lean, "lists": floor.lists(scene.plane)}
    _tell(f"floor: {found['lists']['octets'] / 1e6:.1f} MB of lists are read in {found['lists']['median']:.2f} s")
    starts: list[results.Document] = []
    wanted = 1 if name == EAGER else options.runs
    while True:
        with started(name, scene, directory) as (process, figures):
            starts.append(figures)
            _tell("{}: start {seconds:.2f} s, {cpu:.2f} s of CPU, {memory:.0f} MiB".format(name, **figures))
            if len(starts) < wanted and sum(each["seconds"] for each in starts) < options.patience:
                continue
            found["start"] = {key: results.spread([each[key] for each in starts]) for key in starts[0]}
            found["one"] = changes.one_by_one(scene, process, options.changes, PAUSE[name])
            _tell(f"{name}: one change {_shown(found['one'])}, {found['one']['cpu'] * 1e3:.1f} ms of CPU")
            found["steady"] = changes.steady(scene, process, options.seconds, PERIOD[name])
            _tell(f"{name}: {found['steady']['rate']:.0f} changes/s {_shown(found['steady'])}")
            found["memory"] = churn.peak_memory(process.pid)
            if name == VCPROXY:
                again = [proxies.restarted(scene, process) for _ in range(options.runs)]
                found["restart"] = {key: results.spread([each[key] for each in again]) for key in again[0]}
                _tell(f"{name}: restart, all adopted {found['restart']['seconds']}")
            return found


def _shown(late: results.Document) -> str:
    return f"p50 {late['p50'] * 1e3:.1f} ms, p99 {late['p99'] * 1e3:.1f} ms of {late['count']}"


def table(document: results.Document) -> Table:
    """All that is kept."""
    drawn = Table(title="process start -> last Service; then one change at a time, and 100/s (p50 / p99)")
    headings = ("services", "proxy", "start", "CPU", "MiB", "child MiB", "one change", "CPU", "100/s", "CPU")
    for heading in headings:
        drawn.add_column(heading, justify="left" if heading == "proxy" else "right")
    for size, found in document.get("sizes", {}).items():
        for name, figures in found.items():
            start, one, many = figures["start"], figures["one"], figures["steady"]
            drawn.add_row(
                size,
                name,
                f"{start['seconds']['median']:.2f} s",
                f"{start['cpu']['median']:.2f} s",
                f"{start['memory']['median']:.0f}",
                f"{start['child_memory']['median']:.0f}",
                f"{one['p50'] * 1e3:.1f} / {one['p99'] * 1e3:.1f} ms",
                f"{one['cpu'] * 1e3:.2f} ms",
                f"{many['p50'] * 1e3:.1f} / {many['p99'] * 1e3:.1f} ms",
                f"{many['cpu']:.0%}",
            )
    return drawn
