"""kube-proxy's behaviour as one table, with real packets: the real kube-proxy and vcproxy in each of its places.

One item is a scenario under a configuration in a column; what it runs with, a proxy and a lab, is shared by all of them
and built by the first. `make conformance` shows the same as a table.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from e2e.conformance.columns import TENANTS, Observed, Run, perform
from e2e.controlplane import ControlPlane
from tests.conformance.differences import expected
from tests.conformance.model import CONFIGURATIONS, Case
from tests.conformance.table import CASES, PLAN

# The first scenario of a column and configuration tries all of them; longest on a machine that is busy otherwise.
pytestmark = [pytest.mark.controlplane, pytest.mark.packets, pytest.mark.timeout(600)]

Key = tuple[str, ...]


def _grouped() -> dict[tuple[str, str, str, str], list[Case]]:
    found: dict[tuple[str, str, str, str], list[Case]] = {}
    for column in TENANTS:
        for configuration in CONFIGURATIONS:
            for case in CASES:
                if case.in_column(column) and case.configuration == configuration:
                    found.setdefault((column, configuration, case.scenario.family, case.scenario.name), []).append(case)
    return found


GROUPS = _grouped()


@pytest.fixture(scope="module")
def observed(super_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Observed]:
    """What happened to all cases of a column under a configuration."""

    held: dict[Key, Observed | Exception] = {}

    def observe(*key: str) -> Observed:
        column, configuration = key
        if key not in held:
            cases = [case for group, some in GROUPS.items() if group[:2] == key for case in some]
            run = Run(column, CONFIGURATIONS[configuration], PLAN, cases)
            try:
                held[key] = perform(run, tmp_path_factory.mktemp("conformance"), super_plane)
            except Exception as error:  # every scenario fails by it, none builds the lab again
                held[key] = error
        found = held[key]
        if isinstance(found, Exception):
            raise found
        return found

    return observe


@pytest.mark.parametrize("group", GROUPS, ids=" | ".join)
def test_scenario(group: tuple[str, str, str, str], observed: Callable[[str, str], Observed]) -> None:
    column, configuration, *_ = group
    seen = observed(column, configuration)
    cases = GROUPS[group]
    wanted = {case.id: str(expected(case, column)) for case in cases}
    assert {name: str(seen.found[name]) for name in wanted} == wanted
    opposites = {case.id: seen.opposites[case.id] for case in cases if case.id in seen.opposites}
    assert {name: str(found) for name, (found, _) in opposites.items()} == {
        name: str(want) for name, (_, want) in opposites.items()
    }, "the second tenant"
