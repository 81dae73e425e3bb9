"""Every stage of a first load, a restart, and one changed endpoint, beside the kernel's floor; in one process.

    python -m benchmarks pipeline [--services 1000 10000 ...] [--runs 5] [--resume]

Each size is measured by a process of its own and kept when it is done. Of a first load the median of the runs and
their spread, (most - least) / median; of changes the median and the 99th percentile.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import machine, results
from benchmarks.pipeline import memory, stages

SERVICES = (1_000, 5_000, 10_000, 20_000, 100_000)
ENDPOINTS = 10


def main(argv: Sequence[str]) -> Path:
    """Measure, keep, show; returns the folder."""
    options = _parser().parse_args(argv)
    kept = results.load("pipeline", options.results).get("sizes", {})
    wanted = [count for count in options.services if not (options.resume and f"{count}x{ENDPOINTS}" in kept)]
    for services in wanted:
        if len(wanted) == 1:
            _measure(services, options)
        else:
            command = [sys.executable, "-m", "benchmarks", "pipeline", "--services", str(services)]
            command += ["--runs", str(options.runs), "--results", str(options.results)]
            subprocess.run(command, check=True)
    return options.results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks pipeline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--services", type=int, nargs="+", default=SERVICES)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="leave out what is kept already")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of pipeline.json")
    return parser


def _measure(services: int, options: argparse.Namespace) -> None:
    size, facts = f"{services}x{ENDPOINTS}", machine.facts()
    taken, sizes = stages.Stages(), {}
    for run in range(options.runs):
        print(f"{time.strftime('%T')} {size}: run {run + 1} of {options.runs}", flush=True)
        sizes = stages.first_load(taken, services, ENDPOINTS)
    programmed, floors = taken.seconds[stages.PROGRAM], taken.seconds[stages.FLOOR]
    figures = {
        "machine": facts,
        "stages": {name: results.spread(took) for name, took in taken.seconds.items() if not _is_change(name)},
        "ratio": results.spread([whole / floor for whole, floor in zip(programmed, floors, strict=True)]),
        "one": {name: results.quantiles(took) for name, took in taken.seconds.items() if _is_change(name)},
        "octets": memory.measured(services, ENDPOINTS),
        **sizes,
    }
    document = results.load("pipeline", options.results)
    document.setdefault("sizes", {})[size] = figures
    document["sizes"] = dict(sorted(document["sizes"].items(), key=lambda item: int(item[0].partition("x")[0])))
    results.save("pipeline", document, options.results)
    Console(width=110).print(table(size, figures))


def _is_change(stage: str) -> bool:
    return stage.startswith(stages.ONE)


def table(size: str, figures: results.Document) -> Table:
    """One size."""
    drawn = Table(title=f"{size}: medians of {figures['ratio']['runs']} runs")
    for heading in ("stage", "median", "p99 or spread"):
        drawn.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, took in figures["stages"].items():
        width = (took["most"] - took["least"]) / took["median"]
        drawn.add_row(stage, f"{took['median'] * 1e3:,.1f} ms", f"{width:.0%}")
    drawn.add_row("node programming / floor", f"{figures['ratio']['median']:.2f}", "")
    for stage, took in figures["one"].items():
        drawn.add_row(stage, f"{took['p50'] * 1e6:,.0f} us", f"{took['p99'] * 1e6:,.0f} us")
    for stage, octets in figures["octets"].items():
        drawn.add_row(f"octets an endpoint: {stage}", f"{octets:,.0f}", "")
    drawn.add_row("octets on the wire; kernel elements", f"{figures['wire']:,}", f"{figures['elements']:,}")
    return drawn
