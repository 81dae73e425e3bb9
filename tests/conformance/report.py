"""The table as documents: which cases exist, how many, and where we differ on purpose. `python -m` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.conformance.differences import BEYOND, DIFFERENCES, UNSHOWN, difference
from tests.conformance.model import COLUMNS, CONFIGURATIONS, Case, Scenario
from tests.conformance.table import CASES

DOCS = Path(__file__).parents[2] / "docs"
CONFORMANCE, DIFFER = DOCS / "kube-proxy-conformance.md", DOCS / "kube-proxy-differences.md"

_INTRODUCTION = """\
# What is compared with kube-proxy

Made by `make conformance` from `tests/conformance`; a test fails if it is out of date.

A case is one flow: a client, what it dials, IPv4 or IPv6, TCP, UDP or SCTP, and what kube-proxy 1.37.2 does with it in nftables mode. Every case runs in all columns where it makes sense:

| column | what |
|---|---|
| interpreter | our compiled and resolved tables, read by a plain interpreter; no kernel |
| super | real packets through `vcproxy run` in kube-proxy's place; objects in a real kube-apiserver |
| overlay, flat | real packets in a tenant's zone, beside a second tenant with the same ClusterIPs (on the overlay the same pods too) and the opposite expectations |
| kube-proxy | real packets through kube-proxy 1.37.2 itself; the same flags, nodes, pods and objects |

So a wrong expectation fails in kube-proxy's column, and a wrong vcproxy in the others. Deliberate differences: [kube-proxy-differences.md](kube-proxy-differences.md).

`client`, `local-1`, `local-2` are pods on the tested node; `visitor`, `remote-1` to `remote-3` on another; `node` is the tested node itself; `outside` and `blocked` are no nodes, and load-balancer source ranges leave the latter out.
An answer is the endpoints that a client may get (port 8080 where none is said), with whether they see the node's address instead of the client's. *untouched*: goes on as if there were no proxy. "goes on to": a connection (UDP: a source port) that is held over all steps. SCTP is spoken over raw sockets, INIT and INIT ACK, so that
the kernel needs to translate it and no more; nothing of it is held.

Configurations, of proxy and node:
"""


def conformance() -> str:
    """docs/kube-proxy-conformance.md."""
    return "\n".join([_INTRODUCTION, *_configurations(), "", *_counts(), *_scenarios(), ""])


def _configurations() -> Iterator[str]:
    yield "| name | cluster CIDR | masquerade all | NodePorts on | the node's zone |"
    yield "|---|---|---|---|---|"
    for one in CONFIGURATIONS.values():
        cells = ("yes" if one.detector else "no", "yes" if one.masquerade_all else "no", one.node_ports)
        yield f"| {one.name} | {' | '.join(cells)} | {', then '.join(zone or 'none' for zone in (one.zone, *one.later))} |"


def _counts() -> Iterator[str]:
    yield "## How many"
    yield ""
    yield f"| family | {' | '.join(COLUMNS)} |"
    yield f"|---|{'---:|' * len(COLUMNS)}"
    families = list(dict.fromkeys(case.scenario.family for case in CASES))
    total: Counter[str] = Counter()
    for family in families:
        counts = Counter(
            column for case in CASES if case.scenario.family == family for column in COLUMNS if case.in_column(column)
        )
        total += counts
        yield f"| {family} | {' | '.join(str(counts[column]) for column in COLUMNS)} |"
    yield f"| all | {' | '.join(str(total[column]) for column in COLUMNS)} |"


def _scenarios() -> Iterator[str]:
    by_scenario: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        by_scenario.setdefault((case.scenario.family, case.scenario.name), []).append(case)
    for family in dict.fromkeys(family for family, _ in by_scenario):
        yield f"\n## {family}"
        for (this, _), cases in by_scenario.items():
            if this == family:
                yield from _scenario(cases[0].scenario, cases)


def _scenario(scenario: Scenario, cases: list[Case]) -> Iterator[str]:
    kinds = [f"IPv{ip}" for ip in scenario.families]
    said = f"{' and '.join(kinds)}, {' and '.join(scenario.protocols)}"
    if scenario.configurations != ("base",):
        said += f"; configurations: {'; '.join(scenario.configurations)}"
    if scenario.why or scenario.columns != COLUMNS:
        said += f"; only {', '.join(scenario.columns)}: {scenario.why}"
    yield f"\n**{scenario.name}** ({said})\n"
    seen: dict[tuple[int, str], None] = {}
    for case in cases:
        key = (case.step, case.flow.name)
        if key in seen:
            continue
        if not any(step == case.step for step, _ in seen) and scenario.steps[case.step].after:
            yield f"\nAfter {scenario.steps[case.step].after}:\n"
        seen[key] = None
        line = f"- {case.flow.name}: {_short(case.flow.expect)}"
        for configuration, expectation in case.flow.otherwise.items():
            line += f"; with {configuration}: {_short(expectation)}"
        differs = {found.name for column in COLUMNS if case.in_column(column) and (found := difference(case, column))}
        yield line + "".join(f" *({name})*" for name in sorted(differs))


def _short(expectation: object) -> str:
    return str(expectation).replace(":8080", "")


def differences() -> str:
    """docs/kube-proxy-differences.md."""
    lines = [
        "# Where vcproxy differs from kube-proxy",
        "",
        "Made by `make conformance` from `tests/conformance/differences.py`; a test fails if it is out of date.",
        "",
        "vcproxy does what kube-proxy 1.37.2 does in nftables mode, as far as packets show; "
        "[kube-proxy-conformance.md](kube-proxy-conformance.md) lists what is compared. These are the exceptions. "
        "Whatever else differs is a fault.",
    ]
    for one in DIFFERENCES:
        shown = sum(difference(case, column) is one and case.in_column(column) for case in CASES for column in COLUMNS)
        lines += [
            "",
            f"## {one.name}",
            "",
            f"- kube-proxy: {one.kube_proxy}",
            f"- vcproxy: {one.vcproxy}",
            f"- why: {one.reason}",
            f"- seen in: {', '.join(one.columns)} ({shown} cases)",
        ]
    lines += ["", "## Not shown by the table", "", *(f"- {text}" for text in UNSHOWN)]
    lines += ["", "# Beyond packets", "", "What the process does, and `vcproxy run` of kube-proxy's flags and files."]
    for other in BEYOND:
        lines += [
            "",
            f"## {other.name}",
            "",
            f"- kube-proxy: {other.kube_proxy}",
            f"- vcproxy: {other.vcproxy}",
            f"- why: {other.reason}",
            f"- seen in: `{other.seen}`",
        ]
    return "\n".join([*lines, ""])


def write() -> None:
    """Both documents."""
    CONFORMANCE.write_text(conformance())
    DIFFER.write_text(differences())


if __name__ == "__main__":
    write()
