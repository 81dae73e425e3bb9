"""`python -m benchmarks [NAME...]`: print figures; nothing here asserts a time."""

import platform
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import brain, churn, datapath, end_to_end, lists, pipeline

ALL = {
    "pipeline": pipeline.report,
    "brain": brain.report,
    "lists": lists.report,
    "end-to-end": end_to_end.report,
    "churn": churn.report,
    "datapath": datapath.report,
}


def main() -> None:
    """Run the named benchmarks, or all."""
    console = Console(width=110)
    cores = Path("/proc/cpuinfo").read_text().count("processor\t")
    console.print(f"{platform.platform()}, {cores} cores, Python {platform.python_version()}")
    for name in sys.argv[1:] or ALL:
        if name not in ALL:
            raise SystemExit(f"no benchmark {name!r}; there are: {', '.join(ALL)}")
        ALL[name](console.print)


if __name__ == "__main__":
    main()
