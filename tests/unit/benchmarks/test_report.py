"""What the report says of figures: met, missed, or not measured."""

from __future__ import annotations

import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, report, results
from benchmarks.goals import goals
from benchmarks.start import filling

MACHINE = machine.facts()


def proxy(seconds: float, *, cpu: float = 0.002, p50: float = 0.003) -> dict[str, Any]:
    """Figures of one proxy at one size."""
    start = {"seconds": seconds, "cpu": 1.0, "settled_cpu": 1.0, "memory": 90.0, "child_memory": 0.0}
    change = {"p50": p50, "p99": 4 * p50, "count": 100, "cpu": cpu}
    return {
        "machine": MACHINE,
        "lean": False,
        "lists": results.spread([0.1]) | {"octets": 1},
        "start": {key: results.spread([value]) for key, value in start.items()},
        "one": change | {"floor": {"p50": 0.001, "p99": 0.002, "count": 100}},
        "steady": change | {"rate": 100.0},
    }


def said(what: str, start: dict[str, Any]) -> bool | None:
    """Whether a goal is met."""
    return next(goal.met for goal in goals({"sizes": start}, {}) if goal.what == what)


def test_nothing_measured_is_no_goal_met() -> None:
    assert {goal.met for goal in goals({}, {})} == {None}


@pytest.mark.parametrize(("ours", "theirs", "met"), [(1.0, 2.5, True), (1.0, 2.49, False), (1.0, None, None)])
def test_a_start_is_judged_beside_kube_proxys(ours: float, theirs: float | None, met: bool | None) -> None:
    found = {"vcproxy": proxy(ours)} | ({"kube-proxy": proxy(theirs)} if theirs else {})
    assert said("start, 5,000 Services x 10", {"5000x10": found}) is met


@pytest.mark.parametrize(("cpu", "met"), [(0.0029, True), (0.0031, False)])
def test_a_change_is_judged_by_itself(cpu: float, met: bool) -> None:
    assert said("one change at 10,000, processor time", {"10000x10": {"vcproxy": proxy(1, cpu=cpu)}}) is met


def test_the_document_and_its_pictures_are_made_of_what_is_kept(tmp_path: Path) -> None:
    sizes = {"1000x10": {"vcproxy": proxy(0.5), "kube-proxy": proxy(0.75)}, "5000x10": {"vcproxy": proxy(1)}}
    results.save("start", {"sizes": sizes}, tmp_path)
    report.write(tmp_path)
    text = (tmp_path / report.FILE).read_text()
    assert "| start, 1,000 Services x 10 | not slower | 0.50 s: 1.5 times | 0.75 s | 0.10 s | yes |" in text
    assert "| start, 10,000 Services x 10 | 5 times faster |  |  |  | not measured |" in text
    drawn = xml.dom.minidom.parse(str(tmp_path / "start.svg"))
    assert len(drawn.getElementsByTagName("polyline")) == 2


def test_the_sampled_services_are_spread_and_the_last_is_one() -> None:
    assert filling.sampled(100_000)[-1] == 99_999
    assert len(set(filling.sampled(100_000))) == filling.SAMPLE
    assert filling.sampled(3) == [0, 1, 2]


def test_no_two_services_share_an_address_or_an_endpoint() -> None:
    """Whatever turn the endpoint that changes is at."""
    addresses = [filling.vip(number) for number in range(1_000)]
    assert len(set(addresses)) == len(addresses)
    members = [
        {each.address for turn in range(6) for each in filling.targets(number, 10, turn)} for number in range(99)
    ]
    assert len(set().union(*members)) == sum(map(len, members))
