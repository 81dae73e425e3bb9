"""What is kept, as a document with tables and plots. `python -m benchmarks.report [FOLDER]` writes it anew.

Everything in it comes from the JSON files of the folder; what was not measured is shown as that.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.goals import found, goals, mebi, milli, percent, seconds
from benchmarks.pipeline.stages import ADOPTION, FLOOR, PROGRAM
from benchmarks.plots import Plot, svg
from benchmarks.results import Document

FILE = "figures.md"
_NAMES = {
    "vcproxy": "vcproxy run",
    "kube-proxy": "kube-proxy",
    "kube-proxy-1ns": "kube-proxy, minSyncPeriod 1ns",
}
_TABLES = ("end-to-end", "churn", "datapath", "brain", "lists")


def write(folder: Path = results.FOLDER) -> None:
    """The document and its pictures, beside the files that they are made of."""
    start, pipeline = results.load("start", folder), results.load("pipeline", folder)
    for name, plot in _plots(start, pipeline):
        (folder / f"{name}.svg").write_text(svg(plot))
    lines = [
        "# Figures",
        "",
        "Written by `python -m benchmarks.report` from the JSON files beside it, not by hand; "
        "[what is measured](../benchmarks.md).",
        "",
        *_section("Goals", _goals(start, pipeline)),
        *_section("Start, and changes beside a full API server", _start(start)),
        *_section("Stages of a first load", _pipeline(pipeline)),
    ]
    for name in _TABLES:
        lines += _section(name, _tables(results.load(name, folder)))
    (folder / FILE).write_text("\n".join(lines))


def _section(title: str, lines: Iterable[str]) -> list[str]:
    body = list(lines)
    return [f"## {title}", "", *body, ""] if body else []


def _goals(start: Document, pipeline: Document) -> Iterator[str]:
    said = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        (goal.what, goal.wanted, goal.ours, goal.theirs, goal.floor, said[goal.met]) for goal in goals(start, pipeline)
    ]
    yield from _table(("", "wanted", "vcproxy", "kube-proxy", "floor", "met"), rows)
    yield ""
    yield (
        "`vcproxy run` is brain and agent in one process; where kube-proxy has two figures, they are of its default "
        "minSyncPeriod and of the smallest. Floors: of a start, to be sent the lists and nothing else; of a change, a "
        "bare watch of the same slice in the same changes; of node programming, the same octets sent to the kernel "
        "again. kube-proxy's full sync is its own metric `kubeproxy_sync_full_proxy_rules_duration_seconds` of IPv4, "
        "read when it had just started."
    )


def _start(start: Document) -> Iterator[str]:
    sizes = dict(_by_size(start.get("sizes", {})))
    if not sizes:
        return
    yield from _pictures("start", "memory", "change", "steady")
    headings = (
        "",
        "",
        "start",
        "floor: lists",
        "CPU",
        "memory",
        "nft's",
        "one change: p50 / p99",
        "CPU",
        "100/s: p50 / p99",
        "CPU",
    )
    taken = {(size, name): figures for size, proxies in sizes.items() for name, figures in proxies.items()}
    yield from _table(headings, [_started(*which, figures) for which, figures in taken.items()])
    yield ""
    yield (
        "Start: the median, in parentheses the least, the most and the number of runs; beside it how long a reader "
        "that only counts needs for both lists, as JSON; the processor time until then and the peak memory. CPU beside "
        "a change: beyond what the idle proxy takes; beside 100/s: of one core. At 100/s the count is of the probe's "
        "moves, whose lateness is told, and the rate is what the API server took."
    )
    again = {size: proxies["vcproxy"] for size, proxies in sizes.items() if "restart" in proxies.get("vcproxy", {})}
    if again:
        yield from ("", "`vcproxy run` started again over the table and the state that it left:", "")
        headings = ("", "process start -> all adopted", "elements written until then", "and until it rests")
        yield from _table(headings, [_restarted(size, figures["restart"]) for size, figures in again.items()])
    yield from _machines(list(taken.values()))


def _started(size: str, name: str, figures: Document) -> tuple[str, ...]:
    begun, one, many = figures["start"], figures["one"], figures["steady"]
    return (
        _size(size) + (" (lean objects)" if figures["lean"] else ""),
        _NAMES[name],
        _spread(begun["seconds"]),
        seconds(figures["lists"]["median"]),
        seconds(begun["cpu"]["median"]),
        mebi(begun["memory"]["median"]),
        mebi(begun["child_memory"]["median"]) if name != "vcproxy" else "",
        f"{milli(one['p50'])} / {milli(one['p99'])}",
        milli(one["cpu"]),
        f"{milli(many['p50'])} / {milli(many['p99'])} of {many['count']}; {many['rate']:.0f}/s",
        percent(many["cpu"]),
    )


def _restarted(size: str, restart: Document) -> tuple[str, ...]:
    written = (f"{restart[which]['most']:.0f}" for which in ("elements", "elements_later"))
    return _size(size), _spread(restart["seconds"]), *written


def _pipeline(pipeline: Document) -> Iterator[str]:
    sizes = dict(_by_size(pipeline.get("sizes", {})))
    if not sizes:
        return
    yield from _pictures("programming")
    first = next(iter(sizes.values()))
    headings = ("", *map(_size, sizes))
    rows = [(stage, *(_spread(each["stages"][stage], milli) for each in sizes.values())) for stage in first["stages"]]
    rows.append(("node programming / floor", *(_spread(each["ratio"], "{:.2f}".format) for each in sizes.values())))
    rows += [(stage, *(_late(each["one"][stage]) for each in sizes.values())) for stage in first["one"]]
    rows += [
        (f"octets an endpoint: {stage}", *(f"{each['octets'][stage]:,.0f}" for each in sizes.values()))
        for stage in first["octets"]
    ]
    yield from _table(headings, rows)
    yield ""
    yield "Of stages the median, with the least, the most and the number of runs; of one endpoint p50 / p99."
    yield from _machines(list(sizes.values()))


def _tables(document: Document) -> Iterator[str]:
    for table in document.get("tables", ()):
        yield table["title"]
        yield ""
        yield from _table(table["rows"][0], table["rows"][1:])
        yield ""
    yield from (f"    {line}" for line in document.get("lines", ()))
    if document:
        yield from _machines([document])


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _pictures(*names: str) -> Iterator[str]:
    yield from (f"![{name}]({name}.svg)" for name in names)
    yield ""


def _machines(taken: Sequence[Document]) -> Iterator[str]:
    """On what machine, and how busy it was before each part."""
    facts = [each["machine"] for each in taken]
    machines = {
        f"Linux {fact['kernel']}, {fact['processor']}, {fact['cores']} cores, {fact['memory_gib']} GiB, "
        f"Python {fact['python']}, commit {fact['commit']}"
        for fact in facts
    }
    loads = [fact["load"] for fact in facts]
    dates = sorted(fact["taken"] for fact in facts)
    yield ""
    when = f"Taken {dates[0]} to {dates[-1]}, at load averages of {min(loads)} to {max(loads)}"
    yield f"{'; '.join(sorted(machines))}. {when}."


def _by_size(sizes: Document) -> list[tuple[str, Document]]:
    return sorted(sizes.items(), key=lambda item: [int(part) for part in item[0].split("x")])


def _size(size: str) -> str:
    services, _, endpoints = size.partition("x")
    return f"{int(services):,} x {endpoints}"


def _spread(taken: Document, spell: object = seconds) -> str:
    assert callable(spell)
    if taken["runs"] == 1:
        return f"{spell(taken['median'])} (1)"
    return f"{spell(taken['median'])} ({spell(taken['least'])} to {spell(taken['most'])}, {taken['runs']})"


def _late(taken: Document) -> str:
    return f"{taken['p50'] * 1e6:,.0f} / {taken['p99'] * 1e6:,.0f} us"


def _plots(start: Document, pipeline: Document) -> Iterator[tuple[str, Plot]]:
    sizes, stages = start.get("sizes", {}), pipeline.get("sizes", {})

    def line(documents: Document, *path: str) -> list[tuple[float, float]]:
        values = ((_services(size), found(each, *path)) for size, each in _by_size(documents))
        return [(services, value) for services, value in values if value is not None]

    def lines(*path: str) -> dict[str, list[tuple[float, float]]]:
        return {said: points for name, said in _NAMES.items() if (points := line(sizes, name, *path))}

    x = "Services of 10 endpoints (100: of 3)"
    yield "start", Plot("Process start to the last Service", x, lines("start", "seconds", "median"), seconds_short)
    yield "memory", Plot("Peak memory of the start (without nft's)", x, lines("start", "memory", "median"), mebi)
    change = {f"{name}, p99": points for name, points in lines("one", "p99").items()}
    change["floor: bare watch, p99"] = line(sizes, "vcproxy", "one", "floor", "p99")
    yield "change", Plot("One change: API server's answer to packet", x, change, milli_short)
    steady = {f"{name}, p99": points for name, points in lines("steady", "p99").items()}
    yield "steady", Plot("100 changes a second: answer to packet", x, steady, milli_short)
    programming = {
        "programming": line(stages, "stages", PROGRAM, "median"),
        "kube-proxy's full sync": line(sizes, "kube-proxy", "start", "full_sync", "median"),
        "restart, adoption": line(stages, "stages", ADOPTION, "median"),
        "kernel floor": line(stages, "stages", FLOOR, "median"),
    }
    measured = {name: points for name, points in programming.items() if points}
    yield "programming", Plot("Model in memory to kernel", x, measured, seconds_short)


def _services(size: str) -> float:
    return float(size.partition("x")[0])


def seconds_short(value: float) -> str:
    return f"{value:g} s"


def milli_short(value: float) -> str:
    return f"{value * 1e3:g} ms"


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else results.FOLDER)
