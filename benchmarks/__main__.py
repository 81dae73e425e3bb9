"""`python -m benchmarks [NAME...]`, or `NAME --option...`: print and keep figures; nothing here asserts a time."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import brain, churn, datapath, end_to_end, lists, pipeline, report, results, start

Benchmark = Callable[[Sequence[str]], Path]
"""Takes its options, and returns the folder where it has kept its figures."""


def tables(name: str, figures: Callable[[results.Show], None]) -> Benchmark:
    """A benchmark that shows tables and has no options here."""

    def run(options: Sequence[str]) -> Path:
        if options:
            raise SystemExit(f"{name} has no options: {' '.join(options)}")
        shown = results.Tables(Console(width=110).print)
        figures(shown)
        results.save(name, shown.document())
        return results.FOLDER

    return run


ALL: dict[str, Benchmark] = {
    "start": start.main,
    "pipeline": pipeline.main,
    "brain": tables("brain", brain.report),
    "lists": tables("lists", lists.report),
    "end-to-end": tables("end-to-end", end_to_end.report),
    "churn": tables("churn", churn.report),
    "datapath": tables("datapath", datapath.report),
}


def main() -> None:
    """Run the named benchmarks, or all: each in a process of its own, so that none finds what another left."""
    names = [word for word in sys.argv[1:] if word in ALL] or list(ALL)
    options = [word for word in sys.argv[1:] if word not in ALL]
    if options and (len(names) > 1 or sys.argv[1] not in ALL):
        raise SystemExit(f"what is {options[0]!r}? NAME..., or one NAME and its options; there are: {', '.join(ALL)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was made is removed then too
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    if len(names) == 1:
        report.write(ALL[names[0]](options))
        return
    failed = [name for name in names if subprocess.run([sys.executable, "-m", "benchmarks", name]).returncode]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
