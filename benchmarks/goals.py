"""What was wanted, and whether the figures say so: each goal beside vcproxy's figure, kube-proxy's, and the floor."""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.pipeline.stages import ADOPTION, FLOOR, PROGRAM
from benchmarks.results import Document


class Goal(NamedTuple):
    """One row; texts. `met`: None where something was not measured."""

    what: str
    wanted: str
    ours: str = ""
    theirs: str = ""
    floor: str = ""
    met: bool | None = None


def goals(start: Document, pipeline: Document) -> list[Goal]:
    """All of them, of what is kept of the two benchmarks."""
    starts, stages = start.get("sizes", {}), pipeline.get("sizes", {})
    alone = (*_starts(starts), *_memory(starts), *_changes(starts))
    return [*alone, *_programming(starts, stages), *_adoption(starts, stages)]


def found(document: Document, *path: str) -> float | None:
    """A figure of a nested document, if it is there."""
    here: Document | float = document
    for name in path:
        if not isinstance(here, dict) or name not in here:
            return None
        here = here[name]
    return here if isinstance(here, int | float) else None


def _starts(starts: Document) -> Iterator[Goal]:
    at_once = found(starts, "100x3", "vcproxy", "start", "seconds", "median")
    theirs = found(starts, "100x3", "kube-proxy", "start", "seconds", "median")
    yield Goal(
        "start, 100 Services x 3",
        "within 1 s",
        seconds(at_once),
        seconds(theirs),
        met=None if at_once is None else at_once <= 1,
    )
    for services, factor in ((1_000, 1.0), (5_000, 2.5), (10_000, 5.0), (20_000, 40.0)):
        ours, theirs = (
            found(starts, f"{services}x10", name, "start", "seconds", "median") for name in ("vcproxy", "kube-proxy")
        )
        wanted = "not slower" if factor == 1 else f"{factor:g} times faster"
        floor = found(starts, f"{services}x10", "vcproxy", "lists", "median")
        row = _faster(f"start, {services:,} Services x 10", wanted, ours, theirs, factor)
        yield row._replace(floor=seconds(floor))


def _faster(what: str, wanted: str, ours: float | None, theirs: float | None, factor: float) -> Goal:
    if ours is None or theirs is None:
        return Goal(what, wanted, seconds(ours), seconds(theirs))
    times = theirs / ours
    return Goal(what, wanted, f"{seconds(ours)}: {times:.1f} times", seconds(theirs), met=times >= factor)


def _memory(starts: Document) -> Iterator[Goal]:
    ours, theirs = (found(starts, "1000x10", name, "start", "memory", "median") for name in ("vcproxy", "kube-proxy"))
    met = None if ours is None or theirs is None else ours <= theirs
    yield Goal("peak memory, 1,000 x 10", "not more than kube-proxy", mebi(ours), mebi(theirs), met=met)


def _changes(starts: Document) -> Iterator[Goal]:
    for services in (1_000, 10_000, 100_000):
        size = f"{services}x10"
        for share, limit in (("p50", 0.005), ("p99", 0.020)):
            ours, theirs, floor = (
                found(starts, size, *path, share)
                for path in (("vcproxy", "one"), ("kube-proxy", "one"), ("vcproxy", "one", "floor"))
            )
            met = None if ours is None else ours < limit
            what, wanted = f"one change at {services:,}, {share}", f"below {limit * 1e3:.0f} ms"
            yield Goal(what, wanted, milli(ours), milli(theirs), milli(floor), met)
        ours, theirs = (found(starts, size, name, "one", "cpu") for name in ("vcproxy", "kube-proxy"))
        met = None if ours is None else ours < 0.003
        yield Goal(f"one change at {services:,}, processor time", "below 3 ms", milli(ours), milli(theirs), met=met)
    for services in (10_000, 100_000):
        size = f"{services}x10"
        ours, theirs, eager = (
            found(starts, size, name, "steady", "p99") for name in ("vcproxy", "kube-proxy", "kube-proxy-1ns")
        )
        both = " / ".join(filter(None, (milli(theirs), milli(eager))))
        met = None if ours is None else ours < 0.030
        yield Goal(f"100 changes/s at {services:,}, p99", "below 30 ms", milli(ours), both, met=met)
        ours, theirs, eager = (
            found(starts, size, name, "steady", "cpu") for name in ("vcproxy", "kube-proxy", "kube-proxy-1ns")
        )
        both = " / ".join(filter(None, (percent(theirs), percent(eager))))
        met = None if ours is None else ours < 0.30
        yield Goal(f"100 changes/s at {services:,}, of a core", "below 30 %", percent(ours), both, met=met)


def _programming(starts: Document, stages: Document) -> Iterator[Goal]:
    ours, floor, ratio = _programmed(stages, 100_000)
    yield Goal(
        "node programming, 100,000 x 10",
        "1.5 times the floor",
        seconds(ours) + (f": {ratio:.2f} times" if ratio else ""),
        floor=seconds(floor),
        met=None if ratio is None else ratio <= 1.5,
    )
    for services, factor in ((5_000, 25), (10_000, 50), (20_000, 400)):
        ours, floor, _ = _programmed(stages, services)
        theirs = found(starts, f"{services}x10", "kube-proxy", "start", "full_sync", "median")
        what, wanted = f"node programming, {services:,} x 10", f"{factor} times faster than a full sync"
        yield _faster(what, wanted, ours, theirs, factor)._replace(floor=seconds(floor))


def _programmed(stages: Document, services: int) -> tuple[float | None, float | None, float | None]:
    size = f"{services}x10"
    ours, floor = (found(stages, size, "stages", name, "median") for name in (PROGRAM, FLOOR))
    return ours, floor, found(stages, size, "ratio", "median")


def _adoption(starts: Document, stages: Document) -> Iterator[Goal]:
    ours = found(stages, "100000x10", "stages", ADOPTION, "median")
    met = None if ours is None else ours < 10
    yield Goal("adoption of 1,000,000 endpoints, in process", "below 10 s", seconds(ours), met=met)
    ours = found(starts, "100000x10", "vcproxy", "restart", "seconds", "median")
    written = found(starts, "100000x10", "vcproxy", "restart", "elements", "most")
    met = None if ours is None or written is None else ours < 10 and not written
    text = "" if written is None else f"{seconds(ours)}; {written:.0f} elements written"
    yield Goal("the same, `vcproxy run` started again", "below 10 s, none written", text, met=met)


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s" if value < 10 else f"{value:,.1f} s"


def milli(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:,.1f} ms"


def mebi(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} MiB"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
