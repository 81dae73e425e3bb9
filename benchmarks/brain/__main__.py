"""`python -m benchmarks.brain [--tenants 100] [--runs 1] ...`: the benchmark at another scale."""

import argparse

import msgspec
from rich.console import Console

from benchmarks.brain import Scale, report


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in msgspec.structs.fields(Scale):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    report(Console(width=130).print, Scale(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
