"""Upstream's tests with vcproxy and with kube-proxy, side by side: shown, and written into the docs.

The measure is kube-proxy: a test that passes with it and not with vcproxy is wrong, whatever the others do.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from e2e.cluster import upstream
from e2e.cluster.cluster import Cluster
from e2e.cluster.upstream import Result

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kube-proxy-upstream.md"
PEER = "kube-proxy"

REASONS = {
    "should only target nodes with endpoints": "it asks all addresses of a node, IPv6 among them, for the health-check "
    "node port of an IPv4 Service, so it fails on every dual-stack node"
}
"""Why a test does not pass that is known to fail whoever the proxy is, by words of its name."""

Outcomes = Mapping[str, Mapping[str, Result]]
"""By proxy, then by test."""

_INTRODUCTION = """\
# Upstream's own tests

Made by `make upstream`. Kubernetes 1.37.2's end-to-end tests of SIG Network, against a real cluster (kubelet, containerd, CoreDNS; dual stack; {nodes} nodes \
in {zones} zones, all on one machine), once with vcproxy and once with kube-proxy as its Service proxy, with the same configuration.
Left out, whoever the proxy is: {skipped}.

"""


def perform(
    proxies: Sequence[str], directory: Path, *, nodes: int, focus: Sequence[str], tell: Callable[[str], None]
) -> dict[str, dict[str, Result]]:
    """The tests that match one of `focus`, with each proxy on a cluster of its own. directory: for logs."""
    outcomes = {}
    for proxy in proxies:
        place = directory / proxy
        (place / "cluster").mkdir(parents=True)
        tell(f"{proxy}: a cluster of {nodes} nodes starts")
        with Cluster(place / "cluster", proxy=proxy, nodes=nodes) as cluster:
            tell(f"{proxy}: the tests run; log: {place / 'tests' / 'log'}")
            results = upstream.run(cluster, place / "tests", focus=focus)
        outcomes[proxy] = {result.test: result for result in results}
    return outcomes


def wrong(outcomes: Outcomes) -> list[Result]:
    """What fails, but for what fails with kube-proxy as well."""
    peer = outcomes.get(PEER, {})
    return [
        result
        for proxy, results in outcomes.items()
        if proxy != PEER
        for result in results.values()
        if result.status == "failed" and not (result.test in peer and peer[result.test].status == "failed")
    ]


def drawn(outcomes: Outcomes) -> Table:
    """Test by proxy."""
    table = Table("test", *outcomes, header_style="bold", box=None)
    colours = {"passed": "green", "failed": "red", "skipped": "yellow", "-": "dim"}
    for test in _tests(outcomes):
        cells = [_status(results, test) for results in outcomes.values()]
        table.add_row(test.replace("[", r"\["), *(f"[{colours[cell]}]{cell}[/]" for cell in cells))
    return table


def counts(outcomes: Outcomes) -> list[str]:
    """One line for each proxy."""
    lines = []
    for proxy, results in outcomes.items():
        count = Counter(result.status for result in results.values())
        told = ", ".join(f"{count[status]} {status}" for status in ("passed", "failed", "skipped"))
        lines.append(f"{proxy}: {len(results)} tests, {told}")
    return lines


def document(outcomes: Outcomes, *, nodes: int) -> str:
    """docs/kube-proxy-upstream.md."""
    skipped = ", ".join(f"`{expression}`" for expression in upstream.SKIP)
    head = _INTRODUCTION.format(nodes=nodes, zones=min(nodes, 3), skipped=skipped.replace("\\", ""))
    lines = [f"- {line}" for line in counts(outcomes)]
    lines += ["", f"| test | {' | '.join(outcomes)} |", f"|---|{'---|' * len(outcomes)}"]
    for test in _tests(outcomes):
        cells = (_status(results, test) for results in outcomes.values())
        lines.append(f"| {test.removeprefix('[sig-network] ')} | {' | '.join(cells)} |")
    failed = [result for results in outcomes.values() for result in results.values() if result.status != "passed"]
    if failed:
        lines += ["", "What did not pass:", ""]
        seen = {result.test: result for result in failed}
        lines += [f"- {test.removeprefix('[sig-network] ')}: {_why(result)}" for test, result in seen.items()]
    return head + "\n".join(lines) + "\n"


def _why(result: Result) -> str:
    return next((reason for words, reason in REASONS.items() if words in result.test), result.message[:200])


def _tests(outcomes: Outcomes) -> list[str]:
    return sorted({test for results in outcomes.values() for test in results})


def _status(results: Mapping[str, Result], test: str) -> str:
    return results[test].status if test in results else "-"
